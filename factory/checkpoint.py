"""Safetensors on disk: headers, streamed copy, renaming, sharding; never the whole model in memory."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from factory.errors import CheckpointError, DiskSpaceError
from factory.header import DTYPE_BITS, TensorInfo, damaged, read_header, unique_keys

__all__ = [
    "TensorInfo",
    "copy_auxiliary_files",
    "read_checkpoint",
    "read_header",
    "read_tensor_bytes",
    "write_checkpoint",
]

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
BLOCK_BYTES = 16 * 2**20  # copied, hashed and reported at a time
NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
AUXILIARY = (
    "tokenizer*.json", "tokenizer.model*", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece*.model", "*.tiktoken",
    "tekken.json",
    "preprocessor_config.json", "processor_config.json", "generation_config.json",
    "chat_template.*", "additional_chat_templates/*.jinja",
    "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*", "License*", "license*", "Notice*",
)  # fmt: skip

Transform = Callable[[str, TensorInfo], bytes | memoryview | None]
Progress = Callable[[int, int], None]


# Reading -----------------------------------------------------------------------------------------


def read_checkpoint(folder: Path) -> dict[str, TensorInfo]:
    """Tensors of `model.safetensors`, or of all shards that its index names, in the order of their bytes.

    Links are followed (the Hub's cache is made of them), but the index may name files of this folder only.

    Raises:
        CheckpointError: No safetensors, a missing or damaged shard, an index that disagrees with the shards.
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
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(
                f"{WEIGHTS_INDEX} promises tensor {name!r} in {shard}, which lacks it",
                hint="the checkpoint is incomplete; download it again",
            )
    return tensors


def read_tensor_bytes(tensor: TensorInfo) -> bytearray:
    """Values of one tensor, little-endian and row-major, as stored.

    Raises:
        CheckpointError: The file is gone or has been cut since its header was read.
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
        raise damaged(tensor.file, f"ends inside tensor {tensor.name!r}")
    return values


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
    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, f"not JSON: {str(error)[:200]}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(path, "it has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0:]+\.safetensors", shard):
            raise CheckpointError(
                f"{path.name} puts tensor {name!r} into {str(shard)[:80]!r}, no safetensors file beside it",
                hint="do not use this checkpoint unless you trust where it comes from",
            )
    return weight_map


# Writing -----------------------------------------------------------------------------------------


def write_checkpoint(
    tensors: Iterable[tuple[str, TensorInfo]],
    *,
    folder: Path,
    max_shard_bytes: int = 5 * 10**9,
    transform: Transform | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Copy tensors, under new names, into one file or shards with an index; equal input, equal bytes.

    Values go from file to file in the kernel; nothing larger than a block is held, save what `transform`
    returns. Tensors keep the order of the source files, so that both sides are read and written in order.

    Args:
        tensors: Pairs (new name, where its values lie).
        folder: Exists; weight files that an earlier attempt left in it are removed first.
        max_shard_bytes: A larger checkpoint is split; a single tensor never is.
        transform: Gives the new values of a tensor, as many bytes as before, or None to copy it.
        metadata: Of each file's header; {"format": "pt"} where None.
        progress: Called with (bytes done, bytes in all).

    Returns:
        Weight file name → sha256. The index, where there is one, lies beside them and is not listed.

    Raises:
        CheckpointError: Two tensors with one name, a source that changed, a transform of another size.
        DiskSpaceError: The disk is full.
    """
    shards = _plan_shards(list(tensors), max_shard_bytes=max_shard_bytes)
    _clear_weights(folder, sources={tensor.file for shard in shards for _, tensor in shard})
    total_bytes = sum(tensor.size_bytes for shard in shards for _, tensor in shard)
    done_bytes = 0

    def advance(count: int) -> None:
        nonlocal done_bytes
        done_bytes += count
        if progress:
            progress(done_bytes, total_bytes)

    digests: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    with _disk_errors(folder, total_bytes):
        for number, shard in enumerate(shards, start=1):
            name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            header = _header(shard, metadata={"format": "pt"} if metadata is None else metadata)
            digests[name] = _write_shard(
                folder / name, shard, header=header, transform=transform, advance=advance
            )
            weight_map.update((tensor, name) for tensor, _ in shard)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        _sync_folder(folder)
    return digests


def _plan_shards(
    tensors: list[tuple[str, TensorInfo]], *, max_shard_bytes: int
) -> list[list[tuple[str, TensorInfo]]]:
    for name, count in Counter(name for name, _ in tensors).items():
        if count > 1:
            raise CheckpointError(f"{count} tensors would be named {name!r}", hint="please report this bug")
    shards: list[list[tuple[str, TensorInfo]]] = [[]]
    size_bytes = 0
    for name, tensor in sorted(tensors, key=lambda pair: (pair[1].file, pair[1].start, pair[1].end, pair[0])):
        if shards[-1] and size_bytes + tensor.size_bytes > max_shard_bytes:
            shards.append([])
            size_bytes = 0
        shards[-1].append((name, tensor))
        size_bytes += tensor.size_bytes
    for shard in shards:  # wider types first keeps every tensor aligned to its type, which torch asks for
        shard.sort(key=lambda pair: -DTYPE_BITS[pair[1].dtype])
    return shards


def _clear_weights(folder: Path, *, sources: set[Path]) -> None:
    if any(file.parent.resolve() == folder.resolve() for file in sources):
        raise CheckpointError(f"{folder} holds the source's weights", hint="give another output folder")
    for path in folder.glob("model*.safetensors*"):
        path.unlink()


@contextmanager
def _disk_errors(folder: Path, total_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free_bytes = shutil.disk_usage(folder).free
        raise DiskSpaceError(
            f"the disk of {folder} is full: {total_bytes / 1e9:.1f} GB to write, {free_bytes / 1e9:.1f} left",
            hint="free some space, or give a folder on another disk, and run the same command again",
        ) from error


def _header(shard: list[tuple[str, TensorInfo]], *, metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, tensor in shard:
        end = position + tensor.size_bytes
        entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (position, end)}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_shard(
    path: Path,
    shard: list[tuple[str, TensorInfo]],
    *,
    header: bytes,
    transform: Transform | None,
    advance: Callable[[int], None],
) -> str:
    """Write one file; a thread hashes each block while the next one is copied. Returns the sha256."""
    digest = hashlib.sha256(header)
    pending: Future[None] | None = None
    with path.open("xb", buffering=0) as file, path.open("rb", buffering=0) as written:
        for _ in _write_all(file, memoryview(header)):
            pass
        written.seek(len(header))
        with ThreadPoolExecutor(max_workers=1) as thread:
            for num_bytes in _write_values(file, shard, transform=transform):
                if pending:
                    pending.result()  # at most one block behind, so it is still in the page cache
                pending = thread.submit(_hash_next, digest, written, num_bytes)
                advance(num_bytes)
        if pending:
            pending.result()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _hash_next(digest: "hashlib._Hash", file: IO[bytes], num_bytes: int) -> None:
    while num_bytes > 0:
        block = file.read(min(num_bytes, BLOCK_BYTES))
        if not block:
            raise damaged(Path(file.name), f"{num_bytes} bytes that were written are gone")
        digest.update(block)
        num_bytes -= len(block)


def _write_values(
    file: IO[bytes], shard: list[tuple[str, TensorInfo]], *, transform: Transform | None
) -> Iterator[int]:
    """Append the values of each tensor; yields the number of bytes after each block."""
    run: tuple[Path, int, int] | None = None  # neighbours in one source file, copied in one go
    for name, tensor in shard:
        values = transform(name, tensor) if transform else None
        if values is None and run and run[0] == tensor.file and run[2] == tensor.start:
            run = (tensor.file, run[1], tensor.end)
            continue
        if run:
            yield from _copy_range(file, *run)
        run = (tensor.file, tensor.start, tensor.end) if values is None else None
        if values is not None:
            if len(values) != tensor.size_bytes:
                raise CheckpointError(
                    f"{name!r} was given {len(values)} bytes for {tensor.size_bytes}",
                    hint="please report this bug",
                )
            yield from _write_all(file, memoryview(values))
    if run:
        yield from _copy_range(file, *run)


def _write_all(file: IO[bytes], values: memoryview) -> Iterator[int]:
    while values:
        count = file.write(values[:BLOCK_BYTES])
        yield count
        values = values[count:]


def _copy_range(file: IO[bytes], source: Path, start: int, end: int) -> Iterator[int]:
    """Append bytes [start, end) of `source`: in the kernel where it can, else through a buffer."""
    in_kernel = hasattr(os, "copy_file_range")
    with source.open("rb", buffering=0) as reader:
        while start < end:
            num_bytes = min(end - start, BLOCK_BYTES)
            count = _copy_in_kernel(reader, file, start=start, num_bytes=num_bytes) if in_kernel else 0
            if count == 0:
                in_kernel = False
                reader.seek(start)
                count = file.write(reader.read(num_bytes))
            if count == 0:
                raise damaged(source, f"it ends before byte {end}; it changed during the build")
            start += count
            yield count


def _copy_in_kernel(reader: IO[bytes], file: IO[bytes], *, start: int, num_bytes: int) -> int:
    """Bytes copied; 0 where the file systems cannot, which some say with an error and some with a 0."""
    try:
        return os.copy_file_range(reader.fileno(), file.fileno(), num_bytes, offset_src=start)
    except OSError as error:
        if error.errno in NO_KERNEL_COPY:
            return 0
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Beside the weights ------------------------------------------------------------------------------


def copy_auxiliary_files(source_folder: Path, folder: Path) -> list[str]:
    """Copy tokenizer, generation settings, chat templates and licence texts; returns their names, sorted.

    Left behind: code (`*.py`), the card, other weights, whatever training left. A link is followed only
    within the folder or into the blobs of the Hub's cache: what is copied gets published.

    Raises:
        CheckpointError: A file is a link to somewhere else.
    """
    names = set()
    for pattern in AUXILIARY:
        for path in source_folder.glob(pattern):
            if not path.is_file():
                continue
            target = path.resolve()
            if source_folder.resolve() not in target.parents and not _in_hub_cache(target):
                raise CheckpointError(
                    f"{path.name} is a link to {target}, outside the model's folder",
                    hint="put the file itself there",
                )
            name = path.relative_to(source_folder)
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(target, folder / name)
            names.add(name.as_posix())
    return sorted(names)


def _in_hub_cache(target: Path) -> bool:
    """…/models--owner--name/blobs/<etag>, or the store shared by all repositories, …/blobs/<2 hex>/<hash>."""
    return "blobs" in (target.parent.name, target.parent.parent.name)
