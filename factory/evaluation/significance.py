"""Compare the stored answers of two models: do they differ by more than chance?"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from factory.artifacts import Comparison, TaskScore
from factory.evaluation.answers import Answers, Losses, read_answers, read_losses, scale_of

CONFIDENCE = 0.95  # of the interval


def compare(before: Path, after: Path, *, num_tasks: int) -> tuple[Comparison, ...]:
    """Compare loss and tasks of two evaluated models on the same documents and questions, after − before.

    Args:
        before: Folder of one evaluation.
        after: Folder of another one with the same settings and text.
        num_tasks: Number of tasks; those whose score does not follow from the questions are skipped.
    """
    pairs = [(a, b) for a, b in zip(read_losses(before), read_losses(after), strict=True) if a[0]]
    found = [compare_losses("loss", [a for a, _ in pairs], [b for _, b in pairs])]
    for number in range(num_tasks):
        olds, news = read_answers(before, number), read_answers(after, number)
        for old, new in zip(olds or (), news or ()):  # noqa: B905  one of them may be missing
            first, second = _in_order(old[1]), _in_order(new[1])
            if len(first) < 2 or len(first) != len(second):
                continue
            if isinstance(first[0], list):
                found.append(compare_perplexities(old[0], first, second))
            else:
                found.append(compare_answers(old[0].task, first, second))
    return tuple(found)


def _in_order(answers: Answers) -> list[Any]:
    return [score for task in sorted(answers) for score in answers[task]]


def compare_perplexities(score: TaskScore, before: Losses, after: Losses) -> Comparison:
    """Compare two perplexities, or bits per unit, of the same texts, after − before.

    The test and the interval are those of nats per unit, converted to the scale of the score.

    Args:
        score: Score of the model before.
        before: Units and summed nats of each text, at least two.
        after: The same texts in the same order.
    """
    scale = scale_of(before, score.value)
    assert scale is not None, "answers are stored only if the score follows from them"
    nats = compare_losses(score.task, before, after)
    difference = scale(nats.difference)
    return nats.model_copy(
        update={
            "difference": difference,
            "stderr": abs(scale(nats.difference + nats.stderr) - difference),
            "low": scale(nats.low),
            "high": scale(nats.high),
        }
    )


def compare_answers(measure: str, before: Sequence[float], after: Sequence[float]) -> Comparison:
    """Compare the mean scores of the same questions, after − before.

    If every answer is right or wrong, the p-value is McNemar's, exact, and the interval that of Bonett and
    Price (2012), which does not shrink to zero if no answer changed. Other scores are compared by a paired
    t-test.

    Args:
        measure: Name of the task.
        before: Score of each item, at least two.
        after: The same items in the same order.
    """
    if not {*before, *after} <= {0.0, 1.0}:
        return _paired_t(measure, [b - a for a, b in zip(before, after, strict=True)], [1] * len(before))
    from scipy import special

    pairs = list(zip(before, after, strict=True))
    lost, gained, n = pairs.count((1, 0)), pairs.count((0, 1)), len(pairs)
    p_value = 2 * float(special.bdtr(min(lost, gained), lost + gained, 0.5))
    shares = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    middle = shares[0] - shares[1]
    half = float(special.ndtri((1 + CONFIDENCE) / 2)) * math.sqrt((sum(shares) - middle**2) / (n + 2))
    return Comparison(
        measure=measure,
        difference=(gained - lost) / n,
        stderr=math.sqrt(lost + gained - (gained - lost) ** 2 / n) / n,
        low=max(middle - half, -1.0),
        high=min(middle + half, 1.0),
        confidence=CONFIDENCE,
        p_value=min(p_value, 1.0),
        num_items=n,
        test="McNemar, exact",
    )


def compare_losses(measure: str, before: Losses, after: Losses) -> Comparison:
    """Compare the mean loss in nats per token over the same documents, after − before.

    Args:
        measure: Name of the loss or task.
        before: Tokens and summed nats of each document, at least two.
        after: The same documents in the same order.
    """
    counts = [count for count, _ in before]
    return _paired_t(measure, [b - a for (_, a), (_, b) in zip(before, after, strict=True)], counts)


def _paired_t(measure: str, differences: Sequence[float], counts: Sequence[int]) -> Comparison:
    """Test a ratio, summed differences over summed counts, with independent items."""
    from scipy import special

    n, total = len(differences), sum(counts)
    difference = math.fsum(differences) / total
    residuals = math.fsum((d - difference * c) ** 2 for d, c in zip(differences, counts, strict=True))
    stderr = math.sqrt(residuals * n / (n - 1)) / total
    half = float(special.stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * stderr
    t = abs(difference) / stderr if stderr else (math.inf if difference else 0.0)
    return Comparison(
        measure=measure,
        difference=difference,
        stderr=stderr,
        low=difference - half,
        high=difference + half,
        confidence=CONFIDENCE,
        p_value=2 * float(special.stdtr(n - 1, -t)),
        num_items=n,
        test="paired t",
    )
