"""Define the frozen values that stages pass on, each written to and read from one folder."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from factory import __version__
from factory.config.choices import ObjectiveName
from factory.errors import StoreError

AGAIN = "delete that folder and run the same command again"
BUILD_AGAIN = "run the same `factory build` again, which writes it again from the finished stages"
SINK_RATIO = 10  # of the norms of the first token and the others: 2.5 without a sink, 26 to 170 with one
MAX_BYTES = 2**26  # of one file: a profile of 126 layers takes 1 MB, one of 1,000 takes 64


def canonical_json(value: object) -> str:
    """Write JSON with sorted keys and no spaces: equal values give equal bytes on every machine."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def first_problem(error: ValidationError) -> str:
    """Return the first validation error with its location: "heal.rank: Input should be …"."""
    problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"]))
    if problem["type"] == "value_error":  # of a check of ours
        return f"{where}: {problem['ctx']['error']}" if where else str(problem["ctx"]["error"])
    return f"{where or 'it'}: {problem['msg']}"


def check_size(size_bytes: int) -> None:
    """Refuse a JSON file larger than any written here, which would fill the memory.

    Raises:
        ValueError: The file is too large.
    """
    if size_bytes > MAX_BYTES:
        raise ValueError(f"it has {size_bytes:,} bytes, more than {MAX_BYTES:,}")


# Pydantic uses the setting of each nested model, not of the outermost one, to write NaN and infinity.
FROZEN = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Artifact(BaseModel):
    """A frozen value that is stored as one JSON file in a folder."""

    model_config = FROZEN
    file_name: ClassVar[str]

    def text(self) -> str:
        """Return the JSON that `write` writes, without paths and other machine facts."""
        return self.model_dump_json(indent=2) + "\n"

    def write(self, folder: Path) -> None:
        """Write the JSON file into `folder`."""
        (folder / self.file_name).write_text(self.text(), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, *, again: str = AGAIN) -> Self:
        """Read the value that `write` wrote into `folder`.

        Args:
            again: Hint for a damaged file of this version.

        Raises:
            StoreError: The file is missing or malformed.
        """
        path = folder / cls.file_name
        try:
            check_size(path.stat().st_size)
            value: Any = json.loads(path.read_text(encoding="utf-8"))
            if "folder" in cls.model_fields and isinstance(value, dict):
                value["folder"] = folder
            return cls.model_validate(value)
        except ValidationError as error:
            by = value.get("factory_version") if isinstance(value, dict) else None
            hint = f"use factory {by}, which wrote it" if by not in (None, __version__) else again
            raise StoreError(f"cannot read {path}: {first_problem(error)}", hint=hint) from error
        except (OSError, ValueError, RecursionError) as error:
            raise StoreError(f"cannot read {path}: {str(error).splitlines()[0]}", hint=again) from error

    @classmethod
    def find(cls, folder: Path) -> Self | None:
        """Read the value that `write` wrote into `folder`; None if there is none."""
        return cls.read(folder) if (folder / cls.file_name).is_file() else None


class Origin(BaseModel):
    """A model on the Hub, or a folder, at the version that was used."""

    model_config = FROZEN

    name: str
    repo_id: str | None = None  # None for a folder
    commit: str = Field(pattern=r"^[0-9a-f]{40}$")  # a folder: its content hash

    @property
    def title(self) -> str:
        """Return the repository, or a folder's name."""
        return self.repo_id or self.name


class Lineage(BaseModel):
    """What a source was merged from before anything else."""

    model_config = FROZEN

    adapter: Origin
    base: Origin


