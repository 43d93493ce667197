"""Several processes on one piece of work: which one this is, its share, the shares put together again."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import distributed

from factory.errors import WorkerError

IF_GONE = "out of memory? the same command goes on from here; `processes=1` works in one process"
T = TypeVar("T")


def count() -> int:
    """How many processes are at this work."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def index() -> int:
    """Which of them this is; 0 is the main one, which alone writes."""
    return distributed.get_rank() if count() > 1 else 0


def is_main() -> bool:
    """Whether this is the one process that writes and reports."""
    return index() == 0


def sharded() -> bool:
    """Whether a model in training is divided among the processes (FSDP), as `accelerate launch` was told."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def share(items: Sequence[T]) -> Sequence[T]:
    """The part of `items` that is this process's: consecutive ones, as many as everybody's but for one."""
    start, end = (len(items) * place // count() for place in (index(), index() + 1))
    return items[start:end]


def gather(mine: Sequence[T]) -> list[T]:
    """What all processes made of their shares, in the order of the shares; waits for every process."""
    if count() == 1:
        return list(mine)
    parts: list[list[T]] = [[] for _ in range(count())]
    with _talking():
        distributed.all_gather_object(parts, list(mine))
    return [item for part in parts for item in part]


def from_main(value: T) -> T:
    """The main process's value, in every process."""
    if count() == 1:
        return value
    values = [value]
    with _talking():
        distributed.broadcast_object_list(values, src=0)
    return values[0]


@contextmanager
def main_first() -> Iterator[None]:
    """The main process goes through the block before the others: it fills the caches that they read."""
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
            f"one of {count()} processes is gone: {str(error).splitlines()[0][:200]}", hint=IF_GONE
        ) from error
