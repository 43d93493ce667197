"""Plan what each criterion would drop, and measure what that costs before healing."""

from collections.abc import Sequence
from hashlib import sha256

from factory.artifacts import DistanceProfile, Plans, Source
from factory.builds.swap import output_folder
from factory.config.criteria import CRITERIA
from factory.config.request import PlanRequest
from factory.pipeline.choosing import compare_stage, measure_stage, plan_stage
from factory.pipeline.prepare import begin
from factory.pipeline.run import Reporter, Run
from factory.pipeline.source import pull_and_trust
from factory.pipeline.texts import check_tokens
from factory.pruning.profile_files import read_profile
from factory.pruning.sizes import left_without
from factory.serving.runtimes import verdicts


def make_plans(
    run: Run, source: Source, criteria: Sequence[str], *, profile: DistanceProfile | None = None
) -> tuple[DistanceProfile, Plans]:
    """Plan with each criterion; if there are several, compare their losses on the same documents.

    Args:
        profile: Distances measured elsewhere; None measures them.
    """
    from factory.pruning.criteria import choose

    if profile:
        run.keys["measure"] = sha256(profile.model_dump_json().encode()).hexdigest()
    else:
        profile = measure_stage(run, source)
    plans = [plan_stage(run, source, profile, criterion=criterion) for criterion in criteria]
    cuts = [plan.dropped for plan in plans]
    losses = compare_stage(run, source, cuts, sink=profile.sink) if len(plans) > 1 else None
    chosen, reason = choose(plans, losses) if losses else (criteria[0], "the only one requested")
    dropped = next(plan.dropped for plan in plans if plan.criterion == chosen)
    return profile, Plans(
        source_name=source.name,
        source_commit=source.commit,
        plans=tuple(plans),
        losses=losses,
        num_samples=profile.num_samples,
        sink=profile.sink,
        chosen=chosen,
        reason=reason,
        runtimes=verdicts(source.config, dropped, folder=source.folder),
        goal=run.config.size,
        parameters=left_without(source, dropped)[0],
    )


def plan_for(request: PlanRequest, reporter: Reporter) -> tuple[DistanceProfile, Plans]:
    """Carry out a request for plans, from resolving the source to the plans.

    Raises:
        DataError: The profile belongs to another model, or lacks what a criterion needs.
    """
    wanted = request.criterion
    from_profile = wanted in CRITERIA and not CRITERIA[wanted].searches
    measures = not (request.profile and from_profile)  # else neither text nor weights are read
    source, run = begin(request, reporter, drop=request.drop, measures=measures)
    profile = read_profile(request.profile, source=source) if request.profile else None
    criteria = tuple(name for name in CRITERIA if wanted in ("all", name))
    if wanted == "all" and profile:
        lacking = {name for name, value in profile if value is None}
        criteria = tuple(name for name in criteria if not CRITERIA[name].needs & lacking)
    if request.save:
        output_folder(request.save)
    if measures:
        source = pull_and_trust(source, reporter, home=run.store.home, in_use=run.in_use)
        check_tokens(source, run.texts, run.config, note=reporter.note)
    return make_plans(run, source, criteria, profile=profile)
