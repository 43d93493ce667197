"""What the processes of some tests do; each imports this file, and so no more than that takes."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed

from factory.errors import DataError
from factory.parallel import processes

Progress = Callable[[int, int, str], None]


def fail_in_the_second(progress: Progress, tell: Callable[[str], None]) -> None:
    """Both tell how many they are; then the second fails."""
    tell(f"{processes.count()} of us, {processes.index()}")
    processes.gather([0])
    if processes.is_main():
        processes.gather([0])  # waits for the other
    raise DataError("'x' is no text", hint="give some")


def vanish(progress: Progress) -> None:
    if not processes.is_main():
        os.kill(os.getpid(), signal.SIGKILL)
    processes.gather([0])


def vanish_while_a_library_waits(progress: Progress) -> None:
    if not processes.is_main():
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.all_reduce(torch.zeros(1))


def write_number_and_wait(folder: Path, *, progress: Progress) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(100)
