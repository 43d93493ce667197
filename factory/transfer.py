"""One file put together from ranges of others, copied by the kernel where it can, and its checksum."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from queue import SimpleQueue

from factory.header import TensorInfo, damaged

BLOCK_BYTES = 2**20  # of one step: in the processor's cache where bytes pass through memory
NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}


def assemble(
    path: Path,
    parts: Iterable[TensorInfo | memoryview],
    *,
    header: bytes,
    progress: Callable[[int], None] = lambda _: None,
) -> str:
    """Write a new file from tensors of other files and values in memory; returns its sha256.

    Nothing is synced to the disk, and no more than a block is held in memory. A thread reads the file behind
    the writing, while its blocks are in the system's cache: the checksum takes hardly any time of its own.

    Args:
        path: Must not be there yet.
        parts: In the order of the file, after the header.
        progress: Gets the bytes of each step after the header.

    Raises:
        CheckpointError: A source ends inside a tensor.
    """
    steps: SimpleQueue[int] = SimpleQueue()
    with ThreadPoolExecutor(max_workers=1) as behind, path.open("xb", buffering=0) as file:
        digest = behind.submit(_sha256_behind, path, steps)
        try:
            for count in _write_all(file, memoryview(header)):
                steps.put(count)
            for part in parts:
                for count in _write_all(file, part) if isinstance(part, memoryview) else _copy(file, part):
                    steps.put(count)
                    progress(count)
        finally:
            steps.put(0)
        return digest.result()


def _sha256_behind(path: Path, steps: SimpleQueue[int]) -> str:
    """Of a file that is being written: what each step has added, until one adds nothing."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while added := steps.get():
            while added:
                count = file.readinto(block[:added])
                if not count:
                    raise damaged(path, "somebody has cut it while it was written")
                digest.update(block[:count])
                added -= count
    return digest.hexdigest()


def read_blocks(tensor: TensorInfo, *, block_bytes: int = BLOCK_BYTES) -> Iterator[bytearray]:
    """The values of a tensor, a block at a time.

    Raises:
        CheckpointError: The file ends inside the tensor.
    """
    with tensor.file.open("rb", buffering=0) as file:
        file.seek(tensor.start)
        for start in range(0, tensor.size_bytes, block_bytes):
            block = bytearray(min(block_bytes, tensor.size_bytes - start))
            if file.readinto(block) < len(block):
                raise damaged(tensor.file, f"it ends inside {tensor.name!r}; it changed during the build")
            yield block


def _write_all(file: FileIO, values: memoryview) -> Iterator[int]:
    while values:
        count = file.write(values[:BLOCK_BYTES])
        values = values[count:]
        yield count


def _copy(file: FileIO, tensor: TensorInfo) -> Iterator[int]:
    with tensor.file.open("rb", buffering=0) as source:
        position = tensor.start
        in_kernel = hasattr(os, "copy_file_range")
        while position < tensor.end:
            wanted = min(BLOCK_BYTES, tensor.end - position)
            count = _copy_in_kernel(source, file, position, wanted) if in_kernel else 0
            if not count:  # from here on by plain reads, which also know a true end of the file
                in_kernel = False
                source.seek(position)
                count = sum(_write_all(file, memoryview(source.read(wanted))))
            if not count:
                raise damaged(tensor.file, f"it ends inside {tensor.name!r}; it changed during the build")
            position += count
            yield count


def _copy_in_kernel(source: FileIO, target: FileIO, position: int, wanted: int) -> int:
    """Bytes that the kernel copied without showing them to us; 0 where it will not."""
    try:
        return os.copy_file_range(source.fileno(), target.fileno(), wanted, offset_src=position)
    except OSError as error:
        if error.errno not in NO_KERNEL_COPY:
            raise
        return 0
