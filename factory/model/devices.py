"""Devices: what they can do, and whether a model fits."""

import torch

SHARE_FOR_WEIGHTS = 0.9  # of a GPU's free memory
SHARE_FOR_TRAINED = 0.7  # the same, where activations, gradients and an optimiser need room
FOUR_BIT_BYTES = 0.6  # a parameter: NF4, its scales, and the embeddings in 16 bits


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
