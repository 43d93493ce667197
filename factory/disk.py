"""Room on the disk: sizes for people, what each file system is to take, and who says that one is full."""

import errno
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from factory.errors import DiskSpaceError

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


def size(num_bytes: int) -> str:
    """Bytes for people, in powers of ten as disks are sold."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes} bytes"


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
