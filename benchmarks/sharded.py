"""Claim: a 70B model heals on GPUs that each hold a share of it (FSDP), as it does on one that holds it all.

    python benchmarks/sharded.py --shape llama-70b --drop 0.4 --objectives sft,distill --ways one,sharded

The weights are random and made on the device, for speed, memory and the agreement of losses only. Memory is
the peak of the GPU that used most, from before the model is divided to the last step.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from processes import ways_of
from shapes import SHAPES, random_model

from factory.config.settings import HealSettings
from factory.healing.data import data_sets
from factory.healing.heal import begin
from factory.model.devices import best_device
from factory.model.quantization import keep_scales_whole
from factory.model.tokenizer import load_encoder
from factory.parallel import processes
from factory.parallel.launch import num_processes, spread
from factory.resources import DEMO_MODEL
from factory.text.text import open_text

WARM_STEPS = 2


def heal_random(
    shape: str, dropped: Iterable[int], *, settings: HealSettings, folder: Path, progress: Any
) -> tuple[list[float], float, float]:
    """Heal a random model; return the loss of each step, the peak in bytes, and the seconds before step 1."""
    begun = time.monotonic()
    torch.manual_seed(0)
    dropped = tuple(dropped)
    distils = settings.objective == "distill"
    whole = SHAPES[shape].to_dict()
    layers = whole["num_hidden_layers"] - (0 if distils else len(dropped))
    config = SHAPES[shape].__class__(**{**whole, "num_hidden_layers": layers})
    model = random_model(config, four_bit=settings.bits == 4, to_shard=processes.sharded())
    if processes.sharded():
        keep_scales_whole(model, best_device())
    model.is_loaded_in_4bit = settings.bits == 4
    encoder = load_encoder(DEMO_MODEL)
    text = open_text("stdlib:train", split="train")
    with processes.main_first():
        guard, train = data_sets(text, encoder, settings=settings, seed=0, folder=folder)
    on_gpu = best_device().type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    _, trainer = begin(
        model, tokenizer=encoder.tokenizer, texts=(guard, train), dropped=dropped,
        settings=settings, seed=0, folder=folder, progress=progress,
    )  # fmt: skip
    trainer.args.save_strategy = "no"
    trainer.args.load_best_model_at_end = False
    started = time.monotonic() - begun
    trainer.train()
    peaks = processes.gather([torch.cuda.max_memory_allocated() if on_gpu else 0])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, max(peaks), started


def main() -> None:
    """Print a row after each objective and way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-70b")
    parser.add_argument("--drop", type=float, default=0.4)
    parser.add_argument("--objectives", default="sft,distill")
    parser.add_argument("--ways", default="one,sharded")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--modules", default="all-linear")
    parser.add_argument("--bits", type=int, choices=(4, 16), default=4)
    parser.add_argument("--processes", type=int)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    several = num_processes(options.processes)
    number = int(options.drop * SHAPES[options.shape].num_hidden_layers + 0.5)
    start = (SHAPES[options.shape].num_hidden_layers - number) * 2 // 3
    print(f"{options.shape} without layers {start}–{start + number - 1}, {options.bits} bits")
    print("| objective | | tokens/s | ratio | GB per GPU | losses | apart | before step 1, s |")
    print("|---|---|--:|--:|--:|---|--:|--:|", flush=True)
    from sharded import heal_random as work  # so that other processes can import it

    for objective in options.objectives.split(","):
        settings = HealSettings(
            objective=objective, num_steps=options.steps, warmup_steps=2, batch_size=options.batch_size,
            sequence_length=options.sequence_length, rank=options.rank, modules=options.modules,
            bits=options.bits, dropout=0,
        )  # fmt: skip
        first: tuple[float, list[float]] | None = None
        for name, count, case in ways_of(options.ways, several):
            times: list[float] = []
            with tempfile.TemporaryDirectory() as folder:
                losses, peak, before = spread(
                    partial(
                        work,
                        options.shape,
                        range(start, start + number),
                        settings=settings,
                        folder=Path(folder),
                    ),
                    processes=count,
                    case=case,
                    progress=lambda *_, times=times: times.append(time.monotonic()),  # type: ignore[misc]
                )
            steps = [b - a for a, b in zip(times[WARM_STEPS:-1], times[WARM_STEPS + 1 :], strict=True)]
            rate = options.batch_size * options.sequence_length / median(steps)
            first = first or (rate, losses)
            apart = max(abs(a - b) for a, b in zip(losses, first[1], strict=True))
            print(
                f"| {objective} | {name} | {rate:,.0f} | {rate / first[0]:.2f} | {peak / 1e9:.1f} "
                f"| {' '.join(f'{loss:.4f}' for loss in losses)} | {apart:.4f} | {before:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
