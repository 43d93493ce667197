"""Fit training passes to the GPU: the most sequences that it holds, and their kernels launched at once."""

import gc
import math
from collections.abc import Callable
from typing import Any

import torch

from factory.healing.cuda_graphs import PassGraphs
from factory.parallel import processes

SHARE = 0.92  # of the available memory; the rest is lost to fragmentation
OPTIMIZER_BYTES = 12  # per trained parameter: gradient and Adam's two moments in fp32
GRAPH_SHARE = 0.5  # of that, at most, for a pass to be captured: others run beside the memory of a graph
CANDIDATES = 64  # training sequences, the longest of which is tried


def fit_passes(trainer: Any, tell: Callable[[str], None]) -> None:
    """Set a trainer's batch size per device by trying passes; the effective batch size is unchanged.

    Activations are recomputed in the backward pass only if not even one sequence fits otherwise. If two
    passes would fit, the trainer captures them as graphs. On a CPU nothing changes.

    Args:
        trainer: Trainer built with one sequence per pass, and without activation checkpointing.
        tell: Callback that receives one line if passes turn out not to be capturable.
    """
    arguments = trainer.args
    if processes.sharded():  # the model is not sharded yet, so nothing can be tried: use the minimum
        _recompute(trainer)
        return
    if trainer.model.device.type != "cuda":
        return
    sequences = arguments.gradient_accumulation_steps
    found = processes.gather([_largest(trainer, sequences)])  # passes are equally large on all GPUs
    checkpointing, size = any(again for again, _, _ in found), min(size for _, size, _ in found)
    if checkpointing:
        _recompute(trainer)
    arguments.per_device_train_batch_size = arguments.per_device_eval_batch_size = size
    arguments.gradient_accumulation_steps = sequences // size
    trainer._train_batch_size = size
    if arguments.packing and not checkpointing and max(share for *_, share in found) <= GRAPH_SHARE:
        length = arguments.max_length
        trainer.graphs = PassGraphs(_trained(trainer), width=size * length, longest=length, tell=tell)


def _trained(trainer: Any) -> list[Any]:
    return [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]


def _largest(trainer: Any, sequences: int) -> tuple[bool, int, float]:
    """Return whether activations must be recomputed, how many sequences then fit, and their share."""
    for checkpointing in (False, True):
        if checkpointing:
            _recompute(trainer)
        for size in (n for n in range(sequences, 0, -1) if sequences % n == 0):
            if (share := _share(trainer, size)) <= 1:
                return checkpointing, size, share
    return True, 1, math.inf  # if not even that fits, training fails with the allocator's own message


def _recompute(trainer: Any) -> None:
    """Enable recomputation here, since the trainer's way makes every backward pass reach the embeddings.

    With `heal_layers=seam` it may end at the first adapter, and nothing below has to be kept.
    """
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.model.disable_input_require_grads()


def _share(trainer: Any, size: int) -> float:
    """Return the share of the GPU's memory that passes over `size` full sequences and the optimiser need."""
    rows = [trainer.train_dataset[i] for i in range(min(CANDIDATES, len(trainer.train_dataset)))]
    longest = max(rows, key=lambda row: len(row["input_ids"]))
    trained = _trained(trainer)
    trainer.model.train()
    torch.cuda.reset_peak_memory_stats()
    random = torch.cuda.get_rng_state()
    try:
        inputs = trainer._prepare_inputs(trainer.data_collator([longest] * size))
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
    except torch.cuda.OutOfMemoryError:
        return math.inf
    finally:
        torch.cuda.set_rng_state(random)
        for parameter in trained:
            parameter.grad = None
        inputs = loss = None
        gc.collect()
        torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info()
    usable_bytes = SHARE * (free_bytes + torch.cuda.memory_reserved())
    needed_bytes = torch.cuda.max_memory_allocated() + OPTIMIZER_BYTES * sum(p.numel() for p in trained)
    return float(needed_bytes / usable_bytes)