class Source(Artifact):
    """A resolved model, described before any weight is read.

    `layer_parameters[i]` counts the parameters of decoder layer i; `num_parameters` counts each stored
    tensor once, so tied embeddings count once.
    """

    file_name = "source.json"

    name: str  # short: "Mistral-7B-v0.1"
    repo_id: str | None = None  # None for a folder, and for an adapter that is merged into its base
    commit: str = Field(pattern=r"^[0-9a-f]{40}$")  # a folder: its content hash; an adapter: with its base's
    lineage: Lineage | None = None  # of an adapter
    unmerged: "Unmerged | None" = Field(default=None, exclude=True, repr=False)  # what `lineage` names
    folder: Path | None = Field(default=None, exclude=True)  # None until the weights are here
    model_type: str
    architecture: str  # "MistralForCausalLM"
    config: dict[str, Any]  # the unchanged config.json
    # Name → type, by safetensors' name, and shape.
    tensors: dict[str, tuple[str, tuple[int, ...]]] = Field(default_factory=dict, exclude=True, repr=False)
    num_layers: int = Field(ge=1)
    num_parameters: int = Field(ge=1)
    layer_parameters: tuple[int, ...]
    size_bytes: int = Field(ge=1)  # of the weight files
    cached_bytes: int = Field(default=0, exclude=True)  # of these in the Hub's cache, while `folder` is None
    layer_bytes: tuple[int, ...]
    vocab_size: int = Field(ge=1)
    dtype: str  # type of most of the stored weights: "bfloat16"
    license: str | tuple[str, ...] | None = None  # as on the source's card, which may name several
    license_name: str | None = None
    license_link: str | None = None
    base_models: tuple[str, ...] = ()  # Hub repositories that it derives from, according to its card
    languages: tuple[str, ...] = ()
    has_chat_template: bool = False
    remote_code: bool = False  # transformers lacks this model type: the source's code, at `commit`, is run

    @property
    def is_on_hub(self) -> bool:
        """Return whether the model, or the adapter that it is merged from, is a repository on the Hub."""
        return bool(self.repo_id or (self.lineage and self.lineage.adapter.repo_id))

    @property
    def licenses(self) -> tuple[str, ...]:
        """Return each licence that the card names; all of them apply."""
        return (self.license,) if isinstance(self.license, str) else self.license or ()

    @property
    def download_bytes(self) -> int:
        """Return the size of the weight files that a pull has to download."""
        return self.size_bytes - self.cached_bytes if self.folder is None else 0

    @property
    def local_folder(self) -> Path:
        """Return the folder of the weights, which exists only after a pull."""
        if self.folder is None:
            raise StoreError(f"{self.name} has not been pulled", hint="this is a bug; please report it")
        return self.folder


class Unmerged(BaseModel):
    """An adapter and its base, from which a source is to be merged."""

    model_config = FROZEN

    config: dict[str, Any]  # adapter_config.json, of plain LoRA
    tensors: dict[str, tuple[str, tuple[int, ...]]]  # of the adapter, as in `Source`
    base: Source
    folder: Path | None = None  # of the adapter; None until its files are here


Source.model_rebuild()


class DataSource(Artifact):
    """Origin and version of a text that was used, without paths."""

    file_name = "data.json"

    name: str  # "allenai/c4:en", "wiki.train.jsonl.xz", "stdlib:train"
    version: str  # data set commit, or sha256 of the content
    hub_id: str | None = None
    split: str | None = None
    part: str | None = None  # "1 of 2": its other documents serve another use
    is_chat: bool = False  # conversations, in the form of the model's chat template
    mixed: tuple["Share", ...] = ()  # texts that it is a mix of

    @property
    def is_file(self) -> bool:
        """Return whether this is a local file, of whose origin nothing is known."""
        if self.mixed:
            return any(one.data.is_file for one in self.mixed)
        return not self.hub_id and not self.name.startswith("stdlib:")

    @property
    def texts(self) -> "tuple[DataSource, ...]":
        """Return the texts that it is a mix of, or itself."""
        return tuple(one.data for one in self.mixed) or (self,)

    @property
    def corpus(self) -> str:
        """Return what texts of one origin share: a Hub data set, Python's code, or a file's hash."""
        if self.hub_id or self.is_file:
            return self.hub_id or self.version
        return self.name if self.name == "stdlib:prose" else "stdlib"

    def likeness(self, healing: "DataSource") -> str:
        """Return how this text is to the healing text: "like", of one corpus; "unlike", of two; or neither.

        Of two local files nobody knows whether they come from one corpus: each is "other than" the other.
        """
        if self.corpus in {text.corpus for text in healing.texts}:
            return "like"
        return "other than" if self.is_file and healing.is_file else "unlike"


