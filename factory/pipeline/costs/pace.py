"""Estimate the time of each stage, from the work in it and the pace of a machine."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from factory.artifacts import Source
from factory.config.objectives import OBJECTIVES
from factory.config.settings import BuildConfig
from factory.pipeline.costs.requirements import host_bytes
from factory.text.overlap import Contents

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
MAX_WIDTH = 8192  # of the test product: wider ones run no faster and fill memory


@dataclass(frozen=True)
class Machine:
    """A machine that a build is to run on."""

    device: str
    memory_bytes: int  # of all its GPUs, or of the host without one
    flops_per_second: float  # reached by a whole model
    disk_bytes: int = 0  # free, on a machine other than this
    host_bytes: int = 0  # 0: unknown


def stage_seconds(
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
    backward = FORWARD_BACKWARD if is_cpu(machine.device) else WITH_RECOMPUTATION
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


def _tokens(num_documents: int, text: Contents | None, *, unknown: int) -> tuple[int, float]:
    """Return how many of the requested documents will be read, and their mean length in tokens."""
    if text is None or not text.num_documents:
        return num_documents, unknown
    number = min(num_documents, text.num_documents) if text.is_whole else num_documents
    return number, text.num_bytes / text.num_documents / BYTES_PER_TOKEN


def this_machine(source: Source, *, processes: int, works: bool) -> Machine:
    """Return this machine, with its pace as measured if there is work."""
    device, memory_total, rate = _measured(source) if works else ("", 0, 1.0)
    if processes > 1:
        rate *= 1 if is_cpu(device) else processes  # processes on a CPU share its cores
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


def is_cpu(device: str) -> bool:
    return device.startswith("CPU")
