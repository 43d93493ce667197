"""Read a safetensors checkpoint: its headers, and tensors in blocks."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from factory.artifacts import canonical_json
from factory.checkpoint.auxiliary import WEIGHTS_INDEX, check_json
from factory.checkpoint.header import TensorInfo, check_count, damaged, read_header, unique_keys
from factory.errors import CheckpointError
from factory.store.files import sha256_of_file

WEIGHTS = "model.safetensors"
SHARD_NAME = re.compile(r"[^/\\:]+\.safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
BLOCK_BYTES = 2**20  # a block fits the processor's cache


def read_checkpoint(folder: Path) -> dict[str, TensorInfo]:
    """Return the tensors of `model.safetensors`, or of all shards in the index, in the order of their bytes.

    Links are followed (the Hub's cache consists of them), but the index may name only files of this folder.

    Raises:
        CheckpointError: There are no safetensors, a shard is missing or damaged, or the index disagrees with
            the shards.
    """
    if (folder / WEIGHTS).exists():
        return read_header(folder / WEIGHTS)
    if not (folder / WEIGHTS_INDEX).exists():
        raise _no_weights(folder)
    weight_map = _read_index(folder / WEIGHTS_INDEX)
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        for name, tensor in read_header(folder / shard).items():
            if name in tensors:
                raise CheckpointError(
                    f"tensor {name!r} is in {tensors[name].file.name} and in {shard}",
                    hint="the checkpoint mixes two saves; download it again",
                )
            tensors[name] = tensor
        check_count(len(tensors), where=folder.name)
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(
                f"{WEIGHTS_INDEX} lists tensor {name!r} in {shard}, which lacks it",
                hint="the checkpoint is incomplete; download it again",
            )
    return tensors


def is_shard_name(name: object) -> bool:
    """Return whether an index may name this file: a safetensors file in the same folder."""
    return isinstance(name, str) and name.isprintable() and bool(SHARD_NAME.fullmatch(name))


def read_tensor_bytes(tensor: TensorInfo) -> bytearray:
    """Return the values of one tensor, little-endian and row-major, as stored.

    Raises:
        CheckpointError: The file was removed or truncated since its header was read.
    """
    values = bytearray(tensor.size_bytes)
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.start)
            count = file.readinto(values)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {tensor.file}: {error.strerror}", hint="has the folder changed during the build?"
        ) from error
    if count != tensor.size_bytes:
        raise damaged(tensor.file, f"it ends inside tensor {tensor.name!r}")
    return values


def are_equal(one: TensorInfo, other: TensorInfo) -> bool:
    """Return whether two stored tensors have the same type, shape and bytes, reading in blocks.

    Raises:
        CheckpointError: A file was truncated since its header was read.
    """
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    blocks = zip(read_blocks(one), read_blocks(other), strict=True)
    return all(mine == theirs for mine, theirs in blocks)


def _no_weights(folder: Path) -> CheckpointError:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            f"{folder} has only pickled weights ({', '.join(pickles[:4])}), which can run code when read",
            hint="convert them with transformers' save_pretrained, or choose a repository with safetensors",
        )
    return CheckpointError(
        f"{folder} has neither {WEIGHTS} nor {WEIGHTS_INDEX}", hint="give a folder with safetensors weights"
    )


def _read_index(path: Path) -> dict[str, str]:
    check_json(path.parent, [path.name])
    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, f"it is not JSON: {str(error)[:200]}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(path, "it has no weight_map")
    for name, shard in weight_map.items():
        if not is_shard_name(shard):
            raise CheckpointError(
                f"{path.name} puts tensor {name!r} in {str(shard)[:80]!r}, not a safetensors file beside it",
                hint="do not use this checkpoint unless you trust its origin",
            )
    return weight_map


def sha256_of_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the sha256 of each file by name, reading several at a time."""
    names = list(names)
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda name: sha256_of_file(folder / name), names), strict=True))


def content_hash(folder: Path, names: Iterable[str]) -> str:
    """Return a hash of some files of a folder, as long as a commit's."""
    hashed = sha256_of_files(folder, sorted(names))
    return sha256(canonical_json(list(hashed.items())).encode()).hexdigest()[:40]


def read_blocks(tensor: TensorInfo, *, held: Sequence[bytearray] = ()) -> Iterator[bytearray | memoryview]:
    """Yield the values of a tensor in blocks, read in turn into the buffers `held`, all of one size.

    So only the last `len(held)` blocks are valid: fresh memory can cost more time than reading into it.

    Raises:
        CheckpointError: The file ends inside the tensor.
    """
    held = held or [bytearray(BLOCK_BYTES)]
    block_bytes = len(held[0])
    with tensor.file.open("rb", buffering=0) as file:
        file.seek(tensor.start)
        for number, start in enumerate(range(0, tensor.size_bytes, block_bytes)):
            rest = tensor.size_bytes - start
            whole = held[number % len(held)]
            block = whole if rest >= block_bytes else memoryview(whole)[:rest]
            if file.readinto(block) < len(block):
                raise damaged(tensor.file, f"it ends inside {tensor.name!r}; it changed during the build")
            yield block
