"""Build the result tables of card and terminal, and draw conclusions from a build's numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from factory.artifacts import Build, Comparison, DataSource, Evaluation, TaskScore
from factory.report.markdown import number, percent, rate, ratio, signed, signed_percent, with_error
from factory.units import count, size

SIGNIFICANT = 2  # standard errors
NUM_WORST = 5


@dataclass(frozen=True)
class Row:
    """A row of the results: one text per model, and change and recovery of the one that ships if known."""

    label: str
    cells: list[str]
    change: str = ""
    recovery: str = ""


def headline(build: Build) -> list[tuple[str, str]]:
    """Return the figures that matter most, each with what it is: size, speed, loss on the first text."""
    before, after = build.source_parameters, build.result_parameters
    figures = [(signed_percent(after / before - 1), f"parameters: {count(before)} → {count(after)}")]
    if build.speed:
        old, new = build.speed.source.decode_tokens_per_second, build.speed.result.decode_tokens_per_second
        figures.append((ratio(new, old), f"speed of writing, on {build.speed.device}"))
    source, shipped = (build.evaluations[name].loss for name in ("source", build.shipped))
    losses = f"{number(source.nats)} → {number(shipped.nats)} nats per token"
    figures.append((signed(shipped.nats - source.nats), f"loss on {source.data.name}: {losses}"))
    return figures


def quality_table(build: Build) -> list[list[str]]:
    """Return header and rows: source, what ships, its change and recovery if known, and the third model.

    What a narrow screen shows first is what matters most. A star marks values that differ from the source
    by more than chance.
    """
    others = [name for name in ("pruned", "healed") if name in build.evaluations and name != build.shipped]
    names = ["source", build.shipped, *others]
    models = [f"{name} (this model)" if name == build.shipped else name for name in names]
    findings = task_findings(build)
    rows = [
        Row("", models, change="change", recovery="recovery"),
        *(row for number in range(num_texts(build)) for row in loss_rows(build, names, number)),
        *(task_row(build, names, finding) for finding in findings),
    ]
    return [
        [
            *(row.label, *row.cells[:2]),
            *[row.change] * bool(build.comparisons),
            *[row.recovery] * bool(findings),
            *row.cells[2:],
        ]
        for row in rows
    ]


def num_texts(build: Build) -> int:
    """Return the number of texts on which every model has a loss."""
    return min(len(evaluation.losses) for evaluation in build.evaluations.values())


def loss_rows(build: Build, names: Sequence[str], index: int) -> tuple[Row, Row, Row]:
    """Return the rows of a text: mean loss, the same relative to uniform guessing, and its exponential."""
    losses = [build.evaluations[name].losses[index] for name in names]
    stars = [_star(loss_comparison(build, name, index)) for name in names]
    cells = [with_error(loss.nats, loss.stderr) + star for loss, star in zip(losses, stars, strict=True)]
    on = ""
    if num_texts(build) > 1:
        on = f" on {losses[0].data.name}" + (
            f" ({losses[0].data.likeness(build.adapter.data).split()[0]})" if build.adapter else ""
        )
    change = _change(loss_comparison(build, build.shipped, index))
    return (
        Row(f"Loss{on}, nats per token ↓", cells, change=change),
        Row(f"Loss / log V{on} ↓", [number(loss.normalized) for loss in losses]),
        Row(f"Perplexity{on} ↓", [number(loss.perplexity, digits=2) for loss in losses]),
    )


def loss_comparison(build: Build, name: str, index: int) -> Comparison | None:
    """Return the comparison of a model with the source on one of the texts; None if not compared."""
    found = [c for c in build.comparisons.get(name, ()) if c.measure == "loss"]
    return found[index] if index < len(found) else None


def loss_findings(build: Build) -> list[dict[str, Any]]:
    """Return, for each text, what the cut cost and what healing took back, in nats per token."""
    findings = []
    for index in range(num_texts(build)):
        losses = {name: evaluation.losses[index] for name, evaluation in build.evaluations.items()}
        source, pruned = losses["source"], losses["pruned"]
        shipped, healed = losses[build.shipped], losses.get("healed")
        added = pruned.nats - source.nats
        taken_back = None if healed is None else pruned.nats - healed.nats
        findings.append(
            {
                "data": source.data,
                "like": source.data.likeness(build.adapter.data) if build.adapter else None,
                "source": source,
                "shipped": shipped,
                "comparison": loss_comparison(build, build.shipped, index),
                "added": added,
                "taken_back": taken_back,
                "share": None if taken_back is None or added <= 0 else taken_back / added,
                "harm": _harm(build, index),
            }
        )
    return findings


def _harm(build: Build, index: int) -> float | None:
    """Return how far healing raised the loss on a text unlike its own, beyond chance; None if it did not."""
    if build.adapter is None or build.shipped != "healed" or index >= len(build.healing):
        return None
    compared = build.healing[index]
    is_like = build.evaluations["source"].losses[index].data.likeness(build.adapter.data) == "like"
    return compared.difference if not is_like and compared.significant and compared.difference > 0 else None


def task_row(build: Build, names: Sequence[str], finding: dict[str, Any]) -> Row:
    """Return the row of each model's score in one task."""
    task: TaskScore = finding["source"]
    chance = "" if task.chance is None else f" (chance {number(task.chance)})"
    answers = "" if task.answers is None else f" by {task.answers}"
    scores = [_score_of(build.evaluations[name], task) for name in names]
    stars = [_star(comparison(build, name, task.task)) for name in names]
    return Row(
        f"{task.label}, {task.shots}, {task.metric}{answers} {task.arrow}".rstrip() + chance,
        [with_error(s.value, s.stderr) + star for s, star in zip(scores, stars, strict=True)],
        change=_change(finding["comparison"]),
        recovery="n/a" if finding["recovery"] is None else percent(finding["recovery"]),
    )


