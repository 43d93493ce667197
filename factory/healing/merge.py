"""Merge a LoRA adapter into the weights it was trained for, tensor by tensor on disk."""

import math
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from threading import local
from typing import Any, Literal

import torch
from peft.utils.other import get_pattern_key

from factory.artifacts import Adapter, Checkpoint, Source
from factory.checkpoint.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PEFT_PREFIX,
    adapted_modules,
    read_adapter_config,
)
from factory.checkpoint.auxiliary import copy_auxiliary_files
from factory.checkpoint.header import TensorInfo, read_header
from factory.checkpoint.read import read_blocks, read_checkpoint, read_tensor_bytes
from factory.checkpoint.write import Progress, write_checkpoint
from factory.errors import CheckpointError, OverflowedError, VerificationError
from factory.healing.lora import read_guard
from factory.model.experts import Part, adapted_parameters, stored_parts
from factory.model.loading import load_model, quantized_modules, skeleton, transposed_modules
from factory.model.losses import token_loss
from factory.model.quantization import round_to_nf4

Base = Literal["auto", "bf16", "nf4"]
CANDIDATES: tuple[Base, ...] = ("bf16", "nf4")
BASE_NAMES = {"bf16": "source weights", "nf4": "NF4 weights, unpacked"}
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
ROWS = 128  # rows of a weight read, updated and written at once, which fit in the processor's cache
WORKERS = min(4, os.cpu_count() or 1)  # threads that update rows while others are read and written


@dataclass(frozen=True)
class Update:
    """One low-rank update: its stored matrix becomes W + scale · B·A.

    For a parameter that fuses experts, A holds one expert after another, and B all experts' first columns,
    then their second ones, as in peft.
    """

    part: Part  # W
    a: TensorInfo  # [experts · r, in]
    b: TensorInfo  # [out, r · experts]
    scale: float
    transposed: bool  # W is stored [in, out], as GPT-2's Conv1D does

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return matrices [rows, r] and [r, columns] whose product is W's update without the scale."""
        part = self.part
        rank = self.a.shape[0] // part.num_experts
        a = _load_factor(self.a)[part.expert * rank :][:rank].to(dtype)
        b = _load_factor(self.b)[:, part.expert :: part.num_experts].to(dtype)
        b, a = (a.T, b.T) if self.transposed else (b, a)  # (B·A)ᵀ = Aᵀ·Bᵀ
        return b[part.start :][: part.tensor.shape[0]], a


def merge(
    pruned: Checkpoint,
    adapter: Adapter,
    *,
    folder: Path,
    base: Base = "auto",
    progress: Progress | None = None,
) -> Checkpoint:
    """Write `pruned` with the adapter added into `folder`, using the base weights with the lower loss.

    An adapter trained over NF4 weights has also learnt their rounding, so whether it fits them or the
    original weights better is not known beforehand (github.com/huggingface/peft, issue 2105). "auto" writes
    both, measures the held-out loss of each, and keeps the better one, or the one that is finite.

    Args:
        pruned: Checkpoint that the adapter was trained for.
        adapter: LoRA in peft's format, trained over any quantisation.
        folder: Existing folder, empty or holding an earlier attempt.
        base: "bf16" for the weights on disk, in whatever dtype; "nf4" for these rounded as in training.
        progress: Callback that receives (bytes done, total bytes).

    Raises:
        CheckpointError: The adapter's files are damaged, or it is more than plain LoRA; names the reason.
        OverflowedError: No result is finite.
        VerificationError: The adapter does not fit the weights.
    """
    if not adapter.is_trained or (adapter.quantization != "nf4" and base == "auto"):
        base = "bf16"  # trained on these weights, or untrained, which has not learnt NF4's rounding
    if base != "auto":
        return _merge(pruned, adapter, folder=folder, base=base, progress=progress)
    guard = read_guard(adapter.folder)
    made: dict[Base, Checkpoint] = {}
    losses: dict[str, float] = {}
    for candidate in CANDIDATES:
        (folder / candidate).mkdir(exist_ok=True)
        try:
            made[candidate] = _merge(
                pruned, adapter, folder=folder / candidate, base=candidate, progress=progress
            )
        except OverflowedError:  # sums on the other base may still be finite
            if candidate == CANDIDATES[-1] and not made:
                raise
            continue
        losses[BASE_NAMES[candidate]] = _loss(folder / candidate, guard)
    best = min(made, key=lambda name: losses[BASE_NAMES[name]])
    for file in sorted((folder / best).iterdir()):
        file.rename(folder / file.name)
    for candidate in CANDIDATES:
        shutil.rmtree(folder / candidate)
    return made[best].model_copy(update={"folder": folder, "merge_losses": losses})


