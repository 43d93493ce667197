"""Turn lm-eval's results into scores: choose the metric, its chance level and the answers behind it."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from factory.artifacts import DataSource, PartScore, TaskScore
from factory.errors import DataError, UsageError
from factory.evaluation.answers import Answers, as_mean, as_perplexity

COMMIT = re.compile(r"[0-9a-f]{40}")
METRICS = ("acc_norm", "acc", "exact_match")  # in order of preference
NO_METRIC = "bypass"  # lm-eval's name for answers that are kept but not scored
MAX_ROWS = 20  # per group or tag


def rows_of(name: str, loaded: Any) -> dict[str, list[str]]:
    """Return the tasks and groups that get a score each, with the tasks behind it.

    A group has its own score if each of its tasks has a metric that the group averages. For other groups
    and for tags lm-eval computes none, so each member has one.
    """
    groups = loaded.get("groups", {})
    rows: dict[str, list[str]] = {}
    left = [name] if name in groups else list(loaded["tasks"])
    while left:
        member = left.pop(0)
        if member not in groups:
            rows[member] = [member]
        elif _averages(groups[member]):
            rows[member] = [task.task_name for task in groups[member].get_all_tasks()]
        else:
            left = [*groups[member].child_names, *left]
    return rows


def _averages(group: Any) -> bool:
    """Return whether all tasks of a group have a metric that it averages."""
    averaged = {entry.metric for entry in group.aggregate_metric_list or ()}
    given = [set(task.aggregation()) for task in group.get_all_tasks()]
    return bool(given) and bool(averaged.intersection(*given))


def check_scored(task: str, name: str, loaded: Any) -> None:
    """Refuse, before the work, tasks that cannot give a score.

    Raises:
        UsageError: There are no tasks, too many, or one that cannot be answered or scored here.
    """
    rows = rows_of(name, loaded)
    if not rows:
        raise UsageError(
            f"{task!r} is a group without tasks", hint="`task:` of a group is a list of their names"
        )
    if len(rows) > MAX_ROWS:
        some = ",".join(list(rows)[:3])
        raise UsageError(
            f"{task!r} has no score of its own, but {len(rows)} members that do",
            hint=f"name those that matter, as in `tasks={some}`",
        )
    for part, one in loaded["tasks"].items():
        if getattr(one, "UNSAFE_CODE", False):
            raise UsageError(
                f"task {part!r} runs programs written by the model, which is not supported",
                hint="remove it from `tasks`",
            )
        if getattr(one, "MULTIMODAL", False):
            raise UsageError(
                f"task {part!r} asks about images or sounds, not text", hint="remove it from `tasks`"
            )
        if set(one.aggregation()) == {NO_METRIC}:
            raise UsageError(f"task {part!r} has no metric but {NO_METRIC!r}", hint="remove it from `tasks`")


def task_score(
    name: str, parts: Sequence[Any], results: dict[str, Any], *, runs_code: bool
) -> tuple[TaskScore, Answers]:
    """Return the score of one row, and those of its questions if the score follows from them.

    Args:
        name: Name of a task or group.
        parts: lm-eval's loaded tasks that it consists of.
        results: Results of lm-eval.
        runs_code: Whether Python from a task file was run for it.

    Raises:
        DataError: lm-eval gives no number.
    """
    values = results["results"][name]
    key = _shown(name, values)
    metric, _, answers = key.partition(",")
    stderr = values.get(f"{metric}_stderr,{answers}")
    # A task with several ways to extract an answer logs each question once per way; rows of several
    # processes come one process after another.
    rows = {
        part.task_name: sorted(
            (row for row in results["samples"][part.task_name] if row["filter"] == answers),
            key=lambda row: row["doc_id"],
        )
        for part in parts
    }
    shots = {results["n-shot"].get(task, 0) or 0 for task in rows}
    samples = [row for task in rows.values() for row in task]
    value, rises = float(values[key]), _direction(metric, parts)
    is_share = (metric.startswith("acc") or metric == "exact_match") and 0 <= value <= 1
    score = TaskScore(
        task=name,
        label=values.get("alias", name).strip(" -"),
        metric=metric,
        value=value,
        stderr=float(stderr) if isinstance(stderr, Real) else None,
        num_fewshot=int(shots.pop()) if len(shots) == 1 else None,
        num_samples=len(samples),
        chance=_chance(samples) if metric.startswith("acc") and rises and is_share else None,
        higher_is_better=rises,
        is_share=is_share,
        version=str(results["versions"].get(name, "")),
        data=_question_data(parts),
        answers=None if answers == "none" else answers,
        parts=_part_scores(key, rows, results["results"]),
        runs_code=runs_code,
        writes=any(part.OUTPUT_TYPE == "generate_until" for part in parts),
    )
    return score, _answers(rows, metric=metric, value=value) if math.isfinite(value) else {}


def _shown(name: str, values: dict[str, Any]) -> str:
    """Return the key of the number to show: "acc,none" is a metric and a filter."""
    keys = [
        key
        for key, value in values.items()
        if "," in key and "_stderr," not in key and isinstance(value, Real)
        if not key.startswith(f"{NO_METRIC},")
    ]
    if not keys:
        raise DataError(f"lm-eval gives no number for task {name!r}", hint="remove it from `tasks`")
    known = (key for metric in METRICS for key in keys if key.startswith(f"{metric},"))
    return next(known, keys[0])


def _direction(metric: str, parts: Iterable[Any]) -> bool | None:
    """Return whether higher values are better; None if the tasks do not say, or disagree."""
    from lm_eval.api.registry import is_higher_better

    directions = {part.higher_is_better().get(metric, is_higher_better(metric)) for part in parts}
    direction = directions.pop()
    return direction if not directions and isinstance(direction, bool) else None


def _part_scores(key: str, rows: dict[str, Any], results: dict[str, Any]) -> tuple[PartScore, ...]:
    if len(rows) < 2:
        return ()
    return tuple(
        PartScore(
            label=results[task]["alias"].strip(" -"), value=float(results[task][key]), num_samples=len(logged)
        )
        for task, logged in rows.items()
        if isinstance(results[task].get(key), Real)
    )


def _answers(rows: dict[str, list[dict[str, Any]]], *, metric: str, value: float) -> Answers:
    """Return the score of each question if the task's score follows from them in a known way."""
    found = {task: [row.get(metric) for row in logged] for task, logged in rows.items()}
    for known in (as_mean, as_perplexity):
        if (answers := known(found, value)) is not None:
            return answers
    return {}


