"""Claim: healing on several GPUs gives the losses of one, and takes less time.

    python benchmarks/processes.py MODEL --layers 11-20 --heal-data TEXT [--setting bits=4] [--processes 2]

Heals the same pruned checkpoint on the same text in one process, in several (DDP), and in several that each
hold a share of every layer (FSDP). The losses are of the held-out text, in the arithmetic of training. The
seconds are per step, the median of all but the first three, without loading and starting.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from heal import settings_of

from factory.artifacts import PruningPlan
from factory.config.options import read_layers
from factory.healing.heal import heal
from factory.hub.pull import pull
from factory.hub.resolve import resolve
from factory.parallel.launch import Case, num_processes, spread
from factory.pruning.prune import prune
from factory.text.text import open_text

WARM_STEPS = 3


def main() -> None:
    """Print a row after each way of healing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--layers", required=True, help="layers to drop: 11-20")
    parser.add_argument("--heal-data", required=True)
    parser.add_argument("--setting", default="bits=4", help="settings of healing: rank=8,bits=4")
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--processes", type=int)
    options = parser.parse_args()
    several = num_processes(options.processes)
    source = pull(resolve(options.model))
    dropped = read_layers(options.layers)
    text = open_text(options.heal_data, split="train")
    settings = settings_of(
        options.setting,
        tokens=options.tokens,
        length=options.sequence_length,
        batch_size=options.batch_size,
    )
    ways: list[tuple[str, int, Case | None]] = [("one process", 1, None), (f"{several}, DDP", several, None)]
    if torch.cuda.is_available():  # accelerate shards on GPUs only
        ways.append((f"{several}, FSDP", several, "fsdp"))
    print("| | held-out before | after | last loss | step, s |\n|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as scratch:
        plan = PruningPlan(criterion="chosen", num_layers=source.num_layers, dropped=dropped)
        (Path(scratch) / "pruned").mkdir()
        pruned = prune(source, plan, folder=Path(scratch) / "pruned", progress=lambda *_: None)
        for number, (name, processes, case) in enumerate(ways):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            times: list[float] = []
            part = partial(
                heal,
                pruned,
                text,
                source_folder=source.local_folder,
                dropped=dropped,
                settings=settings,
                seed=0,
                folder=folder,
            )
            adapter = spread(
                part,
                processes=processes,
                case=case,
                progress=lambda *_, times=times: times.append(time.monotonic()),  # type: ignore[misc]
            )
            steps = [b - a for a, b in zip(times[WARM_STEPS:-1], times[WARM_STEPS + 1 :], strict=True)]
            print(
                f"| {name} | {adapter.guard_loss_before:.4f} | {adapter.guard_loss_after:.4f} "
                f"| {adapter.curve[-1].loss:.4f} | {median(steps):.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
