"""A build as a YAML file: the flags of `factory build` by name, and the line of what is wrong with them."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError

from factory.config.choices import MOST, CriterionName, ObjectiveName, Tracker
from factory.config.request import Entry
from factory.config.settings import Settings
from factory.errors import UsageError

SUFFIXES = (".yaml", ".yml")
UNSET: Any = None  # where a file does not say; `null` itself is nothing that a flag can be given
LARGEST_BYTES = 1_000_000
LONGEST = 4096  # characters of one value: a path's limit, and within what Python takes for a number
REPLACES = {"layers": ("drop", "criterion"), "drop": ("layers",), "criterion": ("layers",)}
Path_ = tuple[str | int, ...]


def _joined(value: Any) -> Any:
    """A list as its flag writes it: [3, "7-9"] → "3,7-9"."""
    parts = value if isinstance(value, list) else [value]
    return ",".join(map(str, parts)) if all(type(part) in (str, int) for part in parts) else value


Listed = Annotated[str, BeforeValidator(_joined, json_schema_input_type=str | int | list[str | int])]
Name = Annotated[str, Field(min_length=1)]


class BuildOptions(Settings):
    """What `factory build` can be given, by the names of its flags; nothing is taken for something else."""

    model_config = ConfigDict(strict=True, alias_generator=lambda name: name.replace("_", "-"))

    model: Name = Field(default=UNSET, description="An alias, a Hub repository, or a folder.")
    drop: float = Field(default=UNSET, gt=0, lt=1)
    layers: Listed = Field(default=UNSET)
    calibration_data: Name = Field(default=UNSET)
    samples: int = Field(default=UNSET, ge=2, le=MOST)
    sequence_length: int = Field(default=UNSET, ge=8, le=MOST)
    tokens: Literal["last", "all"] = Field(default=UNSET)
    load_in_4bit: bool = Field(default=UNSET)
    plan_documents: int = Field(default=UNSET, ge=2, le=MOST)
    seed: int = Field(default=UNSET, ge=0, le=2**32 - 1)
    criterion: CriterionName = Field(default=UNSET)
    heal_data: Name = Field(default=UNSET)
    eval_data: Name = Field(default=UNSET)
    tasks: Listed = Field(default=UNSET)
    limit: int = Field(default=UNSET, ge=1, le=MOST)
    no_heal: bool = Field(default=UNSET)
    heal: ObjectiveName = Field(default=UNSET)
    heal_steps: int = Field(default=UNSET, ge=1, le=MOST)
    heal_lr: float = Field(default=UNSET, gt=0, allow_inf_nan=False)
    heal_rank: int = Field(default=UNSET, ge=1, le=MOST)
    heal_modules: Literal["ffn", "all-linear"] = Field(default=UNSET)
    heal_layers: Literal["all", "seam"] = Field(default=UNSET)
    heal_bits: Literal[4, 16] = Field(default=UNSET)
    seam_weight: float = Field(default=UNSET, ge=0, allow_inf_nan=False)
    merge_base: Literal["auto", "bf16", "nf4"] = Field(default=UNSET)
    require_healing: bool = Field(default=UNSET)
    eval_documents: int = Field(default=UNSET, ge=2, le=MOST)
    eval_backend: Literal["hf", "vllm"] = Field(default=UNSET)
    out: Name = Field(default=UNSET)
    processes: int = Field(default=UNSET, ge=1, le=MOST)
    trust_remote_code: bool = Field(default=UNSET)
    run_task_code: bool = Field(default=UNSET)
    push_to: Name = Field(default=UNSET)
    report_to: Tracker = Field(default=UNSET)
    on: Name = Field(default=UNSET)
    timeout: Listed = Field(default=UNSET)
    state: Name = Field(default=UNSET)
    public: bool = Field(default=UNSET)
    accept_license: bool = Field(default=UNSET)


class BuildFile(BuildOptions):
    """One build, or several after one another: what stands beside `builds` holds for each of them."""

    builds: list[BuildOptions] = Field(default=UNSET, min_length=1)


def replacing(values: Mapping[str, Any], by: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without what `by` says otherwise: also by the flag that excludes it."""
    gone = {*by, *(other for key in by for other in REPLACES.get(key, ()))}
    return {key: value for key, value in values.items() if key not in gone}


def read(path: Path) -> list[Entry]:
    """The builds of a file, each complete and within its limits.

    Raises:
        UsageError: The file, the line and the key of the first thing that is wrong.
    """
    name = str(path)
    value, lines = _parsed(path)
    try:
        found = BuildFile.model_validate(value)
    except ValidationError as error:
        raise _explained(error, name, lines) from None
    common = _written(found)
    entries = []
    for index, build in enumerate(found.builds or [BuildOptions()]):
        own, place = _written(build), ("builds", index)
        values = replacing(common, own) | own
        of_own = {key: lines[*place, key] for key in own}
        entries.append(
            Entry(
                name,
                values,
                {key: of_own.get(key) or lines[key,] for key in values},
                lines.get(place, lines[()]),
            )
        )
        if "model" not in values:
            raise UsageError(
                f"{name}, line {entries[-1].line}: model is missing",
                hint="model: mistral-7b, an owner/name, or a folder",
            )
    return entries


