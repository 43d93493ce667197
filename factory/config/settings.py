"""What was asked: the configuration of a build and its parts, and the recipes of known models."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from factory.artifacts import Source
from factory.config.choices import MAX_COUNT, CriterionName, ObjectiveName
from factory.config.criteria import DEFAULT_CRITERION
from factory.config.objectives import DEFAULT_OBJECTIVE, OBJECTIVES, SFT
from factory.config.references import aliases, unknown_model
from factory.config.request import Request
from factory.errors import DropError, UsageError
from factory.resources import RECIPES

SLOWER = 0.3  # of the learning rate, once the loss of healing has run away


class Settings(BaseModel):
    """Base of everything that can be asked: unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class MeasureSettings(Settings):
    """How the angular distances are measured."""

    data: str = "allenai/c4:en"
    num_samples: int | None = Field(
        default=None, ge=2, le=MAX_COUNT
    )  # None: until the choice of the block is certain
    max_samples: int = Field(default=2048, ge=2, le=MAX_COUNT)  # then at most this many
    sequence_length: int = Field(default=2048, ge=2, le=MAX_COUNT)  # tokens
    exact_length: bool = False  # it was asked for: at least one sample must have it
    tokens: Literal["last", "all"] = "last"  # whose states are compared
    four_bit: bool = False  # NF4


class PlanSettings(Settings):
    """How the layers are chosen, and on how much text where a criterion looks at the loss."""

    criterion: CriterionName = DEFAULT_CRITERION.name
    layers: tuple[int, ...] | None = None  # 0-based; somebody's own choice, in place of a criterion
    num_documents: int = Field(default=32, ge=2, le=MAX_COUNT)  # of the calibration text
    sequence_length: int = Field(default=512, ge=8, le=MAX_COUNT)  # tokens


class HealSettings(Settings):
    """QLoRA healing; the defaults are the paper's (arXiv 2403.17887, appendix A)."""

    data: str = "allenai/c4:en"
    objective: ObjectiveName = SFT.name  # next tokens of the text, or the source's distribution
    modules: Literal["ffn", "all-linear"] = "ffn"
    layers: Literal["all", "seam"] = "all"  # those that get an adapter; seam: from the one before the cut on
    seam_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)  # of the states' error, if distilled
    bits: Literal[4, 16] = 4  # of the weights under the adapter: NF4, or as they are
    learning_rate: float = Field(default=3e-4, gt=0, allow_inf_nan=False)
    rank: int = Field(default=64, ge=1, le=MAX_COUNT)  # LoRA alpha equals it
    dropout: float = Field(default=0.05, ge=0, lt=1)
    num_steps: int = Field(default=5000, ge=1, le=MAX_COUNT)
    warmup_steps: int = Field(default=100, ge=0, le=MAX_COUNT)
    batch_size: int = Field(default=16, ge=1, le=MAX_COUNT)  # sequences an optimiser step
    sequence_length: int = Field(default=2048, ge=8, le=MAX_COUNT)  # tokens


class EvaluateSettings(Settings):
    """What the three models are compared on."""

    data: str = "allenai/c4:en"
    num_documents: int = Field(default=1000, ge=2, le=MAX_COUNT)
    sequence_length: int = Field(default=2048, ge=8, le=MAX_COUNT)  # tokens
    tasks: tuple[str, ...] = ("mmlu", "boolq", "gsm8k")
    num_fewshot: dict[str, int] = Field(default_factory=lambda: {"mmlu": 5, "boolq": 0, "gsm8k": 5})
    limit: int | None = Field(default=None, ge=1, le=MAX_COUNT)  # samples a task; None: all of them
    backend: Literal["hf", "vllm"] = "hf"  # that answers the tasks; the loss is always transformers'


