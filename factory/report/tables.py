"""Findings: the tables of the card, and what follows from the numbers of a build."""

import math
from collections.abc import Sequence
from typing import Any

from factory.artifacts import Build, Comparison, DataSource, Evaluation, Speed, TaskScore
from factory.report.markdown import number, percent, rate, ratio, signed, with_error
from factory.units import size

SIGNIFICANT = 2  # standard errors
NUM_WORST = 5


def quality_rows(build: Build) -> list[list[str]]:
    """Head, losses and tasks: a column a model, then change and recovery where they are known.

    A star marks what differs from the source by more than chance.
    """
    names = [name for name in ("source", "pruned", "healed") if name in build.evaluations]
    losses = [build.evaluations[name].loss for name in names]
    stars = [_star(comparison(build, name, "loss")) for name in names]
    rows = [
        ["", *(f"{name} (this model)" if name == build.shipped else name for name in names)],
        [
            "Loss, nats per token ↓",
            *(with_error(loss.nats, loss.stderr) + star for loss, star in zip(losses, stars, strict=True)),
        ],
        ["Loss / log V ↓", *(number(loss.normalized) for loss in losses)],
        ["Perplexity ↓", *(number(loss.perplexity, digits=2) for loss in losses)],
    ]
    changes: list[Comparison | None] = [comparison(build, build.shipped, "loss"), None, None]
    findings = task_findings(build)
    for finding in findings:
        rows.append([_task_label(finding["source"]), *_scores(build, names, finding["source"])])
        changes.append(finding["comparison"])
    if build.comparisons:
        for row, change in zip(rows, ["change", *map(_change, changes)], strict=True):
            row.append(change)
    if findings:
        recoveries = [finding["recovery"] for finding in findings]
        shown = ["n/a" if recovery is None else percent(recovery) for recovery in recoveries]
        for row, cell in zip(rows, ["recovery", "", "", "", *shown], strict=True):
            row.append(cell)
    return rows


def _task_label(task: TaskScore) -> str:
    chance = "" if task.chance is None else f" (chance {number(task.chance)})"
    answers = "" if task.answers is None else f" by {task.answers}"
    return f"{task.label}, {task.shots}, {task.metric}{answers} {task.arrow}".rstrip() + chance


def _scores(build: Build, names: Sequence[str], task: TaskScore) -> list[str]:
    scores = [_score_of(build.evaluations[name], task) for name in names]
    stars = [_star(comparison(build, name, task.task)) for name in names]
    return [with_error(s.value, s.stderr) + star for s, star in zip(scores, stars, strict=True)]


def _star(compared: Comparison | None) -> str:
    return "*" if compared and compared.significant else ""


def _change(compared: Comparison | None) -> str:
    if compared is None:
        return ""
    return f"{signed(compared.difference)} ({signed(compared.low)} to {signed(compared.high)})"


def comparison(build: Build, name: str, measure: str) -> Comparison | None:
    """Of one model with the source, on the loss or a task; None where the two were not compared."""
    return next((c for c in build.comparisons.get(name, ()) if c.measure == measure), None)


def task_findings(build: Build) -> list[dict[str, Any]]:
    """For each task: score of the source and of this model, and what follows from the two."""
    findings = []
    for source in build.evaluations["source"].tasks:
        shipped = _score_of(build.evaluations[build.shipped], source)
        compared = comparison(build, build.shipped, source.task)
        says_nothing = source.chance is not None and not is_above_chance(source)
        sign = {True: 1, False: -1, None: 0}[source.higher_is_better]  # of what is gained
        if not (math.isfinite(source.value) and math.isfinite(shipped.value)):
            worse, compared = False, None  # nothing follows from what is no number
        elif compared:
            worse = sign != 0 and compared.significant and not sign * compared.difference > 0
        else:  # no score a question: their errors alone, as if the questions were others
            error = math.hypot(source.stderr or 0, shipped.stderr or 0)
            worse = sign * (source.value - shipped.value) > SIGNIFICANT * error
        findings.append(
            {
                "source": source,
                "shipped": shipped,
                "comparison": compared,
                "recovery": recovery(source, shipped),
                "at_chance": is_above_chance(source) and not is_above_chance(shipped),
                "worse": worse,
                "no_loss": compared is not None
                and bool(sign)
                and not compared.significant
                and not says_nothing,
                "at_most": compared and (-compared.low if sign > 0 else compared.high),  # lost, at most
                "no_direction": source.higher_is_better is None,
                "fall": _fall(source),
                "says_nothing": says_nothing,
            }
        )
    return findings


def _fall(task: TaskScore) -> tuple[str, str]:
    """How getting worse is called: ("fell", "fall")."""
    return ("rose", "rise") if task.higher_is_better is False else ("fell", "fall")