def schema(descriptions: Mapping[str, str]) -> dict[str, Any]:
    """JSON schema of a file, for editors.

    Args:
        descriptions: By the name of the flag.
    """
    made = BuildFile.model_json_schema(mode="validation")
    made["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    for part in (made, made["$defs"]["BuildOptions"]):
        for key, field in part["properties"].items():
            del field["title"], field["default"]
            if key in descriptions:
                field["description"] = descriptions[key]
    return made


def _written(options: BuildOptions) -> dict[str, Any]:
    return options.model_dump(by_alias=True, exclude_unset=True, exclude={"builds"})


def _parsed(path: Path) -> tuple[Any, dict[Path_, int]]:
    """The value of a YAML file, and the line of each key and each entry of a list in it."""
    name = str(path)
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise UsageError(f"{name} is larger than 1 MB", hint="a build file holds flags, no data")
        content = path.read_bytes()
        node = yaml.compose(content.decode("utf-8"), Loader=_Loader)
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror}", hint="give an existing file") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{name}, line {line}: no UTF-8", hint="save it as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UsageError(f"{name}, line {line}: {error.problem or error.context}", hint=YAML_HINT) from error
    except yaml.reader.ReaderError as error:
        line = content.decode("utf-8").count("\n", 0, error.position) + 1
        raise UsageError(f"{name}, line {line}: a character that is no text", hint=YAML_HINT) from error
    except RecursionError as error:
        raise UsageError(f"{name}, line 1: nested too deeply", hint=YAML_HINT) from error
    lines: dict[Path_, int] = {(): 1}
    return _value(node, (), lines, name) if node else {}, lines


YAML_HINT = "one `key: value` a line, as in: drop: 0.3"


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2: `on` is a word and 3e-4 a number. Without aliases and tags."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  as its base declares it

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or (getattr(event, "tag", None) not in (None, "!")):
            raise yaml.MarkedYAMLError(problem="aliases and tags are not read", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


for _tag, _pattern in (
    ("bool", r"true|True|TRUE|false|False|FALSE"),
    ("int", r"[-+]?[0-9]+"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
    ("null", r"~|null|Null|NULL|"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), None)


def _value(node: yaml.Node, place: Path_, lines: dict[Path_, int], name: str) -> Any:
    """The value of a node; `lines` learns where its parts stand."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[*place, index] = item.start_mark.line + 1
        return [_value(item, (*place, index), lines, name) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        found = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise UsageError(f"{name}, line {line}: a key that is no word", hint=YAML_HINT)
            key = _text(key_node, name)
            if key in found:
                before = lines[*place, key]
                raise UsageError(
                    f"{name}, line {line}: {key} stands there twice, first in line {before}",
                    hint="leave one of them out",
                )
            lines[*place, key] = line
            found[key] = _value(value_node, (*place, key), lines, name)
        return found
    return _scalar(node, name)


def _text(node: yaml.Node, name: str) -> str:
    """What a scalar holds; quotation marks let it hold what no path, name or number can."""
    text: str = node.value
    line = node.start_mark.line + 1
    if not text.isprintable():
        raise UsageError(f"{name}, line {line}: {ascii(text)[:60]} is no plain text", hint=YAML_HINT)
    if len(text) > LONGEST:
        told = f"{name}, line {line}: {text[:40]}… has {len(text):,} characters"
        raise UsageError(told, hint="no flag takes more than a path")
    return text


def _scalar(node: yaml.Node, name: str) -> str | float | bool | None:
    text = _text(node, name)
    match node.tag.rsplit(":", 1)[-1]:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text)
        case "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _explained(error: ValidationError, name: str, lines: Mapping[Path_, int]) -> UsageError:
    """The first problem by its line, said with its key and its value."""
    placed = [(_place(problem["loc"], lines), problem) for problem in error.errors()]
    place, problem = min(placed, key=lambda pair: lines[pair[0]])
    where = f"{name}, line {lines[place]}"
    key = next((str(part) for part in reversed(place) if isinstance(part, str)), "the file")
    if problem["type"] == "extra_forbidden":
        known = [str(field.alias) for field in BuildOptions.model_fields.values()]
        near = difflib.get_close_matches(key.replace("_", "-").lower(), [*known, "builds"], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return UsageError(f"{where}: unknown key {key!r}", hint=f"{hint}known: {', '.join(known)}, builds")
    shown = repr(problem["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "…"
    if problem["type"] == "model_type":
        return UsageError(f"{where}: {key} is {shown}, no list of flags", hint=YAML_HINT)
    wanted = problem["msg"].removeprefix("Input ").removeprefix("List ").removeprefix("String ")
    return UsageError(f"{where}: {key}: {shown} {wanted}", hint="`factory build --help` explains each flag")


def _place(loc: Path_, lines: Mapping[Path_, int]) -> Path_:
    """The longest beginning of an error's place that stands in the file."""
    return next(loc[:n] for n in range(len(loc), -1, -1) if loc[:n] in lines)
