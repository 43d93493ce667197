"""How long a test waits for what must come: a machine under load is no fault, a process that hangs is one."""

import time
from collections.abc import Callable

HUNG_SECONDS = 3600  # no process here works as long, even where many share its core


def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds.

    Raises:
        AssertionError: It has not come to hold for as long as a process that hangs would take.
    """
    end = time.monotonic() + HUNG_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