def judge(merged: Checkpoint, pruned: Checkpoint, adapter: Adapter) -> Checkpoint:
    """Add to a merged checkpoint what decides whether it ships: held-out losses with and without healing.

    Training measured other weights: NF4 with a separate adapter. These losses are of the files as users
    load them.
    """
    guard = read_guard(adapter.folder)
    known = (merged.merge_losses or {}).get(str(merged.merge_base))
    unhealed = _loss(pruned.folder, guard)
    if adapter.changes_nothing:  # the same weights, so exactly the same loss
        known = unhealed
    healed = known if known is not None else _loss(merged.folder, guard)
    return merged.model_copy(update={"guard_losses": {"unhealed": unhealed, "healed": healed}})


def overflowed(pruned: Checkpoint, adapter: Adapter, *, folder: Path) -> Checkpoint:
    """Return a placeholder for a merge that is not finite: no weights, and an infinite loss."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    guard = read_guard(adapter.folder)
    losses = {"unhealed": _loss(pruned.folder, guard), "healed": math.inf}
    return pruned.model_copy(update={"folder": folder, "size_bytes": 0, "files": {}, "guard_losses": losses})


def _loss(folder: Path, guard: list[list[int]]) -> float:
    """Return the mean loss of a model on the held-out sequences, in nats per token; infinity for NaN."""
    loss = token_loss(load_model(folder), guard)
    return math.inf if math.isnan(loss) else loss


def merge_into(
    weights: Path, adapter: Path, *, folder: Path, base: Base = "bf16", progress: Progress | None = None
) -> dict[str, str]:
    """Write a checkpoint with an adapter added into `folder`, tensor by tensor: sums in fp32.

    Args:
        weights: Folder of the checkpoint.
        adapter: Folder of the adapter in peft's format.
        folder: Existing folder; receives weights and config.json, in the dtypes of `weights`.
        base: "bf16" for the weights on disk, in whatever dtype; "nf4" for these rounded to NF4.
        progress: Callback that receives (bytes done, total bytes).

    Returns:
        The sha256 of each weight file by name.

    Raises:
        CheckpointError: The adapter's files are damaged, or it is more than plain LoRA; names the reason.
        OverflowedError: A value is not finite.
        VerificationError: The adapter does not fit the weights.
    """
    tensors = read_checkpoint(weights)
    model = skeleton(weights)
    parts = stored_parts(model, tensors)
    updates = read_updates(adapter, parts, model=model)
    rounded = {}  # stored name → whether it is transposed
    if base == "nf4":
        transposed = transposed_modules(model)
        packed = {module: parts.get(f"{module}.weight") for module in quantized_modules(model)}
        rounded = {whole[0].tensor.name: name in transposed for name, whole in packed.items() if whole}

    def transform(name: str, tensor: TensorInfo) -> Iterator[memoryview] | None:
        if name in rounded:
            update = updates.get(name, [None])[0]
            return merged_values(tensor, update, nf4=True, transposed=rounded[name])
        if name in updates:
            return chain.from_iterable(merged_values(u.part.tensor, u) for u in updates[name])
        return None

    with _one_thread():
        files = write_checkpoint(tensors.items(), folder=folder, transform=transform, progress=progress)
    _load_factor.cache_clear()
    shutil.copyfile(weights / "config.json", folder / "config.json")
    return files


def _merge(
    pruned: Checkpoint, adapter: Adapter, *, folder: Path, base: Base, progress: Progress | None
) -> Checkpoint:
    files = merge_into(pruned.folder, adapter.folder, folder=folder, base=base, progress=progress)
    copy_auxiliary_files(pruned.folder, folder)
    return checkpoint_of(files, folder, like=pruned).model_copy(update={"merge_base": BASE_NAMES[base]})


def checkpoint_of(files: dict[str, str], folder: Path, *, like: Source | Checkpoint) -> Checkpoint:
    """Return the checkpoint of weight files in `folder`, with the layers and parameters of another model."""
    return Checkpoint(
        folder=folder,
        num_layers=like.num_layers,
        num_parameters=like.num_parameters,
        size_bytes=sum((folder / name).stat().st_size for name in files),
        files=files,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch in one thread, since threads that share products of a few rows mostly spin and wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def read_updates(
    adapter_folder: Path, parts: Mapping[str, list[Part]], *, model: Any
) -> dict[str, list[Update]]:
    """Return what the files of an adapter change; see `find_updates`.

    Raises:
        CheckpointError: The files are damaged, or more than plain LoRA.
        VerificationError: An update has no tensor, or does not fit its shape.
    """
    config = read_adapter_config(adapter_folder / ADAPTER_CONFIG)
    return find_updates(config, read_header(adapter_folder / ADAPTER_WEIGHTS), parts, model=model)


def find_updates(
    config: Mapping[str, Any],
    stored: Mapping[str, TensorInfo],
    parts: Mapping[str, list[Part]],
    *,
    model: Any,
) -> dict[str, list[Update]]:
    """Return updates by the name of their stored tensor, checked against the checkpoint.

    A tensor has one update, or one for each expert that it fuses, in order.

    Args:
        config: The adapter's settings, from `read_adapter_config`.
        stored: The adapter's tensors.
        parts: Parts of the checkpoint, from `stored_parts`.
        model: The checkpoint's model, without values.

    Raises:
        CheckpointError: The adapter has other tensors than those of LoRA.
        VerificationError: An update has no tensor, or does not fit its shape.
    """
    experts = adapted_parameters(model, config.get("target_parameters") or ())
    # Not taken from the adapter: over 4-bit weights peft reports false for these too, since bitsandbytes
    # transposes the matrix.
    transposed = transposed_modules(model)
    updates: dict[str, list[Update]] = {}
    for module in adapted_modules(stored):
        name = experts.get(module, f"{module}.weight")
        if name not in parts:
            raise VerificationError(
                f"the adapter changes {name!r}, which the checkpoint does not store as such",
                hint="it was trained for another model, or on weights that are tied or fused on loading",
            )
        a, b = (stored[f"{PEFT_PREFIX}{module}.lora_{side}.weight"] for side in "AB")
        rank, scale = _rank_and_scale(config, experts.get(module, module))
        for part in parts[name]:
            update = Update(part, a, b, scale, name.rpartition(".")[0] in transposed)
            _check_fits(update, rank=rank)
            updates.setdefault(part.tensor.name, []).append(update)
    return updates


def merged_values(
    tensor: TensorInfo, update: Update | None, *, nf4: bool = False, transposed: bool = False
) -> Iterator[memoryview]:
    """Yield W + scale · B·A in W's dtype, some rows at a time, rounded once from fp32 (fp64 for fp64).

    Args:
        nf4: Whether to round W to NF4 first.
        transposed: Whether W is stored [in, out], transposed with respect to 4-bit layers.

    Raises:
        OverflowedError: A value is not finite.
    """
    dtype = DTYPES[tensor.dtype]
    compute = torch.promote_types(dtype, torch.float32)
    if update:
        b, a = update.factors(compute)
    own = local()  # to each worker, since fresh memory costs more time than the sums

    def add(block: torch.Tensor, start: int) -> memoryview:
        merged = block if block.dtype == dtype else torch.empty_like(block, dtype=dtype)
        if update:
            if not hasattr(own, "sums"):
                own.sums = torch.empty((ROWS, *block.shape[1:]), dtype=compute)
            sums = own.sums[: len(block)].copy_(block)
            block = sums.addmm_(b[start : start + len(block)], a, alpha=update.scale)
        merged.copy_(block)
        if not all(math.isfinite(value) for value in torch.aminmax(merged)):
            raise OverflowedError(
                f"merging makes {tensor.name!r} infinite or NaN",
                hint="the adapter's training diverged; train it again with a lower learning rate",
            )
        values: memoryview = merged.view(-1).view(torch.uint8).numpy().data
        return values

    with ThreadPoolExecutor(WORKERS) as pool:
        running: deque[Future[memoryview]] = deque()
        start = 0
        for block in _blocks(tensor, nf4=nf4, transposed=transposed):
            running.append(pool.submit(add, block, start))
            start += len(block)
            if len(running) > WORKERS:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _blocks(tensor: TensorInfo, *, nf4: bool, transposed: bool) -> Iterator[torch.Tensor]:
    """Yield a stored weight, some rows at a time."""
    if nf4:  # as a whole, since packing ignores rows
        weight = _load(tensor)
        weight = round_to_nf4(weight.T).T.contiguous() if transposed else round_to_nf4(weight)
        for start in range(0, len(weight), ROWS):
            yield weight[start : start + ROWS]
    else:
        block_bytes = ROWS * tensor.size_bytes // tensor.shape[0]
        # One for each worker, one that is written, and one that is being read or hashed.
        held = [bytearray(block_bytes) for _ in range(WORKERS + 2)]
        for block in read_blocks(tensor, held=held):
            yield torch.frombuffer(block, dtype=DTYPES[tensor.dtype]).view(-1, *tensor.shape[1:])


@lru_cache(maxsize=4)  # both factors of a layer's two expert parameters
def _load_factor(tensor: TensorInfo) -> torch.Tensor:
    return _load(tensor)


def _load(tensor: TensorInfo) -> torch.Tensor:
    values = read_tensor_bytes(tensor)
    return torch.frombuffer(values, dtype=DTYPES[tensor.dtype]).reshape(tensor.shape)


def _rank_and_scale(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Return r and α/r (α/√r for rank-stabilised LoRA, arXiv 2312.03732); patterns match as in peft."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = int(ranks.get(get_pattern_key(list(ranks), module), config["r"]))
    alpha = float(alphas.get(get_pattern_key(list(alphas), module), config["lora_alpha"]))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_fits(update: Update, *, rank: int) -> None:
    part, tensor = update.part, update.part.tensor
    for stored in (tensor, update.a, update.b):
        if stored.dtype not in DTYPES:
            raise CheckpointError(
                f"{stored.name!r} is stored as {stored.dtype}; LoRA cannot be added to quantised values",
                hint="start from the unquantised model",
            )
    a, b = update.a.shape, update.b.shape
    shape = part.shape[::-1] if update.transposed else part.shape
    ranks = rank * part.num_experts
    inside = tensor.shape[1:] == part.shape[1:] and part.start + tensor.shape[0] <= part.shape[0]
    if len(shape) != 2 or a != (ranks, shape[1]) or b != (shape[0], ranks) or not inside:
        raise VerificationError(
            f"{tensor.name!r} is {list(tensor.shape)}; A {list(a)} and B {list(b)} of rank {rank} do not fit",
            hint="the adapter was trained for another model",
        )
