"""What each criterion would drop, and what that costs before healing."""

from collections.abc import Sequence
from hashlib import sha256

from factory.artifacts import DistanceProfile, Plans, Source
from factory.pipeline.run import Run
from factory.pipeline.stages import compare_stage, measure_stage, plan_stage


def make_plans(
    run: Run, source: Source, criteria: Sequence[str], *, profile: DistanceProfile | None = None
) -> tuple[DistanceProfile, Plans]:
    """What each criterion would drop; where there are several, what that costs, on the same documents.

    Args:
        profile: Measured elsewhere; None measures.
    """
    from factory.pruning.criteria import choose

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
