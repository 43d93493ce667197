"""Choose the layers to drop by the criteria that need the distance profile alone."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

from factory.artifacts import CutLosses, DistanceProfile, PruningPlan, layer_ranges
from factory.config.criteria import CHOSEN, CRITERIA, DEFAULT_CRITERION
from factory.errors import DataError, DropError, ModelError

CERTAIN = 2.0  # standard errors of a paired difference
MayDrop = Callable[[tuple[int, ...]], bool]


def plan(
    profile: DistanceProfile,
    *,
    block_size: int,
    criterion: str = DEFAULT_CRITERION.name,
    may_drop: MayDrop = lambda _: True,
) -> PruningPlan:
    """Choose `block_size` layers by a criterion that needs the profile alone.

    Args:
        may_drop: Predicate: can this set of layers be cut from the architecture?

    Raises:
        DataError: The profile lacks the measurements that the criterion needs.
        ModelError: The architecture does not allow the cut.
    """
    return FROM_PROFILE[criterion](profile, block_size=block_size, may_drop=may_drop)


def angular(profile: DistanceProfile, *, block_size: int, may_drop: MayDrop = lambda _: True) -> PruningPlan:
    """Choose the block across which the hidden state turns least (arXiv 2403.17887, section 3.2).

    Blocks that contain the last layer are not considered: it alone writes what the head reads, and the
    paper's simple heuristic keeps it too (section 4.4). Ties go to the deepest block.
    """
    last_start = profile.num_layers - block_size - 1
    distances = profile.block_distances(block_size)[: last_start + 1]
    known = [start for start, distance in enumerate(distances) if not math.isnan(distance)]
    if not known:
        raise DataError(
            f"the profile has no distances across {block_size} layers",
            hint=f"it covers {_known_sizes(profile)}; drop that many, or measure the model",
        )
    ranking = sorted(known, key=lambda start: (distances[start], -start))
    allowed = [start for start in ranking if may_drop(tuple(range(start, start + block_size)))]
    if not allowed:
        raise _refused(f"no block of {block_size} layers")
    start, *others = allowed
    return PruningPlan(
        criterion="angular",
        num_layers=profile.num_layers,
        dropped=tuple(range(start, start + block_size)),
        distance=distances[start],
        runner_up_start=others[0] if others else None,
        runner_up_distance=distances[others[0]] if others else None,
        ties=_ties(profile, block_size=block_size, start=start, others=others),
    )


def _ties(
    profile: DistanceProfile, *, block_size: int, start: int, others: Collection[int]
) -> tuple[int, ...]:
    """Return those of the other starts that tie with this one, which is the nearest block of its size.

    If the architecture forbids the nearest block, nothing is known about the others' differences.
    """
    distances = profile.block_distances(block_size)[:-1]
    if not distances[start] <= min(distances):
        return ()
    return tuple(other for other in profile.ties.get(block_size, ()) if other in others)


def deepest(profile: DistanceProfile, *, block_size: int, may_drop: MayDrop = lambda _: True) -> PruningPlan:
    """Choose the deepest layers except the last (arXiv 2403.17887, section 4.4), whatever was measured."""
    start = profile.num_layers - block_size - 1
    dropped = tuple(range(start, start + block_size))
    if not may_drop(dropped):
        raise _refused(f"layers {layer_ranges(dropped)}")
    return PruningPlan(
        criterion="deepest",
        num_layers=profile.num_layers,
        dropped=dropped,
        distance=profile.across(dropped),
    )


def block_influence(
    profile: DistanceProfile, *, block_size: int, may_drop: MayDrop = lambda _: True
) -> PruningPlan:
    """Choose the layers that each turn the hidden state least (ShortGPT, arXiv 2403.03853).

    Ties go to the deepest layer.
    """
    if profile.influence is None:
        raise DataError("the profile has no Block Influence", hint="measure the model: omit `profile`")
    influence = profile.influence
    ranking = sorted(range(profile.num_layers), key=lambda layer: (influence[layer], -layer))
    dropped = tuple(sorted(ranking[:block_size]))
    if not may_drop(dropped):
        raise _refused(f"layers {layer_ranges(dropped)}")
    return PruningPlan(
        criterion="block-influence",
        num_layers=profile.num_layers,
        dropped=dropped,
        distance=profile.across(dropped),
    )


FROM_PROFILE: Mapping[str, Callable[..., PruningPlan]] = {
    "angular": angular,
    "deepest": deepest,
    "block-influence": block_influence,
}


def plan_without(layers: Collection[int], *, num_layers: int) -> PruningPlan:
    """Return the plan that drops exactly these 0-based layers.

    Raises:
        DropError: The model lacks one of the layers, or fewer than 2 layers would be kept.
    """
    dropped = tuple(sorted(layers))
    if not dropped or dropped[-1] >= num_layers:
        raise DropError(
            f"`layers={layer_ranges(dropped)}`: the model has layers 0 to {num_layers - 1}",
            hint="layers are counted from 0",
        )
    if num_layers - len(dropped) < 2:
        raise DropError(
            f"`layers={layer_ranges(dropped)}` leaves {num_layers - len(dropped)} of {num_layers} layers",
            hint="at least 2 layers must be kept; `layers` lists those to drop",
        )
    return PruningPlan(criterion=CHOSEN.name, num_layers=num_layers, dropped=dropped)


def first_dropped(plan: PruningPlan, count: int, *, profile: DistanceProfile) -> PruningPlan:
    """Return the plan of a greedy search after its first `count` layers."""
    order = (plan.order or ())[:count]
    dropped = tuple(sorted(order))
    changes = {"order": order, "dropped": dropped, "distance": profile.across(dropped)}
    return plan.model_copy(update=changes)


def choose(plans: Sequence[PruningPlan], losses: CutLosses) -> tuple[str, str]:
    """Return the best criterion, and the reason in words.

    The lowest loss wins; but differences below two standard errors count as ties, and among tied criteria
    the simplest wins: the first in the order of `CRITERIA`.

    Args:
        plans: One plan per criterion.
        losses: Losses of the plans, in the same order.
    """
    level = {
        plan.criterion: cut
        for plan, cut in zip(plans, losses.cuts, strict=True)
        if not cut.behind > CERTAIN * cut.behind_stderr  # NaN, where no loss is finite, is a tie too
    }
    chosen = next(criterion for criterion in CRITERIA if criterion in level)
    others = [criterion for criterion in level if criterion != chosen]
    if not others:
        rivals = [cut for cut in losses.cuts if cut.behind > 0]
        ahead = min((cut.behind for cut in rivals), default=0.0)
        return chosen, f"lowest loss without healing, {ahead:.3f} ahead of the next"
    if level[chosen].behind == 0:
        return chosen, f"lowest loss without healing, though {_listed(others)} within noise of it"
    least = next(criterion for criterion, cut in level.items() if cut.behind == 0)
    return chosen, (
        f"within noise of the lowest loss ({least}: {level[chosen].behind:.3f} ± "
        f"{level[chosen].behind_stderr:.3f} lower), and simpler"
    )


def _listed(criteria: Sequence[str]) -> str:
    names = " and ".join(criteria) if len(criteria) < 3 else f"{', '.join(criteria[:-1])} and {criteria[-1]}"
    return f"{names} {'is' if len(criteria) == 1 else 'are'}"


def _refused(what: str) -> ModelError:
    return ModelError(
        f"{what} can be dropped: this architecture's configuration would not fit the kept layers"
        if what.startswith("no ")
        else f"{what} cannot be dropped: this architecture's configuration would not fit the kept layers",
        hint="try another criterion or another `drop`",
    )


def _known_sizes(profile: DistanceProfile) -> str:
    sizes = [n for n in range(1, profile.num_layers) if not all(map(math.isnan, profile.block_distances(n)))]
    return f"{layer_ranges(sizes)} layers" if sizes else "no distances"