def _question_data(parts: Iterable[Any]) -> tuple[DataSource, ...]:
    """Return the Hub data sets of loaded tasks, with the commit that was read.

    lm-eval pins no commit; `datasets` names its cache folder after the one it found.
    """
    found = set()
    for part in parts:
        split = part.config.test_split or part.config.validation_split
        for file in getattr((part.dataset or {}).get(split), "cache_files", ()):
            commit = Path(file["filename"]).parent.name
            if COMMIT.fullmatch(commit):
                found.add((part.config.dataset_path, split, commit))
    return tuple(
        DataSource(name=path, version=commit, hub_id=path, split=split)
        for path, split, commit in sorted(found)
    )


def _chance(samples: list[dict[str, Any]]) -> float | None:
    """Return the score without reading the question: of guessing, or of always the most common answer.

    The latter applies if all questions offer the same answers: 62 % of BoolQ's are "yes".
    """
    choices = [len(sample["filtered_resps"]) for sample in samples]
    if not choices or min(choices) < 2:
        return None
    guessing = sum(1 / count for count in choices) / len(choices)
    offered = {tuple(arguments[1] for arguments in sample["arguments"]) for sample in samples}
    if len(offered) > 1:
        return guessing
    commonest = max(Counter(str(sample["target"]) for sample in samples).values())
    return max(guessing, commonest / len(samples))
