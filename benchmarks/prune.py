"""Claim: pruning on disk costs as much as copying the kept bytes, in constant memory.

    python benchmarks/prune.py [--gigabytes 4] [--rounds 5] [--folder DIR] [--mergekit PATH/bin/mergekit-yaml]

Writes a Llama of random weights in several shards. Then times alternately `cp` of the pruned files, alone and
followed by checksums, and the pruning copy, which includes checksums; each until it returns and until
everything is on disk. With --mergekit, two whole commands as well: `factory prune`, which checks its result,
and mergekit's passthrough, which does not.
The source is in the page cache if it fits. Needs three times the size on disk.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from factory.artifacts import layer_ranges
from factory.checkpoint.auxiliary import WEIGHTS_INDEX
from factory.checkpoint.header import TensorInfo
from factory.checkpoint.read import read_checkpoint, sha256_of_files
from factory.checkpoint.write import write_checkpoint
from factory.model.architecture import locate, renumber
from factory.store.files import sync_files

NUM_LAYERS = 32
NUM_SHARDS = 4
HIDDEN = 2048
HEADS, KV_HEADS = 16, 4
VOCABULARY = 32_000
DROPPED = range(18, 28)
NOISE_BYTES = 2**26
PEAK = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""
COPY = """
import sys; sys.path[:0] = [".", "benchmarks"]
from pathlib import Path; import prune
source, target = map(Path, sys.argv[1:])
prune.write_checkpoint(prune.kept_tensors(source), folder=target)
"""
PASSTHROUGH = """
merge_method: passthrough
dtype: bfloat16
slices:
  - sources: [{{model: {source}, layer_range: [0, {start}]}}]
  - sources: [{{model: {source}, layer_range: [{end}, {layers}]}}]
