"""The terminal: progress lines, and streams that write every text."""

import errno
import io
import json
import logging
import os
import re
import signal
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import click
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from factory.cli.log import WORK
from factory.config.request import BuildRequest, PlanRequest, PruneRequest, SweepRequest
from factory.pipeline.costs.time_left import TimeLeft
from factory.units import duration, rough_duration

NAMES = {
    *(
        name
        for request in (BuildRequest, PlanRequest, SweepRequest, PruneRequest)
        for name in request.options()
    ),
    *("source", "port", "deploy", "hardware", "accept", "create_pr", "revision"),  # of other commands
    *("gguf", "converter"),
} - {"model"}
OPTION = re.compile(r"`([a-z][a-z0-9_]*)(?:=([^`]*))?`")  # an option in a message: `heal_steps=100`
LOG = logging.getLogger(__name__)
STAGE_WIDTH = 17
PLAIN_SECONDS = 30.0  # least time between progress lines in the log, and without a terminal
ENDED = 128 + signal.SIGPIPE  # exit code that a shell reports after a broken pipe


def as_flags(text: str) -> str:
    """Return a message with its options as flags: `heal_steps=9` → --heal-steps 9."""

    def flag(match: re.Match[str]) -> str:
        name, value = match[1], match[2]
        if name not in NAMES:
            return match[0]
        return f"--{name.replace('_', '-')}" + (f" {value}" if value else "")

    return OPTION.sub(flag, text)


