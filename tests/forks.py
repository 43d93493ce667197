"""Commands run many times at the price of one start: a process that has imported much is copied for each."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from tests.fork_server import SLOW
from tests.places import ROOT
from tests.waiting import HUNG_SECONDS

NOTHING: dict[str, Any] = {"environment": None, "file_bytes": None}


@dataclass(frozen=True)
class Ended:
    """How one run ended."""

    code: int
    stdout: str
    stderr: str


class _Calls:
    """The pipe to a process of `tests.fork_server`."""

    def __init__(self, pipe: IO[str]) -> None:
        self._pipe, self._lock = pipe, threading.Lock()
        self.close = pipe.close

    def send(self, **call: object) -> None:
        with self._lock:
            self._pipe.write(json.dumps(call) + "\n")
            self._pipe.flush()


@cache
def _first() -> _Calls:
    """The process that all others are copies of; it ends with this one."""
    command = [sys.executable, "-m", "tests.fork_server", *SLOW]
    # OpenMP does not outlive a fork; with one thread it is not there to begin with.
    process = subprocess.Popen(
        command, cwd=ROOT, env=_variables(os.environ), stdin=subprocess.PIPE, text=True
    )
    assert process.stdin
    return _Calls(process.stdin)


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    # How much transformers tells is read at its import, before the command line's own setting.
    return {"TRANSFORMERS_VERBOSITY": "error", **environment, "OMP_NUM_THREADS": "1"}


def can_mount() -> bool:
    """Whether this user may have a disk of their own."""
    try:
        return subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


class Forks:
    """A process with an environment and imported modules of its own, copied for each run.

    Runs may overlap, from threads of their own.

    Args:
        environment: Variables beside those of this process.
        modules: What most runs import.
        disk: Folder at which it alone sees another file system, in memory, and its options for `mount`.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        *,
        modules: Sequence[str] = (),
        disk: tuple[Path, str] | None = None,
    ) -> None:
        variables = _variables({**os.environ, **environment})
        mounted = disk and (str(disk[0]), disk[1])
        with tempfile.TemporaryDirectory() as into:
            os.mkfifo(f"{into}/calls")
            _first().send(into=into, environment=variables, modules=modules, disk=mounted)
            self._calls = _Calls(Path(into, "calls").open("w", encoding="utf-8"))  # noqa: SIM115
            self._pid = int(Path(into, "pid").read_text())

    def run(
        self,
        *arguments: str,
        folder: Path,
        program: str | None = None,
        file_bytes: int | None = None,
        before: str = "",
        patience_seconds: float | None = None,
    ) -> Ended:
        """Run `factory` with these arguments in a folder, and wait for it.

        Args:
            program: Python to run instead.
            file_bytes: Longest file that may be written: past it the system says "File too large".
            before: Python that the process runs before the command.
            patience_seconds: A run that takes longer is killed; None: that is a fault of the test.
        """
        call = {"program": program, "file_bytes": file_bytes, "before": before}
        return _ended(self._calls, *arguments, folder=folder, patience_seconds=patience_seconds, **call)

    @property
    def root(self) -> Path:
        """The file system as the process sees it, with what it alone has mounted."""
        return Path(f"/proc/{self._pid}/root")

    def close(self) -> None:
        """End the process; runs under way end by themselves."""
        self._calls.close()


def fork_once(
    environment: Mapping[str, str],
    *arguments: str,
    folder: Path,
    program: str | None = None,
    before: str = "",
) -> Ended:
    """Run `factory`, or a program in Python, with these variables and no others, and wait for it."""
    call = {"environment": _variables(environment), "program": program, "before": before}
    return _ended(_first(), *arguments, folder=folder, **call)


def _ended(
    calls: _Calls, *arguments: str, folder: Path, patience_seconds: float | None = None, **call: Any
) -> Ended:
    with tempfile.TemporaryDirectory() as into:
        calls.send(**NOTHING | call, arguments=arguments, folder=str(folder), into=into)
        code = Path(into) / "code"
        end = time.monotonic() + HUNG_SECONDS
        patience = time.monotonic() + patience_seconds if patience_seconds else end
        while not code.exists():
            if patience < min(time.monotonic(), end):
                os.kill(int((Path(into) / "pid").read_text()), signal.SIGKILL)
                patience = end
            assert time.monotonic() < end, f"factory {' '.join(arguments)} does not end"
            time.sleep(0.02)
        return Ended(
            int(code.read_text()),
            *((Path(into) / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")),
        )