class Share(BaseModel):
    """A text in a mix, and its share: there is this much of it for each 1 of a text with the share 1."""

    model_config = FROZEN

    data: DataSource
    share: float = Field(gt=0, allow_inf_nan=False)


DataSource.model_rebuild()


class DistanceProfile(Artifact):
    """Mean angular distance between layer inputs, for every pair (arXiv 2403.17887, section 3.2).

    `mean[l][m]`, 0 ≤ l, m ≤ L, is the distance in [0, 1] between the input of layer l and the input of
    layer m; index L is the output of the last layer before the final norm. `stderr` is the standard
    error of the mean over samples. Both are symmetric with a zero diagonal.
    """

    file_name = "profile.json"

    num_layers: int = Field(ge=1)
    source_commit: str | None = None  # None: unknown, in a profile from elsewhere
    num_samples: int = Field(ge=0)  # 0: unknown, in a profile from elsewhere
    sequence_length: int  # maximum, in tokens
    num_tokens: int  # tokens read, without padding
    tokens: Literal["last", "all"] = "last"  # of samples that end anywhere, or all but the first
    quantization: str | None = None  # "nf4"
    certain_for: tuple[int, ...] = ()  # block sizes whose best block led by three standard errors
    mean: tuple[tuple[float, ...], ...]
    stderr: tuple[tuple[float, ...], ...]
    influence: tuple[float, ...] | None = None  # Block Influence of each layer (arXiv 2403.03853)
    influence_stderr: tuple[float, ...] | None = None
    # Block size → starts of the blocks within three standard errors of the nearest, if there are any.
    ties: dict[int, tuple[int, ...]] = {}
    # Mean norms at the L + 1 boundaries, of the first token and of the median token after it.
    first_norm: tuple[float, ...] | None = None
    other_norm: tuple[float, ...] | None = None
    data: DataSource

    @model_validator(mode="after")
    def _is_square(self) -> Self:
        """Refuse a profile that was cut short."""
        for matrix in (self.mean, self.stderr):
            if {len(matrix), *map(len, matrix)} != {self.num_layers + 1}:
                raise ValueError(f"it does not have the distances between {self.num_layers + 1} boundaries")
        return self

    @property
    def sink(self) -> int | None:
        """Return the layer that makes the attention sink (arXiv 2309.17453), or None.

        It is the layer across which the norm of the first token grows most relative to the other tokens', if
        that is `SINK_RATIO`-fold, and leaves it `SINK_RATIO` times theirs.
        """
        if not self.first_norm or not self.other_norm or min(*self.first_norm, *self.other_norm) <= 0:
            return None
        ratios = [first / other for first, other in zip(self.first_norm, self.other_norm, strict=True)]
        rises = [after / before for before, after in pairwise(ratios)]
        layer = rises.index(max(rises))
        return layer if min(rises[layer], ratios[layer + 1]) >= SINK_RATIO else None

    def block_distances(self, block_size: int) -> list[float]:
        """Return the distance d(x^l, x^{l+n}) for each start l = 0 … L−n, with n = `block_size`."""
        return [self.mean[start][start + block_size] for start in range(self.num_layers - block_size + 1)]

    def across(self, layers: tuple[int, ...]) -> float | None:
        """Return the distance across a block of layers; None if they are not a block or it is unknown."""
        if not is_block(layers):
            return None
        distance = self.mean[layers[0]][layers[-1] + 1]
        return None if math.isnan(distance) else distance


