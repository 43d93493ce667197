"""Claim: pruning on disk costs about what copying the kept bytes costs, in memory that does not grow.

    python benchmarks/prune.py [--gigabytes 4] [--rounds 5] [--folder DIR]

Writes a synthetic checkpoint in several shards, then in turns: `cp` of the pruned files, `cp` followed by
hashlib's sha256, and the pruning copy, which hashes too. Everything is synced to disk before the clock stops;
the source is in the page cache if it fits. Needs three times the size on disk.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from factory import checkpoint, decoder
from factory.artifacts import sha256_of_file
from factory.checkpoint import TensorInfo

NUM_LAYERS = 32
NUM_SHARDS = 4
HIDDEN = 1024
MATRICES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
DROPPED = range(18, 28)


def write_source(folder: Path, *, size_bytes: int) -> None:
    """A checkpoint of bf16 noise: NUM_LAYERS layers of equal size and an embedding."""
    folder.mkdir()
    rows = size_bytes // (NUM_LAYERS * len(MATRICES) * HIDDEN * 2)
    noise = os.urandom(rows * HIDDEN * 2)
    names = ["model.embed_tokens.weight"]
    names += [f"model.layers.{i}.{matrix}.weight" for i in range(NUM_LAYERS) for matrix in MATRICES]
    per_shard = -(-len(names) // NUM_SHARDS)
    weight_map = {}
    for shard in range(NUM_SHARDS):
        file_name = f"model-{shard + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"
        chosen = names[shard * per_shard : (shard + 1) * per_shard]
        header = {
            name: {
                "dtype": "BF16",
                "shape": [rows, HIDDEN],
                "data_offsets": [number * len(noise), (number + 1) * len(noise)],
            }
            for number, name in enumerate(chosen)
        }
        text = json.dumps(header).encode()
        with (folder / file_name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _ in chosen:
                file.write(noise)
        weight_map |= dict.fromkeys(chosen, file_name)
    (folder / checkpoint.WEIGHTS_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def kept_tensors(source: Path) -> list[tuple[str, TensorInfo]]:
    tensors = checkpoint.read_checkpoint(source)
    config = {"model_type": "llama", "num_hidden_layers": NUM_LAYERS}
    stack = decoder.locate(config, tensors)
    kept = [index for index in range(NUM_LAYERS) if index not in DROPPED]
    kept_index = {old: new for new, old in enumerate(kept)}
    names = ((decoder.renumber(name, stack=stack, kept_index=kept_index), name) for name in tensors)
    return [(new, tensors[old]) for new, old in names if new is not None]


def seconds_of(work: Callable[[Path], object], folder: Path) -> float:
    """Wall time into an empty folder, with nothing of earlier rounds left to write."""
    target = folder / "target"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    os.sync()
    start = time.perf_counter()
    work(target)
    return time.perf_counter() - start


def copy(source: Path, target: Path, *, hashed: bool) -> None:
    files = sorted(source.glob("*.safetensors"))
    subprocess.run(["cp", *files, target], check=True)
    subprocess.run(["sync", *sorted(target.iterdir())], check=True)
    if hashed:
        for path in target.iterdir():
            sha256_of_file(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="factory-benchmark-") as name:
        folder = Path(name)
        source, reference = folder / "source", folder / "reference"
        write_source(source, size_bytes=int(arguments.gigabytes * 1e9))
        kept = kept_tensors(source)
        reference.mkdir()
        checkpoint.write_checkpoint(kept, folder=reference)
        works: dict[str, Callable[[Path], object]] = {
            "cp": lambda target: copy(reference, target, hashed=False),
            "cp, then hash": lambda target: copy(reference, target, hashed=True),
            "prune": lambda target: checkpoint.write_checkpoint(kept, folder=target),
        }
        times: dict[str, list[float]] = {what: [] for what in works}
        for _ in range(arguments.rounds):
            for what, work in works.items():
                times[what].append(seconds_of(work, folder))
    report(times, num_bytes=sum(tensor.size_bytes for _, tensor in kept))


def report(times: dict[str, list[float]], *, num_bytes: int) -> None:
    medians = {what: statistics.median(values) for what, values in times.items()}
    print(f"{num_bytes / 1e9:.2f} GB kept, medians of {len(times['cp'])} rounds in turns")
    for what, values in times.items():
        print(
            f"{what:14} {medians[what]:6.2f} s ({min(values):.2f}–{max(values):.2f})"
            f"  {num_bytes / medians[what] / 1e9:5.2f} GB/s"
        )
    print(f"prune / cp               {medians['prune'] / medians['cp']:.2f}")
    print(f"prune / (cp, then hash)  {medians['prune'] / medians['cp, then hash']:.2f}")
    print(f"peak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
