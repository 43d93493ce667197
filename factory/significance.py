"""Significance: the answers that evaluations leave, and whether two models differ by more than chance."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from factory.artifacts import Comparison, TaskScore
from factory.durable import write_atomically

CONFIDENCE = 0.95  # of the interval
LOSSES = "losses.json"
Losses = Sequence[tuple[int, float]]  # predicted tokens and summed nats of each document
Answers = Mapping[str, Sequence[float]]  # task → score of each of its questions, in their order

# What an evaluation leaves in its folder --------------------------------------------------------


def write_losses(folder: Path, losses: Losses) -> None:
    """Keep the losses of the documents so far; a document too short to have one counts as (0, 0)."""
    write_atomically(folder / LOSSES, json.dumps(losses))


def read_losses(folder: Path) -> list[tuple[int, float]]:
    """What `write_losses` left; nothing where it was not there yet."""
    path = folder / LOSSES
    return [(count, nats) for count, nats in json.loads(path.read_text())] if path.is_file() else []


def write_answers(folder: Path, number: int, score: TaskScore, answers: Answers) -> None:
    """Keep the result of one task, the `number`-th that was asked for."""
    value = {"score": score.model_dump(mode="json"), "answers": answers}
    write_atomically(_answers(folder, number), json.dumps(value))


def read_answers(folder: Path, number: int) -> tuple[TaskScore, Answers] | None:
    """What `write_answers` left; None where that task was not finished."""
    path = _answers(folder, number)
    if not path.is_file():
        return None
    value = json.loads(path.read_text(encoding="utf-8"))
    return TaskScore.model_validate(value["score"]), value["answers"]


def _answers(folder: Path, number: int) -> Path:
    return folder / f"task-{number}.json"


# Two models -------------------------------------------------------------------------------------


def compare(before: Path, after: Path, *, num_tasks: int) -> tuple[Comparison, ...]:
    """Loss and tasks of two evaluated models on the same documents and questions, after − before.

    Args:
        before: Folder that one evaluation was written into.
        after: That of another with the same settings and text.
        num_tasks: That both were evaluated on; one whose score is no mean over questions is left out.
    """
    pairs = [(a, b) for a, b in zip(read_losses(before), read_losses(after), strict=True) if a[0]]
    found = [compare_losses("loss", [a for a, _ in pairs], [b for _, b in pairs])]
    for number in range(num_tasks):
        old, new = read_answers(before, number), read_answers(after, number)
        if old and new and sum(map(len, old[1].values())) > 1:
            found.append(compare_answers(old[0].task, _in_order(old[1]), _in_order(new[1])))
    return tuple(found)


def _in_order(answers: Answers) -> list[float]:
    return [score for task in sorted(answers) for score in answers[task]]


def compare_answers(measure: str, before: Sequence[float], after: Sequence[float]) -> Comparison:
    """Difference of the mean scores of the same questions, after − before.

    Where every answer is right or wrong, the p-value is McNemar's, exact, and the interval that of
    Bonett and Price (2012), which does not shrink to nothing where no answer changed. Other scores are
    compared by a paired t-test.

    Args:
        measure: What it is called.
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
    """Difference of the mean loss in nats a token over the same documents, after − before.

    Args:
        measure: What it is called.
        before: Tokens and summed nats of each document, at least two.
        after: The same documents in the same order.
    """
    counts = [count for count, _ in before]
    return _paired_t(measure, [b - a for (_, a), (_, b) in zip(before, after, strict=True)], counts)


def _paired_t(measure: str, differences: Sequence[float], counts: Sequence[int]) -> Comparison:
    """Of a ratio: summed differences over summed counts, the items independent."""
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
