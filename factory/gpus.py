"""What GPUs can do, by their makers' data sheets."""

import re

# Dense bf16 FLOP a second; of a T4, which has no bf16, fp16. The first name that a device's contains counts.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
    "A10": 125e12, "4090": 165e12, "B200": 2250e12, "T4": 65e12, "RTX PRO 6000": 503e12,
}  # fmt: skip


def peak_flops(device: str) -> float | None:
    """Of a device by its name; None if it is not known."""
    return next(
        (peak for name, peak in PEAK_FLOPS.items() if re.search(rf"(?i)\b{name}(?![a-z0-9])", device)), None
    )
