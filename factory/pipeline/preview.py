"""Preview what a build will do and need, before any heavy work."""

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factory.artifacts import Source
from factory.config.objectives import OBJECTIVES
from factory.config.settings import BuildConfig, num_dropped, warmup_for
from factory.errors import UsageError
from factory.hub.pull import cache_demand
from factory.pipeline.requirements import (
    Needs,
    check_four_bit,
    check_healing,
    check_memory,
    check_seam,
    healing_processes,
    host_bytes,
    needs,
)
from factory.store.capacity import Demand, check_room, demands
from factory.store.locks import HOME
from factory.text.overlap import Contents
from factory.units import duration

START_SECONDS = 12.0  # importing torch, transformers, trl and lm-eval for the first time
STAGE_SECONDS = 2.0  # loading a model and opening the text
# FLOP per parameter and token: forward 2, backward to the activations 2, recomputation 2 (GPU only).
FORWARD, FORWARD_BACKWARD, WITH_RECOMPUTATION = 2, 4, 6
# Approximate requests of lm-eval's tasks and tokens per request; OTHER_TASK stands in for all others.
TASK_SIZES = {
    "mmlu": (56_168, 700),
    "boolq": (6_540, 180),
    "gsm8k": (1_319, 8_000),  # mostly generated, bound by memory: 40,000 steps of 8 rows, 25 ms for 7B
    "next_line": (1_600, 200),
}
OTHER_TASK = (8_000, 120)
BYTES_PER_TOKEN = 4.0  # of UTF-8 text, roughly: 4.4 for English, 3 for Chinese and for code
PROBE_SECONDS = 0.3  # a busy machine lets no single product of a tiny model through undisturbed
# Of a budget's settings: fewer say nothing.
LEAST = {"samples": 64, "heal_steps": 20, "eval_documents": 16, "limit": 20}
MAX_WIDTH = 8192  # of the test product: wider ones run no faster and fill memory


@dataclass(frozen=True)
class Preview:
    """A build in numbers: sizes in bytes, and an estimate in seconds of the stages still to run."""

    num_layers: int
    num_dropped: int
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    pending: tuple[str, ...]
    download_bytes: int
    disk_needed: int  # on the disk of the stages
    disk_free: int
    other_disks: tuple[Demand, ...]  # disks of the Hub's cache and of the build, if others
    memory_needed: int  # minimum over all GPUs together, or of the host without one
    memory_total: int
    host_needed: int
    host_total: int
    device: str
    stage_seconds: dict[str, float]  # of the stages still to run

    @property
    def seconds(self) -> float:
        """Return the time of the whole build."""
        return START_SECONDS + sum(self.stage_seconds.values()) if self.stage_seconds else 0.0


@dataclass(frozen=True)
class Machine:
    """A machine that a build is to run on."""

    device: str
    memory_bytes: int  # of all its GPUs, or of the host without one
    flops_per_second: float  # reached by a whole model
    disk_bytes: int = 0  # free, on a machine other than this
    host_bytes: int = 0  # 0: unknown


def preview(
    source: Source,
    config: BuildConfig,
    *,
    pending: Sequence[str],
    home: Path,
    out: Path | None = None,
    processes: int = 1,
    machine: Machine | None = None,
    calibration: Contents | None = None,
    evaluations: Sequence[Contents] = (),
) -> Preview:
    """Compute the preview of a build; imports torch only if there is something to run.

    Assumes layers of mean size, since the layers to drop are known only after measuring.

    Args:
        home: Folder of the stages.
        out: Folder of the build; None assumes the disk of the stages.
        machine: Machine to run on; None is this one.
        calibration: Known facts about the calibration documents; None assumes full sequences.
        evaluations: Known facts about each evaluation text's documents, all of whose windows are read.

    Raises:
        DropError: The fraction does not give a usable number of layers.
        DiskSpaceError: There is too little disk space for the stages still to run.
        MachineError: There is too little memory here, or bitsandbytes or torch lacks a required feature.
        UnsupportedArchitectureError: The model has no modules that healing could adapt.
    """
    n = num_dropped(config.drop, source.num_layers)
    share = n / source.num_layers
    bytes_after = source.size_bytes - int(share * sum(source.layer_bytes))
    parameters_after = source.num_parameters - int(share * sum(source.layer_parameters))
    is_here = machine is None
    machine = machine or this_machine(source, processes=processes, works=bool(pending))
    device = machine.device
    needed = needs(
        source,
        config,
        pending=pending,
        parameters_after=parameters_after,
        bytes_after=bytes_after,
        on_gpu=not _is_cpu(device),
    )
    download = source.download_bytes if pending else 0
    if is_here:
        wanted = [(home, HOME, needed.disk)]
        if pending:
            wanted += [cache_demand(source), *_copies(bytes_after, home=home, out=out)]
        disk, *others = demands(wanted)
    else:
        disk, others = Demand(str(home), HOME, needed.disk + download, machine.disk_bytes), []
    result = Preview(
        num_layers=source.num_layers,
        num_dropped=n,
        parameters_before=source.num_parameters,
        parameters_after=parameters_after,
        bytes_before=source.size_bytes,
        bytes_after=bytes_after,
        pending=tuple(pending),
        download_bytes=download,
        disk_needed=disk.needed,
        disk_free=disk.free,
        other_disks=tuple(others),
        memory_needed=needed.gpu or needed.host,
        memory_total=machine.memory_bytes,
        host_needed=needed.host,
        host_total=machine.host_bytes,
        device=device,
        stage_seconds=_seconds(
            config,
            pending,
            before=source.num_parameters,
            after=parameters_after,
            machine=machine,
            calibration=calibration,
            evaluations=evaluations,
        ),
    )
    check_room([disk, *others])
    if is_here:
        _check_here(config, pending, needed, machine)
    if "heal" in pending and config.fits_seam:
        check_seam(source, config)
    if "heal" in pending and config.heal_enabled:
        sharers = 1
        if is_here:
            sharers = _sharers(source, config, processes=processes, pruned_parameters=parameters_after)
        if not source.remote_code:
            from factory.healing.lora import check_targets

            check_targets(source.config, config.heal.modules)
        if needed.gpu and machine.memory_bytes:
            check_healing(source, config, gpu_total=machine.memory_bytes * sharers)
    return result


