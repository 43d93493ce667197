"""Write files that survive a kill or a power cut, and checksum them."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from factory.errors import StoreError

PARTIAL = ".partial"  # suffix of incomplete files and folders
SUMS = "SHA256SUMS"  # in the format of `sha256sum -c`
LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_taken: dict[tuple[int, ...], str] = {}  # device, inode, size, time → sha256
OLD = ".old"  # suffix of a replaced folder until its successor is in place


def sha256_of_file(path: Path) -> str:
    """Return the hex sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a file atomically: whatever happens, it is either the old or the new one."""
    draft = path.with_name(path.name + PARTIAL)
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)  # `verify` would report half a file as foreign to the build
        raise


def sync_files(folder: Path) -> None:
    """Sync all files below a folder, and their names, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir() or path.is_file():
            sync_folder(path)


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries, or a file, to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_once(path: Path) -> str:
    """Return the hex sha256 of a file, cached as long as its inode, size and time stay the same.

    Meant for files that are written and published in one run; `forget` clears the cache.
    """
    state = path.stat()
    known = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
    if known not in _taken:
        _taken[known] = sha256_of_file(path)
    return _taken[known]


def forget() -> None:
    """Clear the cache of checksums: a failing disk changes neither size nor time."""
    _taken.clear()


def visible_files(folder: Path) -> list[Path]:
    """List every file below a folder, sorted, except hidden ones, such as keys, caches and `.git`."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def changed_files(
    folder: Path, sums: Mapping[str, str], *, sha256_of: Callable[[Path], str] = sha256_of_file
) -> list[str]:
    """List the files that are missing, unreadable or have another sha256 than recorded."""

    def is_same(name: str) -> bool:
        try:
            return sha256_of(folder / name) == sums[name]
        except OSError:  # a failing disk raises it, too
            return False

    names = sorted(sums)
    with ThreadPoolExecutor() as pool:
        return [name for name, same in zip(names, pool.map(is_same, names), strict=True) if not same]


def write_sums(folder: Path, names: Iterable[str], *, known: Mapping[str, str]) -> None:
    """Write the checksums of these files into `folder`; `known` holds those already computed.

    Raises:
        StoreError: A file name cannot be written into such a list.
    """
    names = list(names)
    if strange := [name for name in names if not name.isprintable()]:
        raise StoreError(f"{strange[0]!a} is not a valid name in a checksum list", hint="rename that file")
    sums = {name: known.get(name) or sha256_once(folder / name) for name in names}
    (folder / SUMS).write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)), encoding="utf-8")


def read_sums(folder: Path) -> dict[str, str] | None:
    """Return the recorded sha256 of each file by name; None if there is no list.

    Raises:
        StoreError: The list is damaged.
    """
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _damaged(folder) from error
    matches = [LINE.fullmatch(line) for line in lines if line]
    if not all(matches):
        raise _damaged(folder)
    return {match[2]: match[1] for match in matches if match}


def _damaged(folder: Path) -> StoreError:
    return StoreError(f"{folder / SUMS} is damaged", hint="run the build again, which rewrites it")
