"""What the processes of some tests do; each imports this file, and so no more than that takes."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from factory.errors import DataError
from factory.parallel import processes

Progress = Callable[[int, int, str], None]


def fail_in_the_second(progress: Progress) -> int:
    if processes.is_main():
        processes.gather([0])  # waits for the other
    raise DataError("'x' is no text", hint="give some")


def vanish(progress: Progress) -> None:
    if not processes.is_main():
        os.kill(os.getpid(), signal.SIGKILL)
    processes.gather([0])


def write_number_and_wait(folder: Path, *, progress: Progress) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(100)
