"""Decide whether the healed model ships: its gain on held-out healing text against its harm elsewhere."""

from collections.abc import Mapping

from factory.artifacts import Adapter, Decision, Evaluation


def decide(
    adapter: Adapter, guard_losses: Mapping[str, float], evaluations: Mapping[str, Evaluation]
) -> Decision:
    """Weigh the held-out loss against the losses on the evaluation texts unlike the healing text.

    Args:
        adapter: Names the healing text.
        guard_losses: Held-out losses of the files, "unhealed" and "healed".
        evaluations: By model; without "healed", which could not be evaluated, no harm is known.
    """
    gain = guard_losses["unhealed"] - guard_losses["healed"]
    if "healed" not in evaluations:
        return Decision(gain=gain)
    pairs = zip(evaluations["pruned"].losses, evaluations["healed"].losses, strict=True)
    harms = [
        (healed.nats - pruned.nats, healed.data)
        for pruned, healed in pairs
        if healed.data.likeness(adapter.data) == "unlike"
    ]
    harm, text = max(harms, key=lambda pair: pair[0], default=(0.0, None))
    return Decision(gain=gain, harm=harm, text=text) if harm > 0 else Decision(gain=gain)
