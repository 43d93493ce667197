"""Divide work among several processes: find this one's share, and combine the results."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import distributed

from factory.errors import WorkerError

IF_GONE = "out of memory? the same command resumes from here; `processes=1` uses a single process"
T = TypeVar("T")


def count() -> int:
    """Return how many processes share this work."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def index() -> int:
    """Return this process's number; 0 is the main one, the only one that writes."""
    return distributed.get_rank() if count() > 1 else 0


def is_main() -> bool:
    """Return whether this is the one process that writes and reports."""
    return index() == 0


def sharded() -> bool:
    """Return whether a model in training is sharded across the processes (FSDP)."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def share(items: Sequence[T]) -> Sequence[T]:
    """Return this process's consecutive share of `items`; the sizes of shares differ by one at most."""
    start, end = (len(items) * place // count() for place in (index(), index() + 1))
    return items[start:end]


def gather(mine: Sequence[T]) -> list[T]:
    """Combine the results of all processes in the order of their shares; waits for every process."""
    if count() == 1:
        return list(mine)
    parts: list[list[T]] = [[] for _ in range(count())]
    with _talking():
        distributed.all_gather_object(parts, list(mine))
    return [item for part in parts for item in part]


def from_main(value: T) -> T:
    """Return the main process's value in every process."""
    if count() == 1:
        return value
    values = [value]
    with _talking():
        distributed.broadcast_object_list(values, src=0)
    return values[0]


@contextmanager
def main_first() -> Iterator[None]:
    """Let the main process run the block before the others, to fill the caches that they read."""
    if not is_main():
        from_main(None)
    yield
    if is_main():
        from_main(None)


@contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's own errors of this kind are RuntimeErrors, or gloo's plain ones
        raise WorkerError(
            f"one of {count()} processes died: {str(error).splitlines()[0][:200]}", hint=IF_GONE
        ) from error
