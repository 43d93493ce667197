"""The folder of a build, or of `factory prune`: its lock, what lies beside it for a moment, and the swap."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from factory.artifacts import Build, DistanceProfile, Pruning
from factory.errors import StoreError, UsageError
from factory.store.files import OLD, PARTIAL, SUMS
from factory.store.locks import locked, writing

MARK = ".made-by-factory"  # in a folder beside a build that is being written or removed


@contextmanager
def laying_out(build: Path, *, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock of one build folder: two builds into it take turns, whatever their stores.

    What a `swap` that was killed had moved away is put back first.

    Raises:
        StoreError: The place cannot be written, or its file system has no locks.
    """
    build = build.resolve()  # a link stays, and what it leads to is written
    with writing(build.parent, option="`out`"):
        build.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock_of(build), on_wait=on_wait, passing=True, option="`out`"):
        restore(build)
        yield


def lock_of(build: Path) -> Path:
    """The lock of a build folder."""
    return build.with_name(f".{build.name}.lock")


def beside(build: Path) -> tuple[Path, Path]:
    """Where a build's folder is laid out, and where the one before it waits to be removed."""
    return build.with_name(f".{build.name}{PARTIAL}"), build.with_name(f".{build.name}{OLD}")


def leftovers(build: Path) -> list[Path]:
    """What laying out a build leaves beside it for a moment; for longer only if it was killed."""
    return [folder for folder in beside(build) if is_ours(folder)]


def is_writable(out: Path) -> bool:
    """Whether a folder can be put there: what is above it and what lies there may be written."""
    above = next((path for path in out.parents if path.exists()), out)
    places = (above, out) if out.is_dir() else (above,)
    return above.is_dir() and all(os.access(place, os.W_OK | os.X_OK) for place in places)


def is_build(folder: Path) -> bool:
    """Whether a folder holds what every build has."""
    return all((folder / name).exists() for name in (Build.file_name, DistanceProfile.file_name, "model"))


def is_whole(folder: Path) -> bool:
    """Whether a folder beside a build is what a swap moves: marked is what is being written or removed."""
    made = is_build(folder) or (folder / Pruning.file_name).is_file()
    return made and not (folder / MARK).is_file()


def is_ours(folder: Path) -> bool:
    """Whether what lies beside a build was left there by laying one out: nobody's own files go."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return (folder / MARK).is_file() or is_whole(folder) or not any(folder.iterdir())


def begin(out: Path) -> Path:
    """Make the folder in which a result is laid out; what a killed attempt left there goes.

    Raises:
        StoreError: Somebody's own files are in the way.
    """
    check_beside(out)
    partial, _ = beside(out)
    if partial.exists():
        discard(partial)
    partial.mkdir(parents=True)
    (partial / MARK).touch()
    return partial


def discard(folder: Path) -> None:
    """Remove a folder beside a build; wherever a kill ends that, the rest is still known as ours."""
    (folder / MARK).touch()
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()
    (folder / MARK).unlink()
    folder.rmdir()


def whole_beside(build: Path) -> bool:
    """Whether a whole one lies beside a build: the old one, or a new one with what is written last."""
    return any(folder.suffix == OLD or (folder / SUMS).is_file() for folder in leftovers(build))


def check_beside(out: Path) -> None:
    """Refuse to build where somebody's own files have the names that laying out needs for a moment.

    Raises:
        StoreError: Names them.
    """
    for path in beside(out):
        if os.path.lexists(path) and not is_ours(path):
            raise StoreError(
                f"{path} is in the way and was not made by the factory",
                hint="move it away, or give another folder with `out`",
            )


def swap(partial: Path, out: Path) -> None:
    """Put the new folder where the old one is; a kill in between leaves one of them whole."""
    _, old = beside(out)
    if old.exists():
        discard(old)
    (partial / MARK).unlink()  # whole by now
    if out.exists():
        os.replace(out, old)  # noqa: PTH105  the pair reads better so
    os.replace(partial, out)  # noqa: PTH105
    if old.is_dir():
        discard(old)


def restore(out: Path) -> None:
    """Put back the folder that a `swap` which was killed had moved away."""
    _, old = beside(out)
    if old in leftovers(out) and is_whole(old) and not os.path.lexists(out):
        old.rename(out)


def output_folder(folder: Path) -> Path:
    """A folder for results, made before the work that they take.

    Raises:
        UsageError: It cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot make the folder {str(folder)!r}: {error.strerror}", hint="give another one"
        ) from error
    if not os.access(folder, os.W_OK):
        raise UsageError(f"cannot write to the folder {str(folder)!r}", hint="give another one")
    return folder
