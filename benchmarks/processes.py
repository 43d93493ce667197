"""Claim: several GPUs give the results of one in a fraction of its time.

    python benchmarks/processes.py MODEL --layers 11-20 --heal-data TEXT --setting bits=4 --setting rank=8
    python benchmarks/processes.py MODEL --layers 11-20 --heal-data TEXT --measure 512 --documents 1000

Heals the same pruned checkpoint on the same text in one process, in several (each with the whole model),
and with `--ways one,spread,sharded` also in several that each hold a share of every layer (FSDP). Steps are
timed without the first three, loading and starting; with one process, every GPU but the first is idle.
Losses are of held-out text, in the arithmetic of training; "apart" is the largest difference along the curve
of training. Measuring and evaluating are timed from their first report of progress to their last.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from evaluate_speed import write_tasks
from heal import settings_of

from factory.artifacts import Adapter, Checkpoint, PruningPlan, Source
from factory.config.options import read_layers
from factory.config.settings import EvaluateSettings, HealSettings, MeasureSettings
from factory.evaluation.evaluate import evaluate
from factory.healing.heal import heal
from factory.hub.pull import pull
from factory.hub.resolve import resolve
from factory.parallel.launch import Case, num_processes, spread
from factory.pruning.measure import measure
from factory.pruning.prune import prune
from factory.text.text import Text, open_text

WARM_STEPS = 3
Seen = list[tuple[float, int, str]]  # seconds, units done, note


def timed(work: Callable[..., Any], *, processes: int, case: Case | None = None) -> tuple[Any, Seen]:
    """Return what some work returns, and its reports of progress."""
    seen: Seen = []
    result = spread(
        work,
        processes=processes,
        case=case,
        progress=lambda done, _total, note: seen.append((time.monotonic(), done, note)),
    )
    return result, seen


def rates(seen: Seen) -> dict[str, float]:
    """Return units per second of each part of a stage, by its note."""
    found = {}
    for note in dict.fromkeys(note for *_, note in seen):
        part = [(at, done) for at, done, other in seen if other == note]
        if len(part) > 1 and part[-1][0] > part[0][0]:
            found[note] = (part[-1][1] - part[0][1]) / (part[-1][0] - part[0][0])
    return found


def ways_of(names: str, several: int) -> Iterator[tuple[str, int, Case | None]]:
    """Yield label, number of processes and configuration of each way."""
    ways: dict[str, tuple[str, int, Case | None]] = {
        "one": ("one process", 1, None),
        "spread": (f"{several}, the whole model each", several, None),
        "sharded": (f"{several}, a share each", several, "fsdp"),
    }
    yield from (ways[name] for name in names.split(","))


def heal_ways(
    pruned: Checkpoint,
    source: Source,
    text: Text,
    *,
    dropped: tuple[int, ...],
    settings: HealSettings,
    ways: str,
    several: int,
    scratch: Path,
) -> None:
    """Heal in each way, and print a row after each."""
    step_tokens = settings.batch_size * settings.sequence_length
    first: tuple[Adapter, float] | None = None
    for name, processes, case in ways_of(ways, several):
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            part = partial(
                heal,
                pruned,
                text,
                source_folder=source.local_folder,
                dropped=dropped,
                settings=settings,
                seed=0,
                folder=Path(folder),
            )
            begun = time.monotonic()
            adapter, seen = timed(part, processes=processes, case=case)
        times = [at for at, *_ in seen]
        steps = [b - a for a, b in zip(times[WARM_STEPS:-1], times[WARM_STEPS + 1 :], strict=True)]
        step = median(steps)
        first = first or (adapter, step)
        apart = max(abs(a.loss - b.loss) for a, b in zip(adapter.curve, first[0].curve, strict=True))
        print(
            f"| {settings.objective}, {settings.bits} bits | {name} | {step_tokens / step:,.0f} "
            f"| {first[1] / step:.2f} ({first[1] / max(steps):.2f}–{first[1] / min(steps):.2f}) "
            f"| {adapter.guard_loss_before:.4f} → {adapter.guard_loss_after:.4f} | {apart:.4f} "
            f"| {time.monotonic() - begun:.0f} |",
            flush=True,
        )


def read_ways(
    name: str,
    work: Callable[..., Any],
    found: Callable[[Any], str],
    *,
    into: str,
    several: int,
    scratch: Path,
) -> None:
    """Measure or evaluate in one process and in several, and print a row for each part of either.

    Args:
        into: Name of the argument of `work` that takes its folder.
    """
    first: dict[str, float] = {}
    for label, processes, _ in ways_of("one,spread", several):
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            begun = time.monotonic()
            result, seen = timed(partial(work, **{into: Path(folder)}), processes=processes)
        for note, rate in rates(seen).items():
            first.setdefault(note, rate)
            print(
                f"| {name} {note} | {label} | {rate:.1f} | {rate / first[note]:.2f} | {found(result)} "
                f"| {time.monotonic() - begun:.0f} |",
                flush=True,
            )


def main() -> None:
    """Print a row after each way of healing, measuring and evaluating."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--layers", required=True, help="layers to drop: 11-20")
    parser.add_argument("--heal-data", required=True)
    parser.add_argument("--setting", action="append", help="settings of healing: rank=8,bits=4; repeatable")
    parser.add_argument("--ways", default="one,spread", help="of: one, spread, sharded")
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--measure", type=int, default=0, help="number of samples")
    parser.add_argument("--documents", type=int, default=0, help="number of documents to evaluate")
    parser.add_argument("--questions", type=Path, help="folder of questions, as in evaluate_speed.py")
    parser.add_argument("--scratch", type=Path, help="folder for what is made")
    options = parser.parse_args()
    several = num_processes(options.processes)
    source = pull(resolve(options.model))
    dropped = read_layers(options.layers)
    text = open_text(options.heal_data, split="train")
    print(f"{several} × {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}", flush=True)
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        scratch = Path(name)
        plan = PruningPlan(criterion="chosen", num_layers=source.num_layers, dropped=dropped)
        (scratch / "pruned").mkdir()
        pruned = prune(source, plan, folder=scratch / "pruned", progress=lambda *_: None)
        length = options.sequence_length
        if options.setting:
            print("| healing | | tokens/s | ratio | held-out | apart | whole, s |")
            print("|---|---|--:|--:|---|--:|--:|", flush=True)
        for setting in options.setting or ():
            settings = settings_of(
                setting, tokens=options.tokens, length=length, batch_size=options.batch_size
            )
            heal_ways(
                pruned, source, text, dropped=dropped, settings=settings, ways=options.ways, several=several,
                scratch=scratch,
            )  # fmt: skip
        read = partial(read_ways, several=several, scratch=scratch)
        if options.measure or options.documents:
            print("| stage | | units/s | ratio | found | whole, s |\n|---|---|--:|--:|---|--:|", flush=True)
        if options.measure:
            measuring = MeasureSettings(num_samples=options.measure, sequence_length=length)
            work = partial(measure, source, text, settings=measuring, block_sizes=(), seed=0)
            read("measure", work, lambda profile: f"{profile.mean[0][5]:.5f}", into="folder")
        if options.documents:
            (scratch / "tasks").mkdir()
            tasks = write_tasks(options.questions, scratch / "tasks") if options.questions else []
            evaluating = EvaluateSettings(
                num_documents=options.documents,
                tasks=tuple(tasks),
                num_fewshot=dict.fromkeys(tasks, 0),
                sequence_length=length,
            )
            work = partial(evaluate, source.local_folder, text, settings=evaluating)
            read("evaluate", work, lambda evaluation: f"{evaluation.loss.nats:.5f}", into="into")


if __name__ == "__main__":
    main()
