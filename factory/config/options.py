"""Define options: how they are read, limited and shown, and which settings they decide."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args

from annotated_types import Ge, Gt, Le, Lt, MinLen

from factory.config.choices import MAX_COUNT, RUNTIMES
from factory.config.references import nearest
from factory.errors import UsageError

CUT, MEASURING, HEALING, EVALUATION, PUBLISHING, RENTING, RUNNING = GROUPS = (
    *("What to cut", "Measuring", "Healing", "Evaluation", "Publishing", "Rented hardware"),
    "This run",
)
PARAMETERS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
BYTES = {"": 1, "b": 1} | {
    f"{letter}{unit}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for unit, base in (("", 1000), ("b", 1000), ("ib", 1024))
}
SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}
MAX_AMOUNT = 10**18
LAYERS_HINT = "`layers=3,7,21-24` drops six layers, counted from 0"


@dataclass(frozen=True)
class Option:
    """Presentation of one option, and the settings that it decides."""

    help: str  # begins with a noun or a verb
    group: str
    default: str = ""  # description of the default, if that is not a fixed value
    sets: tuple[str, ...] = ()  # settings of `BuildConfig` that it decides, as "heal.num_steps"
    metavar: str | None = None
    bare: str | None = None  # value of the option if it is given without one
    of_run: bool = False  # says how to run, not what to build: not written to build files
    on_terminal: bool = False  # has no meaning in Python
    repeats: bool = False  # can be combined with `reproduce`


@dataclass(frozen=True)
class Reads:
    """A conversion of typed text, or a value in a build file, to the value of an option."""

    read: Callable[[Any], Any]
    written: Any  # types that a build file may hold

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(self.read, handler(source))


def read_layers(value: Any) -> Any:
    """Read layer numbers and inclusive ranges, "3,7,21-24" or [3, 7, "21-24"], sorted."""
    parts = str(value).split(",") if isinstance(value, str | int) else value
    if not isinstance(parts, list | tuple) or not all(type(part) in (str, int) for part in parts):
        return value  # pydantic refuses the type
    found: list[int] = []
    for part in parts:
        match = re.fullmatch(r"\s*([0-9]{1,5})(?:\s*[-–]\s*([0-9]{1,5}))?\s*", str(part))
        if match is None:
            raise UsageError(f"`layers`: {str(part)[:60]!r} is not a layer number", hint=LAYERS_HINT)
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UsageError(f"`layers`: {str(part).strip()} is a descending range", hint=LAYERS_HINT)
        if twice := sorted({*found} & {*range(first, last + 1)}):
            raise UsageError(f"`layers` names layer {twice[0]} twice", hint=LAYERS_HINT)
        found += range(first, last + 1)
    return tuple(sorted(found))


def read_names(value: Any) -> Any:
    """Read comma-separated names, or a list of names; "none" means an empty list."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(type(part) in (str, int) for part in parts):
        return value  # pydantic refuses the type
    names = [str(part).strip() for part in parts]
    if not all(names):
        raise UsageError(
            f"`tasks` {value!r} has an empty name", hint="give `tasks=mmlu,boolq`, or `tasks=none`"
        )
    return () if names == ["none"] else tuple(names)


def read_runtimes(value: Any) -> Any:
    """Read comma-separated names of runtimes, or a list of them; "all" stands for itself."""
    names = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return value  # pydantic refuses the type
    for name in names:
        if name not in ("all", *RUNTIMES):
            raise UsageError(
                f"`for_runtimes`: {name[:60]!r} is not a runtime that is known",
                hint=f"known are {', '.join(RUNTIMES)}, and all; Ollama and LM Studio are llama.cpp",
            )
    return tuple(dict.fromkeys(names))


def read_references(value: Any) -> Any:
    """Read one reference to a text, or a list of them."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def read_fraction(value: Any) -> Any:
    """Read a fraction strictly between 0 and 1, the value of `drop`."""
    if type(value) not in (str, int, float):
        return value  # pydantic refuses the type
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < 1:
        raise UsageError(
            f"`drop={value}` is not a fraction between 0 and 1", hint="`drop=0.3` drops three of ten layers"
        )
    return number


def read_fractions(value: Any) -> Any:
    """Read comma-separated fractions, "0.1,0.2", or a list of them: sorted, without duplicates."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        return value  # pydantic refuses the type
    return tuple(sorted({read_fraction(part.strip() if isinstance(part, str) else part) for part in parts}))


