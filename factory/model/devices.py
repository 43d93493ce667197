"""Devices: what they can do, and whether a model fits."""

import re

import torch

SHARE_FOR_WEIGHTS = 0.9  # of a GPU's free memory
SHARE_FOR_TRAINED = 0.7  # the same, where activations, gradients and an optimiser need room
FOUR_BIT_BYTES = 0.6  # a parameter: NF4, its scales, and the embeddings in 16 bits
# Dense bf16 FLOP a second; of a T4, which has no bf16, fp16. The first name that a device's contains counts.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
    "A10": 125e12, "4090": 165e12, "B200": 2250e12, "T4": 65e12, "RTX PRO 6000": 503e12,
}  # fmt: skip


def best_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """For people: "NVIDIA H100 80GB HBM3", "CPU, 2 cores"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU; fp32 on a CPU, where bf16 is 4 to 30 times slower."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def training_processes(asked: int, *, batch_size: int) -> int:
    """How many processes share a step: each takes as many of its sequences, so that the batch stays."""
    return max(number for number in range(1, asked + 1) if batch_size % number == 0)


def trains_on_one(
    num_parameters: int, device: torch.device, *, four_bit: bool, num_unpacked: int = 0
) -> bool:
    """Whether a model, and what training an adapter of it takes, fit into what is free on a device.

    Args:
        num_unpacked: Those of the parameters that stay in 16 bits: experts that are one parameter.
    """
    if device.type == "cpu":
        return True
    free_bytes, _ = torch.cuda.mem_get_info(device)
    bytes_each = compute_dtype(device).itemsize
    packed = (FOUR_BIT_BYTES if four_bit else bytes_each) * (num_parameters - num_unpacked)
    return packed + bytes_each * num_unpacked < SHARE_FOR_TRAINED * free_bytes


def peak_flops(device: str) -> float | None:
    """Of a device by its name; None if it is not known."""
    return next(
        (peak for name, peak in PEAK_FLOPS.items() if re.search(rf"(?i)\b{name}(?![a-z0-9])", device)), None
    )
