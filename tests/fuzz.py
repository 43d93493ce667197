"""Damaged and hostile model folders without end: each is pruned, or refused in one line.

    python -m tests.fuzz [--cases 50000] [--seed 0]

A case is a small folder whose safetensors header, index file, configuration or bytes are changed at random,
by value, by structure or by byte. It is resolved, its headers are read and its layers copied. Every case must
end in success or a FactoryError within its time and memory, and leave nothing outside the output folder.
"""

import argparse
import copy
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

from factory.checkpoint.auxiliary import WEIGHTS_INDEX, copy_auxiliary_files
from factory.checkpoint.read import read_checkpoint
from factory.checkpoint.write import write_checkpoint
from factory.errors import FactoryError
from factory.hub.resolve import resolve
from factory.model.architecture import locate, renumber
from factory.pruning.criteria import plan_without

SECONDS = 60  # per case, of which none takes a tenth of one
MEMORY_BYTES = 6 << 30  # of the process, which maps much more than it uses
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NUM_LAYERS = 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4, "intermediate_size": 4,
    "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 4,
    "tie_word_embeddings": True, "eos_token_id": [1, 2], "rope_scaling": {"rope_type": "default"},
}  # fmt: skip
HOSTILE_NAMES = (
    "../outside.safetensors", "/tmp/outside.safetensors", "a/b.safetensors", "..", "", ".", "\0.safetensors",
    "~/x.safetensors", "C:\\x.safetensors", "..\\x.safetensors", "model.safetensors.index.json",
    "config.json", "x" * 300 + ".safetensors", "file:x.safetensors", "\u202e.safetensors",
    "\ud800.safetensors", "-rf.safetensors", "model.bin", "*.safetensors", "con.safetensors",
    "\n.safetensors", *SHARDS,
)  # fmt: skip
HOSTILE_TENSORS = (
    "model.layers.01.w", "model.layers.-1.w", "model.layers.4.w", "model.layers." + "9" * 5000 + ".w",
    "model.layers.².w", "model.layers.٣.w", "model.layers.", "model.layers.0", "layers.0.w", "0.0", "", ".",
    "__metadata__", "\ud800", "a" * 100_000, "model.layers.0.w", "lm_head.weight", "vision.layers.0.w",
)  # fmt: skip
HOSTILE_VALUES = (
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, 2**64, 10**400, -(2**63), 1.5, -0.0, 1e308,
    float("nan"), float("inf"), "", "F32", "BF16", "F4", "F99", "\0", "\ud800", [], [[]], [0], [0, 0], [-1],
    [2**62, 4], {}, {"": ""}, {"dtype": "F32"}, [1] * 70, [None], "0", "４",
)  # fmt: skip


def deep(levels: int) -> Any:
    """Lists in lists."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


# Folders -----------------------------------------------------------------------------------------


def tensors(rng: random.Random) -> dict[str, tuple[str, list[int], bytes]]:
    """Name → dtype, shape and values of a small decoder."""
    found = {"model.embed_tokens.weight": ("BF16", [4, 4], rng.randbytes(32))}
    for layer in range(NUM_LAYERS):
        found[f"model.layers.{layer}.w"] = ("F32", [2, 2], rng.randbytes(16))
        found[f"model.layers.{layer}.v"] = ("BF16", [3], rng.randbytes(6))
    return found


def header_of(chosen: dict[str, tuple[str, list[int], bytes]]) -> dict[str, Any]:
    """The header of a well-formed file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, values) in chosen.items():
        start, end = end, end + len(values)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return header


