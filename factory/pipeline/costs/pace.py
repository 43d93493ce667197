"""Estimate the time of each stage, from the work in it and the pace of a machine."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from factory.artifacts import Source
from factory.config.criteria import CRITERIA
from factory.config.objectives import OBJECTIVES
from factory.config.settings import BuildConfig, num_dropped
from factory.pipeline.costs.probe import Pace, pace_of
from factory.pipeline.costs.requirements import host_bytes, widths
from factory.pruning.sizes import left_about
from factory.text.overlap import Contents

PROCESSES_SECONDS = 25.0  # starting several of them for one stage, most of it imports
START_SECONDS = 12.0  # importing torch, transformers, trl and lm-eval for the first time
STAGE_SECONDS = 2.0  # loading a small model and opening the text
LOADED_BYTES = 1e9  # per second
# FLOP per parameter and token: forward 2, backward to the activations 2, recomputation 2 (GPU only).
FORWARD, FORWARD_BACKWARD, WITH_RECOMPUTATION = 2, 4, 6
# Approximate requests of lm-eval's tasks and tokens per request; OTHER_TASK stands in for all others.
TASK_SIZES = {
    "mmlu": (56_168, 700),
    "boolq": (6_540, 180),
    "gsm8k": (1_319, 8_000),  # mostly generated, bound by memory: 40,000 steps of 8 rows, 25 ms for 7B
    "next_line": (1_600, 160),
}
OTHER_TASK = (8_000, 120)
BYTES_PER_TOKEN = 4.0  # of UTF-8 text, roughly: 4.4 for English, 3 for Chinese and for code
PROBE_SECONDS = 0.3  # a busy machine lets no single product of a tiny model through undisturbed
SHORT_FLOP = 1e11  # work of seconds on any machine: timing that would take as long
SLOW_FLOPS = 1e10  # per second; of a core with a tiny model
MAX_WIDTH = 8192  # of the test product: wider ones run no faster and fill memory
HELD_OUT_PASSES = 12  # at about ten checkpoints, before the first step and at the end
HELD_OUT_SEQUENCES, HELD_OUT_SHARE = 64, 0.05  # at most, as `healing.data` keeps them; its import is slow
SPEED_ROUNDS, PROMPT, NEW_TOKENS = 6, 256, 32  # of the comparison of speed, with its warm-up
CPU_MEMORY_BYTES = 1e10  # read per second
LAUNCHES_SECONDS = 1e-3  # of a layer's kernels, in a pass over one token
PRUNED_BYTES, MERGED_BYTES = 7e8, 3e8  # written per second, with checksums
CHECK_SECONDS = 1.0  # of a small checkpoint
SEARCHED = 4  # whole passes over a sequence that trying one candidate takes: eight, from the cut on
FINALISTS = 4  # candidates tried on all sequences


@dataclass(frozen=True)
class Machine:
    """A machine that a build is to run on."""

    device: str
    memory_bytes: int  # of all its GPUs, or of the host without one
    flops_per_second: float  # reached by a whole model
    disk_bytes: int = 0  # free, on a machine other than this
    host_bytes: int = 0  # 0: unknown
    pace: Pace | None = None  # of this model's layers, if they could be timed here
    processes: int = 1  # that can share a stage's work, each as fast as one alone


def stage_seconds(
    source: Source,
    config: BuildConfig,
    pending: Sequence[str],
    *,
    machine: Machine,
    calibration: Contents | None,
    evaluations: Sequence[Contents],
) -> dict[str, float]:
    """Return the estimated time of each pending stage, without the start of the program.

    A stage is divided among the machine's processes if that saves more time than starting them takes.
    """
    measure, heal, evaluate = config.measure, config.heal, config.evaluate
    whole = source.num_layers
    kept = whole - num_dropped(config.drop, whole)
    cost = _cost(source, config, machine, kept)
    _, bytes_after = left_about(source, whole - kept)
    sizes = [TASK_SIZES.get(task, OTHER_TASK) for task in evaluate.tasks]
    task_tokens = sum(min(requests, (evaluate.limit or requests) * 4) * tokens for requests, tokens in sizes)
    samples, length = _tokens(
        measure.num_samples or measure.max_samples, calibration, unknown=measure.sequence_length
    )
    known: Sequence[Contents | None] = evaluations or [None] * len(evaluate.data)
    read = [_tokens(evaluate.num_documents, text, unknown=evaluate.sequence_length) for text in known]
    evaluated = sum(number * length for number, length in read) + task_tokens  # every window of each document
    results = 2 if config.has_adapter else 1
    steps, step_tokens = heal.num_steps, heal.batch_size * heal.sequence_length
    held_out = HELD_OUT_PASSES * min(
        HELD_OUT_SEQUENCES * heal.sequence_length, int(HELD_OUT_SHARE * steps * step_tokens)
    )
    work = {
        "measure": samples * min(length, measure.sequence_length) * cost.reading(whole),
        "prune": CHECK_SECONDS + bytes_after / PRUNED_BYTES,
        "merge": CHECK_SECONDS + bytes_after / MERGED_BYTES,
        "evaluate": evaluated * (cost.reading(whole) + results * cost.reading(kept)),
        "speed": SPEED_ROUNDS
        * sum(PROMPT * cost.reading(n) + NEW_TOKENS * cost.decoding(n) for n in (whole, kept)),
    }
    if config.heal_enabled:
        work["heal"] = steps * (step_tokens * cost.training + cost.update) + held_out * cost.reading(kept)
    models = {"measure": 1, "heal": 1, "evaluate": 1 + results, "speed": 2}
    if (criterion := CRITERIA.get(config.plan.criterion)) and criterion.searches:
        rounds = whole - kept if criterion.scattered else 1
        read_each = SEARCHED * kept + FINALISTS * config.plan.num_documents  # passes over a sequence
        work["search"] = rounds * read_each * config.plan.sequence_length * cost.reading(kept)
        models["search"] = 1
    for stage, starts in num_starts(config).items():
        if stage in work and machine.processes > 1:
            divided = work[stage] / machine.processes + starts * PROCESSES_SECONDS
            work[stage] = min(work[stage], divided)
    loading = STAGE_SECONDS + source.size_bytes / LOADED_BYTES
    return {stage: models.get(stage, 0) * loading + work.get(stage, 0) for stage in pending}


def num_starts(config: BuildConfig) -> dict[str, int]:
    """Return the stages that several processes can share, and how often each of them starts processes."""
    models = 3 if config.has_adapter else 2
    return {"measure": 1, "heal": 1, "evaluate": models * len(config.evaluate.data)}


def too_short(config: BuildConfig, seconds: Mapping[str, float], *, processes: int) -> frozenset[str]:
    """Return the stages that take less time in one process than several take to start and do them.

    Args:
        seconds: Of `stage_seconds`, on a machine of so many processes.
    """
    least = PROCESSES_SECONDS * processes / (processes - 1) if processes > 1 else 0
    starts = num_starts(config)
    return frozenset(stage for stage in starts if seconds.get(stage, 0) < starts[stage] * least)


@dataclass(frozen=True)
class _Cost:
    """Seconds in one process."""

    reading: Callable[[int], float]  # number of layers → a token, in passes of many
    decoding: Callable[[int], float]  # number of layers → a token after the other
    training: float  # a token, with the teacher's pass
    update: float  # of the adapter, in each step


def _cost(source: Source, config: BuildConfig, machine: Machine, kept: int) -> _Cost:
    """Return the costs as timed; or as computed from products, if disturbed passes took longer than that."""
    if machine.pace is None:
        return _by_flops(source, config, machine, kept)
    timed = _by_pace(source, config, machine, kept)
    if machine.pace.settled:
        return timed
    computed = _by_flops(source, config, machine, kept)
    return _Cost(
        reading=lambda n: min(timed.reading(n), computed.reading(n)),
        decoding=timed.decoding,
        training=min(timed.training, computed.training),
        update=computed.update,
    )


def _by_pace(source: Source, config: BuildConfig, machine: Machine, kept: int) -> _Cost:
    pace, heal = machine.pace, config.heal
    assert pace is not None
    taught = OBJECTIVES[heal.objective].teacher_passes * source.num_layers * pace.layer
    return _Cost(
        reading=lambda n: n * pace.layer + pace.head,
        decoding=_decoding(source, machine),
        training=kept * pace.trained_layer + pace.trained_head + taught,
        update=kept * pace.update,
    )


def _by_flops(source: Source, config: BuildConfig, machine: Machine, kept: int) -> _Cost:
    backward = FORWARD_BACKWARD if is_cpu(machine.device) else WITH_RECOMPUTATION
    after, rate = _kept_parameters(source, kept), machine.flops_per_second
    taught = OBJECTIVES[config.heal.objective].teacher_passes * FORWARD * source.num_parameters
    return _Cost(
        reading=lambda n: FORWARD * _kept_parameters(source, n) / rate,
        decoding=_decoding(source, machine),
        training=(backward * after + taught) / rate,
        update=0,
    )


def _decoding(source: Source, machine: Machine) -> Callable[[int], float]:
    """Return the time of a pass over one token, bound by reading all weights or by launching kernels."""
    if is_cpu(machine.device):
        return lambda n: 4 * _kept_parameters(source, n) / CPU_MEMORY_BYTES
    return lambda n: n * LAUNCHES_SECONDS


def _kept_parameters(source: Source, num_layers: int) -> int:
    return left_about(source, source.num_layers - num_layers)[0]


def _tokens(num_documents: int, text: Contents | None, *, unknown: int) -> tuple[int, float]:
    """Return how many of the requested documents will be read, and their mean length in tokens."""
    if text is None or not text.num_documents:
        return num_documents, unknown
    number = min(num_documents, text.num_documents) if text.is_whole else num_documents
    return number, text.num_bytes / text.num_documents / BYTES_PER_TOKEN


def this_machine(
    source: Source, config: BuildConfig, *, processes: int, flop: float | None, home: Path
) -> Machine:
    """Return this machine, with its pace as timed if there is more than a little work.

    Args:
        flop: Work to do, roughly; None if there is none.
    """
    if flop is None:
        return Machine("", 0, 1.0, host_bytes=host_bytes())
    pace = pace_of(source, config, home=home) if flop > SHORT_FLOP else None
    products = flop > SHORT_FLOP and (pace is None or not pace.settled)
    device, memory_total, rate = _measured(source, products=products)
    sharers = 1 if is_cpu(device) else processes  # processes on a CPU share its cores
    if processes > 1:
        device = f"{device}, {processes} processes"
    return Machine(device, memory_total, rate, host_bytes=host_bytes(), pace=pace, processes=sharers)


def _measured(source: Source, *, products: bool) -> tuple[str, int, float]:
    """Return the device, its memory in bytes, and its FLOP/s on products of this model's width, if asked."""
    import torch

    from factory.model.devices import best_device, compute_dtype, device_name

    device = best_device()
    on_gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else host_bytes()
    if not products:
        return device_name(device), memory, SLOW_FLOPS
    width = min(widths(source)[0], MAX_WIDTH)
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
    return device_name(device), memory, 2 * rows * width * 4 * width / min(times) / 3


def is_cpu(device: str) -> bool:
    return device.startswith("CPU")
