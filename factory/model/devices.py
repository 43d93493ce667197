"""Choose devices and data types, and check whether a model fits."""

import shutil
from typing import Any

import torch

SHARE_FOR_WEIGHTS = 0.9  # of a GPU's free memory
SHARE_FOR_TRAINED = 0.7  # the same, if activations, gradients and an optimiser need room
FOUR_BIT_BYTES = 0.6  # per parameter: NF4, its scales, and the embeddings in 16 bits


def best_device() -> torch.device:
    """Return this process's GPU if there is one, else the CPU.

    With its number: safetensors takes "cuda" for the first one, whichever is current.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def device_name(device: torch.device) -> str:
    """Return the name to show for a device: "NVIDIA H100 80GB HBM3", "CPU, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"


def unused_gpu() -> str | None:
    """Return a line on a GPU of this machine that is not used, and why; None if there is none."""
    if torch.cuda.is_available():
        return None
    if shutil.which("nvidia-smi"):
        return f"this machine has an NVIDIA GPU, but torch {torch.__version__} cannot use it"
    return "the GPU of a Mac is not used" if torch.backends.mps.is_available() else None


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return bf16 for a GPU, and fp32 for a CPU, where bf16 is 4 to 30 times slower."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def training_processes(requested: int, *, batch_size: int) -> int:
    """Return how many processes share a step, with equally many of its sequences for each."""
    return max(number for number in range(1, requested + 1) if batch_size % number == 0)


def trains_on_one(
    num_parameters: int, device: torch.device, *, four_bit: bool, num_unpacked: int = 0
) -> bool:
    """Return whether a device has enough free memory for a model and the training of an adapter.

    Args:
        num_parameters: Parameter count of the model.
        device: Device to train on.
        four_bit: Whether the model is loaded in NF4.
        num_unpacked: Number of parameters that remain in 16 bits: fused experts.
    """
    if device.type == "cpu":
        return True
    free_bytes, _ = torch.cuda.mem_get_info(device)
    bytes_each = compute_dtype(device).itemsize
    packed = (FOUR_BIT_BYTES if four_bit else bytes_each) * (num_parameters - num_unpacked)
    return packed + bytes_each * num_unpacked < SHARE_FOR_TRAINED * free_bytes


def tensor_bytes(cache: Any) -> int:
    """Return the bytes of all tensors in a cache of any kind: keys, values, recurrent states."""
    left, seen, size_bytes = [cache], set(), 0
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            size_bytes += value.nbytes
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
        elif hasattr(value, "__dict__") and not isinstance(value, type):
            left += vars(value).values()
    return size_bytes
