"""What healing can train for: one value each. The standard library alone, so that `--help` stays fast.

Its trainer has the same name in `factory/healing/trainers.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


def _no_changes(_num_parameters: int) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Objective:
    """What is trained for, what that takes, and the words for it."""

    name: str
    summary: str  # for `--help`, behind the name
    card: str  # for the model card
    # Settings that differ from those for a model of any objective, by the number of the source's parameters.
    settings: Callable[[int], dict[str, Any]] = _no_changes
    # The source is loaded, and its layers left out in memory; otherwise the pruned model is loaded.
    loads_source: bool = False
    teacher_passes: int = 0  # passes of the whole source for each of the student's
    makes_logits: bool = True  # of a whole sequence at once, on a GPU
    curve_is_loss: bool = True  # the training lowers the loss of next tokens itself

    @property
    def curve(self) -> str:
        """Name of the line in the figure of the healing."""
        return "Training loss" if self.curve_is_loss else "Loss on held-back text"


SIXTEEN_BIT_PARAMETERS = 1_000_000_000  # up to here NF4 saves little memory, and costs small models more


def _distill_settings(num_parameters: int) -> dict[str, Any]:
    """Settings measured with `benchmarks/heal.py` on a 26 M-parameter Llama.

    The learning rate falls from there, 5e-3, with the root of the size to the paper's 3e-4 at 7 B.
    """
    return {
        "modules": "all-linear",
        "rank": 128,
        "dropout": 0.0,
        "learning_rate": float(f"{min(3e-4 * (7e9 / num_parameters) ** 0.5, 5e-3):.1e}"),
        "bits": 16 if num_parameters <= SIXTEEN_BIT_PARAMETERS else 4,
    }


SFT = Objective("sft", summary="on the text, as in the paper", card="next-token prediction")
DISTILL = Objective(
    "distill",
    summary="on what the source makes of the text",
    card="distillation: the divergence from the source's next-token distribution",
    settings=_distill_settings,
    loads_source=True,
    teacher_passes=1,
    makes_logits=False,
    curve_is_loss=False,
)
OBJECTIVES: Mapping[str, Objective] = {objective.name: objective for objective in (SFT, DISTILL)}
DEFAULT_OBJECTIVE = DISTILL
LIGHTEST_OBJECTIVE = SFT  # takes the least memory


def summaries() -> str:
    """Return what each objective trains on, in one line, the default first."""
    others = [objective for objective in OBJECTIVES.values() if objective is not DEFAULT_OBJECTIVE]
    return "; ".join(f"{one.name}: {one.summary}" for one in (DEFAULT_OBJECTIVE, *others))