def read_parameters(value: Any) -> Any:
    """Read a number of parameters, the value of `target`: "6B", "350M", 6000000000."""
    return _amount(value, "target", PARAMETERS, hint="`target=6B` leaves at most six billion parameters")


def read_bytes(value: Any) -> Any:
    """Read a size in bytes, the value of `fits`: "8GB", "7.5 GiB"."""
    return _amount(
        value, "fits", BYTES, hint="`fits=8GB` is for a device with 8 GB of memory, 8GiB for 8 GiB"
    )


def read_duration(value: Any) -> Any:
    """Read a duration, the value of `budget`, in seconds: "30min", "2h", "90 s", or a number of seconds."""
    if type(value) is not str:
        return value  # pydantic refuses the type
    match = re.fullmatch(r"\s*([0-9]{1,6}(?:\.[0-9]{1,6})?)\s*(s|m|min|h|d)\s*", value)
    seconds = int(float(match[1]) * SECONDS[match[2]]) if match else 0
    if seconds < 1:
        raise UsageError(f"`budget={value[:60]}` is not a duration", hint="`budget=30min`, 2h or 1d")
    return seconds


def _amount(value: Any, option: str, units: Mapping[str, int], *, hint: str) -> Any:
    if type(value) not in (str, int, float):
        return value  # pydantic refuses the type
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([a-z]{0,3})\s*", str(value), re.IGNORECASE)
    number = int(Decimal(match[1]) * units.get(match[2].lower(), 0)) if match else 0
    if not 0 < number < MAX_AMOUNT:
        raise UsageError(f"`{option}={str(value)[:60]}` is not a size", hint=hint)
    return number


def read_path(value: Any) -> Any:
    """Read a path; an empty one, which would mean the current folder, stays an invalid value."""
    return Path(value) if isinstance(value, str) and value.strip() else value


LISTED = str | int | list[str | int]
Text = Annotated[str, MinLen(1)]
Location = Annotated[Path, Reads(read_path, Text)]
Layers = Annotated[tuple[int, ...], Reads(read_layers, LISTED)]
Names = Annotated[tuple[str, ...], Reads(read_names, LISTED)]
Runtimes = Annotated[tuple[str, ...], MinLen(1), Reads(read_runtimes, str | list[str])]
References = Annotated[tuple[Text, ...], MinLen(1), Reads(read_references, str | list[str])]
Timeout = Annotated[str, Reads(lambda value: str(value) if type(value) is int else value, str | int)]
Between = Annotated[float, Gt(0), Lt(1)]
Fraction = Annotated[Between, Reads(read_fraction, Between)]
Parameters = Annotated[Annotated[int, Ge(1)], Reads(read_parameters, str | int)]
Bytes = Annotated[Annotated[int, Ge(1)], Reads(read_bytes, str | int)]
Duration = Annotated[Annotated[int, Ge(1)], Reads(read_duration, str | int)]
Fractions = Annotated[tuple[Fraction, ...], MinLen(1), Reads(read_fractions, str | list[float])]
One = Annotated[int, Ge(1), Le(MAX_COUNT)]
Two = Annotated[int, Ge(2), Le(MAX_COUNT)]
Eight = Annotated[int, Ge(8), Le(MAX_COUNT)]


def without_none(kind: Any) -> Any:
    """Return the type of an optional value without None."""
    members = [member for member in get_args(kind) if member is not NoneType]
    return members[0] if len(members) == 1 and NoneType in get_args(kind) else kind


def problem_of(problem: Mapping[str, Any]) -> str:
    """Return a problem that pydantic found: the value, and what it should be."""
    shown = shortened(problem["input"])
    if problem.get("ctx", {}).get("lt") == math.inf:
        return f"{shown} should be finite"
    wanted = re.sub(r"^(Input|List|Tuple|String) | after validation, not 0$", "", problem["msg"])
    return f"{shown} {wanted}"


def shortened(value: Any) -> str:
    """Return a value as a message quotes it, of at most 60 characters."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "…"


def unknown_option(name: str, known: Mapping[str, Any]) -> UsageError:
    """Return the error for an unknown option; the hint suggests the nearest name."""
    near = nearest(name.replace("-", "_"), known)
    hint = f"did you mean `{near}`?" if near else f"known: {', '.join(known)}"
    return UsageError(f"unknown option {name!r}", hint=hint)


def reads_healing_text(request: Any) -> bool:
    """Return whether a request with a text to heal on reads it: to train, or to fit a seam."""
    return not getattr(request, "no_heal", False) or getattr(request, "heal_start", None) == "seam-fit"
