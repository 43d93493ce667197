"""The stages in order, and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from factory.artifacts import (
    Adapter,
    Build,
    Checkpoint,
    DistanceProfile,
    Evaluation,
    Plans,
    PruningPlan,
    Publication,
    Source,
    SpeedComparison,
)
from factory.config import num_dropped
from factory.errors import HealingError
from factory.place import laying_out
from factory.references import Criterion
from factory.run import Missing, Run
from factory.stages import (
    compare_evaluations,
    compare_stage,
    evaluate_stage,
    heal_stage,
    measure_stage,
    merge_stage,
    plan_stage,
    prune_stage,
    speed_stage,
)
from factory.store import STAGES as STORED
from factory.sweep import RULE, Sweep, SweepPoint, before_the_cliff

STAGES = (*STORED, "card")


def pending(run: Run, source: Source) -> tuple[str, ...]:
    """Stages that a build would still have to run; empty if all of them can be reused."""
    looking = replace(run, only_look=True, keys={}, digests={}, folders={}, seconds={}, remade=set())
    try:
        make_models(looking, source)
    except Missing as missing:
        return STAGES[STAGES.index(missing.stage) :]
    return ()


def build(run: Run, source: Source, *, out: Path, require_healing: bool = False) -> Build:
    """Turn a pulled source into a folder that can be published.

    source → profile → plan → pruned → adapter → healed → evaluations → card

    Raises:
        HealingError: Healing is required, and did not lower the loss on text held back.
    """
    made = make_models(run, source, require_healing=require_healing)
    return finish(run, made, out=out)


@dataclass(frozen=True)
class Made:
    """Everything the stages made, ready for the card."""

    source: Source
    profile: DistanceProfile
    plan: PruningPlan
    pruned: Checkpoint
    adapter: Adapter | None
    healed: Checkpoint | None
    shipped: Checkpoint
    shipped_name: str  # "healed" or "pruned"
    evaluations: dict[str, Evaluation]
    speed: SpeedComparison


def make_models(run: Run, source: Source, *, require_healing: bool = False) -> Made:
    """Every stage up to the measurements on the models; each is reused if it is there."""
    profile = measure_stage(run, source)
    plan = plan_stage(run, source, profile)
    pruned = prune_stage(run, source, plan)
    adapter = heal_stage(run, source, plan, pruned) if run.config.heal_enabled else None
    healed = merge_stage(run, pruned, adapter) if adapter else None
    if healed and healed.guard_losses and require_healing and not healed.helped:
        raise HealingError(
            "healing took the held-back loss from {unhealed:.4f} to {healed:.4f}".format(
                **healed.guard_losses
            )
            + ", and --require-healing is on",
            hint=f"more --heal-steps or another --heal-lr may help; the adapter is in {run.folders['heal']}",
        )
    models: dict[str, Source | Checkpoint] = {"source": source, "pruned": pruned}
    if healed and healed.is_finite:
        models["healed"] = healed
    evaluations = {name: evaluate_stage(run, name, model) for name, model in models.items()}
    # A heal that did not lower the loss on text it had not seen is kept in the store but not shipped.
    shipped, shipped_name = (healed, "healed") if healed and healed.helped else (pruned, "pruned")
    speed = speed_stage(run, source, shipped, shipped_name)
    return Made(source, profile, plan, pruned, adapter, healed, shipped, shipped_name, evaluations, speed)


def make_plans(
    run: Run, source: Source, criteria: Sequence[Criterion], *, profile: DistanceProfile | None = None
) -> tuple[DistanceProfile, Plans]:
    """What each criterion would drop; where there are several, what that costs, on the same documents.

    Args:
        profile: Measured elsewhere; None measures.
    """
    from factory.plan import choose

    if profile:
        run.keys["measure"] = sha256(profile.model_dump_json().encode()).hexdigest()
    else:
        profile = measure_stage(run, source)
    plans = [plan_stage(run, source, profile, criterion=criterion) for criterion in criteria]
    losses = compare_stage(run, source, [plan.dropped for plan in plans]) if len(plans) > 1 else None
    chosen, reason = choose(plans, losses) if losses else (criteria[0], "the only one asked for")
    return profile, Plans(
        source_name=source.name,
        source_commit=source.commit,
        plans=tuple(plans),
        losses=losses,
        chosen=chosen,
        reason=reason,
    )


def sweep(run: Run, source: Source, drops: Sequence[float]) -> Sweep:
    """Quality at each fraction, on the files of the pruned and, where asked, the healed model.

    One measurement serves all; the stages are those of builds, which reuse them.

    Args:
        drops: Rising fractions, each another number of layers.
    """
    run.block_sizes = tuple(num_dropped(drop, source.num_layers) for drop in drops)
    profile = measure_stage(run, source)
    whole = evaluate_stage(run, "source", source)
    points = []
    for drop in drops:
        run.config = run.config.model_copy(update={"drop": drop})
        plan = plan_stage(run, source, profile)
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


def finish(run: Run, made: Made, *, out: Path) -> Build:
    """Lay out the folder that is published: weights, card, figures, `build.json`."""
    from factory.layout import describe_build, lay_out, read_if_same

    comparisons = compare_evaluations(run, made.evaluations)
    build = describe_build(
        run.config, run.texts, made, comparisons=comparisons, keys=run.keys, seconds=run.seconds
    )
    with laying_out(out, on_wait=lambda: run.reporter.waiting("card")):
        same = None if run.remade else read_if_same(build, out)
        run.store.register(out, run.keys)  # before: what a kill leaves beside it is found by `factory gc`
        if not same:
            run.reporter.started("card")
            lay_out(build, made.profile, made.shipped.folder, out=out)
    run.reporter.finished("card", str(out), 0.0, same is not None)
    return same or build


def publish(
    folder: Path, repository: str | None, *, space: str | None = None, **options: Any
) -> tuple[Publication, bool]:
    """Publish a finished build: its card names the repository, then everything goes up in one commit.

    A card that somebody has edited is published as it is.

    Args:
        folder: The build.
        repository: `owner/name`; None: the source's name and the fraction, under who is logged in.
        space: The comparison Space that the card links to; None: the one it links to already, if any.
        options: Of `hub.push`.

    Returns:
        What lies on the Hub, and whether the card is an edited one.
    """
    from factory import hub
    from factory.card import renewed_card
    from factory.layout import check_nothing_added, check_whole
    from factory.publish import label

    build = Build.read(folder)
    check_nothing_added(folder)
    check_whole(build, folder)
    if repository is None:
        repository = hub.default_repo_name(build.source, build.config["drop"])
    repo_id = hub.full_name(repository)
    known = Publication.read(folder) if (folder / Publication.file_name).is_file() else None
    pull_request = None
    if known and known.repo_id == repo_id:
        space, pull_request = space or known.space, known.pull_request
    with renewed_card(build, folder / "model", repo_id=repo_id, space=space) as is_edited:
        pushed = hub.push(
            folder / "model", repo_id=repo_id, pull_request=pull_request, named=label(build), **options
        )
    publication = pushed.model_copy(update={"space": space})
    publication.write(folder)
    return publication, is_edited