def worst_parts(build: Build) -> list[dict[str, Any]]:
    """Of each group of tasks, the parts that lost most, worst first: label, both scores, questions."""
    groups = []
    for source in build.evaluations["source"].tasks:
        after = {part.label: part for part in _score_of(build.evaluations[build.shipped], source).parts}
        pairs = [(part, after[part.label]) for part in source.parts if part.label in after]
        sign = {True: 1, False: -1, None: 0}[source.higher_is_better]
        lost = [(sign * (a.value - b.value), a, b) for a, b in pairs]
        fallen = [(a, b) for loss, a, b in sorted(lost, key=lambda one: -one[0]) if loss > 0]
        if fallen:
            rows = [
                [a.label, number(a.value), number(b.value), signed(b.value - a.value), str(a.num_samples)]
                for a, b in fallen[:NUM_WORST]
            ]
            groups.append(
                {"label": source.label, "num_parts": len(pairs), "rows": rows, "fall": _fall(source)}
            )
    return groups


def precision(build: Build) -> str:
    """In which dtype the models ran; they can differ where a stage was made on another machine."""
    dtypes = {name: evaluation.dtype for name, evaluation in build.evaluations.items()}
    if len(set(dtypes.values())) == 1:
        return f"All models ran in {dtypes['source']}."
    return f"Not all models ran alike: {', '.join(f'{name} in {dtype}' for name, dtype in dtypes.items())}."


def gap_closed(build: Build) -> float | None:
    """Share of the loss that the cut had added and healing took away again; None without such a loss."""
    if build.shipped != "healed":
        return None
    source, pruned, healed = (build.evaluations[name].loss.nats for name in ("source", "pruned", "healed"))
    return (pruned - healed) / (pruned - source) if pruned > source else None


def _score_of(evaluation: Evaluation, like: TaskScore) -> TaskScore:
    return next(s for s in evaluation.tasks if (s.task, s.metric) == (like.task, like.metric))


def is_above_chance(score: TaskScore) -> bool:
    """Whether a score exceeds chance by more than two standard errors."""
    return score.chance is not None and score.value - score.chance > SIGNIFICANT * (score.stderr or 0)


def recovery(source: TaskScore, shipped: TaskScore) -> float | None:
    """(score − chance) / (source − chance); None where the source is not clearly above chance."""
    if source.chance is None or not is_above_chance(source):
        return None
    return (shipped.value - source.chance) / (source.value - source.chance)


def size_rows(build: Build) -> list[list[str]]:
    """Label, source, this model, ratio: parameters, bytes and, where measured, memory and tokens a second."""
    before, after = build.source_parameters, build.result_parameters
    rows = [["Parameters", f"{before:,}", f"{after:,}", ratio(after, before)]]
    before, after = build.source_bytes, build.result_bytes
    rows.append(["Weight files", size(before, decimals=2), size(after, decimals=2), ratio(after, before)])
    if build.speed:
        old, new = build.speed.source, build.speed.result
        rows += _memory_rows(old, new, counted=build.speed.memory or "")
        for label, speed, spread in (
            ("Prefill (reading the prompt), tokens/s", "prefill_tokens_per_second", "prefill_spread"),
            ("Decode (writing), tokens/s", "decode_tokens_per_second", "decode_spread"),
        ):
            rates = [rate(getattr(side, speed), getattr(side, spread)) for side in (old, new)]
            rows.append([label, *rates, ratio(getattr(new, speed), getattr(old, speed))])
    return rows


def _memory_rows(old: Speed, new: Speed, *, counted: str) -> list[list[str]]:
    rows = []
    if old.memory_bytes is not None and new.memory_bytes is not None:
        label = "Memory, at its peak" if counted == "peak" else "Weights and cache in memory"
        sizes = size(old.memory_bytes, decimals=2), size(new.memory_bytes, decimals=2)
        rows.append([label, *sizes, ratio(new.memory_bytes, old.memory_bytes)])
    before, after = old.cache_bytes_per_token, new.cache_bytes_per_token
    if before is not None and after is not None:
        rows.append(["Cache, bytes a token", f"{before:,.0f}", f"{after:,.0f}", ratio(after, before)])
    return rows


def data_rows(build: Build) -> list[tuple[str, DataSource]]:
    """Each text with what it was used for."""
    used = [("calibration text", build.calibration)]
    if build.adapter:
        used.append(("healing text", build.adapter.data))
    evaluation = build.evaluations[build.shipped]
    used.append(("evaluation text", evaluation.loss.data))
    return [*used, *((f"{score.label} questions", data) for score in evaluation.tasks for data in score.data)]