class SizeGoal(BaseModel):
    """A size that was asked for instead of a fraction, and the number of layers that was found for it.

    Sizes of the result are upper bounds: it keeps the largest layers that the number allows.
    """

    model_config = FROZEN

    target: int | None = None  # parameters
    fits: int | None = None  # bytes
    context: int | None = None  # tokens, with `fits`
    num_dropped: int
    parameters: int  # of the result
    weight_bytes: int
    cache_bytes: int = 0  # of `context` tokens
    overhead_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Return the memory for weights, cache and overhead."""
        return self.weight_bytes + self.cache_bytes + self.overhead_bytes


class PruningPlan(Artifact):
    """The layers to drop, the criterion that chose them, and the runner-up."""

    file_name = "plan.json"

    criterion: str
    num_layers: int
    dropped: tuple[int, ...]  # 0-based, ascending
    distance: float | None = None  # of the dropped block, in [0, 1]
    runner_up_start: int | None = None  # of the next best block of the same size
    runner_up_distance: float | None = None
    free: tuple[int, ...] | None = None  # layers that it would have chosen without a limit to runtimes
    free_distance: float | None = None
    ties: tuple[int, ...] = ()  # starts of the blocks from whose distance this one's cannot be told
    order: tuple[int, ...] | None = None  # in which a greedy search dropped them
    passes: float | None = None  # of the whole model over the documents; None if no loss was computed
    num_documents: int | None = None  # of a search

    @model_validator(mode="after")
    def _is_a_cut(self) -> Self:
        """Refuse layers that the model does not have, and an order of none."""
        if not all(before < after for before, after in pairwise((-1, *self.dropped, self.num_layers))):
            raise ValueError(f"its layers are not ascending numbers below {self.num_layers}")
        if (self.runner_up_start is None) != (self.runner_up_distance is None):
            raise ValueError("its runner-up has no distance, or the other way round")
        return self

    @property
    def kept(self) -> tuple[int, ...]:
        """Return the 0-based indices of the kept layers, ascending."""
        dropped = set(self.dropped)
        return tuple(index for index in range(self.num_layers) if index not in dropped)


class Verdict(BaseModel):
    """Whether a runtime runs a pruned model right, by what it takes for a layer's kind."""

    model_config = FROZEN

    runtime: str  # "llama.cpp"
    title: str  # with the programs that build on it
    versions: str  # for which this is known
    by_code: bool  # read in its code, not run
    runs: bool | None  # right; None: not known
    reason: str | None = None


class CutLoss(BaseModel):
    """Unhealed loss of one cut, in nats per token. Standard errors treat documents as independent."""

    model_config = FROZEN

    dropped: tuple[int, ...]
    nats: float
    stderr: float
    behind: float  # excess over the best cut in the same comparison
    behind_stderr: float  # paired: of the difference on the same documents


class CutLosses(Artifact):
    """Several cuts of one model, compared on the same documents without healing."""

    file_name = "cuts.json"

    source: CutLoss
    cuts: tuple[CutLoss, ...]
    sink: CutLoss | None = None  # without the attention sink's layer alone; `behind` the source
    num_documents: int
    sequence_length: int  # maximum, in tokens
    data: DataSource


class Plans(Artifact):
    """The plan of each criterion, its loss without healing, and the choice among them."""

    file_name = "plans.json"

    source_name: str
    source_commit: str
    plans: tuple[PruningPlan, ...]
    losses: CutLosses | None  # in the order of the plans; None if not requested
    num_samples: int = 0  # of the distances; 0: unknown
    sink: int | None = None  # layer that makes the attention sink
    chosen: str  # criterion
    reason: str
    runtimes: tuple[Verdict, ...] = ()  # of the chosen plan
    goal: SizeGoal | None = None
    parameters: int | None = None  # left by the chosen plan; None in plans of earlier versions


