"""Room on the disk and in memory: what is needed, what is free, and who says that there is none left."""

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
RUST = re.compile(
    r"(?:\(os error |\bOs { code: )(\d+)"
)  # safetensors and hf_xet tell the number in their text alone
TORCH = "PytorchStreamWriter failed writing file"  # without a number
TEXTS = re.compile(
    "out of memory|can't allocate memory|cannot allocate memory|bad_alloc|can't start new thread"
    "|failed to map segment from shared object",
    re.IGNORECASE,
)
ALLOCATION = re.compile(r"[Tt]ried to allocate ([\d.]+ ?[A-Za-z]+)")


def no_room(error: BaseException | None) -> str | None:
    """Why a file could not be written any further, in words; None where that is not the trouble.

    Looks at the error and at what it came from.
    """
    while error is not None:
        match = RUST.search(str(error))
        number = error.errno if isinstance(error, OSError) else int(match[1]) if match else None
        if number in REASONS:
            return REASONS[number]
        if TORCH in str(error):
            return "the disk is full or failing"
        error = error.__cause__ or error.__context__
    return None


@dataclass(frozen=True)
class Demand:
    """What one file system is to take."""

    place: str  # the first folder that was named on it
    option: str  # that would give another one
    needed: int  # bytes
    free: int  # bytes


def demands(wanted: Sequence[tuple[Path, str, int]]) -> tuple[Demand, ...]:
    """What each file system is to take in all.

    Args:
        wanted: Folder, there or not; the option that would give another one; bytes that go to it. The
            first counts also where these are none.
    """
    found: dict[int, Demand] = {}
    for folder, option, needed in wanted:
        if found and not needed:
            continue  # it need not even be readable
        there = existing(folder)
        device = there.stat().st_dev
        first = found.get(device) or Demand(str(folder), option, 0, shutil.disk_usage(there).free)
        found[device] = replace(first, needed=first.needed + needed)
    return tuple(found.values())


def check_room(found: Iterable[Demand]) -> None:
    """Refuse what does not fit.

    Raises:
        DiskSpaceError: Says where, how much is needed and how much there is.
    """
    for one in found:
        if one.needed > one.free:
            raise DiskSpaceError(
                f"{size(one.needed)} of disk are needed at {one.place}, {size(one.free)} are free",
                hint="`factory gc` removes what no build uses; or give a folder on another disk with "
                + one.option,
            )


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def no_memory(error: BaseException | None) -> str | None:
    """What could not be allocated, in words; None where that is not the trouble.

    Looks at the error and at what it came from.
    """
    while error is not None:
        text = str(error)
        full = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        if full or (isinstance(error, Exception) and TEXTS.search(text)):
            where = "GPU" if "CUDA" in text else "host"
            wanted = ALLOCATION.search(text)
            return f"the {where}'s memory is full" + (f": {wanted[1]} more were asked for" if wanted else "")
        error = error.__cause__ or error.__context__
    return None
