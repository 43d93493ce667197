"""Describe what a stage made in one line, for the terminal."""

from collections.abc import Sequence

from factory.artifacts import Adapter, Checkpoint, PruningPlan, SeamFit, layer_ranges
from factory.config.criteria import criterion_of


def describe_plan(plan: PruningPlan, *, sink: int | None = None) -> str:
    """Describe the layers to drop, how they were chosen, and whether the attention sink's layer goes."""
    n = len(plan.dropped)
    across = f", angular distance {plan.distance:.3f}" if plan.distance is not None else ""
    by = criterion_of(plan.criterion).by
    share = f"{n / plan.num_layers:.0%}"
    ties = f", {len(plan.ties) + 1} blocks tie" if plan.ties else ""
    with_sink = f", with the attention sink's layer {sink}" if sink in plan.dropped else ""
    layers = layer_ranges(plan.dropped)
    return f"dropping {n} of {plan.num_layers} layers ({share}){by}: {layers}{across}{ties}{with_sink}"


def describe_healing(adapter: Adapter, *, requested_steps: int, requested_dropout: float = 0.0) -> str:
    """Describe the training, its effect, and every departure from the request."""
    best = adapter.best_step
    fit = [describe_seam(adapter.seam)] if adapter.seam else []
    if adapter.objective is None:
        return "; ".join([*fit, "no training"])
    facts = [
        *fit,
        f"{adapter.num_steps:,} steps, {adapter.num_tokens:,} tokens",
        f"held-out loss {adapter.guard_loss_before:.3f} → {adapter.guard_loss_after:.3f}"
        + (f", lowest at step {best:,}" if best not in (None, adapter.num_steps) else ""),
    ]
    if (slowed := adapter.slowed_at_step) is not None:
        facts.append(f"learning rate lowered from step {slowed:,}, after the loss diverged")
    if (ended := adapter.ran_away_at_step) is not None:
        kept = f"went back to step {adapter.num_steps:,}" if adapter.num_steps else "nothing learnt"
        facts.append(f"stopped at step {ended:,}, where the loss diverged again: {kept}")
    elif adapter.num_steps < requested_steps:
        facts.append(f"stopped early, at step {adapter.num_steps:,} of {requested_steps:,}")
    if adapter.experts and requested_dropout:
        facts.append("no dropout, which adapters on fused experts do not support")
    if adapter.quantization == "nf4" and (adapter.experts or adapter.left_out):
        facts.append("experts in 16 bits, not in NF4")
    if adapter.left_out:
        facts.append(f"no adapter on {', '.join(adapter.left_out)}, one parameter for all experts")
    if not adapter.packed:
        facts.append("not packed, since this model attends across packed documents")
    return "; ".join(facts)


def describe_seam(fit: SeamFit) -> str:
    """Describe a fit: what it read, what it explains, and its effect on the loss without training."""
    seams = fit.seams
    if not seams:
        return f"no fitted seam: a fit of {_layers(fit.rejected)} does not lower the held-out loss"
    shares = [f"{seam.explained:.0%}" for seam in seams]
    explained = shares[0] if len(seams) == 1 else f"{', '.join(shares[:-1])} and {shares[-1]}"
    left_out = max(seam.num_left_out for seam in seams)
    facts = (
        f"fitted seam ({_layers([seam.layer for seam in seams])}) on {seams[0].num_tokens:,} tokens, "
        f"{left_out:,} outliers left out; it explains {explained} of the error on held-out tokens, "
        f"held-out loss {fit.loss_before:.3f} → {fit.loss_after:.3f}"
    )
    if fit.rejected:
        facts += f"; none in {_layers(fit.rejected)}, where it did not lower that loss"
    return facts + ("; none at layer 0, which no layer precedes" if fit.without_layer_before else "")


def _layers(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def describe_merge(merged: Checkpoint) -> str:
    """Describe the merged weights, and whether they ship."""
    if not merged.files:
        return "the adapter makes weights infinite or NaN, so the unhealed model ships"
    return f"adapter added to the {merged.merge_base}{_losses(merged.merge_losses)}" + (
        "" if merged.helped else "; it does not lower the held-out loss, so the unhealed model ships"
    )


def _losses(losses: dict[str, float] | None) -> str:
    """Describe the losses behind a choice: "; held-out loss 3.12 on source weights, 3.10 on …"."""
    if not losses:
        return ""
    return "; held-out loss " + ", ".join(f"{loss:.4f} on {name}" for name, loss in losses.items())