class Checkpoint(Artifact):
    """A complete model folder that transformers can load."""

    file_name = "checkpoint.json"

    folder: Path = Field(exclude=True)
    num_layers: int
    num_parameters: int
    size_bytes: int  # of the weight files
    files: dict[str, str]  # weight file name → sha256
    merge_base: str | None = None  # "source weights"; None if nothing was merged
    merge_losses: dict[str, float] | None = None  # of the bases tried, on the held-out set
    guard_losses: dict[str, float] | None = None  # "unhealed" and "healed", of the files, on that set
    verified: tuple[str, ...] = ()  # aspects compared with the source: "names and shapes", "logits"

    @property
    def helped(self) -> bool:
        """Return whether the merged adapter lowered the loss on the held-out set."""
        losses = self.guard_losses
        return losses is not None and losses["healed"] < losses["unhealed"]

    @property
    def is_finite(self) -> bool:
        """Return whether the held-out loss is finite: healing can make weights or the loss overflow."""
        return self.guard_losses is None or math.isfinite(self.guard_losses["healed"])


class LossPoint(BaseModel):
    """One point of the healing curve; losses in nats per token."""

    model_config = FROZEN

    step: int
    loss: float


class FittedSeam(BaseModel):
    """An update of the layer before a cut, by ridge regression on activations."""

    model_config = FROZEN

    layer: int  # 0-based, of the source
    module: str  # "mlp.down_proj"
    rank: int
    ridge: float  # strength, times the mean square of the activations
    explained: float  # share of the squared error of the states after the cut, on held-out tokens
    num_tokens: int
    num_left_out: int  # tokens with outlier norms, such as attention sinks


class SeamFit(Artifact):
    """The updates that a healing started from, one per cut. Losses in nats per token."""

    file_name = "seam.json"

    quantization: str  # of the model whose states were fitted: "nf4", "none"
    seams: tuple[FittedSeam, ...]
    rejected: tuple[int, ...] = ()  # layers whose fit raised the loss on the held-out set
    without_layer_before: int = 0  # cuts that begin at layer 0, left as they are
    loss_before: float  # on the held-out set, layers skipped in memory, in the precision of healing
    loss_after: float


class Adapter(Artifact):
    """A LoRA adapter in peft's format, and a record of its training. Losses in nats per token."""

    file_name = "adapter.json"

    folder: Path = Field(default=Path(), exclude=True)  # unset in `build.json`, which holds no paths
    objective: ObjectiveName | None  # None: a fitted seam without training
    quantization: str  # "nf4", "none"
    rank: int
    learning_rate: float
    target_modules: tuple[str, ...]
    experts: tuple[str, ...] = ()  # fused parameters of experts; adapted in 16 bits, without dropout
    left_out: tuple[str, ...] = ()  # fused parameters to which no LoRA is known to fit
    layers: str = "all"  # adapted layers; "seam": from the last one before the cut onwards
    num_steps: int
    best_step: int | None = None  # step of this adapter, where the held-out loss was lowest
    num_tokens: int  # tokens seen in training, without padding
    sequence_length: int
    packed: bool = True  # False: one document per row, as the model would attend across documents
    num_trainable_parameters: int
    curve: tuple[LossPoint, ...]  # of the objective; when distilling, the divergence from the source
    guard_curve: tuple[LossPoint, ...] = ()
    seam: SeamFit | None = None  # its start; None: an adapter that changes nothing
    guard_loss_before: float  # on the held-out set, same 4-bit model, adapter off
    guard_loss_after: float
    slowed_at_step: int | None = None  # the rate is lower from here on, after the loss had diverged
    ran_away_at_step: int | None = None  # second divergence, which ended training; 0 steps: nothing learnt
    data: DataSource

    @property
    def is_trained(self) -> bool:
        """Return whether there was any training: a fitted seam can be merged without."""
        return self.num_steps > 0

    @property
    def changes_nothing(self) -> bool:
        """Return whether the adapter is the zero that training starts from unless a seam was fitted."""
        return self.num_steps == 0 and self.seam is None


