"""Store the answers of an evaluation: the loss of each document and the score of each question."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from factory.artifacts import TaskScore
from factory.store.files import write_atomically

FLOAT_RANGE = 709.0  # largest exponent of exp() in float64
LOSSES = "losses.json"
Losses = Sequence[tuple[int, float]]  # predicted tokens and summed nats per document
Scores = Sequence[float]  # per question; the task's score is their mean
Answers = Mapping[str, Scores | Losses]  # task → the values behind its score, in the order of the questions


def write_losses(folder: Path, losses: Losses) -> None:
    """Store the losses of the documents so far; a document too short to have one counts as (0, 0)."""
    write_atomically(folder / LOSSES, json.dumps(losses))


def read_losses(folder: Path) -> list[tuple[int, float]]:
    """Read the losses that `write_losses` stored; empty if there are none yet."""
    path = folder / LOSSES
    return [(count, nats) for count, nats in json.loads(path.read_text())] if path.is_file() else []


def write_answers(folder: Path, number: int, scored: Sequence[tuple[TaskScore, Answers]]) -> None:
    """Store the scores and answers of the `number`-th requested task; a group can have several scores."""
    value = [{"score": score.model_dump(mode="json"), "answers": answers} for score, answers in scored]
    write_atomically(_answers(folder, number), json.dumps(value))


def read_answers(folder: Path, number: int) -> list[tuple[TaskScore, Answers]] | None:
    """Read the scores and answers that `write_answers` stored; None if that task is not finished."""
    path = _answers(folder, number)
    if not path.is_file():
        return None
    value = json.loads(path.read_text(encoding="utf-8"))
    return [(TaskScore.model_validate(one["score"]), one["answers"]) for one in value]


def _answers(folder: Path, number: int) -> Path:
    return folder / f"task-{number}.json"


def as_mean(found: Mapping[str, Sequence[Any]], value: float) -> Answers | None:
    """Return the scores of the questions if the task's score is their mean, else None."""
    scores = [score for task in found.values() for score in task]
    if not scores or not all(isinstance(score, Real) for score in scores):
        return None
    answers = {task: [float(score) for score in logged] for task, logged in found.items()}
    mean = math.fsum(score for task in answers.values() for score in task) / len(scores)
    return answers if math.isclose(mean, value) else None


def as_perplexity(found: Mapping[str, Sequence[Any]], value: float) -> Answers | None:
    """Return units and nats of the texts if the score is a perplexity or bits per unit, else None.

    lm-eval gives the log-likelihood of a text, with its number of words or bytes unless it counts as one.
    """
    answers: dict[str, Losses] = {}
    for task, logged in found.items():
        pairs = [pair if isinstance(pair, tuple) else (pair, 1) for pair in logged]
        if not all(len(pair) == 2 and all(isinstance(part, Real) for part in pair) for pair in pairs):
            return None
        answers[task] = [(int(units), -float(likelihood)) for likelihood, units in pairs]
    together = [pair for task in answers.values() for pair in task]
    return answers if together and scale_of(together, value) else None


def scale_of(losses: Losses, value: float) -> Callable[[float], float] | None:
    """Return the function from a difference in nats per unit to one of the score; None if it is unknown."""
    units = sum(count for count, _ in losses)
    if not units:
        return None
    nats = math.fsum(loss for _, loss in losses) / units
    if math.isclose(_exp(nats), value, rel_tol=1e-6):
        return lambda difference: value * (_exp(difference) - 1)
    if math.isclose(nats / math.log(2), value, rel_tol=1e-6):
        return lambda difference: difference / math.log(2)
    return None


def _exp(exponent: float) -> float:
    return math.exp(exponent) if exponent < FLOAT_RANGE else math.inf
