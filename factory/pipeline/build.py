"""Run the stages of a build in order."""

from dataclasses import replace
from pathlib import Path

from factory.artifacts import Build, Checkpoint, Made, Source
from factory.builds.garbage import register
from factory.builds.swap import laying_out
from factory.config.criteria import CRITERIA
from factory.config.settings import BuildConfig
from factory.errors import HealingError
from factory.evaluation.decision import decide
from factory.pipeline.choosing import measure_stage, plan_stage, refuse_wrong_backend
from factory.pipeline.run import Missing, Run
from factory.pipeline.stages import (
    compare_evaluations,
    compare_healing,
    evaluate_stage,
    heal_stage,
    merge_stage,
    prune_stage,
    speed_stage,
)
from factory.store import stage


def stages_of(config: BuildConfig) -> tuple[str, ...]:
    """Return the stages that a build with these settings runs, in their order."""
    searches = not config.plan.layers and CRITERIA[config.plan.criterion].searches
    skipped = {stage.ASSEMBLE, stage.COMPARE, stage.PLAN if searches else stage.SEARCH}
    if not config.has_adapter:
        skipped |= {stage.HEAL, stage.MERGE}
    return (*(one.name for one in stage.STAGES.values() if one not in skipped), "card")


def pending(run: Run, source: Source) -> tuple[str, ...]:
    """Return the stages that a build would still have to run; empty if all of them can be reused."""
    looking = replace(run, only_look=True, keys={}, digests={}, folders={}, seconds={}, remade=set())
    try:
        make_models(looking, source)
    except Missing as missing:
        names = stages_of(run.config)
        return names[names.index(missing.stage) :]
    return ()


def build(run: Run, source: Source, *, out: Path, require_healing: bool = False) -> Build:
    """Turn a pulled source into a folder that can be published.

    source → profile → plan → pruned → adapter → healed → evaluations → card

    Raises:
        HealingError: Healing is required, but did not lower the loss on the held-out set.
    """
    made = make_models(run, source, require_healing=require_healing)
    return finish(run, made, out=out)


def make_models(run: Run, source: Source, *, require_healing: bool = False) -> Made:
    """Run every stage up to the evaluations of the models, reusing those that are already made."""
    profile = measure_stage(run, source)
    plan = plan_stage(run, source, profile)
    refuse_wrong_backend(run, source, plan)
    pruned = prune_stage(run, source, plan)
    adapter = heal_stage(run, source, plan, pruned) if run.config.has_adapter else None
    healed = merge_stage(run, pruned, adapter) if adapter else None
    if healed and healed.guard_losses and require_healing and not healed.helped:
        raise _not_helped(
            "changed the held-out loss from {unhealed:.4f} to {healed:.4f}".format(**healed.guard_losses), run
        )
    models: dict[str, Source | Checkpoint] = {"source": source, "pruned": pruned}
    if healed and healed.is_finite:
        models["healed"] = healed
    evaluations = {name: evaluate_stage(run, name, model) for name, model in models.items()}
    known = healed.guard_losses if healed else None
    decision = decide(adapter, known, evaluations) if adapter and known else None
    if decision and decision.text and not decision.ships and require_healing:
        raise _not_helped(
            f"lowered the held-out loss by {decision.gain:.4f}, and raised that on "
            f"{decision.text.name} by {decision.harm:.4f}",
            run,
        )
    # Healing that did more harm than good on text it had not seen is kept in the store but not shipped.
    ships = healed if decision and decision.ships else None
    result, shipped = (ships, "healed") if ships else (pruned, "pruned")
    return Made(
        source=source,
        profile=profile,
        plan=plan,
        pruned=pruned,
        adapter=adapter,
        healed=healed,
        result=result,
        shipped=shipped,
        decision=decision,
        evaluations=evaluations,
        speed=speed_stage(run, source, result, shipped),
    )


def _not_helped(what: str, run: Run) -> HealingError:
    return HealingError(
        f"healing {what}, but `require_healing` is on",
        hint=f"try more `heal_steps` or another `heal_lr`; the adapter is in {run.folders['heal']}",
    )


def finish(run: Run, made: Made, *, out: Path) -> Build:
    """Write the build folder: weights, card, figures, `build.json`."""
    from factory.builds.folder import lay_out, read_if_same
    from factory.builds.record import describe_build

    comparisons = compare_evaluations(run, made.evaluations)
    build = describe_build(
        run.config,
        run.texts,
        made,
        comparisons=comparisons,
        healing=compare_healing(run, made.evaluations),
        keys=run.keys,
        seconds=run.seconds,
    )
    with laying_out(out, on_wait=lambda: run.reporter.waiting("card")):
        same = None if run.remade else read_if_same(build, out)
        register(run.store.home, out, run.keys)  # first, so that `factory gc` finds what a kill leaves
        if not same:
            run.reporter.started("card")
            lay_out(build, made.profile, made.result.folder, out=out)
    run.reporter.finished("card", str(out), 0.0, same is not None)
    return same or build