class TokenLoss(BaseModel):
    """Mean token loss on fixed sequences. `stderr` treats documents, not tokens, as independent."""

    model_config = FROZEN

    nats: float
    stderr: float
    normalized: float  # nats / log V (arXiv 2403.17887, figure 4)
    num_tokens: int  # predicted tokens
    num_documents: int
    sequence_length: int
    data: DataSource

    @property
    def perplexity(self) -> float:
        """Return exp(loss), or infinity beyond the float range."""
        return math.exp(self.nats) if self.nats < 700 else math.inf


class PartScore(BaseModel):
    """One task of a group: a subject of MMLU."""

    model_config = FROZEN

    label: str  # "abstract_algebra"
    value: float
    num_samples: int


class TaskScore(BaseModel):
    """One lm-eval task and metric."""

    model_config = FROZEN

    task: str
    label: str  # shown name: "MMLU"
    metric: str
    value: float
    stderr: float | None
    num_fewshot: int | None  # None: differs among the tasks of a group
    num_samples: int
    chance: float | None  # score of guessing without the question; None if there is no meaningful one
    higher_is_better: bool | None = True  # as the harness says; None: unknown
    is_share: bool = True  # share of correct answers, in [0, 1]; other metrics have their own scale
    version: str  # of the task, in the harness
    data: tuple[DataSource, ...] = ()  # Hub data sets of the questions
    answers: str | None = None  # filter that extracted answers from generated text: "strict-match"
    parts: tuple[PartScore, ...] = ()  # of a group
    runs_code: bool = False  # the task file names Python
    writes: bool = False  # the model generates the answer instead of choosing among given ones

    @property
    def shots(self) -> str:
        """Return the number of examples before each question: "5-shot"."""
        return "shots differ" if self.num_fewshot is None else f"{self.num_fewshot}-shot"

    @property
    def arrow(self) -> str:
        """Return the direction of better values: "↑", "↓", or nothing if unknown."""
        return {True: "↑", False: "↓", None: ""}[self.higher_is_better]

    @property
    def name(self) -> str:
        """Return the label, with the metric unless that is the share of correct answers."""
        return self.label if self.is_share else f"{self.label} {self.metric} {self.arrow}".rstrip()

    def shown(self, value: float, *, sign: str = "") -> str:
        """Format a value of this metric for the terminal: a share in per cent, others as numbers."""
        return format(value, f"{sign}.1%" if self.is_share else f"{sign},.3f")


class Evaluation(Artifact):
    """Quality of one model, measured on the files that ship."""

    file_name = "evaluation.json"

    loss: TokenLoss  # on the first text
    tasks: tuple[TaskScore, ...]
    dtype: str  # of the running model
    harness: str  # "lm-eval 0.4.13"
    more_losses: tuple[TokenLoss, ...] = ()  # on the other texts

    @property
    def losses(self) -> tuple[TokenLoss, ...]:
        """Return the loss on each text."""
        return (self.loss, *self.more_losses)


class Comparison(BaseModel):
    """Difference of a model from its source in one measure, on the same documents or questions."""

    model_config = FROZEN

    measure: str  # "loss", or the task
    text: str | None = None  # name of the text of a loss; None: the only one of an earlier version
    difference: float  # model − source
    stderr: float
    low: float  # bounds of the confidence interval
    high: float
    confidence: float  # 0.95
    p_value: float  # two-sided
    num_items: int
    test: str  # "McNemar, exact", "paired t"

    @property
    def significant(self) -> bool:
        """Return whether chance alone would rarely produce such a difference."""
        return not self.p_value >= 1 - self.confidence  # NaN is no evidence of equality


