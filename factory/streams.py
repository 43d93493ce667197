"""Standard output and error: they take every text, and a reader that goes away ends no work."""

import errno
import io
import os
import signal
import stat
import sys
from typing import TextIO

ENDED = 128 + signal.SIGPIPE  # what a shell reports of a program that its reader left


class Output(io.TextIOWrapper):
    """A standard stream that a reader such as `head` may leave."""

    ends_work = True  # which has no result but what it prints

    def write(self, text: str, /) -> int:
        """Write, or end as a shell expects; without effect where the work has other results."""
        try:
            return super().write(text)
        except OSError as error:
            self._check_left(error)
        return len(text)

    def flush(self) -> None:
        """Write out what is held; the same where no reader is left."""
        try:
            super().flush()
        except OSError as error:
            self._check_left(error)

    def _check_left(self, error: OSError) -> None:
        """Let the rest go nowhere where no reader is left.

        Raises:
            OSError: It is another error.
            SystemExit: Standard output was all that there is of the work.
        """
        closed = isinstance(error, BrokenPipeError | ConnectionResetError)
        if not closed and not (error.errno == errno.EIO and stat.S_ISCHR(os.fstat(self.fileno()).st_mode)):
            raise error  # EIO of a terminal: its window was closed
        _to_nowhere(self)
        if self.ends_work and self is sys.stdout:
            raise SystemExit(ENDED)


def settle() -> None:
    """Make standard output and error take every text, whole or with an error."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file would get its number, and what libraries print to that
            os.open(os.devnull, os.O_RDWR)
    for number, name in enumerate(("stdout", "stderr"), start=1):
        stream = getattr(sys, name)
        if stream is None:  # it was closed
            nowhere = open(number, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
            setattr(sys, name, nowhere)
            continue
        if stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
            continue  # one that the program around this one put there
        os.set_blocking(number, True)  # or what a slow reader has no room for yet would be lost
        raw = isinstance(stream.buffer, io.RawIOBase)  # PYTHONUNBUFFERED: half a write would pass for a whole
        buffer = io.BufferedWriter(stream.buffer) if raw else stream.buffer
        lines = raw or stream.line_buffering
        # A terminal without ≠ or ✓ shows ? and goes on.
        setattr(sys, name, Output(buffer, stream.encoding, errors="replace", line_buffering=lines))


def finish() -> None:
    """Write out what is held; what cannot be written goes nowhere, and not into a traceback at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _to_nowhere(stream)


def _to_nowhere(stream: TextIO) -> None:
    """Send the rest, also what is held and what libraries print, to nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def go_on() -> None:
    """Work to the end though nobody reads: its result is a folder or a repository."""
    Output.ends_work = False
