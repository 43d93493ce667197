"""How many sequences a training pass holds: the most that fit the GPU, activations kept if those fit."""

import gc
from typing import Any

import torch

from factory.parallel import processes

SHARE = 0.92  # of the memory that may be used; the rest is lost between blocks
OPTIMIZER_BYTES = 12  # a trained parameter: gradient and Adam's two moments in fp32
CANDIDATES = 64  # training sequences among which the longest is tried


def fit_micro_batch(trainer: Any) -> None:
    """Set a trainer's batch on each device by trying a pass, at an unchanged effective batch.

    Activations are computed again in the backward pass only if not even one sequence fits otherwise. On a
    CPU everything stays as it is.

    Args:
        trainer: Built with one sequence a pass, and without checkpointing of activations.
    """
    arguments = trainer.args
    if processes.sharded():  # not divided yet, so nothing can be tried: as little as possible
        _recompute(trainer)
        return
    if trainer.model.device.type != "cuda":
        return
    sequences = arguments.gradient_accumulation_steps
    found = processes.gather([_largest(trainer, sequences)])  # a pass is as large on each GPU
    checkpointing, size = any(again for again, _ in found), min(size for _, size in found)
    if checkpointing:
        _recompute(trainer)
    arguments.per_device_train_batch_size = arguments.per_device_eval_batch_size = size
    arguments.gradient_accumulation_steps = sequences // size
    trainer._train_batch_size = size


def _largest(trainer: Any, sequences: int) -> tuple[bool, int]:
    """Whether activations must be computed again, and how many sequences then fit this process's GPU."""
    for checkpointing in (False, True):
        if checkpointing:
            _recompute(trainer)
        for size in (n for n in range(sequences, 0, -1) if sequences % n == 0):
            if _fits(trainer, size):
                return checkpointing, size
    return True, 1  # not even that fits: training itself says so, with the numbers of the allocator


def _recompute(trainer: Any) -> None:
    """Enabled here, not by the trainer: that lets the backward pass go down to the embeddings each time.

    With `heal_layers=seam` it may end where the first adapter lies, and nothing below is kept for it.
    """
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.model.disable_input_require_grads()


def _fits(trainer: Any, size: int) -> bool:
    """Whether a forward and a backward pass over `size` full sequences leave room for the optimiser."""
    rows = [trainer.train_dataset[i] for i in range(min(CANDIDATES, len(trainer.train_dataset)))]
    longest = max(rows, key=lambda row: len(row["input_ids"]))
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    trainer.model.train()
    torch.cuda.reset_peak_memory_stats()
    random = torch.cuda.get_rng_state()
    trainer.accelerator.gather_for_metrics = lambda value: value  # what fits is each process's own matter
    try:
        inputs = trainer._prepare_inputs(trainer.data_collator([longest] * size))
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        del trainer.accelerator.gather_for_metrics
        torch.cuda.set_rng_state(random)
        for parameter in trained:
            parameter.grad = None
        trainer._metrics["train"].clear()
        inputs = loss = None
        gc.collect()
        torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info()
    usable_bytes = SHARE * (free_bytes + torch.cuda.memory_reserved())
    needed_bytes = torch.cuda.max_memory_allocated() + OPTIMIZER_BYTES * sum(p.numel() for p in trained)
    return bool(needed_bytes <= usable_bytes)
