"""Say in one line what a reader of a plan should know of its choice."""

from factory.artifacts import CutLosses, PruningPlan, layer_ranges

SHOWN = 4  # blocks that tie


def tie_note(plan: PruningPlan, *, num_samples: int) -> str | None:
    """Return which blocks the distances cannot tell from the chosen one; None if there are none."""
    if not plan.ties:
        return None
    size = len(plan.dropped)
    shown = [layer_ranges(range(start, start + size)) for start in plan.ties[:SHOWN]]
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


def notes(
    plan: PruningPlan, *, num_samples: int, sink: int | None, losses: CutLosses | None = None
) -> list[str]:
    """Return the notes that there are, one line each, with what decides between blocks that tie."""
    ties = tie_note(plan, num_samples=num_samples)
    decide = f"{ties}; `criterion=loss` or more `samples` decide" if ties else None
    return [note for note in (decide, sink_note(plan, sink, losses)) if note]