class Speed(BaseModel):
    """Medians over alternating rounds; spread is half the interquartile range over the median."""

    model_config = FROZEN

    prefill_tokens_per_second: float
    prefill_spread: float
    decode_tokens_per_second: float
    decode_spread: float
    memory_bytes: int | None = None
    cache_bytes_per_token: float | None = None  # growth of the key-value cache


class SpeedComparison(Artifact):
    """Tokens per second and memory of source and result, measured alternately in one run."""

    file_name = "speed.json"

    device: str
    rounds: int
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    dtype: str | None = None  # of the running models
    memory: Literal["peak", "weights and cache"] | None = None  # how it was measured; a peak only on a GPU
    source: Speed
    result: Speed


class Decision(BaseModel):
    """What decides whether the healed model ships: what healing changed, in nats per token.

    Attributes:
        gain: By how much it lowered the loss on the held-out part of the healing text.
        harm: The most by which it raised the loss on a text unlike that one; 0 if on none.
        text: The text of the harm; None without harm.
    """

    model_config = FROZEN

    gain: float
    harm: float = 0.0
    text: DataSource | None = None

    @property
    def ships(self) -> bool:
        """Return whether the gain is one, and outweighs the harm."""
        return self.gain > self.harm


@dataclass(frozen=True)
class Made:
    """All results of the stages; a build keeps those for which it has a field of the same name."""

    source: Source
    profile: DistanceProfile
    plan: PruningPlan
    pruned: Checkpoint
    adapter: Adapter | None
    healed: Checkpoint | None
    result: Checkpoint  # what ships: one of the two
    shipped: str  # its name, "healed" or "pruned"
    decision: Decision | None  # None without healing
    evaluations: dict[str, Evaluation]
    speed: SpeedComparison


class Build(Artifact):
    """A complete build, as stored in `build.json`: no paths, no user names."""

    file_name = "build.json"

    factory_version: str
    name: str  # "demo-drop0.3"
    reference: str  # model reference as given; of a folder, only its name
    config: dict[str, Any]  # every setting in use
    source: Source
    plan: PruningPlan
    profile_samples: int
    sink: int | None = None  # layer that makes the attention sink
    calibration: DataSource
    adapter: Adapter | None  # None for a build without healing
    merge_base: str | None = None  # weights that the adapter was added to: "source weights"
    merge_losses: dict[str, float] | None = None  # of the bases tried, on the held-out set of healing
    guard_losses: dict[str, float] | None = None  # of the files without and with healing, on that set
    shipped: Literal["healed", "pruned"]
    decision: Decision | None = None  # None without healing, and of builds before it was recorded
    runtimes: tuple[Verdict, ...] = ()  # whether each runs this cut right
    source_parameters: int
    result_parameters: int
    source_bytes: int
    result_bytes: int
    evaluations: dict[str, Evaluation]  # "source", "pruned", "healed"
    comparisons: dict[str, tuple[Comparison, ...]] = {}  # with the source: "pruned", "healed"
    healing: tuple[Comparison, ...] = ()  # healed − pruned, of the loss on each text
    speed: SpeedComparison | None
    files: dict[str, str]  # published weight file → sha256
    stages: dict[str, str]  # stage → key
    versions: dict[str, str]  # library → version, of those that can change a number
    libraries: dict[str, str] = {}  # library → version, of all installed ones that the program could use
    seconds: dict[str, float]  # stage → wall time of making it
    device: str

    @classmethod
    def read(cls, folder: Path, *, again: str = BUILD_AGAIN) -> Self:
        """Read the record of a build folder; see `Artifact.read`."""
        return super().read(folder, again=again)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        """Refuse a record that was cut short, or whose parts are of different builds."""
        for name in ("source", "pruned", self.shipped):
            if name not in self.evaluations:
                raise ValueError(f"it has no evaluation of the {name} model")
        if len({len(one.losses) for one in self.evaluations.values()}) > 1:
            raise ValueError("its evaluations are not of the same texts")
        for number in (len(self.source.layer_parameters), len(self.source.layer_bytes), self.plan.num_layers):
            if number != self.source.num_layers:
                raise ValueError(f"it tells of {number} layers of a model of {self.source.num_layers}")
        config = self.source.config
        if not (
            isinstance(config.get("model_type"), str) and type(config.get("num_hidden_layers", 0)) is int
        ):
            raise ValueError("the configuration of its source has no model_type, or no number of layers")
        return self

    @property
    def dropped(self) -> tuple[int, ...]:
        """Return the 0-based indices of the dropped layers."""
        return self.plan.dropped


