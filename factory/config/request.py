"""Define the requests of all commands, one row per option; every list of options derives from these rows."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from annotated_types import Ge, Gt, Le, Lt

from factory.config.choices import RUNTIMES, CriterionName, HealStart, ObjectiveName, Tracker
from factory.config.criteria import DEFAULT_CRITERION
from factory.config.objectives import DEFAULT_OBJECTIVE, summaries
from factory.config.options import (
    CUT,
    EVALUATION,
    HEALING,
    MEASURING,
    PUBLISHING,
    RENTING,
    RUNNING,
    Bytes,
    Duration,
    Eight,
    Fraction,
    Fractions,
    Layers,
    Location,
    Names,
    One,
    Option,
    Parameters,
    References,
    Runtimes,
    Text,
    Timeout,
    Two,
    problem_of,
    reads_healing_text,
    unknown_option,
    without_none,
)
from factory.config.references import ModelReference, check_data, share_of
from factory.errors import FactoryError, UsageError

DEFAULT_CONTEXT = 8192
LENGTHS = tuple(f"{section}.sequence_length" for section in ("measure", "plan", "heal", "evaluate"))
# fmt: off
ForRuntimes = Annotated[Runtimes | None, Option(
    f"Choose only cuts whose layers run right there: {', '.join(RUNTIMES)}, or all", CUT, default="any cut",
    sets=("plan.runtimes",), metavar="A,B")]
Criterion = Annotated[CriterionName | None, Option(
    "Criterion for choosing layers", CUT, default=DEFAULT_CRITERION.name, sets=("plan.criterion",))]
Target = Annotated[Parameters | None, Option(
    "Parameters of the result at most, instead of a fraction", CUT, metavar="6B")]
Fits = Annotated[Bytes | None, Option(
    "Memory that weights, cache and overhead must fit in, instead of a fraction", CUT, metavar="8GB")]
Context = Annotated[Eight | None, Option(
    "Tokens whose cache must fit too, with --fits", CUT,
    default=f"{DEFAULT_CONTEXT:,}, or as many as the model was made for")]
# fmt: on
REPOSITORY = re.compile(r"([\w.-]+/|~/)?[\w.-]+")


@dataclass(frozen=True)
class Origin:
    """Location of a request in a build file."""

    file: str
    line: int  # first line
    lines: Mapping[str, int]  # option → line

    @contextmanager
    def located(self, key: str = "model") -> Iterator[None]:
        """Prefix an error with file and line: of the option that it names, or else of `key`."""
        try:
            yield
        except FactoryError as error:
            if error.message.startswith(f"{self.file}, line "):
                raise
            named = next((n for n in re.findall(r"`([a-z_0-9]+)[`=]", error.message) if n in self.lines), key)
            where = f"{self.file}, line {self.lines.get(named, self.line)}"
            raise type(error)(f"{where}: {error.message}", hint=error.hint) from error


@dataclass(frozen=True, kw_only=True)
class Request:
    """Options of every command on a model."""

    reads: ClassVar[tuple[str, ...]] = ()  # options that name a text

    # fmt: off
    model: Annotated[Text, Option("Alias, Hub repository, or folder", CUT, repeats=True)]
    trust_remote_code: Annotated[bool, Option(
        "Run the model's own code; MODEL must be owner/name@COMMIT or a folder", RUNNING,
        repeats=True)] = False
    home: Annotated[Location | None, Option(
        "Folder of finished stages, shared by all builds", RUNNING, default="user cache", metavar="FOLDER",
        of_run=True, repeats=True)] = None
    # fmt: on
    origin: Origin | None = field(default=None, repr=False, compare=False)

    @classmethod
    def options(cls) -> dict[str, tuple[Any, Option]]:
        """Return the rows above in their order: name → type without None, and `Option`."""
        found = {}
        for each in fields(cls):
            if each.name == "origin":
                continue
            kind, *notes = get_args(each.type)
            (option,) = [note for note in notes if isinstance(note, Option)]
            limits = [note for note in notes if note is not option]
            found[each.name] = (Annotated[kind, *limits] if limits else without_none(kind), option)
        return found

    @classmethod
    def read(cls, values: Mapping[str, Any], *, origin: Origin | None = None) -> Self:
        """Build a request from checked names and values; None or a missing name means the default.

        Raises:
            UsageError: A name is unknown, a value is out of range, or values exclude each other.
        """
        from pydantic import TypeAdapter, ValidationError

        known = cls.options()
        if unknown := sorted(values.keys() - known.keys()):
            raise unknown_option(unknown[0], known)
        read: dict[str, Any] = {}
        for name, value in values.items():
            if value is None:
                continue
            with origin.located(name) if origin else nullcontext():
                try:
                    read[name] = TypeAdapter(known[name][0]).validate_python(value, strict=True)
                except ValidationError as error:
                    raise UsageError(
                        f"`{name}`: {problem_of(error.errors()[0])}", hint=f"`{name}`: {known[name][1].help}"
                    ) from None
        request = cls(**read, origin=origin)
        with request.located():
            request.check()
        return request

    @classmethod
    def default(cls, name: str) -> Any:
        """Return the value of an option that is not given; `dataclasses.MISSING` if it must be."""
        return cls.__dataclass_fields__[name].default

    @classmethod
    def requires(cls, name: str) -> bool:
        """Return whether an option must be given."""
        return cls.default(name) is MISSING

    @cached_property
    def reference(self) -> ModelReference:
        """Return the recognised model."""
        return ModelReference.read(self.model)

    @property
    def given(self) -> dict[str, Any]:
        """Return the values that differ from the defaults, by name."""
        return {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if each.name != "origin" and getattr(self, each.name) != each.default
        }

    def file_values(self) -> dict[str, Any]:
        """Return the values that differ from the defaults, as a build file has them, by flag name."""
        return {
            name.replace("_", "-"): _as_yaml(value)
            for name, value in self.given.items()
            if not self.options()[name][1].of_run
        }

    @contextmanager
    def located(self, key: str = "model") -> Iterator[None]:
        """Prefix an error with file and line if the request comes from a file; see `Origin.located`."""
        with self.origin.located(key) if self.origin else nullcontext():
            yield

    def check(self) -> None:
        """Refuse values that the types let through, looking only at local files.

        Raises:
            UnknownModelError: The model is not an alias, a folder or a repository name.
            DataError: A text does not exist or has an unsupported format.
        """
        assert self.reference  # refuses a model that is not recognised
        for name in self.reads:
            is_read = name != "heal_data" or reads_healing_text(self)
            if is_read and (given := getattr(self, name)) is not None:
                with self.located(name):
                    several = "" if isinstance(given, str) else f"give `{name}` once for each text"
                    for reference in (given,) if isinstance(given, str) else given:
                        data = share_of(reference)[0] if name == "heal_data" else reference
                        check_data(data, several=several)


@dataclass(frozen=True, kw_only=True)
class Measuring(Request):
    """Options of commands that measure layers."""

    reads: ClassVar[tuple[str, ...]] = ("calibration_data",)

    # fmt: off
    calibration_data: Annotated[Text | None, Option(
        "Text to measure on", MEASURING, sets=("measure.data",), metavar="DATA", repeats=True)] = None
    samples: Annotated[Two | None, Option(
        "Documents to measure on", MEASURING, default="until the choice is certain",
        sets=("measure.num_samples",))] = None
    sequence_length: Annotated[Eight | None, Option(
        "Tokens per sequence, in all stages", MEASURING, sets=LENGTHS)] = None
    tokens: Annotated[Literal["last", "all"] | None, Option(
        "Tokens to compare: last of samples that end anywhere, or all but the first", MEASURING,
        default="last", sets=("measure.tokens",))] = None
    load_in_4bit: Annotated[bool, Option(
        "Load the model in NF4 for measuring", MEASURING, sets=("measure.four_bit",))] = False
    plan_documents: Annotated[Two | None, Option(
        "Documents for choosing layers by loss", MEASURING, sets=("plan.num_documents",))] = None
    seed: Annotated[Annotated[int, Ge(0), Le(2**32 - 1)] | None, Option(
        "Random seed", RUNNING, default="0", sets=("seed",))] = None
    processes: Annotated[One | None, Option(
        "Processes to measure, heal and evaluate with", RUNNING, default="one per GPU", repeats=True)] = None
    # fmt: on


def check_amount(request: Any, names: Sequence[str]) -> None:
    """Refuse a request unless exactly one of these options says how much to drop.

    Raises:
        UsageError: None or several are given, or a context without a size that it is for.
    """
    given = [name for name in names if getattr(request, name) is not None]
    if len(given) > 1:
        problem = "both choose layers" if "layers" in given else "each says how much to drop"
        raise UsageError(f"`{given[0]}` with `{given[1]}`: {problem}", hint="remove one of them")
    if not given:
        layers = ", `layers=3,7` those two" if "layers" in names else ""
        raise UsageError(
            "`drop` is missing",
            hint=f"`drop=0.3` drops three of ten layers{layers}; or give a size: `target=6B`, `fits=8GB`",
        )
    if request.context is not None and request.fits is None:
        raise UsageError("`context` without `fits`", hint="add `fits`, or remove `context`")


@dataclass(frozen=True, kw_only=True)
class PlanRequest(Measuring):
    """Options of `plan`."""

    # fmt: off
    drop: Annotated[Fraction | None, Option(
        "Fraction of the decoder layers to drop", CUT, sets=("drop",))] = None
    target: Target = None
    fits: Fits = None
    context: Context = None
    criterion: Annotated[CriterionName | Literal["all"], Option(
        "Criterion for choosing layers; all: compare every one, with the loss of each cut", CUT,
        default=DEFAULT_CRITERION.name)] = DEFAULT_CRITERION.name
    for_runtimes: ForRuntimes = None
    profile: Annotated[Location | None, Option(
        "Earlier measurement: a profile.json, or a CSV from PruneMe", MEASURING, metavar="FILE")] = None
    save: Annotated[Location | None, Option(
        "Folder for the plans and the figure", RUNNING, metavar="FOLDER")] = None
    # fmt: on

    def check(self) -> None:
        """Check as the base class does, and that exactly one option says how much to drop."""
        super().check()
        check_amount(self, ("drop", "target", "fits"))


@dataclass(frozen=True, kw_only=True)
class Evaluating(Measuring):
    """Options of commands that heal the cut and compare source and results."""

    reads: ClassVar[tuple[str, ...]] = ("calibration_data", "heal_data", "eval_data")

    # fmt: off
    heal: Annotated[ObjectiveName | None, Option(
        f"Training objective. {summaries()}", HEALING, default=DEFAULT_OBJECTIVE.name,
        bare=DEFAULT_OBJECTIVE.name, sets=("heal.objective",))] = None
    heal_data: Annotated[References | None, Option(
        "Text to heal on (repeatable); several are mixed, DATA*2 with twice the share", HEALING,
        sets=("heal.data",), metavar="DATA", repeats=True)] = None
    heal_steps: Annotated[One | None, Option(
        "Optimiser steps", HEALING, default="by the size of the model", sets=("heal.num_steps",))] = None
    eval_data: Annotated[References | None, Option(
        "Text to compute the loss on (repeatable): one like the healing text, one unlike it", EVALUATION,
        sets=("evaluate.data",), metavar="DATA", repeats=True)] = None
    eval_documents: Annotated[Two | None, Option(
        "Documents to compute the loss on", EVALUATION, sets=("evaluate.num_documents",))] = None
    eval_backend: Annotated[Literal["hf", "vllm"] | None, Option(
        "Library that runs the tasks; vllm must be installed", EVALUATION, default="hf",
        sets=("evaluate.backend",))] = None
    tasks: Annotated[Names | None, Option(
        "lm-eval tasks, your own YAML task files, or none", EVALUATION, sets=("evaluate.tasks",),
        metavar="A,B", repeats=True)] = None
    apply_chat_template: Annotated[bool, Option(
        "Ask the tasks' questions in the model's chat template, examples as earlier turns", EVALUATION,
        sets=("evaluate.apply_chat_template",))] = False
    run_task_code: Annotated[bool, Option(
        "Run the Python code that task files refer to", EVALUATION, repeats=True)] = False
    limit: Annotated[One | None, Option(
        "Samples per task, for a quick look", EVALUATION, sets=("evaluate.limit",))] = None
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class SweepRequest(Evaluating):
    """Options of `sweep`; cuts are healed if `heal` is given."""

    # fmt: off
    heal: Annotated[ObjectiveName | None, Option(
        f"Heal each cut, by {DEFAULT_OBJECTIVE.name} if none is named. {summaries()}", HEALING,
        default="no healing", bare=DEFAULT_OBJECTIVE.name, sets=("heal.objective",))] = None
    drop: Annotated[Fractions, Option(
        "Fractions of the decoder layers to drop, one cut each", CUT, default="0.1,0.2,0.3,0.4,0.5,0.6",
        metavar="A,B")] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    criterion: Criterion = None
    for_runtimes: ForRuntimes = None
    limit: Annotated[One, Option(
        "Samples per task", EVALUATION, default="100", sets=("evaluate.limit",))] = 100
    out: Annotated[Location | None, Option(
        "Folder for the results", RUNNING, default="sweeps/NAME", metavar="FOLDER")] = None
    # fmt: on

    @property
    def no_heal(self) -> bool:
        """Return whether the cuts stay unhealed, the default of a sweep."""
        return self.heal is None

    def check(self) -> None:
        """Check as the base class does, and that healing options come with `heal`."""
        for name in ("heal_data", "heal_steps"):
            if getattr(self, name) is not None and self.heal is None:
                raise UsageError(
                    f"`{name}` without `heal`: no cut is healed", hint=f"add `heal`, or remove `{name}`"
                )
        super().check()


@dataclass(frozen=True, kw_only=True)
class BuildRequest(Evaluating):
    """Options of `build`."""

    # fmt: off
    drop: Annotated[Fraction | None, Option(
        "Fraction of the decoder layers to drop", CUT, sets=("drop",))] = None
    layers: Annotated[Layers | None, Option(
        "Layers to drop, counted from 0, instead of a fraction", CUT, sets=("plan.layers",),
        metavar="3,7,21-24")] = None
    target: Target = None
    fits: Fits = None
    context: Context = None
    criterion: Criterion = None
    for_runtimes: ForRuntimes = None
    reproduce: Annotated[bool, Option(
        "Repeat the build MODEL and compare the weights", CUT, of_run=True, repeats=True)] = False
    no_heal: Annotated[bool, Option("Skip healing; with a fitted seam, only training", HEALING)] = False
    heal_start: Annotated[HealStart | None, Option(
        "Start of the adapter; seam-fit: fit the layer before each cut to what the dropped layers did",
        HEALING, default="none", sets=("heal.start",))] = None
    heal_lr: Annotated[Annotated[float, Gt(0), Lt(math.inf)] | None, Option(
        "Peak learning rate", HEALING, default="by the size of the model",
        sets=("heal.learning_rate",))] = None
    heal_rank: Annotated[One | None, Option(
        "LoRA rank; alpha is the same", HEALING, sets=("heal.rank",))] = None
    heal_modules: Annotated[Literal["ffn", "all-linear"] | None, Option(
        "Modules that get an adapter", HEALING, sets=("heal.modules",))] = None
    heal_layers: Annotated[Literal["all", "seam"] | None, Option(
        "Layers that get an adapter; seam: only those from just before the cut onwards", HEALING,
        sets=("heal.layers",))] = None
    heal_bits: Annotated[Literal[4, 16] | None, Option(
        "Bits per weight under the adapter; 4 is NF4", HEALING, sets=("heal.bits",))] = None
    next_token_weight: Annotated[Annotated[float, Ge(0), Lt(1)] | None, Option(
        "Share of the next-token loss when distilling; the rest is the divergence from the source", HEALING,
        default="0.3; 0 for the demo", sets=("heal.next_token_weight",))] = None
    seam_weight: Annotated[Annotated[float, Ge(0), Lt(math.inf)] | None, Option(
        "Weight of the hidden-state loss at the cut, when distilling", HEALING,
        sets=("heal.seam_weight",))] = None
    merge_base: Annotated[Literal["auto", "bf16", "nf4"] | None, Option(
        "Weights to merge the adapter into: the source's (bf16), NF4's, or the better of both (auto)",
        HEALING, default="auto", sets=("merge_base",))] = None
    require_healing: Annotated[bool, Option(
        "Fail if healing does not lower the held-out loss, or does more harm elsewhere", HEALING)] = False
    push_to: Annotated[Text | None, Option(
        "Hub repository owner/name to publish to when done", PUBLISHING, metavar="REPO", repeats=True)] = None
    public: Annotated[bool, Option("Publish to a public repository", PUBLISHING, repeats=True)] = False
    accept_license: Annotated[bool, Option(
        "Publish even if the source's licence forbids sharing derived models", PUBLISHING,
        repeats=True)] = False
    on: Annotated[Text | None, Option(
        "Hugging Face Jobs hardware to build on, such as a100-large", RENTING, metavar="HARDWARE",
        on_terminal=True)] = None
    timeout: Annotated[Timeout | None, Option(
        "Maximum run time of the job", RENTING, default="twice the estimate", metavar="6h",
        on_terminal=True)] = None
    detach: Annotated[bool, Option(
        "Submit the job without following it", RENTING, of_run=True, on_terminal=True)] = False
    upload: Annotated[bool, Option(
        "Upload local models and texts to your private bucket first", RENTING, of_run=True,
        on_terminal=True)] = False
    state: Annotated[Text | None, Option(
        "Private Hub bucket to keep finished stages in as well", RENTING, metavar="BUCKET",
        repeats=True)] = None
    out: Annotated[Location | None, Option(
        "Folder for the build", RUNNING, default="builds/NAME", metavar="FOLDER", repeats=True)] = None
    budget: Annotated[Duration | None, Option(
        "Time for the build: fewer steps, documents, samples and questions, by the estimate", RUNNING,
        default="as many as are usual", sets=("budget",), metavar="30min")] = None
    report_to: Annotated[Tracker | None, Option(
        "Experiment tracker for healing", RUNNING, default="trackio, if installed")] = None
    rerun: Annotated[Names, Option(
        "Stage to redo even if it is finished (repeatable)", RUNNING, of_run=True, repeats=True)] = ()
    # fmt: on

    def check(self) -> None:
        """Check as the base class does, and which options exclude or need each other."""
        super().check()
        self._check_cut()
        for one, other in (("no_heal", "require_healing"), ("on", "state"), ("on", "home"), ("on", "budget")):
            if getattr(self, one) and getattr(self, other):
                raise UsageError(f"`{other}` cannot be combined with `{one}`", hint="remove one of them")
        for name, needed in (("public", "push_to"), ("timeout", "on"), ("detach", "on"), ("upload", "on")):
            if getattr(self, name) and getattr(self, needed) is None:
                raise UsageError(f"`{name}` without `{needed}`", hint=f"add `{needed}`, or remove `{name}`")
        if self.push_to is not None and not REPOSITORY.fullmatch(self.push_to):
            raise UsageError(
                f"`push_to` {self.push_to!r} is not a repository name", hint="give `push_to=owner/name`"
            )
        for name, value in self.given.items():
            if isinstance(value, str) and not value.strip():
                raise UsageError(f"`{name}` is empty", hint=f"give `{name}` a value, or remove it")

    def _check_cut(self) -> None:
        """Check that exactly one option says which layers to drop."""
        if self.reproduce:
            for name in self.given:
                if not self.options()[name][1].repeats:
                    raise UsageError(
                        f"`{name}` with `reproduce`, which repeats a build unchanged",
                        hint="remove one of them",
                    )
            return
        check_amount(self, ("layers", "drop", "target", "fits"))
        if self.layers and self.criterion:
            raise UsageError("`layers` with `criterion`: both choose layers", hint="remove one of them")


@dataclass(frozen=True, kw_only=True)
class PruneRequest(Request):
    """Options of `prune`."""

    # fmt: off
    layers: Annotated[Layers, Option("Layers to drop, counted from 0", CUT, metavar="3,7,21-24")]
    out: Annotated[Location, Option("Folder for the smaller model", RUNNING, metavar="FOLDER")]
    verify: Annotated[Literal["auto", "full"], Option(
        "Compare logits with the source; auto: for small models only", RUNNING, default="auto")] = "auto"
    force: Annotated[bool, Option("Replace the folder if `factory prune` wrote it", RUNNING)] = False
    # fmt: on


def _as_yaml(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value) or "none"
    return str(value) if isinstance(value, Path) else value


def file_text(builds: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of a build file for builds of these values; see `Request.file_values`."""
    import yaml

    value = builds[0] if len(builds) == 1 else {"builds": [*builds]}
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