def scaled(config: BuildConfig, share: float, *, kept: Collection[str] = ()) -> BuildConfig:
    """Return settings for a share of the usual work, but no less than `LEAST`.

    Args:
        share: In (0, 1].
        kept: Options that were given, and stay as they are.
    """
    if share == 1:
        return config
    measure, heal, evaluate = config.measure, config.heal, config.evaluate

    def part(name: str, usual: int) -> int:
        return usual if name in kept else max(int(share * usual), min(LEAST[name], usual))

    changes: dict[str, Any] = {}
    if measure.num_samples is None:
        most = part("samples", measure.max_samples)
        changes["measure"] = measure.model_copy(update={"max_samples": most})
    else:
        changes["measure"] = measure.model_copy(update={"num_samples": part("samples", measure.num_samples)})
    steps = part("heal_steps", heal.num_steps)
    warmup = warmup_for(steps, heal.warmup_steps)
    changes["heal"] = heal.model_copy(update={"num_steps": steps, "warmup_steps": warmup})
    largest = max((TASK_SIZES.get(task, OTHER_TASK)[0] for task in evaluate.tasks), default=0)
    limit = part("limit", evaluate.limit or max(largest // 4, 1)) if evaluate.tasks else None
    documents = part("eval_documents", evaluate.num_documents)
    changes["evaluate"] = evaluate.model_copy(update={"num_documents": documents, "limit": limit})
    if "limit" in kept:
        changes["evaluate"] = changes["evaluate"].model_copy(update={"limit": evaluate.limit})
    return config.model_copy(update=changes)


def share_within(
    source: Source,
    config: BuildConfig,
    *,
    budget: float,
    machine: Machine,
    pending: Sequence[str],
    kept: Collection[str] = (),
    calibration: Contents | None = None,
    evaluations: Sequence[Contents] = (),
) -> float:
    """Return the largest share of the usual work whose estimate is within a budget, for `scaled`.

    Args:
        budget: Seconds.

    Raises:
        UsageError: Not even the least work is.
    """
    n = num_dropped(config.drop, source.num_layers)
    after = source.num_parameters - n * sum(source.layer_parameters) // source.num_layers

    def seconds(share: float) -> float:
        found = _seconds(
            scaled(config, share, kept=kept),
            pending,
            before=source.num_parameters,
            after=after,
            machine=machine,
            calibration=calibration,
            evaluations=evaluations,
        )
        return START_SECONDS + sum(found.values())

    if seconds(1) <= budget:
        return 1
    least = seconds(0)
    if least > budget:
        raise UsageError(
            f"`budget` of {duration(budget)}: even the least work takes about {duration(least)} here",
            hint=f"give `budget={math.ceil(least / 60)}min`, or a shorter `sequence_length` or fewer `tasks`",
        )
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if seconds(middle) <= budget else (low, middle)
    return low


def _copies(size_bytes: int, *, home: Path, out: Path | None) -> list[tuple[Path, str, int]]:
    """Return the build's own demand for disk: none on the disk of the stages, whose files it links."""
    if out is None or len(demands([(home, HOME, 1), (out, "`out`", 1)])) == 1:
        return []
    return [(out, "`out`", size_bytes)]


def _check_here(config: BuildConfig, pending: Sequence[str], needed: Needs, machine: Machine) -> None:
    """Refuse a build for which this machine has too little memory, or no working quantisation."""
    gpu_total = machine.memory_bytes if needed.gpu else 0
    check_memory(needed, host_total=machine.host_bytes, gpu_total=gpu_total)
    heals = "heal" in pending and config.has_adapter and config.heal.bits == 4
    if heals or ("measure" in pending and config.measure.four_bit):
        from factory.model.devices import best_device

        check_four_bit(best_device())


def _sharers(source: Source, config: BuildConfig, *, processes: int, pruned_parameters: int) -> int:
    """Return the number of GPUs that share one copy of the model in training: 1 if it fits on one GPU."""
    from factory.parallel.launch import check_sharding

    number, divided = healing_processes(
        source, config, processes=processes, pruned_parameters=pruned_parameters
    )
    if not divided:
        return 1
    check_sharding()
    return number


def _tokens(num_documents: int, text: Contents | None, *, unknown: int) -> tuple[int, float]:
    """Return how many of the requested documents will be read, and their mean length in tokens."""
    if text is None or not text.num_documents:
        return num_documents, unknown
    number = min(num_documents, text.num_documents) if text.is_whole else num_documents
    return number, text.num_bytes / text.num_documents / BYTES_PER_TOKEN


def _seconds(
    config: BuildConfig,
    pending: Sequence[str],
    *,
    before: int,
    after: int,
    machine: Machine,
    calibration: Contents | None,
    evaluations: Sequence[Contents],
) -> dict[str, float]:
    """Return the estimated time of each pending stage, without the start of the program."""
    measure, heal, evaluate = config.measure, config.heal, config.evaluate
    backward = FORWARD_BACKWARD if _is_cpu(machine.device) else WITH_RECOMPUTATION
    taught = FORWARD * before * OBJECTIVES[heal.objective].teacher_passes
    sizes = [TASK_SIZES.get(task, OTHER_TASK) for task in evaluate.tasks]
    task_tokens = sum(min(requests, (evaluate.limit or requests) * 4) * tokens for requests, tokens in sizes)
    samples, length = _tokens(
        measure.num_samples or measure.max_samples, calibration, unknown=measure.sequence_length
    )
    measured = samples * min(length, measure.sequence_length)  # the beginning of each document
    known: Sequence[Contents | None] = evaluations or [None] * len(evaluate.data)
    read = [_tokens(evaluate.num_documents, text, unknown=evaluate.sequence_length) for text in known]
    evaluated = sum(number * length for number, length in read) + task_tokens  # every window of each document
    work = {
        "measure": measured * FORWARD * before,
        "heal": heal.num_steps * heal.batch_size * heal.sequence_length * (backward * after + taught),
        "evaluate": evaluated * FORWARD * (before + 2 * after),
    }
    if not config.heal_enabled:
        models = before + (2 if config.has_adapter else 1) * after
        work["heal"], work["evaluate"] = 0, evaluated * FORWARD * models
    rate = machine.flops_per_second
    return {stage: STAGE_SECONDS + work.get(stage, 0) / rate for stage in pending}


def this_machine(source: Source, *, processes: int, works: bool) -> Machine:
    """Return this machine, with its pace as measured if there is work."""
    device, memory_total, rate = _measured(source) if works else ("", 0, 1.0)
    if processes > 1:
        rate *= 1 if _is_cpu(device) else processes  # processes on a CPU share its cores
        device = f"{device}, {processes} processes"
    return Machine(device, memory_total, rate, host_bytes=host_bytes())


def _measured(source: Source) -> tuple[str, int, float]:
    """Return the device, its memory in bytes, and its FLOP/s on products of this model's width."""
    import torch

    from factory.model.devices import best_device, compute_dtype, device_name

    device = best_device()
    text_config = source.config.get("text_config") or source.config
    width = min(int(text_config.get("hidden_size") or text_config.get("n_embd") or 1024), MAX_WIDTH)
    rows = 512 if device.type == "cpu" else 4096
    left = torch.ones(rows, width, device=device, dtype=compute_dtype(device))
    right = torch.ones(width, 4 * width, device=device, dtype=compute_dtype(device))
    times: list[float] = []
    end = time.perf_counter() + PROBE_SECONDS
    while len(times) < 30 or time.perf_counter() < end:  # the best of many: others may use the machine
        start = time.perf_counter()
        (left @ right).sum().item()
        times.append(time.perf_counter() - start)
    # Whole models reach about a third of a single product's rate: norms, attention and small kernels.
    rate = 2 * rows * width * 4 * width / min(times) / 3
    if device.type == "cuda":
        return device_name(device), torch.cuda.get_device_properties(device).total_memory, rate
    return device_name(device), host_bytes(), rate


def _is_cpu(device: str) -> bool:
    return device.startswith("CPU")
