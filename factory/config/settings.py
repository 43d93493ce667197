"""Define the configuration of a build and its parts, and the recipes of known models."""

import math
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator

from factory.artifacts import SizeGoal, Source
from factory.config.choices import MAX_COUNT, CriterionName, HealStart, ObjectiveName
from factory.config.criteria import DEFAULT_CRITERION
from factory.config.objectives import DEFAULT_OBJECTIVE, OBJECTIVES, SFT, Objective
from factory.config.references import aliases, unknown_model
from factory.config.request import Request
from factory.errors import DropError, UsageError
from factory.resources import RECIPES

SLOWER = 0.3  # factor of the learning rate after the loss of healing has diverged


class Settings(BaseModel):
    """Base of all settings; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def one_or_several(value: Any) -> Any:
    """Read one text, as earlier builds recorded it, or several."""
    return (value,) if isinstance(value, str) else value


class MeasureSettings(Settings):
    """Settings for measuring angular distances."""

    data: str = "allenai/c4:en"
    num_samples: int | None = Field(default=None, ge=2, le=MAX_COUNT)  # None: until the best block is certain
    max_samples: int = Field(default=2048, ge=2, le=MAX_COUNT)  # limit if `num_samples` is None
    sequence_length: int = Field(default=2048, ge=2, le=MAX_COUNT)  # tokens
    exact_length: bool = False  # the length was requested: at least one sample must have it
    tokens: Literal["last", "all"] = "last"  # of samples that end anywhere, or all but the first
    four_bit: bool = False  # NF4


class PlanSettings(Settings):
    """Settings for choosing layers, and the amount of text for criteria that measure the loss."""

    criterion: CriterionName = DEFAULT_CRITERION.name
    layers: tuple[int, ...] | None = None  # 0-based; chosen by the user instead of a criterion
    runtimes: tuple[str, ...] = ()  # in which the cut must run right; "all": those that run the source
    num_documents: int = Field(default=32, ge=2, le=MAX_COUNT)  # of the calibration set
    sequence_length: int = Field(default=512, ge=8, le=MAX_COUNT)  # tokens


class HealSettings(Settings):
    """QLoRA healing; the defaults are the paper's (arXiv 2403.17887, appendix A)."""

    data: tuple[str, ...] = Field(default=("allenai/c4:en",), min_length=1)  # several: each as DATA*SHARE
    objective: ObjectiveName = SFT.name
    modules: Literal["ffn", "all-linear"] = "ffn"
    layers: Literal["all", "seam"] = "all"  # adapted layers; seam: from the one before the cut onwards
    seam_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)  # of the hidden-state loss, distilling
    next_token_weight: float = Field(default=0.0, ge=0, lt=1)  # its share of the loss, distilling
    bits: Literal[4, 16] = 4  # per weight under the adapter: 4 is NF4
    learning_rate: float = Field(default=3e-4, gt=0, allow_inf_nan=False)
    schedule: Literal["cosine", "linear"] = "cosine"  # of the learning rate after the warm-up, down to 0
    second_moment_decay: float = Field(default=0.999, gt=0, lt=1)  # AdamW's beta2
    rank: int = Field(default=64, ge=1, le=MAX_COUNT)  # LoRA alpha equals it
    dropout: float = Field(default=0.05, ge=0, lt=1)
    start: HealStart = "none"  # of the adapter: nothing, or a fit of the layer before each cut
    num_steps: int = Field(default=5000, ge=1, le=MAX_COUNT)
    warmup_steps: int = Field(default=100, ge=0, le=MAX_COUNT)
    batch_size: int = Field(default=16, ge=1, le=MAX_COUNT)  # sequences per optimiser step
    sequence_length: int = Field(default=2048, ge=8, le=MAX_COUNT)  # tokens

    _several = field_validator("data", mode="before")(one_or_several)

    @property
    def for_trainer(self) -> dict[str, Any]:
        """Return the settings that transformers' trainer takes as they are, by their names there."""
        return {
            "max_steps": self.num_steps,
            "warmup_steps": self.warmup_steps,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": self.schedule,
            "adam_beta2": self.second_moment_decay,
            "max_length": self.sequence_length,
        }


class EvaluateSettings(Settings):
    """Settings for comparing the three models."""

    data: tuple[str, ...] = Field(default=("allenai/c4:en", "wikimedia/wikipedia:20231101.en"), min_length=1)
    num_documents: int = Field(default=1000, ge=2, le=MAX_COUNT)
    sequence_length: int = Field(default=2048, ge=8, le=MAX_COUNT)  # tokens
    tasks: tuple[str, ...] = ("mmlu", "boolq", "gsm8k")
    num_fewshot: dict[str, int] = Field(default_factory=lambda: {"mmlu": 5, "boolq": 0, "gsm8k": 5})
    limit: int | None = Field(default=None, ge=1, le=MAX_COUNT)  # samples per task; None: all of them
    backend: Literal["hf", "vllm"] = "hf"  # answers the tasks; the loss always comes from transformers
    apply_chat_template: bool = False  # to the questions of the tasks

    _several = field_validator("data", mode="before")(one_or_several)


