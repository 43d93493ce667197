"""Divide work among several processes: find this one's share, and combine the results."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import distributed

from factory.errors import WorkerError

IF_GONE = "out of memory? the same command resumes from here; `processes=1` uses a single process"
T = TypeVar("T")
R = TypeVar("R")


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


def portion(costs: Sequence[float]) -> list[int]:
    """Return the places of this process's items, so that all processes have about the same total cost."""
    costliest = sorted(range(len(costs)), key=lambda place: -costs[place])
    there_and_back = [*range(count()), *reversed(range(count()))]
    turns = (there_and_back[turn % len(there_and_back)] for turn in range(len(costs)))
    return sorted(place for place, turn in zip(costliest, turns, strict=True) if turn == index())


def divide(items: Sequence[T], work: Callable[[list[T]], list[R]], *, cost: Callable[[T], float]) -> list[R]:
    """Return a result of `work` for each item, in their order; each process does a part of about equal cost.

    Every process must call it with the same items, and gets all results.
    """
    mine = portion([cost(item) for item in items])
    results = gather(list(zip(mine, work([items[place] for place in mine]), strict=True)))
    return [result for _, result in sorted(results, key=lambda found: found[0])]


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


@torch.no_grad()
def average(tensors: Sequence[torch.Tensor]) -> None:
    """Replace each tensor by its mean over all processes, which hold the same shapes in the same order."""
    _exchange(tensors, distributed.all_reduce, scale=1 / count())


@torch.no_grad()
def copy_from_main(tensors: Sequence[torch.Tensor]) -> None:
    """Replace each tensor by the main process's, of the same shape."""
    _exchange(tensors, partial(distributed.broadcast, src=0))


def _exchange(
    tensors: Sequence[torch.Tensor], exchange: Callable[[torch.Tensor], object], scale: float = 1
) -> None:
    if count() == 1:
        return
    whole = torch.cat([tensor.flatten() for tensor in tensors])  # one message instead of hundreds
    with _talking():
        exchange(whole)
    parts = torch.split(whole * scale, [tensor.numel() for tensor in tensors])
    torch._foreach_copy_(list(tensors), [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])


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
    except RuntimeError as error:
        raise gone(error) from error


def gone(error: BaseException) -> WorkerError:
    """Return the error to show for one of a connection between processes."""
    return WorkerError(f"one of {count()} processes died: {str(error).splitlines()[0][:200]}", hint=IF_GONE)


def is_of_connection(error: BaseException) -> bool:
    """Return whether a library raised an error because it could not reach another process."""
    return isinstance(error, distributed.DistError) or (
        type(error) is RuntimeError and "/gloo/" in str(error)  # gloo's own are plain
    )
