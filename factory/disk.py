"""Sizes for people, and no room on the disk, whoever says so: Python, safetensors, torch, the Hub client."""

import errno
import re
from pathlib import Path

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


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
