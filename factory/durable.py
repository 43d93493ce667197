"""Files that outlast a kill or a power cut."""

import os
from pathlib import Path

PARTIAL = ".partial"  # of the name of what is not whole yet


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
