"""Standard output and error: they take every text, and a reader that goes away ends no work."""

import io
import os
import signal
import sys

ENDED = 128 + signal.SIGPIPE  # what a shell reports of a program that its reader left


class Output(io.TextIOWrapper):
    """A standard stream that a reader such as `head` may leave."""

    ends_work = True  # which has no result but what it prints

    def write(self, text: str, /) -> int:
        """Write, or end as a shell expects; without effect where the work has other results."""
        try:
            return super().write(text)
        except BrokenPipeError:
            self._left()
        return len(text)

    def flush(self) -> None:
        """Write out what is held; the same where no reader is left."""
        try:
            super().flush()
        except BrokenPipeError:
            self._left()

    def _left(self) -> None:
        """Let the rest, also what is held and what libraries print, go nowhere.

        Raises:
            SystemExit: Standard output was all that there is of the work.
        """
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        if self.ends_work and self is sys.stdout:
            raise SystemExit(ENDED)


def settle() -> None:
    """Make standard output and error take every text, whole or with an error."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file would get its number, and what libraries print to that
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
            continue  # one that the program around this one put there
        raw = isinstance(stream.buffer, io.RawIOBase)  # PYTHONUNBUFFERED: half a write would pass for a whole
        buffer = io.BufferedWriter(stream.buffer) if raw else stream.buffer
        lines = raw or stream.line_buffering
        # A terminal without ≠ or ✓ shows ? and goes on.
        setattr(sys, name, Output(buffer, stream.encoding, errors="replace", line_buffering=lines))


def go_on() -> None:
    """Work to the end though nobody reads: its result is a folder or a repository."""
    Output.ends_work = False