def _star(compared: Comparison | None) -> str:
    return "*" if compared and compared.significant else ""


def _change(compared: Comparison | None) -> str:
    if compared is None:
        return ""
    return f"{signed(compared.difference)} ({signed(compared.low)} to {signed(compared.high)})"


def comparison(build: Build, name: str, measure: str) -> Comparison | None:
    """Return the comparison of a model with the source on the loss or a task; None if not compared."""
    return next((c for c in build.comparisons.get(name, ()) if c.measure == measure), None)


def task_findings(build: Build) -> list[dict[str, Any]]:
    """Return, for each task, the scores of the source and of this model, and conclusions from them."""
    findings = []
    for source in build.evaluations["source"].tasks:
        shipped = _score_of(build.evaluations[build.shipped], source)
        compared = comparison(build, build.shipped, source.task)
        says_nothing = source.chance is not None and not is_above_chance(source)
        sign = {True: 1, False: -1, None: 0}[source.higher_is_better]  # sign of an improvement
        if not (math.isfinite(source.value) and math.isfinite(shipped.value)):
            worse, compared = False, None  # no conclusions without finite scores
        elif compared:
            worse = sign != 0 and compared.significant and not sign * compared.difference > 0
        else:  # no scores per question: compare by the errors alone, as if the questions differed
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
                "at_most": compared and (-compared.low if sign > 0 else compared.high),  # possible loss
                "no_direction": source.higher_is_better is None,
                "fall": _fall(source),
                "says_nothing": says_nothing,
            }
        )
    return findings


def _fall(task: TaskScore) -> tuple[str, str]:
    """Return the words for getting worse: ("fell", "fall")."""
    return ("rose", "rise") if task.higher_is_better is False else ("fell", "fall")


