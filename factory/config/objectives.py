"""Define the training objectives of healing, with the standard library alone, so that `--help` stays fast.

The trainer of each has the same name in `factory/healing/trainers.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


def _no_changes(_num_parameters: int) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Objective:
    """A training objective, its requirements and its descriptions."""

    name: str
    summary: str  # for `--help`, after the name
    card: str  # for the model card
    # Parameter count of the source → settings that differ from the common ones.
    settings: Callable[[int], dict[str, Any]] = _no_changes
    # Load the source and skip its layers in memory, instead of loading the pruned model.
    loads_source: bool = False
    teacher_passes: int = 0  # passes of the whole source for each pass of the student
    makes_logits: bool = True  # of a whole sequence at once, on a GPU
    curve_is_loss: bool = True  # training minimises the next-token loss itself
    reads: frozenset[str] = frozenset()  # settings that no other objective reads
    min_steps: int = 400  # that a small model's tokens are spread over

    @property
    def curve(self) -> str:
        """Return the name of the line in the healing figure."""
        return "Training loss" if self.curve_is_loss else "Loss on held-out text"


SMALL_PARAMETERS = 1_000_000_000  # up to here, NF4 and a lower rank save little memory and cost more quality


def _distill_settings(num_parameters: int) -> dict[str, Any]:
    """Return settings chosen on models of 26 M, 135 M and 270 M parameters, by texts unlike the healing text.

    The best learning rates tried there, 2e-3, 1.5e-3 and 7e-4, fall about with the root of the size. Rank,
    schedule and decay were chosen on that of 135 M alone.
    """
    return {
        "modules": "all-linear",
        "rank": 256 if num_parameters <= SMALL_PARAMETERS else 128,
        "dropout": 0.0,
        "schedule": "linear",
        "second_moment_decay": 0.95,
        "learning_rate": float(f"{min(1.5e-4 * (7e9 / num_parameters) ** 0.5, 2.5e-3):.1e}"),
        "next_token_weight": 0.3,
        "bits": 16 if num_parameters <= SMALL_PARAMETERS else 4,
    }


SFT = Objective("sft", summary="next-token loss, as in the paper", card="next-token prediction")
DISTILL = Objective(
    "distill",
    summary="match the source's token probabilities, and the text's next tokens",
    card="distillation: the divergence from the source's next-token distribution",
    settings=_distill_settings,
    loads_source=True,
    teacher_passes=1,
    makes_logits=False,
    curve_is_loss=False,
    reads=frozenset({"seam_weight", "next_token_weight"}),
    min_steps=1000,
)
OBJECTIVES: Mapping[str, Objective] = {objective.name: objective for objective in (SFT, DISTILL)}
DEFAULT_OBJECTIVE = DISTILL
LIGHTEST_OBJECTIVE = SFT  # takes the least memory


def summaries() -> str:
    """Return the summaries of all objectives in one line, the default first."""
    others = [objective for objective in OBJECTIVES.values() if objective is not DEFAULT_OBJECTIVE]
    return "; ".join(f"{one.name}: {one.summary}" for one in (DEFAULT_OBJECTIVE, *others))
