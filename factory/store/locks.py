"""Locks between processes: freed when their holder dies, kept by signs of life, waited for with an end."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from factory.errors import StoreError
from factory.store.capacity import READ_ONLY

try:
    import fcntl
except ImportError:  # Windows: there age alone keeps `factory gc` from stages in use
    fcntl = None  # type: ignore[assignment]
LIFE_SECONDS = 10.0  # between two signs of life of a holder
PATIENCE_SECONDS = 600.0  # without a sign of life; a stopped process or a dead machine gives none
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
HOME = "`home` or FACTORY_HOME"


def unwritable(folder: Path, error: OSError, *, option: str = HOME) -> StoreError:
    """The error for a place that cannot be written, or whose file system lacks what is needed.

    Args:
        option: That would give another place.
    """
    if error.errno in NO_LOCKS:
        return StoreError(
            f"the file system of {folder} has no locks", hint=f"give a folder on another disk with {option}"
        )
    return StoreError(
        f"cannot write to {folder}: {error.strerror}", hint=f"give another folder with {option}"
    )


@contextmanager
def writing(folder: Path, *, option: str = HOME) -> Iterator[None]:
    """Tell a place that cannot be written from other trouble."""
    try:
        yield
    except OSError as error:
        if error.errno in READ_ONLY or isinstance(error, NotADirectoryError | FileExistsError):
            raise unwritable(folder, error, option=option) from error
        raise


@contextmanager
def locked(
    path: Path,
    *,
    on_wait: Callable[[], None] | None = None,
    patience_seconds: float = PATIENCE_SECONDS,
    passing: bool = False,
    option: str = HOME,
) -> Iterator[None]:
    """Hold the lock of one file; the operating system frees it when its holder dies.

    While it is held, the file's time moves on every few seconds. Whoever waits goes by that, not by how
    long it takes: a stage may take days, but a process that was stopped is not waited for.

    Args:
        on_wait: Called once if somebody else holds it.
        patience_seconds: Without a sign of life of the holder.
        passing: Remove the file in the end; whoever waits for it makes it anew.
        option: That would give another place.

    Raises:
        StoreError: It cannot be written, its file system has no locks, or its holder gives no sign of life.
    """
    lock = _lock(path)
    try:
        if not _taken(lock):
            if on_wait:
                on_wait()
            _wait(lock, path, patience_seconds=patience_seconds)
    except OSError as error:
        raise unwritable(path.parent, error, option=option) from error
    try:
        with _signs_of_life(path):
            yield
    finally:
        _let_go(lock, passing=passing)


@contextmanager
def unless_locked(path: Path, *, passing: bool = False) -> Iterator[bool]:
    """Hold the lock of one file if nobody else does, and say whether; never waits.

    Raises:
        StoreError: It cannot be written, or its file system has no locks.
    """
    lock = _lock(path)
    try:
        free = _taken(lock)
    except OSError as error:
        raise unwritable(path.parent, error) from error
    try:
        yield free
    finally:
        _let_go(lock, passing=passing)


def _lock(path: Path) -> FileLock:
    """Never a soft lock, what filelock falls back to: it outlives a holder that is killed."""
    return FileLock(path, fallback_to_soft=False)


def _taken(lock: FileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


def _let_go(lock: FileLock, *, passing: bool) -> None:
    if passing and lock.is_locked:  # still held: who opened the file already sees that it is gone
        with suppress(OSError):
            Path(lock.lock_file).unlink()
    lock.release()


def hold(path: Path) -> IO[bytes] | None:
    """Mark a file as in use until what is returned is closed, or this process dies; many may at once."""
    if fcntl is None:
        return None
    file = path.open("rb")
    with suppress(OSError):  # without locks on its file system nobody could make it in the first place
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return file


def is_held(path: Path) -> bool:
    """Whether somebody marked this file as in use, and lives."""
    if fcntl is None or not path.is_file():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _wait(lock: FileLock, path: Path, *, patience_seconds: float) -> None:
    """Wait for the lock while its holder gives signs of life, by this process's own clock."""
    last, since = _time_of(path), time.monotonic()
    while True:
        with suppress(Timeout):
            lock.acquire(timeout=min(patience_seconds / 4, LIFE_SECONDS), poll_interval=0.1)
            return
        if (seen := _time_of(path)) != last:
            last, since = seen, time.monotonic()
        elif time.monotonic() - since > patience_seconds:
            raise StoreError(
                f"{path} is held by a process that has given no sign of life for {patience_seconds:.0f} s",
                hint=f"`fuser {path}` names it on its machine; end it and run the same command again",
            )


def _time_of(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@contextmanager
def _signs_of_life(path: Path) -> Iterator[None]:
    """Let the file's time move on from a thread until the work is done."""
    done = threading.Event()

    def touch() -> None:
        while not done.wait(LIFE_SECONDS):
            with suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=touch, name="signs of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
