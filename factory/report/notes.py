"""Say in one line what a reader of a plan should know of its choice."""

from collections.abc import Sequence

from factory.artifacts import CutLosses, Gguf, PruningPlan, SizeGoal, Verdict, layer_ranges
from factory.units import count, size

SHOWN = 4  # blocks that tie


def tie_note(plan: PruningPlan, *, num_samples: int) -> str | None:
    """Return which blocks the distances cannot tell from the chosen one; None if there are none."""
    if not plan.ties:
        return None
    length = len(plan.dropped)
    shown = [layer_ranges(range(start, start + length)) for start in plan.ties[:SHOWN]]
    if hidden := len(plan.ties) - len(shown):
        shown.append(f"{hidden} more blocks")
    *names, last = [layer_ranges(plan.dropped), *shown]
    return f"layers {', '.join(names)} and {last} tie within the error of {num_samples:,} samples"


def sink_note(plan: PruningPlan, sink: int | None, losses: CutLosses | None = None) -> str | None:
    """Return what is known of the layer that makes the attention sink; None if the model has none."""
    if sink is None:
        return None
    note = f"layer {sink} makes the attention sink, the large state of the first token"
    if sink in plan.dropped:
        note += ", and it is dropped"
    if losses and (alone := losses.sink):
        note += f"; dropping it alone changes the loss by {alone.behind:+.3f} ± {alone.behind_stderr:.3f}"
    return note


def runtimes_note(verdicts: Sequence[Verdict]) -> str | None:
    """Return where the result runs right, where it does not and why; None for a record without this."""
    if not verdicts:
        return None
    short = {one.runtime: one.title.partition(" (")[0] for one in verdicts}
    right = ["transformers 5", *(_with_bound(one, short) for one in verdicts if one.runs)]
    others: dict[tuple[str, str | None], list[str]] = {}
    for one in sorted(verdicts, key=lambda one: one.runs is None):
        if not one.runs:
            unknown = "not known" if one.reason else "not tried"
            how = unknown if one.runs is None else "wrongly"
            others.setdefault((how, one.reason), []).append(short[one.runtime])
    parts = [f"runs right in {', '.join(right)}"]
    for (how, reason), names in others.items():
        parts.append(f"{how} in {', '.join(names)}" + (f": {reason}" if reason else ""))
    return "; ".join(parts)


def _with_bound(one: Verdict, short: dict[str, str]) -> str:
    return short[one.runtime] + (f" ({one.reason})" if one.reason else "")


def gguf_note(one: Gguf) -> str:
    """Return what is known of a GGUF: how far it is from transformers, and up to which length it is right."""
    bound = f"; right {one.bound}" if one.bound else ""
    if one.check is None:
        return f"not verified: llama.cpp was not installed where it was made{bound}"
    return (
        f"verified against transformers: largest logit difference {one.check.largest:.2g}, "
        f"{one.check.same_next:.0%} of next tokens agree, at {one.check.num_positions} positions of texts "
        f"of up to {one.check.longest:,} tokens{bound}"
    )


def goal_note(goal: SizeGoal, *, parameters: int | None = None) -> str:
    """Return what size was asked for, and what the cut that was found for it leaves.

    Args:
        parameters: Parameters that are left; None before the layers are chosen, which can differ in size.
    """
    n = f"{goal.num_dropped} layer{'s' if goal.num_dropped > 1 else ''}"
    if goal.target is not None:
        left = f"at most {count(goal.parameters)}" if parameters is None else count(parameters)
        return f"for at most {count(goal.target)} parameters, {n} must go, which leaves {left}"
    return (
        f"to fit in {size(goal.fits or 0)} with {goal.context:,} tokens, {n} must go, which leaves at most "
        f"{size(goal.total_bytes)}: weights {size(goal.weight_bytes)}, cache {size(goal.cache_bytes)}, "
        f"overhead {size(goal.overhead_bytes)}"
    )


def limit_note(plan: PruningPlan) -> str | None:
    """Return what a limit to runtimes cost beside the free choice; None without one."""
    if plan.free is None:
        return None
    if plan.free == plan.dropped:
        return "without the limit to runtimes the choice would be the same"
    apart = (
        f", angular distance {plan.free_distance:.3f} instead of {plan.distance:.3f}"
        if plan.free_distance is not None and plan.distance is not None
        else ""
    )
    return f"without the limit to runtimes the choice would be {layer_ranges(plan.free)}{apart}"


def notes(
    plan: PruningPlan, *, num_samples: int, sink: int | None, losses: CutLosses | None = None
) -> list[str]:
    """Return the notes that there are, one line each, with what decides between blocks that tie."""
    ties = tie_note(plan, num_samples=num_samples)
    decide = f"{ties}; `criterion=loss` or more `samples` decide" if ties else None
    return [note for note in (decide, sink_note(plan, sink, losses), limit_note(plan)) if note]
