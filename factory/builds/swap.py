"""Replace the folder of a build, or of `factory prune`, atomically: its lock, temporary folders and swap."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from factory.artifacts import Build, DistanceProfile, Pruning
from factory.errors import StoreError, UsageError
from factory.store.files import OLD, PARTIAL, SUMS
from factory.store.locks import locked, writing

MARK = ".made-by-factory"  # marks a folder beside a build while it is written or removed


@contextmanager
def laying_out(build: Path, *, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock of one build folder: builds into it take turns, whatever their stores.

    A folder that an interrupted `swap` had moved away is put back first.

    Raises:
        StoreError: The path cannot be written, or its file system does not support locks.
    """
    build = build.resolve()  # a link stays, and its target is written
    with writing(build.parent, option="`out`"):
        build.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock_of(build), on_wait=on_wait, passing=True, option="`out`"):
        restore(build)
        yield


def lock_of(build: Path) -> Path:
    """Return the path of a build folder's lock."""
    return build.with_name(f".{build.name}.lock")


def beside(build: Path) -> tuple[Path, Path]:
    """Return where a build's folder is written, and where its predecessor waits to be removed."""
    return build.with_name(f".{build.name}{PARTIAL}"), build.with_name(f".{build.name}{OLD}")


def leftovers(build: Path) -> list[Path]:
    """Return the temporary folders beside a build, which remain only after an interruption."""
    return [folder for folder in beside(build) if is_ours(folder)]


def is_writable(out: Path) -> bool:
    """Return whether a folder can be created there: its parent, and itself if it exists, are writable."""
    above = next((path for path in out.parents if path.exists()), out)
    folders = (above, out) if out.is_dir() else (above,)
    return above.is_dir() and all(os.access(folder, os.W_OK | os.X_OK) for folder in folders)


def is_build(folder: Path) -> bool:
    """Return whether a folder has the files of every build."""
    return all((folder / name).exists() for name in (Build.file_name, DistanceProfile.file_name, "model"))


def is_whole(folder: Path) -> bool:
    """Return whether a folder beside a build is complete, not being written or removed (marked)."""
    made = is_build(folder) or (folder / Pruning.file_name).is_file()
    return made and not (folder / MARK).is_file()


def is_ours(folder: Path) -> bool:
    """Return whether a folder beside a build was left by the factory; the user's own are never removed."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return (folder / MARK).is_file() or is_whole(folder) or not any(folder.iterdir())


def begin(out: Path) -> Path:
    """Create the folder in which a result is written, removing what an interrupted attempt left there.

    Raises:
        StoreError: The user's own files are in the way.
    """
    check_beside(out)
    partial, _ = beside(out)
    if partial.exists():
        discard(partial)
    partial.mkdir(parents=True)
    (partial / MARK).touch()
    return partial


def discard(folder: Path) -> None:
    """Remove a folder beside a build; if interrupted, the rest is still recognised as the factory's."""
    (folder / MARK).touch()
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()
    (folder / MARK).unlink()
    folder.rmdir()


def whole_beside(build: Path) -> bool:
    """Return whether a complete copy is beside a build: the old one, or a new one with its checksums."""
    return any(folder.suffix == OLD or (folder / SUMS).is_file() for folder in leftovers(build))


def check_beside(out: Path) -> None:
    """Refuse to build where the user's own files have the names of the temporary folders.

    Raises:
        StoreError: A file is in the way; names it.
    """
    for path in beside(out):
        if os.path.lexists(path) and not is_ours(path):
            raise StoreError(
                f"{path} is in the way and was not made by the factory",
                hint="move it away, or choose another folder with `out`",
            )


def swap(partial: Path, out: Path) -> None:
    """Put the new folder in place of the old one; an interruption leaves one of them complete."""
    _, old = beside(out)
    if old.exists():
        discard(old)
    (partial / MARK).unlink()  # complete by now
    if out.exists():
        os.replace(out, old)  # noqa: PTH105  the pair reads better so
    os.replace(partial, out)  # noqa: PTH105
    if old.is_dir():
        discard(old)


def restore(out: Path) -> None:
    """Put back the folder that an interrupted `swap` had moved away."""
    _, old = beside(out)
    if old in leftovers(out) and is_whole(old) and not os.path.lexists(out):
        old.rename(out)


def output_folder(folder: Path) -> Path:
    """Create a folder for results before the work, and return it.

    Raises:
        UsageError: The folder cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot create the folder {str(folder)!r}: {error.strerror}", hint="choose another one"
        ) from error
    if not os.access(folder, os.W_OK):
        raise UsageError(f"cannot write to the folder {str(folder)!r}", hint="choose another one")
    return folder
