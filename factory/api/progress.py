"""Progress in Python: one bar per stage, in a notebook or on a terminal."""

import sys
import warnings
from typing import Any


class Bars:
    """The reporter of the Python interface: bars of tqdm, and notes as warnings."""

    def __init__(self) -> None:
        self._bar: Any = None

    def started(self, stage: str) -> None:
        """Show the bar of a stage."""
        from tqdm.auto import tqdm

        self.stop()
        shows = sys.stderr.isatty() or "ipykernel" in sys.modules
        self._bar = tqdm(desc=stage, total=None, leave=False, disable=not shows)

    def progressed(self, stage: str, done: int, total: int, note: str) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.total = total
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)

    def finished(self, stage: str, summary: str, seconds: float, reused: bool) -> None:
        """Remove the bar."""
        self.stop()

    def waiting(self, stage: str) -> None:
        """Warn that another run is making this stage."""
        warnings.warn(f"{stage}: another run is making it; waiting", stacklevel=2)

    def damaged(self, stage: str, file: str) -> None:
        """Warn that a finished stage has changed."""
        warnings.warn(f"{stage}: {file} has changed since it was made; making it again", stacklevel=2)

    def note(self, message: str) -> None:
        """Warn of something that is not an error."""
        warnings.warn(message, stacklevel=2)

    def stop(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
