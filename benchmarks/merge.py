"""Claim: merging a 7B adapter takes at most 2.5 times the time of `cp`, and memory for a few tensors.

    python benchmarks/merge.py [--layers 22] [--rank 64] [--rounds 3] [--folder DIR]

Writes Mistral 7B's shape with random bf16 weights and a LoRA adapter on its feed-forward modules. Then
runs alternately `cp` of the weights, which are as large as the result, and the merge in a separate process,
each until everything is on disk. The time of the merge includes its checksums, but not the start of Python.
Needs twice the size on disk (22 layers: 10.1 GB).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from prune import seconds_of
from safetensors.torch import save_file
from shapes import write_random
from transformers import MistralConfig

from factory.artifacts import Adapter, Checkpoint
from factory.healing.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PEFT_PREFIX
from factory.healing.merge import merge as merge_merge
from factory.store.files import sync_files

FFN = ("gate_proj", "up_proj", "down_proj")


def write_adapter(folder: Path, shapes: dict[str, torch.Size], *, rank: int) -> None:
    """Write a LoRA adapter in peft's format with random values in both halves."""
    folder.mkdir()
    tensors = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module.endswith(FFN):
            tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"] = torch.randn(rank, shape[1]) * 0.01
            tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"] = torch.randn(shape[0], rank) * 0.01
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": FFN}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))


def merge_here(source: Path, adapter: Path, target: Path) -> dict[str, float]:
    """Merge in this process; return the seconds, and its peak resident memory."""
    pruned = Checkpoint(folder=source, num_layers=1, num_parameters=1, size_bytes=1, files={})
    start = time.perf_counter()
    trained = Adapter.model_construct(folder=adapter, quantization="none", num_steps=1, experts=())
    merge_merge(pruned, trained, folder=target)
    returned = time.perf_counter() - start
    sync_files(target)
    synced = time.perf_counter() - start
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    return {"returned": returned, "synced": synced, "peak_gb": int(status.split()[0]) * 1024 / 1e9}


def merge_apart(source: Path, adapter: Path, folder: Path) -> dict[str, float]:
    """Merge in a fresh process, into a new folder."""
    target = folder / "target"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    os.sync()
    command = [sys.executable, __file__, "--merge", source, adapter, target]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    values: dict[str, float] = json.loads(done.stdout)
    return values


def main() -> None:
    """Write the model, time both alternately, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure; default: temporary")
    parser.add_argument("--merge", type=Path, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.merge:
        print(json.dumps(merge_here(*arguments.merge)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="factory-benchmark-") as name:
        folder = Path(name)
        source, adapter = folder / "source", folder / "adapter"
        shapes = write_random(source, MistralConfig(num_hidden_layers=arguments.layers))
        write_adapter(adapter, shapes, rank=arguments.rank)
        files = sorted(source.glob("*.safetensors"))
        copies, merges = [], []
        for _ in range(arguments.rounds):
            cp = ["cp", *files]
            copies.append(seconds_of(lambda target, cp=cp: subprocess.run([*cp, target], check=True), folder))
            merges.append(merge_apart(source, adapter, folder))
            print(f"cp {copies[-1][1]:.1f} s, merge {merges[-1]}", flush=True)
        report(copies, merges, size_bytes=sum(file.stat().st_size for file in files))


def report(copies: list[tuple[float, float]], merges: list[dict[str, float]], *, size_bytes: int) -> None:
    """Print medians, ranges and the two claims."""
    print(f"{size_bytes / 1e9:.1f} GB, medians of {len(copies)} rounds, {torch.get_num_threads()} threads")
    rows = {
        "cp, returned": [returned for returned, _ in copies],
        "cp, synced": [synced for _, synced in copies],
        "merge, returned": [values["returned"] for values in merges],
        "merge, synced": [values["synced"] for values in merges],
    }
    for what, seconds in rows.items():
        print(f"{what:16} {statistics.median(seconds):6.1f} s  ({min(seconds):.1f}–{max(seconds):.1f})")
    for when in ("returned", "synced"):
        pairs = zip(rows[f"merge, {when}"], rows[f"cp, {when}"], strict=True)
        ratios = [ours / theirs for ours, theirs in pairs]
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"merge / cp, both {when}: {statistics.median(ratios):.2f} ({each}; limit 2.5)")
    print(f"peak resident memory: {max(values['peak_gb'] for values in merges):.2f} GB (limit 2)")


if __name__ == "__main__":
    main()
