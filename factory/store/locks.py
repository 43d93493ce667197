"""Lock files between processes; the operating system releases a lock when its holder dies."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from factory.errors import StoreError
from factory.store.capacity import READ_ONLY

try:
    import fcntl
except ImportError:  # Windows, where only their age protects stages in use from `factory gc`
    fcntl = None  # type: ignore[assignment]
POLL_SECONDS = 0.2
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
HOME = "`home` or FACTORY_HOME"


def unwritable(folder: Path, error: OSError, *, option: str = HOME) -> StoreError:
    """Return the error for a folder that cannot be written, or whose file system has no locks.

    Args:
        option: Option that sets the folder.
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
    """Turn errors that mean an unwritable folder into a `StoreError`; let others through."""
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
    passing: bool = False,
    option: str = HOME,
) -> Iterator[None]:
    """Wait for the lock of one file and hold it; a stage may take days, so there is no timeout.

    Args:
        on_wait: Called once if another process holds the lock.
        passing: Remove the file afterwards; a process that waits for it creates it again.
        option: Option that sets the folder.

    Raises:
        StoreError: The file cannot be written, or its file system has no locks.
    """
    lock = _lock(path)
    try:
        if not _taken(lock):
            if on_wait:
                on_wait()
            lock.acquire(poll_interval=POLL_SECONDS)
    except OSError as error:
        raise unwritable(path.parent, error, option=option) from error
    try:
        yield
    finally:
        _let_go(lock, passing=passing)


@contextmanager
def unless_locked(path: Path, *, passing: bool = False) -> Iterator[bool]:
    """Hold the lock of one file if it is free, and yield whether it was; never wait.

    Raises:
        StoreError: The file cannot be written, or its file system has no locks.
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
    """Return a lock without filelock's fallback to soft locks, which outlive a holder that is killed."""
    return FileLock(path, fallback_to_soft=False)


def _taken(lock: FileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


def _let_go(lock: FileLock, *, passing: bool) -> None:
    if passing and lock.is_locked:  # still held: a waiting process sees that the file is gone
        with suppress(OSError):
            Path(lock.lock_file).unlink()
    lock.release()


def hold(path: Path) -> IO[bytes] | None:
    """Mark a file as in use until the returned file is closed or this process dies; holders can share it."""
    if fcntl is None:
        return None
    file = path.open("rb")
    with suppress(OSError):  # on a file system without locks, the stage could not have been written
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return file


def is_held(path: Path) -> bool:
    """Return whether a live process has marked this file as in use."""
    if fcntl is None or not path.is_file():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