class Pruning(Artifact):
    """Record of a model folder made by `factory prune`, without paths or user names."""

    file_name = "pruning.json"

    factory_version: str
    source_name: str
    repo_id: str | None  # None for a folder
    commit: str  # a folder: its content hash
    lineage: Lineage | None = None  # of an adapter
    license: str | tuple[str, ...] | None
    num_layers: int  # before
    dropped: tuple[int, ...]  # 0-based, ascending
    source_parameters: int
    result_parameters: int
    source_bytes: int
    result_bytes: int
    files: dict[str, str]  # weight file name → sha256
    verified: tuple[str, ...]
    runtimes: tuple[Verdict, ...] = ()


class GgufCheck(BaseModel):
    """What llama.cpp computes from a GGUF, beside transformers with the folder that it was made from."""

    model_config = FROZEN

    largest: float  # difference of logits, without the mean of a row
    apart: float  # root mean square of the differences over the deviation of the logits
    same_next: float  # share of positions with the same next token
    num_positions: int
    longest: int  # tokens of the longest text
    num_texts: int  # whose tokens are the same
    llama: str  # version of llama-cpp-python


class Gguf(BaseModel):
    """One GGUF file beside a model."""

    model_config = FROZEN

    name: str
    kind: str  # "Q8_0"
    sha256: str
    size_bytes: int
    made_by: str  # "gguf 0.19.0"
    check: GgufCheck | None = None  # None: llama.cpp was not there
    bound: str | None = None  # where llama.cpp is right: "up to 4,096 tokens, as the source"


class Ggufs(Artifact):
    """The GGUF files beside a model."""

    file_name = "gguf.json"

    weights: dict[str, str]  # weight file that they were made from → sha256
    files: tuple[Gguf, ...]


class Publication(Artifact):
    """A published build on the Hub."""

    file_name = "publication.json"

    repo_id: str
    url: str
    commit: str
    private: bool
    files: dict[str, str]  # every file → sha256
    space: str | None = None  # the comparison Space that the card links to
    pull_request: int | None = None  # number, if it was proposed in one


def is_block(layers: Sequence[int]) -> bool:
    """Return whether ascending layer indices are consecutive."""
    return len(layers) > 0 and layers[-1] - layers[0] + 1 == len(layers)


def layer_ranges(layers: Sequence[int]) -> str:
    """Format layer indices as inclusive ranges: (14, 15, 16, 20) → "14–16, 20"."""
    ranges: list[list[int]] = []
    for layer in sorted(layers):
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in ranges)


class SweepPoint(BaseModel):
    """One cut of a sweep, measured on the files of the pruned and the healed model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    drop: float  # dropped layers over all layers
    plan: PruningPlan
    pruned: Evaluation
    healed: Evaluation | None

    @property
    def best(self) -> Evaluation:
        """Return the evaluation of the healed model, or of the pruned one if it was not healed."""
        return self.healed or self.pruned


class Sweep(Artifact):
    """Quality against the fraction of dropped layers."""

    file_name = "sweep.json"

    source_name: str
    source_commit: str
    num_layers: int
    criterion: str
    source: Evaluation
    points: tuple[SweepPoint, ...]  # by rising fraction
    before_the_cliff: float | None  # largest fraction that keeps enough quality; None: not even the first
    rule: str