def raw(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file."""
    stated = len(header) if length is None else length
    return (stated % 2**64).to_bytes(8, "little") + header + data


def write_folder(folder: Path, rng: random.Random) -> str:
    """A folder with something wrong with it; returns what was changed, for a report."""
    folder.mkdir()
    found = tensors(rng)
    names = list(found)
    sharded = rng.random() < 0.5
    parts = [names[: len(names) // 2], names[len(names) // 2 :]] if sharded else [names]
    files = SHARDS if sharded else ("model.safetensors",)
    target = rng.choice(("header", "header", "index", "index", "config", "bytes") if sharded else
                        ("header", "header", "header", "config", "bytes"))  # fmt: skip
    broken = rng.randrange(len(files))
    for number, (file, part) in enumerate(zip(files, parts, strict=True)):
        chosen = {name: found[name] for name in part}
        data = b"".join(values for _, _, values in chosen.values())
        header, content = header_of(chosen), None
        if target == "header" and number == broken:
            content = damaged_file(header, data, rng)
        content = content or raw(dumped(header), data)
        if target == "bytes" and number == broken:
            content = damaged_bytes(content, rng)
        (folder / file).write_bytes(content)
    if sharded:
        index = {
            "metadata": {"total_size": 1},
            "weight_map": {name: file for file, part in zip(files, parts, strict=True) for name in part},
        }
        text = damaged_json(index, rng, HOSTILE_NAMES) if target == "index" else dumped(index)
        (folder / WEIGHTS_INDEX).write_bytes(text)
    text = damaged_json(CONFIG, rng, HOSTILE_VALUES) if target == "config" else dumped(CONFIG)
    (folder / "config.json").write_bytes(text)
    return target


def damaged_file(header: dict[str, Any], data: bytes, rng: random.Random) -> bytes:
    """A file with another header, or another length of it, or other data behind it."""
    text = damaged_json(header, rng, HOSTILE_TENSORS) if rng.random() < 0.9 else dumped(header)
    kind = rng.random()
    if kind < 0.1:
        return raw(
            text, data, length=rng.choice((0, 1, len(text) - 1, len(text) + 1, 2**31, 2**63, 2**64 - 1))
        )
    if kind < 0.2:
        return raw(text, data[: rng.randrange(len(data))])
    if kind < 0.3:
        return raw(text, data + rng.randbytes(rng.randrange(1, 20)))
    return raw(text, data)


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut, put in or doubled."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = (
            rng.randrange(len(changed) + 1)
            if rng.random() < 0.5
            else rng.randrange(min(len(changed), 40) + 1)
        )
        kind = rng.randrange(4)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[place : place + rng.randrange(1, 30)]
        elif kind == 2:
            changed[place:place] = rng.randbytes(rng.randrange(1, 9))
        else:
            changed[place:place] = changed[place : place + rng.randrange(1, 60)]
    return bytes(changed)


def damaged_json(value: Any, rng: random.Random, pool: tuple[Any, ...]) -> bytes:
    """JSON with values, names or structure changed, and at times no JSON at all."""
    changed = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        changed = mutated(changed, rng, pool)
    text = dumped(changed, ensure_ascii=rng.random() < 0.5)
    kind = rng.random()
    if kind < 0.05:
        return damaged_bytes(text, rng)
    if kind < 0.08:  # a name twice
        return text.replace(b"{", b'{"weight_map":{},"dtype":"F32",', 1)
    if kind < 0.1:
        return rng.choice(
            (b"", b"{", b"[" * 100_000, b'{"a":' * 50_000, b"\xef\xbb\xbf" + text, b" " + text, b"null")
        )
    return text


def mutated(value: Any, rng: random.Random, pool: tuple[Any, ...]) -> Any:
    """One change at a random place."""
    places = list(walk(value))
    holder, key = rng.choice(places) if places else (None, None)
    new = rng.choice((*pool, *HOSTILE_VALUES, *HOSTILE_TENSORS, "DEEP"))
    new = deep(300) if new == "DEEP" else copy.deepcopy(new)  # what follows may change it
    if holder is None or rng.random() < 0.02:
        return new
    kind = rng.randrange(5)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        name = rng.choice((*[name for name in pool if isinstance(name, str)], *HOSTILE_TENSORS))
        holder[name] = holder.pop(key)
    elif kind == 2 and isinstance(holder[key], int):
        holder[key] += rng.choice((-8, -2, -1, 1, 2, 8, 2**32, 2**63))
    elif kind == 3:
        other, name = rng.choice(places)
        holder[key] = copy.deepcopy(other[name])
    else:
        holder[key] = new
    return value


def walk(value: Any, *, levels: int = 20) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value: its holder and the key there."""
    if not levels:
        return
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from walk(value[key], levels=levels - 1)


def dumped(value: Any, *, ensure_ascii: bool = True) -> bytes:
    """JSON as bytes, lone surrogates too."""
    return json.dumps(value, ensure_ascii=ensure_ascii).encode("utf-8", "surrogatepass")


# One case ----------------------------------------------------------------------------------------


def attempt(source: Path, target: Path) -> str:
    """Resolve, read and copy, as a build does; returns "pruned" or the name of the error."""
    try:
        resolved = resolve(str(source))
        found = read_checkpoint(source)
        stack = locate(resolved.config, found)
        plan = plan_without([1], num_layers=stack.num_layers)
        kept_index = {old: new for new, old in enumerate(plan.kept)}
        names = ((renumber(name, stack=stack, kept_index=kept_index), name) for name in found)
        kept = [(new, found[old]) for new, old in names if new is not None]
        write_checkpoint(kept, folder=target, max_shard_bytes=40)
        copy_auxiliary_files(source, target)
    except FactoryError as error:
        if not (error.message and error.hint):
            raise AssertionError("an error that says nothing") from error
        return type(error).__name__
    assert read_checkpoint(target).keys() == {name for name, _ in kept}
    for path in target.glob("*.safetensors"):
        with safe_open(path, "np") as file:  # what is written, the library reads
            assert file.keys()
    return "pruned"


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after that time."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_case(seed: int, case: int, *, sandbox: Path) -> str:
    """One case from its numbers alone; returns its outcome.

    Raises:
        AssertionError: Something was written outside the output folder, or a result is not what it should be.
        Exception: Whatever escaped.
    """
    rng = random.Random(f"{seed}:{case}")
    for name in ("source", "target"):
        shutil.rmtree(sandbox / name, ignore_errors=True)
    target = write_folder(sandbox / "source", rng)
    (sandbox / "target").mkdir()
    before = files_in(sandbox)
    with within(SECONDS):
        outcome = attempt(sandbox / "source", sandbox / "target")
    after = {name: content for name, content in files_in(sandbox).items() if not name.startswith("target")}
    assert after == before, f"files outside the output folder: {sorted(after.keys() ^ before.keys())}"
    return f"{target}: {outcome}"


def run(cases: range, *, seed: int, told: Callable[[int], None] = lambda case: None) -> Counter[str]:
    """Run cases; returns how often each outcome came.

    Raises:
        AssertionError: Names the case that did not end as it must.
    """
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="factory-fuzz-") as name:
        for case in cases:
            try:
                outcomes[run_case(seed, case, sandbox=Path(name))] += 1
            except Exception as error:
                raise AssertionError(f"case {case} of seed {seed}") from error
            told(case)
    return outcomes


def main() -> None:
    """Run many cases and say how they ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=50_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    start = time.monotonic()
    cases = range(arguments.first, arguments.first + arguments.cases)
    outcomes = run(cases, seed=arguments.seed)
    for outcome, number in sorted(outcomes.items()):
        print(f"{number:7,} {outcome}")  # noqa: T201
    print(f"{outcomes.total():,} cases in {time.monotonic() - start:.0f} s, none escaped")  # noqa: T201


if __name__ == "__main__":
    main()
