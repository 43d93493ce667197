"""Sweep: quality against the fraction of dropped layers, and where its plateau ends."""

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from factory.artifacts import Artifact, Evaluation, PruningPlan

SHARE_KEPT = 0.8
RULE = (
    f"the largest cut up to which, smaller cuts included, {SHARE_KEPT:.0%} of what the source has over "
    "guessing is kept: by each task that has a chance level and on which the source is above it, "
    "(score − chance) / (source − chance), averaged; without such a task by the loss, "
    "(log V − loss) / (log V − source loss)"
)


class SweepPoint(BaseModel):
    """One cut of a sweep, measured on the files of the pruned and the healed model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    drop: float  # dropped layers over all layers
    plan: PruningPlan
    pruned: Evaluation
    healed: Evaluation | None

    @property
    def best(self) -> Evaluation:
        """Of the model that one would take: healed if it was."""
        return self.healed or self.pruned


class Sweep(Artifact):
    """Quality against the fraction of layers that are dropped."""

    file_name = "sweep.json"

    source_name: str
    source_commit: str
    num_layers: int
    criterion: str
    source: Evaluation
    points: tuple[SweepPoint, ...]  # by rising fraction
    before_the_cliff: float | None  # largest fraction that still keeps enough; None: not even the first
    rule: str


def share_kept(evaluation: Evaluation, source: Evaluation) -> float:
    """What is left of the source's advantage over guessing: 1 as good as the source, 0 guessing.

    NaN where the source has none.
    """
    shares = [
        (after.value - after.chance) / (before.value - after.chance)
        for after, before in zip(evaluation.tasks, source.tasks, strict=True)
        if after.chance is not None and before.value - after.chance > 2 * (before.stderr or 0.0)
    ]
    if shares:
        return math.fsum(shares) / len(shares)
    advantage = 1 - source.loss.normalized
    return (1 - evaluation.loss.normalized) / advantage if advantage > 0 else math.nan


def left_out(source: Evaluation) -> list[str]:
    """Labels of the tasks that `share_kept` does not look at, as nothing says what guessing scores."""
    return [task.label for task in source.tasks if task.chance is None]


def before_the_cliff(points: Sequence[SweepPoint], source: Evaluation) -> float | None:
    """The largest fraction that `RULE` names, None where not even the first point keeps enough.

    Args:
        points: By rising fraction.
    """
    largest = None
    for point in points:
        if not share_kept(point.best, source) >= SHARE_KEPT:
            break
        largest = point.drop
    return largest
