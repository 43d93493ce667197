"""Sweep: where the plateau ends, from the scores at each fraction of dropped layers."""

import math
from collections.abc import Sequence

from factory.artifacts import Evaluation, SweepPoint

SHARE_KEPT = 0.8
RULE = (
    f"the largest cut up to which, smaller cuts included, {SHARE_KEPT:.0%} of what the source has over "
    "guessing is kept: by each task that has a chance level and on which the source is above it, "
    "(score − chance) / (source − chance), averaged; without such a task by the loss, "
    "(log V − loss) / (log V − source loss)"
)


def share_kept(evaluation: Evaluation, source: Evaluation) -> float:
    """What is left of the source's advantage over guessing: 1 as good as the source, 0 guessing."""
    shares = [
        (after.value - after.chance) / (before.value - after.chance)
        for after, before in zip(evaluation.tasks, source.tasks, strict=True)
        if after.chance is not None and before.value - after.chance > 2 * (before.stderr or 0.0)
    ]
    if shares:
        return math.fsum(shares) / len(shares)
    return (1 - evaluation.loss.normalized) / (1 - source.loss.normalized)


def before_the_cliff(points: Sequence[SweepPoint], source: Evaluation) -> float | None:
    """The largest fraction that `RULE` names, None where not even the first point keeps enough.

    Args:
        points: By rising fraction.
    """
    largest = None
    for point in points:
        if share_kept(point.best, source) < SHARE_KEPT:
            break
        largest = point.drop
    return largest
