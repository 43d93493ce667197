"""Estimate a build's disk and memory, and refuse what does not fit before the first download.

The constants were fitted to measurements of real builds (benchmarks/needs.py).
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from factory.artifacts import Source
from factory.config.objectives import LIGHTEST_OBJECTIVE, OBJECTIVES
from factory.config.settings import BuildConfig, num_dropped
from factory.errors import MachineError
from factory.pruning.sizes import CONTEXT_BYTES, SLACK
from factory.units import size

LIBRARIES_BYTES = 500_000_000  # host memory: Python, torch, transformers, trl and lm-eval, without a model
ON_GPU_BYTES = 3_500_000_000  # host memory when on a GPU: CUDA's libraries and a shard in transit
KEPT_BYTES = 1_500_000  # figures, card, tokenizer twice, losses and answers
CHECKPOINTS = 2  # trainer checkpoints kept; a third exists for a moment
SAVES = 10  # trainer checkpoints per run
TRAINED_BYTES = 16  # per adapter parameter: itself, gradient and Adam's two moments
LOGIT_COPIES = 6  # per sequence in training: logits, their gradient, probabilities and so on
BATCH = 16  # sequences measured at once
LOSS_BATCH = 4  # sequences whose loss is evaluated at once, with logits in bf16
ROW_COPIES = 3  # fp32 copies of one such sequence's logits: themselves, their logarithms and temporaries
SEAM_BYTES = 8 * 5  # per pair of inputs of a fitted module: moments, their sum, its factor and a copy in fp64
NF4_BYTES = 0.516  # per weight, with scales and nested scales
# Changes that make healing lighter, the smallest first; rank 8 on feed-forward is the paper's for 70B.
SMALL = {"rank": 8, "modules": "ffn"}
LIGHT = LIGHTEST_OBJECTIVE.name
LIGHTER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("`heal_layers=seam`", {"layers": "seam"}),
    ("`heal_rank=8` `heal_modules=ffn`", SMALL),
    ("`heal_rank=8` `heal_modules=ffn` `heal_layers=seam`", {**SMALL, "layers": "seam"}),
    (f"`heal={LIGHT}` `heal_rank=8` `heal_modules=ffn`", {**SMALL, "objective": LIGHT}),
    (
        f"`heal={LIGHT}` `heal_rank=8` `heal_modules=ffn` `heal_layers=seam`",
        {**SMALL, "objective": LIGHT, "layers": "seam"},
    ),
)
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Needs:
    """Bytes that a build needs at its peak."""

    disk: int  # on the disk of the stages
    host: int
    gpu: int  # minimum, since measuring and healing use all there is; 0 without a GPU


def needs(
    source: Source,
    config: BuildConfig,
    *,
    pending: Sequence[str],
    parameters_after: int,
    bytes_after: int,
    on_gpu: bool,
) -> Needs:
    """Estimate what the remaining stages need.

    Args:
        parameters_after: Parameter count of the pruned model.
        bytes_after: Size of its weight files.
    """
    if not pending:
        return Needs(0, 0, 0)
    models = source.num_parameters + parameters_after  # side by side for the speed comparison
    if on_gpu:
        gpu = int(SLACK * max(2 * models, *_on_gpu(source, config, pending))) + CONTEXT_BYTES
        host = ON_GPU_BYTES
    else:
        gpu = 0
        host = LIBRARIES_BYTES + max(4 * models, *_stages(source, config, pending, parameters_after))
    return Needs(_disk(source, config, pending, bytes_after), host, gpu)


def _disk(source: Source, config: BuildConfig, pending: Sequence[str], bytes_after: int) -> int:
    """Return the bytes written, at the end or while the trainer's checkpoints exist."""
    writes = sum(stage in pending for stage in ("prune", "merge")) * bytes_after
    if source.unmerged:  # the source itself is written too
        writes += source.size_bytes
    if "heal" not in pending or not config.heal_enabled:
        return writes + KEPT_BYTES
    heal = config.heal
    adapter = 4 * _adapter_parameters(source, config)
    tokens = 4 * heal.num_steps * heal.batch_size * heal.sequence_length
    saves = math.ceil(heal.num_steps / max(5, heal.num_steps // SAVES))
    # In adapters: each checkpoint also holds Adam's two moments; the final adapter is written besides.
    peak = max(3 * min(saves, CHECKPOINTS + 1), 3 * min(saves, CHECKPOINTS) + 1)
    healing = writes - bytes_after * ("merge" in pending) + peak * adapter + tokens
    both = bytes_after * ("merge" in pending and heal.bits == 4 and config.merge_base == "auto")
    return max(healing, writes + both + adapter) + KEPT_BYTES


def _stages(source: Source, config: BuildConfig, pending: Sequence[str], parameters_after: int) -> list[int]:
    """Return the memory of each stage on a CPU, in fp32, beyond the libraries."""
    width, inner = widths(source)
    kept = _num_kept(source, config)
    measure, heal, evaluate = config.measure, config.heal, config.evaluate
    logits = (min(LOSS_BATCH, evaluate.num_documents) + ROW_COPIES) * source.vocab_size
    found = [4 * source.num_parameters + 4 * evaluate.sequence_length * logits]
    if "measure" in pending:
        sequences = min(BATCH, measure.num_samples or BATCH)
        activations = 4 * sequences * measure.sequence_length * (6 * width + 3 * inner)
        found.append(4 * source.num_parameters + activations)
    if "heal" in pending and config.fits_seam:
        found.append(4 * source.num_parameters + SEAM_BYTES * inner**2)
    if "heal" in pending and config.heal_enabled:
        outside = source.num_parameters - sum(source.layer_parameters)
        states = kept * (20 * width + 10 * inner) + LOGIT_COPIES * source.vocab_size
        whole = OBJECTIVES[heal.objective].loads_source
        held = source.num_parameters if whole else parameters_after
        experts = _num_experts_parameters(source, source.num_layers if whole else kept)
        inside = held - outside - experts
        added = _num_experts_parameters(source, kept + 1)  # with their updates, and a layer's gradient
        weights = (inside // 2 if heal.bits == 4 else 4 * inside) + 4 * (outside + experts + added)
        trained = TRAINED_BYTES * _adapter_parameters(source, config)
        found.append(weights + trained + 4 * heal.sequence_length * states)
    return found


def _on_gpu(source: Source, config: BuildConfig, pending: Sequence[str]) -> list[int]:
    """Return the memory of each stage on a GPU, in bf16, beyond its context, with the smallest batches."""
    width, inner = widths(source)
    heal, evaluate = config.heal, config.evaluate
    found = [0]
    if "evaluate" in pending:
        logits = evaluate.sequence_length * source.vocab_size
        found.append(2 * source.num_parameters + (2 * LOSS_BATCH + 4 * ROW_COPIES) * logits)
    if "heal" in pending and config.fits_seam:
        found.append(2 * source.num_parameters + SEAM_BYTES * inner**2)
    if "heal" in pending and config.heal_enabled:
        outside = source.num_parameters - sum(source.layer_parameters)
        experts = _num_experts_parameters(source, source.num_layers)
        inside = source.num_parameters - outside - experts
        added = _num_experts_parameters(source, 2)
        weights = (inside // 2 if heal.bits == 4 else 2 * inside) + 2 * (outside + experts + added)
        # The input of every layer, all that is kept when memory is short, and all activations of one layer.
        states = 2 * (_num_kept(source, config) * width + 20 * width + 10 * inner)
        logits = 4 * LOGIT_COPIES * source.vocab_size * OBJECTIVES[heal.objective].makes_logits
        trained = TRAINED_BYTES * _adapter_parameters(source, config)
        found.append(weights + trained + heal.sequence_length * (states + logits))
    return found


def _num_kept(source: Source, config: BuildConfig) -> int:
    return source.num_layers - num_dropped(config.drop, source.num_layers)


def _adapter_parameters(source: Source, config: BuildConfig) -> int:
    """Count the parameters of LoRA on each feed-forward part, and on attention's four matrices if chosen."""
    width, inner = widths(source)
    attention = 8 * width if config.heal.modules == "all-linear" else 0
    feed_forward = experts_of(source)[1] // source.num_layers or 3 * (width + inner)
    return _num_kept(source, config) * config.heal.rank * (feed_forward + attention)


def experts_of(source: Source) -> tuple[int, int]:
    """Count the parameters of experts kept in 16 bits, and of a rank-1 adapter on them, in all layers."""
    fields: dict[str, Any] = source.config.get("text_config") or source.config
    if source.remote_code or not any("expert" in name for name in fields):
        return 0, 0
    return _expert_sizes(json.dumps(source.config, sort_keys=True))


@cache
def _expert_sizes(config: str) -> tuple[int, int]:
    from factory.model.config_proof import on_meta
    from factory.model.experts import expert_sizes

    return expert_sizes(on_meta(json.loads(config)))


def _num_experts_parameters(source: Source, num_layers: int) -> int:
    return experts_of(source)[0] * num_layers // source.num_layers


def widths(source: Source) -> tuple[int, int]:
    """Return (hidden_size, intermediate_size)."""
    fields: dict[str, Any] = source.config.get("text_config") or source.config
    width = int(fields.get("hidden_size") or fields.get("n_embd") or 1024)
    return width, int(fields.get("intermediate_size") or fields.get("n_inner") or 4 * width)


def host_bytes() -> int:
    """Return the memory this process may use: the machine's, or its control group's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [Path(path).read_text().strip() for path in LIMITS if Path(path).is_file()]
    return min([total, *(int(limit) for limit in limits if limit.isdigit())])


def check_memory(needed: Needs, *, host_total: int, gpu_total: int) -> None:
    """Refuse what cannot fit. A model that does not fit on the GPU spills over into host memory.

    Raises:
        MachineError: There is too little memory; says how much is needed and how much there is.
    """
    spread = max(needed.gpu - gpu_total, 0)
    if needed.host + spread > host_total:
        on_gpu = f" besides {size(gpu_total)} on the GPU" if gpu_total else ""
        raise MachineError(
            f"the build needs about {size(needed.host + spread)} of memory{on_gpu}, "
            f"but this machine has {size(host_total)}",
            hint="use a machine with more memory, or a smaller model",
        )


def healing_bytes(source: Source, config: BuildConfig) -> int:
    """Estimate the GPU memory for healing with one sequence per pass and recomputed activations.

    A 70B model without 40 % of its layers took 33.4 GB with two sequences of 4,096 tokens; distilled at the
    seam alone 38.5 GB with one of 2,048 and 39.9 GB with one of 4,096 (benchmarks/heal_speed.py).
    """
    heal, kept, (width, inner) = config.heal, _num_kept(source, config), widths(source)
    objective = OBJECTIVES[heal.objective]
    held = source.num_layers if objective.loads_source else kept
    experts = _num_experts_parameters(source, held)
    inside = sum(source.layer_parameters) * held // source.num_layers - experts
    outside = source.num_parameters - sum(source.layer_parameters)
    weights = (NF4_BYTES if heal.bits == 4 else 2) * inside + 2 * experts
    trained = kept if heal.layers == "all" else kept // 3 + 1  # layers; cuts are at about two thirds
    adapter = TRAINED_BYTES * _adapter_parameters(source, config) * trained // kept
    unpacked = 2 * width * inner if heal.bits == 4 else 0
    # A layer's experts with their updates, and the updates' gradient: 1.65 times the experts on a CPU.
    added = 2 * _num_experts_parameters(source, 2)
    # The inputs of all layers, one layer's states, and the final states of student and teacher.
    token = 2 * (trained * width + 6 * inner + 6 * (1 + objective.teacher_passes) * width)
    return int(
        CONTEXT_BYTES + weights + 2 * outside + adapter + unpacked + added + heal.sequence_length * token
    )


def healing_processes(
    source: Source, config: BuildConfig, *, processes: int, pruned_parameters: int
) -> tuple[int, bool]:
    """Return how many processes share a step of healing, and whether the model is divided among them.

    Where the model and its training fit one device, each process holds the whole.

    Args:
        processes: Maximum number of processes.
        pruned_parameters: Parameter count of the pruned model.
    """
    from factory.model.devices import best_device, training_processes, trains_on_one

    heal = config.heal
    distils = OBJECTIVES[heal.objective].loads_source
    number = training_processes(processes, batch_size=heal.batch_size)
    fits = number == 1 or trains_on_one(
        source.num_parameters if distils else pruned_parameters,
        best_device(),
        four_bit=heal.bits == 4,
        num_unpacked=_num_experts_parameters(
            source, source.num_layers if distils else _num_kept(source, config)
        ),
    )
    return number, not fits


def check_healing(source: Source, config: BuildConfig, *, gpu_total: int) -> None:
    """Refuse healing that does not fit in GPU memory, and suggest what would.

    Args:
        gpu_total: Total memory in bytes of the GPUs that share the model.

    Raises:
        MachineError: There is too little memory; the hint names the smallest change that fits.
    """
    needed = healing_bytes(source, config)
    if needed <= gpu_total:
        return
    packs = " `heal_bits=4`" if config.heal.bits == 16 else ""
    hint = "use a GPU with more memory, or build without healing: `no_heal`"
    for flags, changes in LIGHTER:
        lighter = config.heal.model_copy(update={**changes, "bits": 4})
        fewer = healing_bytes(source, config.model_copy(update={"heal": lighter}))
        if fewer <= gpu_total:
            hint = f"{flags}{packs} takes about {size(fewer)}"
            break
    raise MachineError(
        f"healing by {config.heal.objective} needs about {size(needed)} of GPU memory, but there are only "
        f"{size(gpu_total)}",
        hint=hint,
    )


def check_seam(source: Source, config: BuildConfig) -> None:
    """Refuse to fit a seam where the model, or the layers that were given, show that it cannot be done.

    Raises:
        UnsupportedArchitectureError: The weights are packed, no linear module is outside attention, or the
            only cut begins at layer 0.
    """
    from factory.healing.lora import check_feed_forward
    from factory.healing.seam.fit import check_seams

    if config.plan.layers:
        check_seams(config.plan.layers)
    if not source.remote_code:
        check_feed_forward(source.config)


def check_four_bit(device: Any) -> None:
    """Refuse, before any long work, a machine on which bitsandbytes cannot quantise.

    Args:
        device: torch device on which the model would be healed or measured in NF4.

    Raises:
        MachineError: Quantisation does not work; includes the message of bitsandbytes.
    """
    try:
        import torch
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        packed, state = quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4")
        whole = bool(dequantize_4bit(packed, state).isfinite().all())
    except (ImportError, RuntimeError, NotImplementedError, OSError, AttributeError, ValueError) as error:
        raise _no_four_bit(device, " ".join(str(error).split())[:200]) from error
    if not whole:
        raise _no_four_bit(device, "dequantised values are not finite")


def _no_four_bit(device: Any, reason: str) -> MachineError:
    return MachineError(
        f"bitsandbytes cannot quantise to 4 bits on {device}: {reason}",
        hint="install a bitsandbytes that supports this machine, or build without healing: `no_heal`",
    )
