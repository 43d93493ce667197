"""Files that outlast a kill or a power cut, and their checksums."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from factory.errors import StoreError

PARTIAL = ".partial"  # of the name of what is not whole yet
SUMS = "SHA256SUMS"  # as `sha256sum -c` reads it
LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_taken: dict[tuple[int, ...], str] = {}  # device, inode, size, time → sha256
OLD = ".old"  # what had the final name, until its successor has it


def sha256_of_file(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is either the old or the new one, whatever happens."""
    draft = path.with_name(path.name + PARTIAL)
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)  # half a file is nothing that a build has made
        raise


def sync_files(folder: Path) -> None:
    """Make all files below a folder, and their names, outlast a power cut."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir() or path.is_file():
            sync_folder(path)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_once(path: Path) -> str:
    """Hex sha256 of a file that a run reads once, as long as its inode, size and time stay what they are.

    For what is laid out and published at once. What lies between two of those is read again: see `forget`.
    """
    state = path.stat()
    known = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
    if known not in _taken:
        _taken[known] = sha256_of_file(path)
    return _taken[known]


def forget() -> None:
    """Have every file read again: a disk that rots changes neither size nor time."""
    _taken.clear()


def visible_files(folder: Path) -> list[Path]:
    """Every file below a folder, sorted; hidden ones are no part of a model: keys, caches, `.git`."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def changed_files(
    folder: Path, sums: Mapping[str, str], *, sha256_of: Callable[[Path], str] = sha256_of_file
) -> list[str]:
    """Names of files that are missing, cannot be read, or have another sha256 than they had."""

    def is_same(name: str) -> bool:
        try:
            return sha256_of(folder / name) == sums[name]
        except OSError:  # also what a failing disk answers
            return False

    names = sorted(sums)
    with ThreadPoolExecutor() as pool:
        return [name for name, same in zip(names, pool.map(is_same, names), strict=True) if not same]


def write_sums(folder: Path, names: Iterable[str], *, known: Mapping[str, str]) -> None:
    """Write the sums of these files into `folder`; `known` holds those that were taken already.

    Raises:
        StoreError: A name that cannot stand in such a list.
    """
    names = list(names)
    if strange := [name for name in names if not name.isprintable()]:
        raise StoreError(f"{strange[0]!a} is no name for a list of checksums", hint="rename that file")
    sums = {name: known.get(name) or sha256_once(folder / name) for name in names}
    (folder / SUMS).write_text("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)), encoding="utf-8")


def read_sums(folder: Path) -> dict[str, str] | None:
    """File name → sha256; None where no sums were written.

    Raises:
        StoreError: It is no such list.
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
    return StoreError(f"{folder / SUMS} is damaged", hint="run the build again: it lays it out anew")