class BuildConfig(Settings):
    """Everything that decides what a build makes."""

    reference: str  # as typed: alias, repo[@revision] or folder
    drop: float = Field(gt=0, lt=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    heal_enabled: bool = True
    merge_base: Literal["auto", "bf16", "nf4"] = "auto"  # weights that the adapter is added to
    measure: MeasureSettings = MeasureSettings()
    plan: PlanSettings = PlanSettings()
    heal: HealSettings = HealSettings()
    evaluate: EvaluateSettings = EvaluateSettings()


class Recipe(Settings):
    """A known model: where it lies on the Hub, and what heals it."""

    alias: str
    repo_id: str | None = None
    source: Literal["hub", "embedded"] = "hub"
    note: str | None = None  # what to know before the first build: gates, custom code
    provenance: str  # where each figure below comes from
    license: str | None = None  # of the embedded model
    measure: MeasureSettings = MeasureSettings()
    heal: HealSettings = HealSettings()
    # Objective → settings over its own, where that is tried for this model.
    objectives: dict[ObjectiveName, dict[str, Any]] = {}
    evaluate: EvaluateSettings = EvaluateSettings()


def load_recipe(alias: str) -> Recipe:
    """Read the recipe of one alias.

    Raises:
        UnknownModelError: No such alias; the hint offers the nearest.
    """
    if alias not in aliases():
        raise unknown_model(alias)
    fields: dict[str, Any] = yaml.safe_load((RECIPES / f"{alias}.yaml").read_text(encoding="utf-8"))
    return Recipe.model_validate({"alias": alias, **fields})


# Healing a model that has no recipe: between the paper's 7B models (164 M tokens at 3e-4) and a
# 26 M-parameter Llama (best at 3e-3), learning rate falls with the power 0.4 of the size.
TOKENS_PER_PARAMETER = 0.0227
MIN_TOKENS = 500_000
MAX_TOKENS = 164_000_000
MIN_STEPS = 100


def heal_settings_for(num_parameters: int, *, max_length: int) -> HealSettings:
    """Defaults for a model without a recipe: the paper's recipe, scaled to the size of the model.

    Args:
        num_parameters: Of the source.
        max_length: Tokens the model was made for.
    """
    length = min(HealSettings().sequence_length, max_length)
    tokens = min(max(int(TOKENS_PER_PARAMETER * num_parameters), MIN_TOKENS), MAX_TOKENS)
    batch_size = min(max(tokens // (MIN_STEPS * length), 1), HealSettings().batch_size)
    steps = math.ceil(tokens / (batch_size * length))
    return HealSettings(
        learning_rate=float(f"{min(3e-4 * (7e9 / num_parameters) ** 0.4, 3e-3):.1e}"),
        num_steps=steps,
        warmup_steps=min(100, steps // 10),
        batch_size=batch_size,
        sequence_length=length,
    )


def settle(request: Request, source: Source, *, drop: float | None = None) -> BuildConfig:
    """Every setting decided: what was asked for over the recipe over the defaults.

    Args:
        drop: Fraction of the layers to drop; None: as the request says.

    Raises:
        UsageError: Settings that exclude each other, or sequences longer than the model was made for.
    """
    recipe = load_recipe(request.model) if request.model in aliases() else None
    longest = longest_sequence(source.config)
    asked = {
        path: value
        for name, (_, option) in request.options().items()
        if (value := getattr(request, name)) not in (None, False)
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
    fields = _defaults(recipe, source, longest=longest, objective=asked.get("heal.objective"))
    for path, value in asked.items():
        section, _, name = path.rpartition(".")
        (fields[section] if section else fields)[name] = value
    steps, warmup = fields["heal"]["num_steps"], fields["heal"]["warmup_steps"]
    if steps < 2 * warmup:  # fewer steps than the recipe's: the peak rate must still be reached
        fields["heal"]["warmup_steps"] = max(steps // 10, min(warmup, 1))
    config = BuildConfig.model_validate({"reference": request.model, **fields})
    if config.merge_base == "nf4" and config.heal_enabled and config.heal.bits == 16:
        raise UsageError(
            "`merge_base=nf4`, but this model is healed over 16-bit weights: there are none in NF4",
            hint="`heal_bits=4` heals over NF4; or remove `merge_base`",
        )
    return config


def _defaults(
    recipe: Recipe | None, source: Source, *, longest: int, objective: str | None
) -> dict[str, dict[str, Any]]:
    """Section → setting → value, where nothing was asked for."""
    if recipe:
        measure, heal, evaluate = recipe.measure, recipe.heal, recipe.evaluate
    else:
        measure, heal = MeasureSettings(), heal_settings_for(source.num_parameters, max_length=longest)
        # A folder gets no tasks unless they are asked for, since their data is on the Hub.
        evaluate = EvaluateSettings() if source.repo_id else EvaluateSettings(tasks=())
    sections = {
        "measure": measure.model_dump(),
        "plan": PlanSettings().model_dump(),
        "heal": heal.model_dump(),
        "evaluate": evaluate.model_dump(),
    }
    chosen = OBJECTIVES[objective] if objective else DEFAULT_OBJECTIVE
    sections["heal"] |= {"objective": chosen.name, **chosen.settings(source.num_parameters)}
    sections["heal"] |= recipe.objectives.get(chosen.name, {}) if recipe else {}
    for section in sections.values():
        section["sequence_length"] = min(section["sequence_length"], longest)
    return sections


def longest_sequence(config: Mapping[str, Any]) -> int:
    """Tokens that a model was made for, by its config.json; 2048 where that does not say."""
    text_config = config.get("text_config")
    for part in (text_config if isinstance(text_config, Mapping) else {}, config):
        for name in ("max_position_embeddings", "n_positions", "n_ctx"):
            if type(part.get(name)) is int and part[name] > 0:
                return int(part[name])
    return 2048


def num_dropped(drop: float, num_layers: int) -> int:
    """n = floor(drop · L + 0.5): how many of L layers a fraction means.

    Raises:
        DropError: It rounds to none, or leaves fewer than 2 layers.
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
            hint=f"at least 2 layers must stay: `drop={(num_layers - 2) / num_layers:.2g}` at most"
            if num_layers > 2
            else "at least 2 layers must stay, so this model has none to spare",
        )
    return n


def build_name(source_name: str, drop: float) -> str:
    """Name of a build's folder and, by default, of its repository: "Mistral-7B-v0.1-drop30"."""
    return f"{source_name}-drop{drop * 100:.3g}"
