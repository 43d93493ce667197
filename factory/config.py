"""What was asked: the configuration of a build and its parts, and the recipes of known models."""

import difflib
import math
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from factory.errors import DropError, UnknownModelError

RECIPES = Path(__file__).parent / "recipes"


class Settings(BaseModel):
    """Base of everything that can be asked: unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class MeasureSettings(Settings):
    """How the angular distances are measured."""

    data: str = "allenai/c4:en"
    num_samples: int = Field(default=512, ge=2)
    sequence_length: int = Field(default=2048, ge=2)  # tokens


class HealSettings(Settings):
    """QLoRA healing; the defaults are the paper's (arXiv 2403.17887, appendix A)."""

    data: str = "allenai/c4:en"
    learning_rate: float = Field(default=3e-4, gt=0)
    rank: int = Field(default=64, ge=1)  # LoRA alpha equals it
    dropout: float = Field(default=0.05, ge=0, lt=1)
    num_steps: int = Field(default=5000, ge=1)
    warmup_steps: int = Field(default=100, ge=0)
    batch_size: int = Field(default=16, ge=1)  # sequences an optimiser step
    sequence_length: int = Field(default=2048, ge=8)  # tokens


class EvaluateSettings(Settings):
    """What the three models are compared on."""

    data: str = "allenai/c4:en"
    num_documents: int = Field(default=1000, ge=2)
    sequence_length: int = Field(default=2048, ge=8)  # tokens
    tasks: tuple[str, ...] = ("mmlu", "boolq")
    num_fewshot: dict[str, int] = Field(default_factory=lambda: {"mmlu": 5, "boolq": 0})
    limit: int | None = Field(default=None, ge=1)  # samples a task; None: all of them


class BuildConfig(Settings):
    """Everything that decides what a build makes."""

    reference: str  # as typed: alias, repo[@revision] or folder
    drop: float = Field(gt=0, lt=1)
    seed: int = 0
    heal_enabled: bool = True
    measure: MeasureSettings = MeasureSettings()
    heal: HealSettings = HealSettings()
    evaluate: EvaluateSettings = EvaluateSettings()


class Recipe(Settings):
    """A known model: where it lies on the Hub, and what heals it."""

    alias: str
    repo_id: str | None = None
    source: Literal["hub", "embedded"] = "hub"
    note: str | None = None  # what to know before the first build: gates, custom code
    provenance: str  # where each figure below comes from
    measure: MeasureSettings = MeasureSettings()
    heal: HealSettings = HealSettings()
    evaluate: EvaluateSettings = EvaluateSettings()


def aliases() -> list[str]:
    """Names of the known models, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(alias: str) -> Recipe:
    """Read the recipe of one alias.

    Raises:
        UnknownModelError: No such alias; the hint offers the nearest.
    """
    if alias not in aliases():
        raise unknown_model(alias)
    fields: dict[str, Any] = yaml.safe_load((RECIPES / f"{alias}.yaml").read_text(encoding="utf-8"))
    return Recipe.model_validate({"alias": alias, **fields})


def unknown_model(reference: str) -> UnknownModelError:
    """The error for a reference that is no alias, no folder and no repository name."""
    near = difflib.get_close_matches(reference.lower(), aliases(), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UnknownModelError(
        f"{reference!r} is no known model, no folder and no Hub repository name",
        hint=f"{hint}known: {', '.join(aliases())}; or give owner/name or ./folder",
    )


def num_dropped(drop: float, num_layers: int) -> int:
    """n = floor(drop · L + 0.5): how many of L layers a fraction means.

    Raises:
        DropError: It rounds to none, or leaves fewer than 2 layers.
    """
    n = math.floor(drop * num_layers + 0.5)
    if n < 1:
        raise DropError(
            f"--drop {drop:g} of {num_layers} layers rounds to 0 layers",
            hint=f"the smallest cut is --drop {1 / num_layers:.2g}",
        )
    if num_layers - n < 2:
        raise DropError(
            f"--drop {drop:g} of {num_layers} layers leaves {num_layers - n}",
            hint=f"at least 2 layers must stay: --drop {max(num_layers - 2, 0) / num_layers:.2g} at most",
        )
    return n
