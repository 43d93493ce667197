"""Define the stages that choose the layers: inputs, parameters in the key, work, summary line."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from factory.artifacts import Artifact, CutLosses, DistanceProfile, PruningPlan, Source
from factory.config.criteria import CRITERIA
from factory.config.settings import PlanSettings, num_dropped
from factory.errors import UsageError
from factory.pipeline.run import Run
from factory.pipeline.stages import in_processes, without_data
from factory.report.summaries import describe_plan
from factory.store.stage import COMPARE, MEASURE, PLAN, SEARCH
from factory.text.text import text_identity


def measure_stage(run: Run, source: Source) -> DistanceProfile:
    """Measure the angular distance between every pair of layer inputs."""
    settings = run.config.measure
    block_sizes = run.block_sizes or (num_dropped(run.config.drop, source.num_layers),)

    def work(folder: Path) -> Artifact:
        from factory.pruning.measure import measure

        part = partial(
            measure,
            source,
            run.texts.calibration,
            settings=settings,
            block_sizes=block_sizes if settings.num_samples is None else (),
            seed=run.config.seed,
            folder=folder,
        )
        return in_processes(run, part, name="measure", model=source.local_folder)

    return run.stage(
        MEASURE,
        work,
        # A fixed number of samples serves every block size.
        parameters={
            **without_data(settings),
            "seed": run.config.seed,
            "certain_for": list(block_sizes) if settings.num_samples is None else [],
        },
        inputs={"source": source.commit, "text": text_identity(run.texts.calibration.data)},
        summary=lambda p: (
            f"{p.num_samples} samples, {p.num_tokens:,} tokens of {p.data.name}"
            + (", choice is certain" if p.certain_for else "")
            + (f", attention sink in layer {p.sink}" if p.sink is not None else "")
        ),
    )


def plan_stage(
    run: Run, source: Source, profile: DistanceProfile, *, criterion: str | None = None
) -> PruningPlan:
    """Choose the layers to drop by one criterion, by default the configured one."""
    from factory.pruning.criteria import first_dropped, plan, plan_without

    settings = run.config.plan
    if settings.layers and criterion is None:
        return run.stage(
            PLAN,
            lambda _folder: plan_without(settings.layers or (), num_layers=source.num_layers),
            parameters={"layers": list(settings.layers)},
            inputs={"source": source.commit},
            summary=lambda p: describe_plan(p, sink=profile.sink),
        )
    criterion = criterion or run.config.plan.criterion
    n = num_dropped(run.config.drop, source.num_layers)
    if (
        CRITERIA[criterion].nested and not settings.runtimes
    ):  # one search serves every smaller number of layers
        largest = max((n, *run.block_sizes))
        found = search_stage(run, source, profile, criterion=criterion, block_size=largest)
        return first_dropped(found, n, profile=profile)
    if CRITERIA[criterion].searches:
        return search_stage(run, source, profile, criterion=criterion, block_size=n)

    def work(_folder: Path) -> Artifact:
        from factory.model.architecture import may_drop
        from factory.serving.runtimes import limit

        choose = partial(
            plan,
            profile,
            block_size=n,
            criterion=criterion,
            may_drop=lambda layers: may_drop(source.config, layers),
        )
        if not settings.runtimes:
            return choose()
        free = choose()
        within = limit(source.config, runtimes=settings.runtimes, count=n)
        return choose(within=within).model_copy(update={"free": free.dropped, "free_distance": free.distance})

    return run.stage(
        PLAN,
        work,
        parameters={"criterion": criterion, "block_size": n, **_runtimes(settings)},
        inputs={"profile": run.keys["measure"], "source": source.commit},
        summary=lambda p: describe_plan(p, sink=profile.sink),
    )


def _runtimes(settings: PlanSettings) -> dict[str, list[str]]:
    # Added later: keys of earlier versions lack it.
    return {"runtimes": list(settings.runtimes)} if settings.runtimes else {}


def search_stage(
    run: Run, source: Source, profile: DistanceProfile, *, criterion: str, block_size: int
) -> PruningPlan:
    """Choose the layers to drop by the loss without them; the profile only ranks the candidates."""
    settings = run.config.plan.model_copy(update={"criterion": criterion})

    def work(folder: Path) -> Artifact:
        from factory.pruning.search import search
        from factory.serving.runtimes import limit

        return search(
            source,
            run.texts.calibration,
            profile,
            block_size=block_size,
            settings=settings,
            four_bit=run.config.measure.four_bit,
            seed=run.config.seed,
            folder=folder,
            progress=run.ticks("search"),
            within=limit(source.config, runtimes=settings.runtimes, count=block_size),
        )

    return run.stage(
        SEARCH,
        work,
        parameters={
            **settings.model_dump(exclude={"runtimes"}),
            **_runtimes(settings),
            "block_size": block_size,
            "four_bit": run.config.measure.four_bit,
            "seed": run.config.seed,
        },
        inputs={  # an imported profile may not record its model
            "profile": run.keys["measure"],
            "source": source.commit,
            "text": text_identity(run.texts.calibration.data),
        },
        summary=lambda p: (
            f"{describe_plan(p, sink=profile.sink)}; {p.passes:.0f} passes over {p.num_documents} documents"
        ),
    )


def compare_stage(
    run: Run, source: Source, cuts: Sequence[tuple[int, ...]], *, sink: int | None = None
) -> CutLosses:
    """Measure the unhealed loss of several cuts on calibration documents that no search has seen."""
    settings = run.config.plan

    def work(_folder: Path) -> Artifact:
        from factory.pruning.search import compare

        return compare(
            source,
            run.texts.calibration,
            cuts,
            sink=sink,
            settings=settings,
            four_bit=run.config.measure.four_bit,
            seed=run.config.seed,
            progress=run.ticks("compare"),
        )

    return run.stage(
        COMPARE,
        work,
        parameters={
            **settings.model_dump(exclude={"criterion", "runtimes"}),
            "cuts": [list(cut) for cut in cuts],
            **({"sink": sink} if sink is not None else {}),
            "four_bit": run.config.measure.four_bit,
            "seed": run.config.seed,
        },
        inputs={"source": source.commit, "text": text_identity(run.texts.calibration.data)},
        summary=lambda c: f"{len(c.cuts)} cuts on {c.num_documents} documents",
    )


def refuse_wrong_backend(run: Run, source: Source, plan: PruningPlan) -> None:
    """Refuse to score the tasks with a library that takes this cut's layers for others.

    Raises:
        UsageError: The tasks would be answered by vLLM, which runs this cut wrongly.
    """
    from factory.serving.runtimes import verdicts

    backend = run.config.evaluate.backend
    if backend == "hf" or not run.config.evaluate.tasks:
        return
    found = next((one for one in verdicts(source.config, plan.dropped) if one.runtime == backend), None)
    if found and found.runs is False:
        raise UsageError(
            f"`eval_backend={backend}` runs this cut wrongly: {found.reason}",
            hint=f"omit `eval_backend`, or choose the layers with `for_runtimes={backend}`",
        )