class BuildConfig(Settings):
    """All settings that determine the result of a build."""

    reference: str  # as typed: alias, repo[@revision] or folder
    drop: float = Field(gt=0, lt=1)
    size: SizeGoal | None = None  # from which `drop` follows
    budget: int | None = None  # seconds that the build was to take, from which amounts follow
    seed: int = Field(default=0, ge=0, lt=2**32)
    heal_enabled: bool = True
    merge_base: Literal["auto", "bf16", "nf4"] = "auto"  # weights that the adapter is added to
    measure: MeasureSettings = MeasureSettings()
    plan: PlanSettings = PlanSettings()
    heal: HealSettings = HealSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @property
    def fits_seam(self) -> bool:
        """Return whether the layer before each cut is fitted, with or without training after it."""
        return self.heal.start == "seam-fit"

    @property
    def has_adapter(self) -> bool:
        """Return whether an adapter is made and merged: by training, by a fit, or both."""
        return self.heal_enabled or self.fits_seam


class Recipe(Settings):
    """A known model, its repository on the Hub, and settings for it."""

    alias: str
    repo_id: str | None = None  # None: the embedded model
    note: str | None = None  # advice before the first build: gates, custom code
    provenance: str  # origin of each figure below
    license: str | None = None  # of the embedded model
    measure: MeasureSettings = MeasureSettings()
    heal: HealSettings | None = None  # None: scaled to the size, as without a recipe
    # Objective → settings that override its own, if they were tried for this model.
    objectives: dict[ObjectiveName, dict[str, Any]] = {}
    evaluate: EvaluateSettings = EvaluateSettings()


@cache
def load_recipe(alias: str) -> Recipe:
    """Read the recipe of one alias.

    Raises:
        UnknownModelError: The alias does not exist; the hint suggests the nearest.
    """
    if alias not in aliases():
        raise unknown_model(alias)
    fields: dict[str, Any] = yaml.safe_load((RECIPES / f"{alias}.yaml").read_text(encoding="utf-8"))
    return Recipe.model_validate({"alias": alias, **fields})


# Without a recipe: between the paper's 7B models (164 M tokens at 3e-4) and a 26 M-parameter Llama (best
# at 3e-3), the learning rate falls with the power 0.4 of the size.
TOKENS_PER_PARAMETER = 0.0227
MIN_TOKENS = 500_000
MAX_TOKENS = 164_000_000


