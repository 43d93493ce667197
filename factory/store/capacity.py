"""Check disk space, and recognise errors that mean a full disk or memory."""

import errno
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from factory.errors import DiskSpaceError
from factory.units import size

READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}
REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would be longer than the file system or `ulimit -f` allows",
}
RUST = re.compile(r"(?:\(os error |\bOs { code: )(\d+)")  # safetensors and hf_xet give errno only as text
# Of torch and numpy, which give no errno.
WITHOUT_NUMBER = re.compile(r"PytorchStreamWriter failed writing file|\d+ requested and \d+ written")
TEXTS = re.compile(
    "out of memory|can't allocate memory|cannot allocate memory|bad_alloc|can't start new thread"
    "|failed to map segment from shared object",
    re.IGNORECASE,
)
ALLOCATION = re.compile(r"[Tt]ried to allocate ([\d.]+ ?[A-Za-z]+)")


def no_room(error: BaseException | None) -> str | None:
    """Return why a file could not be written, from an error and its causes; None for other errors."""
    while error is not None:
        match = RUST.search(str(error))
        number = error.errno if isinstance(error, OSError) else int(match[1]) if match else None
        if number in REASONS:
            return REASONS[number]
        if WITHOUT_NUMBER.search(str(error)):
            return "the disk is full or failing"
        error = error.__cause__ or error.__context__
    return None


@dataclass(frozen=True)
class Demand:
    """Bytes to be written to one file system."""

    place: str  # first folder on it
    option: str  # option that sets the folder
    needed: int  # bytes
    free: int  # bytes


def demands(wanted: Sequence[tuple[Path, str, int]]) -> tuple[Demand, ...]:
    """Add up the demands on each file system.

    Args:
        wanted: Folder, which need not exist; the option that sets it; bytes to write. The first entry
            counts even with 0 bytes.
    """
    found: dict[int, Demand] = {}
    for folder, option, needed in wanted:
        if found and not needed:
            continue  # the folder may not even be readable
        nearest = existing(folder)
        device = nearest.stat().st_dev
        first = found.get(device) or Demand(str(folder), option, 0, shutil.disk_usage(nearest).free)
        found[device] = replace(first, needed=first.needed + needed)
    return tuple(found.values())


def check_room(found: Iterable[Demand]) -> None:
    """Refuse demands that exceed the free space.

    Raises:
        DiskSpaceError: A file system has too little space.
    """
    for one in found:
        if one.needed > one.free:
            raise DiskSpaceError(
                f"{size(one.needed)} of disk space is needed at {one.place}, {size(one.free)} is free",
                hint=f"`factory gc` removes unused stages; or use a folder on another disk with {one.option}",
            )


def existing(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    return next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())


def folder_bytes(folder: Path) -> int:
    """Return the size of all files below a folder in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def no_memory(error: BaseException | None) -> str | None:
    """Return what could not be allocated, from an error and its causes; None for other errors."""
    while error is not None:
        text = str(error)
        full = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        if full or (isinstance(error, Exception) and TEXTS.search(text)):
            where = "GPU" if "CUDA" in text else "host"
            wanted = ALLOCATION.search(text)
            return f"the {where}'s memory is full" + (f": {wanted[1]} more were requested" if wanted else "")
        error = error.__cause__ or error.__context__
    return None