"""


def llama(size_bytes: int) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Return config.json and the shapes of a Llama that takes about `size_bytes` in bf16."""
    kv = HIDDEN * KV_HEADS // HEADS
    fixed = VOCABULARY * HIDDEN + NUM_LAYERS * 2 * HIDDEN * (HIDDEN + kv)
    wide = max((size_bytes // 2 - fixed) // (NUM_LAYERS * 3 * HIDDEN), 64)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": wide, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "vocab_size": VOCABULARY, "tie_word_embeddings": True,
        "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
    }  # fmt: skip
    layer = {
        "input_layernorm": [HIDDEN], "post_attention_layernorm": [HIDDEN],
        "self_attn.q_proj": [HIDDEN, HIDDEN], "self_attn.k_proj": [kv, HIDDEN],
        "self_attn.v_proj": [kv, HIDDEN], "self_attn.o_proj": [HIDDEN, HIDDEN],
        "mlp.gate_proj": [wide, HIDDEN], "mlp.up_proj": [wide, HIDDEN], "mlp.down_proj": [HIDDEN, wide],
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": [VOCABULARY, HIDDEN], "model.norm.weight": [HIDDEN]}
    for index in range(NUM_LAYERS):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return config, shapes


def write_source(folder: Path, *, size_bytes: int) -> None:
    """Write the Llama in NUM_SHARDS files; its values are one repeated block of noise."""
    folder.mkdir()
    config, shapes = llama(size_bytes)
    (folder / "config.json").write_text(json.dumps(config))
    values = np.random.default_rng(0).normal(0, 0.02, NOISE_BYTES // 2).astype("<f4")
    noise = (values.view("<u4") >> 16).astype("<u2").tobytes()  # bf16 is the upper half of fp32
    names = list(shapes)
    per_shard = -(-len(names) // NUM_SHARDS)
    weight_map = {}
    for shard in range(NUM_SHARDS):
        file_name = f"model-{shard + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"
        chosen = names[shard * per_shard : (shard + 1) * per_shard]
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in chosen:
            start, end = end, end + 2 * int(np.prod(shapes[name]))
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (folder / file_name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, end, NOISE_BYTES):
                file.write(noise[: end - start])
        weight_map |= dict.fromkeys(chosen, file_name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / WEIGHTS_INDEX).write_text(json.dumps(index))


def kept_tensors(source: Path) -> list[tuple[str, TensorInfo]]:
    """Return the names in the result and where their values are."""
    tensors = read_checkpoint(source)
    stack = locate({"model_type": "llama", "num_hidden_layers": NUM_LAYERS}, tensors)
    kept = [index for index in range(NUM_LAYERS) if index not in DROPPED]
    kept_index = {old: new for new, old in enumerate(kept)}
    names = ((renumber(name, stack=stack, kept_index=kept_index), name) for name in tensors)
    return [(new, tensors[old]) for new, old in names if new is not None]


def seconds_of(work: Callable[[Path], object], folder: Path) -> tuple[float, float]:
    """Return the wall time into a new folder until the work returns, and until its files are on disk."""
    target = folder / "target"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    os.sync()
    start = time.perf_counter()
    work(target)
    returned = time.perf_counter()
    sync_files(target)
    return returned - start, time.perf_counter() - start


def peak_mebibytes(command: list[Any]) -> float:
    """Run a command in a process and return its peak resident memory.

    There is a process in between: a new one counts the memory of its parent as its own.
    """
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
    )
    *messages, kibibytes = done.stderr.decode().splitlines()
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with {done.returncode}: {' '.join(messages)[-2000:]}")
    return int(kibibytes) / 1024


def copy_works(source: Path, reference: Path) -> dict[str, Callable[[Path], object]]:
    """Return `cp` of the pruned files, alone and followed by checksums, and the pruning copy."""
    kept = kept_tensors(source)
    reference.mkdir()
    write_checkpoint(kept, folder=reference)
    files = sorted(reference.iterdir())

    def cp(target: Path) -> None:
        subprocess.run(["cp", *files, target], check=True)

    def cp_and_sum(target: Path) -> None:
        cp(target)
        sha256_of_files(target, [file.name for file in files])

    def prune(target: Path) -> None:
        write_checkpoint(kept, folder=target)

    return {"cp": cp, "prune": prune, "cp, sha256": cp_and_sum}


def command_works(source: Path, *, mergekit: Path, plan: Path, peaks: dict[str, float]) -> Any:
    """Return two whole commands that do the same."""
    plan.write_text(
        PASSTHROUGH.format(source=source, start=DROPPED.start, end=DROPPED.stop, layers=NUM_LAYERS)
    )
    layers = layer_ranges(DROPPED).replace("–", "-")

    def factory(target: Path) -> None:
        command = [sys.executable, "-m", "factory", "prune", source, "--layers", layers]
        peaks["factory prune"] = peak_mebibytes([*command, "--out", target / "model", "--json"])

    def passthrough(target: Path) -> None:
        peaks["mergekit"] = peak_mebibytes([mergekit, plan, target, "--no-copy-tokenizer", "--quiet"])

    return {"factory prune": factory, "mergekit": passthrough}


def main() -> None:
    """Write the source, time all alternately, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure; default: temporary")
    parser.add_argument("--mergekit", type=Path, help="path of mergekit-yaml in an environment with mergekit")
    arguments = parser.parse_args()
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="factory-benchmark-") as name:
        folder = Path(name)
        source, reference = folder / "source", folder / "reference"
        write_source(source, size_bytes=int(arguments.gigabytes * 1e9))
        works = copy_works(source, reference)
        if arguments.mergekit:
            works |= command_works(
                source, mergekit=arguments.mergekit, plan=folder / "plan.yaml", peaks=peaks
            )
        times: dict[str, list[tuple[float, float]]] = {what: [] for what in works}
        for _ in range(arguments.rounds):
            for what, work in works.items():
                times[what].append(seconds_of(work, folder))
        report(times, num_bytes=sum(path.stat().st_size for path in reference.glob("*.safetensors")))
        command = [sys.executable, "-c", COPY, source]
        seconds_of(lambda target: peaks.update({"prune": peak_mebibytes([*command, target])}), folder)
    for what, mebibytes in peaks.items():
        print(f"peak resident memory, {what}: {mebibytes:.0f} MiB")


def report(times: dict[str, list[tuple[float, float]]], *, num_bytes: int) -> None:
    """Print medians, and the ratios of those that do the same."""
    rounds = len(times["cp"])
    medians = {
        what: [statistics.median(column) for column in zip(*rows, strict=True)]
        for what, rows in times.items()
    }
    print(
        f"{num_bytes / 1e9:.2f} GB kept, medians of {rounds} alternating rounds: until return, until synced"
    )
    for what, rows in times.items():
        spread = ", ".join(f"{min(column):.2f}–{max(column):.2f}" for column in zip(*rows, strict=True))
        print(f"{what:14} {medians[what][0]:6.2f} s {medians[what][1]:6.2f} s  ({spread})")
    for ours, theirs in (
        ("prune", "cp"),
        ("prune", "cp, sha256"),
        ("factory prune", "mergekit"),
    ):
        if theirs in medians:
            ratios = [a / b for a, b in zip(medians[ours], medians[theirs], strict=True)]
            print(f"{ours} / {theirs}: {ratios[0]:.2f}, synced {ratios[1]:.2f}")


if __name__ == "__main__":
    main()