def heal_settings_for(num_parameters: int, *, max_length: int, objective: Objective = SFT) -> HealSettings:
    """Return the paper's settings, scaled to the size of a model for which no others are known.

    Args:
        num_parameters: Parameter count of the source.
        max_length: Longest sequence that the model was made for, in tokens.
        objective: Decides the number of steps that the tokens are spread over.
    """
    length = min(HealSettings().sequence_length, max_length)
    tokens = min(max(int(TOKENS_PER_PARAMETER * num_parameters), MIN_TOKENS), MAX_TOKENS)
    most = min(max(tokens // (objective.min_steps * length), 1), HealSettings().batch_size)
    batch_size = 2 ** int(math.log2(most))  # so that two, four or eight GPUs can share it
    steps = math.ceil(tokens / (batch_size * length))
    return HealSettings(
        learning_rate=float(f"{min(3e-4 * (7e9 / num_parameters) ** 0.4, 3e-3):.1e}"),
        num_steps=steps,
        warmup_steps=min(100, steps // 10),
        batch_size=batch_size,
        sequence_length=length,
    )


def settle(
    request: Request, source: Source, *, drop: float | None = None, goal: SizeGoal | None = None
) -> BuildConfig:
    """Decide every setting: the request overrides the recipe, which overrides the defaults.

    Args:
        request: Options that the user gave.
        source: Resolved model.
        drop: Fraction of the layers to drop; None: as requested.
        goal: Size from which the fraction follows instead.

    Raises:
        UsageError: Settings exclude each other, or sequences are longer than the model was made for.
    """
    recipe = load_recipe(request.model) if request.model in aliases() else None
    longest = longest_sequence(source.config)
    asked = {
        path: value
        for name, (_, option) in request.options().items()
        if (value := getattr(request, name)) is not None and value is not False
        for path in option.sets
    }
    length = asked.get("measure.sequence_length")
    if length is not None and length > longest:
        raise UsageError(
            f"`sequence_length={length}` is more than the {longest} tokens the model was made for",
            hint=f"give {longest} or fewer",
        )
    if length is not None:
        asked["measure.exact_length"] = True
    asked["heal_enabled"] = not getattr(request, "no_heal", False)
    if drop is not None:
        asked["drop"] = drop
    if goal:
        asked |= {"size": goal, "drop": goal.num_dropped / source.num_layers}
    fields = _defaults(recipe, source, longest=longest, objective=asked.get("heal.objective"))
    _refuse_settings_of_another_objective(asked, OBJECTIVES[fields["heal"]["objective"]])
    for path, value in asked.items():
        section, _, name = path.rpartition(".")
        (fields[section] if section else fields)[name] = value
    fields["heal"]["warmup_steps"] = warmup_for(fields["heal"]["num_steps"], fields["heal"]["warmup_steps"])
    config = BuildConfig.model_validate({"reference": request.model, **fields})
    if config.merge_base == "nf4" and config.heal_enabled and config.heal.bits == 16:
        raise UsageError(
            "`merge_base=nf4`, but this model is healed over 16-bit weights, not NF4",
            hint="add `heal_bits=4` to heal over NF4, or remove `merge_base`",
        )
    return config


def warmup_for(num_steps: int, usual: int) -> int:
    """Return the steps of warm-up, so that the peak rate is reached even with fewer steps than usual."""
    return usual if num_steps >= 2 * usual else max(num_steps // 10, min(usual, 1))


def _refuse_settings_of_another_objective(asked: Mapping[str, Any], chosen: Objective) -> None:
    for name in sorted(frozenset().union(*(one.reads for one in OBJECTIVES.values())) - chosen.reads):
        if value := asked.get(f"heal.{name}"):
            readers = " or ".join(f"`heal={one.name}`" for one in OBJECTIVES.values() if name in one.reads)
            raise UsageError(
                f"`{name}={value:g}` without {readers}: {chosen.name} does not use it",
                hint=f"remove `{name}`, or give {readers}",
            )


def _defaults(
    recipe: Recipe | None, source: Source, *, longest: int, objective: str | None
) -> dict[str, dict[str, Any]]:
    """Return the defaults: section → setting → value."""
    chosen = OBJECTIVES[objective] if objective else DEFAULT_OBJECTIVE
    heal = recipe.heal if recipe else None
    if heal is None:
        heal = heal_settings_for(source.num_parameters, max_length=longest, objective=chosen)
    if recipe:
        measure, evaluate = recipe.measure, recipe.evaluate
    else:
        measure = MeasureSettings()
        # A folder gets no tasks by default, since their data is on the Hub.
        evaluate = EvaluateSettings() if source.is_on_hub else EvaluateSettings(tasks=())
    sections = {
        "measure": measure.model_dump(),
        "plan": PlanSettings().model_dump(),
        "heal": heal.model_dump(),
        "evaluate": evaluate.model_dump(),
    }
    sections["heal"] |= {"objective": chosen.name, **chosen.settings(source.num_parameters)}
    sections["heal"] |= recipe.objectives.get(chosen.name, {}) if recipe else {}
    for section in sections.values():
        section["sequence_length"] = min(section["sequence_length"], longest)
    return sections


def longest_sequence(config: Mapping[str, Any]) -> int:
    """Return the longest sequence that a model was made for, in tokens; 2048 if config.json lacks it."""
    text_config = config.get("text_config")
    for part in (text_config if isinstance(text_config, Mapping) else {}, config):
        for name in ("max_position_embeddings", "n_positions", "n_ctx"):
            if type(part.get(name)) is int and part[name] > 0:
                return int(part[name])
    return 2048


def num_dropped(drop: float, num_layers: int) -> int:
    """Return the number of layers that a fraction means: n = floor(drop · L + 0.5).

    Raises:
        DropError: The fraction rounds to 0 layers, or leaves fewer than 2.
    """
    n = math.floor(drop * num_layers + 0.5)
    if n < 1:
        raise DropError(
            f"`drop={drop:g}` of {num_layers} layers rounds to 0 layers",
            hint=f"the smallest cut is `drop={1 / num_layers:.2g}`",
        )
    if num_layers - n < 2:
        raise DropError(
            f"`drop={drop:g}` of {num_layers} layers leaves {num_layers - n}",
            hint=f"at least 2 layers must be kept: `drop={(num_layers - 2) / num_layers:.2g}` at most"
            if num_layers > 2
            else "at least 2 layers must be kept, so none of this model's can be dropped",
        )
    return n


def build_name(source_name: str, drop: float) -> str:
    """Return the name of a build's folder and default repository: "Mistral-7B-v0.1-drop30"."""
    return f"{source_name}-drop{drop * 100:.3g}"
