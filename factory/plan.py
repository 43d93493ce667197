"""Plan: from the distance profile to the layers that go."""

from factory.artifacts import DistanceProfile, PruningPlan


def plan(profile: DistanceProfile, *, block_size: int) -> PruningPlan:
    """The block of `block_size` layers whose removal turns the stream least (arXiv 2403.17887, 3.2).

    Blocks that hold the last layer are not considered: it alone writes what the head reads, and the
    paper keeps it in its simple heuristic too (section 4.4). Ties go to the deepest block.
    """
    last_start = profile.num_layers - block_size - 1
    distances = profile.block_distances(block_size)[: last_start + 1]
    ranking = sorted(range(len(distances)), key=lambda start: (distances[start], -start))
    start, *others = ranking
    return PruningPlan(
        criterion="angular",
        num_layers=profile.num_layers,
        dropped=tuple(range(start, start + block_size)),
        distance=distances[start],
        runner_up_start=others[0] if others else None,
        runner_up_distance=distances[others[0]] if others else None,
    )
