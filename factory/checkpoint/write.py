"""Write a safetensors checkpoint: streamed, sharded, checksummed; never the whole model in memory."""

import hashlib
import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from factory.checkpoint.auxiliary import WEIGHTS_INDEX
from factory.checkpoint.header import DTYPE_BITS, TensorInfo
from factory.checkpoint.read import BLOCK_BYTES, WEIGHTS, read_blocks
from factory.errors import CheckpointError, DiskSpaceError
from factory.store.capacity import no_room
from factory.units import size

Transform = Callable[[str, TensorInfo], Iterable[bytes | memoryview] | None]
Progress = Callable[[int, int], None]
SYNC_BYTES = 2**28  # written between two syncs


def write_checkpoint(
    tensors: Iterable[tuple[str, TensorInfo]],
    *,
    folder: Path,
    max_shard_bytes: int = 5 * 10**9,
    transform: Transform | None = None,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Copy tensors, under new names, into one file or shards with an index; equal input, equal bytes.

    Nothing larger than a block is held in memory, except what `transform` returns. Tensors keep the order of
    the source files, so that both sides are read and written sequentially. Syncing to the disk is left to
    the caller that gives the folder its final name.

    Args:
        tensors: Pairs of new name and stored tensor.
        folder: Existing folder; weight files that an earlier attempt left in it are removed first.
        max_shard_bytes: Size above which a checkpoint is split; a single tensor never is.
        transform: Function that returns the new values of a tensor in parts, as many bytes as before, or
            None to copy it. For how long a part must stay as it is, see `assemble`.
        progress: Called with the bytes done and the total bytes.

    Returns:
        The sha256 of each weight file by name; the index, if there is one, is not listed.

    Raises:
        CheckpointError: Two tensors have one name, a source changed, or a transform changed a size.
        DiskSpaceError: The disk is full.
    """
    shards = _plan_shards(list(tensors), max_shard_bytes=max_shard_bytes)
    _clear_weights(folder, sources={tensor.file for shard in shards for _, tensor in shard})
    total_bytes = sum(tensor.size_bytes for shard in shards for _, tensor in shard)
    done_bytes = 0
    weight_map: dict[str, str] = {}
    sums: dict[str, str] = {}

    def report(count: int) -> None:
        nonlocal done_bytes
        done_bytes += count
        if progress:
            progress(done_bytes, total_bytes)

    with _disk_errors(folder, total_bytes):
        for number, shard in enumerate(shards, start=1):
            name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            header = _header(shard)
            parts = _parts(shard, transform=transform)
            sums[name] = assemble(folder / name, parts, header=header, progress=report)
            weight_map.update((tensor, name) for tensor, _ in shard)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return sums


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
    for shard in shards:  # wider types first: this aligns every tensor to its type, as torch requires
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
        reason = no_room(error)
        if reason is None:
            raise
        free_bytes = shutil.disk_usage(folder).free
        raise DiskSpaceError(
            f"{reason}: {size(total_bytes)} to write to {folder}, {size(free_bytes)} free",
            hint="free some space, or give a folder on another disk, and run the same command again",
        ) from error


def _header(shard: list[tuple[str, TensorInfo]]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in shard:
        end = position + tensor.size_bytes
        entries[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (position, end)}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parts(
    shard: list[tuple[str, TensorInfo]], *, transform: Transform | None
) -> Iterator[TensorInfo | memoryview]:
    """Yield what follows the header of one file, in order."""
    for name, tensor in shard:
        values = transform(name, tensor) if transform else None
        if values is None:
            yield tensor
            continue
        size_bytes = 0
        for part in values:
            size_bytes += len(part)
            yield memoryview(part)
        if size_bytes != tensor.size_bytes:
            raise CheckpointError(
                f"{name!r} was given {size_bytes} bytes for {tensor.size_bytes}",
                hint="please report this bug",
            )


def assemble(
    path: Path,
    parts: Iterable[TensorInfo | memoryview],
    *,
    header: bytes,
    progress: Callable[[int], None] = lambda _: None,
) -> str:
    """Write a new file from stored tensors and values in memory, and return its sha256.

    Only a few blocks are held in memory. Each is hashed in a thread while it is written and the next one is
    read, so the checksum takes hardly any time. Another thread syncs meanwhile: left to itself, the system
    would begin to write when gigabytes have accumulated, and the caller's final sync would wait for all.

    Args:
        path: File that does not exist yet.
        parts: Contents after the header; each must stay as it is until the next but one is asked for.
        progress: Called with the bytes of each step after the header.

    Raises:
        CheckpointError: A source ends inside a tensor.
    """
    digest = hashlib.sha256(header)
    with path.open("xb", buffering=0) as file, ThreadPoolExecutor(max_workers=2) as behind:
        _write_all(file, header)
        hashed, synced = (behind.submit(lambda: None) for _ in range(2))
        unsynced_bytes = 0
        for block in _blocks(parts):
            hashed.result()
            hashed = behind.submit(digest.update, block)
            _write_all(file, block)
            unsynced_bytes += len(block)
            if unsynced_bytes >= SYNC_BYTES:
                synced.result()
                synced = behind.submit(os.fsync, file.fileno())
                unsynced_bytes = 0
            progress(len(block))
        hashed.result()
        synced.result()
    return digest.hexdigest()


def _blocks(parts: Iterable[TensorInfo | memoryview]) -> Iterator[bytearray | memoryview]:
    held = deque(bytearray(BLOCK_BYTES) for _ in range(2))
    for part in parts:
        if isinstance(part, memoryview):
            yield part
            continue
        yield from read_blocks(part, held=held)
        held.rotate(-(-part.size_bytes // BLOCK_BYTES))  # the next part begins with the older one


def _write_all(file: FileIO, block: bytes | bytearray | memoryview) -> None:
    values = memoryview(block)
    while values:
        values = values[file.write(values) :]
