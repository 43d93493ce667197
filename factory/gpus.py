"""Peak speed of GPUs, from their makers' data sheets."""

import re

# Dense bf16 FLOP/s; fp16 for a T4, which has no bf16. The first name found in the device's name counts.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
    "A10": 125e12, "4090": 165e12, "B200": 2250e12, "T4": 65e12, "RTX PRO 6000": 503e12,
}  # fmt: skip


def peak_flops(device: str) -> float | None:
    """Return the peak FLOP/s of a GPU by its name; None if it is unknown."""
    return next(
        (peak for name, peak in PEAK_FLOPS.items() if re.search(rf"(?i)\b{name}(?![a-z0-9])", device)), None
    )
