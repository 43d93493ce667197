"""Sweep: measure quality against the fraction of dropped layers, and find where its plateau ends."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from factory.artifacts import Evaluation, Source, Sweep, SweepPoint, TaskScore
from factory.builds.swap import output_folder
from factory.config.request import SweepRequest
from factory.config.settings import num_dropped
from factory.pipeline.choosing import measure_stage, plan_stage, refuse_wrong_backend
from factory.pipeline.prepare import begin
from factory.pipeline.run import Reporter, Run
from factory.pipeline.source import pull_and_trust
from factory.pipeline.stages import (
    evaluate_stage,
    heal_stage,
    merge_stage,
    prune_stage,
)
from factory.pipeline.texts import check_tokens

SHARE_KEPT = 0.8
RULE = (
    f"the largest cut that, like all smaller ones, keeps {SHARE_KEPT:.0%} of the source's margin over "
    "guessing: (score − chance) / (source − chance), averaged over the tasks that have a chance level and "
    "on which the source is above it; without such a task, (log V − loss) / (log V − source loss) "
    "on the first text"
)


@dataclass(frozen=True)
class PreparedSweep:
    """A checked sweep."""

    source: Source
    run: Run  # whose block sizes are the numbers of layers to drop
    drops: tuple[float, ...]  # ascending, each a different number of layers
    out: Path


def prepare_sweep(request: SweepRequest, reporter: Reporter) -> PreparedSweep:
    """Resolve, settle and check a sweep before it begins."""
    source, run = begin(request, reporter, drop=request.drop[0])
    by_size = {num_dropped(drop, source.num_layers): drop for drop in reversed(request.drop)}
    run.block_sizes = tuple(sorted(by_size))
    out = output_folder(request.out or Path("sweeps") / source.name)
    return PreparedSweep(source, run, tuple(by_size[size] for size in run.block_sizes), out)


def run_sweep(prepared: PreparedSweep, reporter: Reporter) -> Sweep:
    """Make and measure every cut, then write the result and its figure."""
    from factory.report.sweep_figure import sweep_figure

    run = prepared.run
    source = pull_and_trust(prepared.source, reporter, home=run.store.home, in_use=run.in_use)
    check_tokens(source, run.texts, run.config, note=reporter.note)
    found = sweep(run, source, prepared.drops)
    found.write(prepared.out)
    sweep_figure(found, path_stem=prepared.out / "sweep")
    return found


def sweep(run: Run, source: Source, drops: Sequence[float]) -> Sweep:
    """Evaluate the pruned and, if requested, the healed model at each fraction.

    One measurement serves all fractions; builds reuse the stages.

    Args:
        drops: Ascending fractions, each a different number of layers.
    """
    profile = measure_stage(run, source)
    whole = evaluate_stage(run, "source", source)
    points = []
    for drop in drops:
        run.config = run.config.model_copy(update={"drop": drop})
        plan = plan_stage(run, source, profile)
        refuse_wrong_backend(run, source, plan)
        pruned = prune_stage(run, source, plan)
        adapter = heal_stage(run, source, plan, pruned) if run.config.heal_enabled else None
        healed = merge_stage(run, pruned, adapter) if adapter else None
        points.append(
            SweepPoint(
                drop=len(plan.dropped) / source.num_layers,
                plan=plan,
                pruned=evaluate_stage(run, "pruned", pruned),
                healed=evaluate_stage(run, "healed", healed) if healed and healed.is_finite else None,
            )
        )
    return Sweep(
        source_name=source.name,
        source_commit=source.commit,
        num_layers=source.num_layers,
        criterion=run.config.plan.criterion,
        source=whole,
        points=tuple(points),
        before_the_cliff=before_the_cliff(points, whole),
        rule=RULE,
    )


def share_kept(evaluation: Evaluation, source: Evaluation) -> float:
    """Return the share of the source's advantage over guessing that is kept: 1 is the source, 0 guessing.

    NaN if the source has no such advantage.
    """
    shares = [
        (after.value - chance) / (before.value - chance)
        for after, before, chance in _counted(evaluation, source)
    ]
    if shares:
        return math.fsum(shares) / len(shares)
    advantage = 1 - source.loss.normalized
    return (1 - evaluation.loss.normalized) / advantage if advantage > 0 else math.nan


def _counted(evaluation: Evaluation, source: Evaluation) -> list[tuple[TaskScore, TaskScore, float]]:
    """Return the tasks on which the source is above chance: the score, the source's, and chance."""
    return [
        (after, before, after.chance)
        for after, before in zip(evaluation.tasks, source.tasks, strict=True)
        if after.chance is not None and before.value - after.chance > 2 * (before.stderr or 0.0)
    ]


def kept_stderr(evaluation: Evaluation, source: Evaluation) -> float:
    """Return the standard error of `share_kept`, as if both models had met other samples: an upper bound.

    The two err alike on the same samples, so the share itself is known better.
    """
    pairs = [
        (after.value - chance, before.value - chance, after.stderr or 0.0, before.stderr or 0.0)
        for after, before, chance in _counted(evaluation, source)
    ]
    if not pairs:
        after, before = evaluation.loss, source.loss
        error, of_source = (one.stderr * one.normalized / one.nats for one in (after, before))
        pairs = [(1 - after.normalized, 1 - before.normalized, error, of_source)]
    if not all(before > 0 for _, before, *_ in pairs):
        return math.nan
    errors = [
        math.hypot(error, after / before * of_source) / before for after, before, error, of_source in pairs
    ]
    return math.hypot(*errors) / len(errors)


def left_out(source: Evaluation) -> list[str]:
    """Return labels of the tasks that `share_kept` ignores because they have no known chance level."""
    return [task.label for task in source.tasks if task.chance is None]


def before_the_cliff(points: Sequence[SweepPoint], source: Evaluation) -> float | None:
    """Return the largest fraction that meets `RULE`, or None if not even the first point does.

    Args:
        points: Points in ascending order of the fraction.
    """
    largest = None
    for point in points:
        if not share_kept(point.best, source) >= SHARE_KEPT:
            break
        largest = point.drop
    return largest
