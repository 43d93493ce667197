"""What was asked for: one build of a command line or of a build file."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from factory.errors import FactoryError


@dataclass(frozen=True)
class Entry:
    """One build of a file."""

    file: str
    values: dict[str, Any]  # by the names of the flags; only what is written there
    lines: dict[str, int]  # of these
    line: int  # where it starts

    @contextmanager
    def located(self, key: str = "model") -> Iterator[None]:
        """Put file and line before an error: of the flag it names, or else of `key`."""
        try:
            yield
        except FactoryError as error:
            named = next((k for k in re.findall(r"--([a-z][\w-]*)", error.message) if k in self.lines), key)
            where = f"{self.file}, line {self.lines.get(named, self.line)}"
            raise type(error)(f"{where}: {error.message}", hint=error.hint) from error


@dataclass(frozen=True)
class Request:
    """One build that is asked for."""

    model: str
    options: dict[str, Any]  # complete, by the names of click's parameters
    given: dict[str, Any]  # what was typed or stands in the file, by the names of the flags
    entry: Entry | None  # in a file

    @contextmanager
    def located(self, key: str = "model") -> Iterator[None]:
        """Put the line before an error, where there is one."""
        if self.entry is None:
            yield
        else:
            with self.entry.located(key):
                yield