class PlainConsole(Console):
    """A console that strips control characters from text; only rich moves the cursor or sets colours."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield the segments that rich lays out, their texts without control characters."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                lines = [printable(line) for line in segment.text.split("\n")]
                yield Segment("\n".join(lines), segment.style)


def console(*, stderr: bool = False) -> Console:
    """Return a console: colours and bars on a terminal, plain lines of any length elsewhere."""
    made = PlainConsole(stderr=stderr, highlight=False, emoji=False, markup=False)
    return (
        made
        if made.is_terminal
        else PlainConsole(stderr=stderr, highlight=False, emoji=False, markup=False, width=200, no_color=True)
    )


def say(out: Console, text: Text | str, *, label: Text | str = "") -> None:
    """Print a sentence: on a terminal broken between words, beside its label; elsewhere as one line."""
    label = label if isinstance(label, Text) else Text(label, style="dim")
    if not out.is_terminal:
        out.print(Text.assemble(label, text), soft_wrap=True)
        return
    table = Table.grid(Column(no_wrap=True), Column(overflow="fold"))
    table.add_row(label, text)
    out.print(table)


class StageLines:
    """The reporter of a build: one line per stage; on a terminal also a bar and the time left."""

    time_left: TimeLeft | None = None  # of the whole build, if its stages were estimated

    def __init__(self, out: Console) -> None:
        self.out = out
        self.bars = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=14),
            TimeElapsedColumn(),  # which moves even where a step takes minutes
            TaskProgressColumn(),  # empty while the total is not known
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}{task.fields[build]}"),
            console=out,
            transient=True,
        )
        self.task: TaskID | None = None
        self.last_line = self.began = time.monotonic()

    def started(self, stage: str) -> None:
        """Show that a stage runs."""
        LOG.info("%s: started", stage, extra=WORK)
        self.last_line = self.began = time.monotonic()
        if self.time_left:
            self.time_left.started(stage)
        self._show(stage)

    @contextmanager
    def busy(self, doing: str) -> Iterator[None]:
        """Show on a terminal that something is done that is no stage, and for how long, until it ends."""
        self._show(doing)
        try:
            yield
        finally:
            self.stop()

    def _show(self, doing: str) -> None:
        self.stop()
        if self.out.is_terminal:
            self.bars.start()
            self.task = self.bars.add_task(f"{doing:<{STAGE_WIDTH}}", total=None, note="", build="")

    def progressed(self, stage: str, done: int, total: int, note: str) -> None:
        """Move the bar; without a terminal, print a line now and then."""
        is_due = time.monotonic() - self.last_line > PLAIN_SECONDS
        if is_due:
            self.last_line = time.monotonic()
            LOG.debug("%s: %d of %d %s", stage, done, total, note)
        if self.task is not None:
            of_task = next(task for task in self.bars.tasks if task.id == self.task)
            build = self._of_build(of_task.time_remaining, note)
            self.bars.update(self.task, completed=done, total=total, note=note, build=build)
        elif is_due:
            share = done / total if total else 0
            own = (self.last_line - self.began) * (1 - share) / share if share else None
            build = self._of_build(own, note)
            self.out.print(f"    {stage:<{STAGE_WIDTH}}  {done:,} of {total:,}  {note}{build}".rstrip())

    def _of_build(self, remaining: float | None, note: str) -> str:
        """Return the time left of the whole build, to be read after a note."""
        if not self.time_left:
            return ""
        left = self.time_left.left(elapsed=time.monotonic() - self.began, remaining=remaining)
        return f"{', ' if note else ''}{rough_duration(left)} left in all"

    def finished(self, stage: str, summary: str, seconds: float, reused: bool) -> None:
        """Print the final line of a stage."""
        LOG.info("%s: %s, %.1f s, %s", stage, "reused" if reused else "done", seconds, summary, extra=WORK)
        self.stop()
        if self.time_left and not reused:
            self.time_left.finished(stage, seconds)
        mark, took = ("=", "reused") if reused else ("✓", duration(seconds))
        label = Text.assemble(
            (f"{mark} ", "dim" if reused else "green"),
            (f"{stage:<{STAGE_WIDTH}}", "bold" if not reused else "dim"),
            (f"{took:>8}  ", "dim"),
        )
        say(self.out, summary, label=label)

    def waiting(self, stage: str) -> None:
        """Report that another run is making this stage."""
        LOG.info("%s: another run is making it", stage, extra=WORK)
        self.out.print(f"  {stage:<{STAGE_WIDTH}}  another run is making it; waiting")

    def damaged(self, stage: str, file: str) -> None:
        """Report that a finished stage has changed."""
        LOG.warning("%s: %s has changed since it was made", stage, file, extra=WORK)
        message = f"{printable(file)} has changed since it was made; making it again"
        say(self.out, message, label=f"  {stage:<{STAGE_WIDTH}}  ")

    def note(self, message: str) -> None:
        """Print a note on standard error, for something that is not an error."""
        remark(message)

    def stop(self) -> None:
        """Remove the bar."""
        if self.task is not None:
            self.bars.remove_task(self.task)
            self.bars.stop()
            self.task = None


def printable(text: str) -> str:
    """Return untrusted text without the control characters that could move the cursor."""
    return "".join(letter for letter in text if letter.isprintable())


def remark(message: str) -> None:
    """Print a note on standard error, for something that is not an error."""
    LOG.info("note: %s", message)
    say(console(stderr=True), f"note: {printable(as_flags(message))}")


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    click.echo(json.dumps(value, indent=2))


class Output(io.TextIOWrapper):
    """A standard stream whose reader, such as `head`, may go away."""

    ends_work = True  # the work has no result but what it prints

    def write(self, text: str, /) -> int:
        """Write; without a reader, exit as a shell expects, or discard the text if work goes on."""
        try:
            return super().write(text)
        except OSError as error:
            self._check_left(error)
        return len(text)

    def flush(self) -> None:
        """Flush the buffer, treating a missing reader as `write` does."""
        try:
            super().flush()
        except OSError as error:
            self._check_left(error)

    def _check_left(self, error: OSError) -> None:
        """Discard further output if the reader has gone away.

        Raises:
            OSError: The error has another cause.
            SystemExit: The reader of standard output left, and printing was all the work.
        """
        closed = isinstance(error, BrokenPipeError | ConnectionResetError)
        if not closed and not (error.errno == errno.EIO and stat.S_ISCHR(os.fstat(self.fileno()).st_mode)):
            raise error  # EIO of a terminal: its window was closed
        _to_nowhere(self)
        if self.ends_work and self is sys.stdout:
            raise SystemExit(ENDED)


def settle() -> None:
    """Make standard output and error write every text in full, or raise an error."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file opened would get its number, and the output of libraries
            os.open(os.devnull, os.O_RDWR)
    for number, name in enumerate(("stdout", "stderr"), start=1):
        stream = getattr(sys, name)
        if stream is None:  # it was closed
            nowhere = open(number, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
            setattr(sys, name, nowhere)
            continue
        if stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
            continue  # replaced by the calling program
        os.set_blocking(number, True)  # otherwise text that a slow reader has no room for yet would be lost
        raw = isinstance(stream.buffer, io.RawIOBase)  # PYTHONUNBUFFERED: a partial write would go unnoticed
        buffer = io.BufferedWriter(stream.buffer) if raw else stream.buffer
        lines = raw or stream.line_buffering
        # A terminal that cannot show ≠ or ✓ shows ? instead.
        setattr(sys, name, Output(buffer, stream.encoding, errors="replace", line_buffering=lines))


def finish() -> None:
    """Flush both streams; discard what cannot be written, so that no traceback appears at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _to_nowhere(stream)


def _to_nowhere(stream: TextIO) -> None:
    """Discard all further output, including buffered text and what libraries print."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def go_on() -> None:
    """Keep working without a reader: the result is a folder or a repository."""
    Output.ends_work = False