def worst_parts(build: Build) -> list[dict[str, Any]]:
    """Return the parts of each task group that lost most, worst first: label, both scores, questions."""
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
    """Say in which dtype the models ran; they can differ if a stage was made on another machine."""
    dtypes = {name: evaluation.dtype for name, evaluation in build.evaluations.items()}
    if len(set(dtypes.values())) == 1:
        return f"All models ran in {dtypes['source']}."
    return f"Not all models ran alike: {', '.join(f'{name} in {dtype}' for name, dtype in dtypes.items())}."


def _score_of(evaluation: Evaluation, like: TaskScore) -> TaskScore:
    return next(s for s in evaluation.tasks if (s.task, s.metric) == (like.task, like.metric))


def is_above_chance(score: TaskScore) -> bool:
    """Return whether a score exceeds chance by more than two standard errors."""
    return score.chance is not None and score.value - score.chance > SIGNIFICANT * (score.stderr or 0)


def recovery(source: TaskScore, shipped: TaskScore) -> float | None:
    """Return (score − chance) / (source − chance); None if the source is not clearly above chance."""
    if source.chance is None or not is_above_chance(source):
        return None
    return (shipped.value - source.chance) / (source.value - source.chance)


def size_table(build: Build) -> list[list[str]]:
    """Return header and rows of everything measured: source, this model, and their ratio."""
    rows = (
        parameters_row(build),
        weights_row(build),
        memory_row(build),
        cache_row(build),
        speed_row(build, "Prefill (reading the prompt), tokens/s", "prefill"),
        speed_row(build, "Decode (writing), tokens/s", "decode"),
    )
    return [["", "source", "this model", "ratio"], *(row for row in rows if row)]


def parameters_row(build: Build) -> list[str]:
    """Return the row of parameter counts."""
    before, after = build.source_parameters, build.result_parameters
    return ["Parameters", f"{before:,}", f"{after:,}", ratio(after, before)]


def weights_row(build: Build) -> list[str]:
    """Return the row of weight file sizes."""
    return ["Weight files", *_sizes(build.source_bytes, build.result_bytes)]


def memory_row(build: Build) -> list[str]:
    """Return the row of memory while generating; empty if it was not measured."""
    if build.speed is None:
        return []
    before, after = build.speed.source.memory_bytes, build.speed.result.memory_bytes
    if before is None or after is None:
        return []
    label = "Memory, at its peak" if build.speed.memory == "peak" else "Weights and cache in memory"
    return [label, *_sizes(before, after)]


def cache_row(build: Build) -> list[str]:
    """Return the row of cache growth; empty if it was not measured."""
    if build.speed is None:
        return []
    before, after = build.speed.source.cache_bytes_per_token, build.speed.result.cache_bytes_per_token
    if before is None or after is None:
        return []
    return ["Cache, bytes per token", f"{before:,.0f}", f"{after:,.0f}", ratio(after, before)]


def speed_row(build: Build, label: str, phase: str) -> list[str]:
    """Return the row of tokens per second in "prefill" or "decode"; empty if they were not measured."""
    if build.speed is None:
        return []
    sides = (build.speed.source, build.speed.result)
    rates = [getattr(side, f"{phase}_tokens_per_second") for side in sides]
    spreads = [getattr(side, f"{phase}_spread") for side in sides]
    return [label, *map(rate, rates, spreads), ratio(rates[1], rates[0])]


def _sizes(before: int, after: int) -> tuple[str, str, str]:
    return size(before, decimals=2), size(after, decimals=2), ratio(after, before)


def data_rows(build: Build) -> list[tuple[str, DataSource]]:
    """Return each text with its use."""
    used = [("calibration text", build.calibration)]
    if build.adapter:
        healing = build.adapter.data
        used += [(f"healing text, share {one.share:g}", one.data) for one in healing.mixed] or [
            ("healing text", healing)
        ]
    evaluation = build.evaluations[build.shipped]
    used += [("evaluation text", loss.data) for loss in evaluation.losses]
    return [*used, *((f"{score.label} questions", data) for score in evaluation.tasks for data in score.data)]
