"""The command line run many times at the price of one start: a process that has imported it all forks."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.waiting import HUNG_SECONDS

PROGRAM = """
import gc, importlib, json, os, resource, signal, sys, traceback

def run(call):
    os.chdir(call["folder"])
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{call['into']}/{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    limit = call["file_bytes"]
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = ["factory", *call["arguments"]]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # `factory … &` ignores it
    exec(call["before"], {})
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 70
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # they are files here, under the same limit on files
            pass
    os._exit(code)

def supervise(call):  # the code of a run that a signal ends is told as well
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        run(call)
    with open(f"{call['into']}/pid", "w") as file:
        file.write(str(pid))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with open(f"{call['into']}/draft", "w") as file:
        file.write(str(code))
    os.rename(f"{call['into']}/draft", f"{call['into']}/code")
    os._exit(0)

for module in ("factory.cli.tables", *sys.argv[1:]):  # what nearly every command imports, and rich with it
    importlib.import_module(module)
from factory.cli.main import main
gc.freeze()  # or each run looks through, and so copies, all that was imported whenever it collects
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    if os.fork() == 0:
        supervise(json.loads(line))
"""


@dataclass(frozen=True)
class Ended:
    """How one run of the command line ended."""

    code: int
    stdout: str
    stderr: str


class Forks:
    """The process, started by the words of `prefix` if any. Runs may overlap, from threads of their own."""

    def __init__(
        self, environment: dict[str, str], *, modules: Sequence[str], prefix: Sequence[str] = ()
    ) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-c", PROGRAM, *modules],
            # OpenMP does not outlive a fork; with one thread it is not there to begin with. How much
            # transformers tells is read at its import, which comes before the command line's own setting.
            env={"TRANSFORMERS_VERBOSITY": "error", **os.environ, **environment, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        *arguments: str,
        folder: Path,
        file_bytes: int | None = None,
        before: str = "",
        patience_seconds: float | None = None,
    ) -> Ended:
        """Run `factory` with these arguments in a folder, and wait for it.

        Args:
            file_bytes: Longest file that may be written: past it the system says "File too large".
            before: Python that the process runs before the command.
            patience_seconds: A run that takes longer is killed; None: that is a fault of the test.
        """
        with tempfile.TemporaryDirectory() as into:
            call = {
                "arguments": arguments,
                "folder": str(folder),
                "file_bytes": file_bytes,
                "into": into,
                "before": before,
            }
            with self._lock:
                assert self._process.stdin
                self._process.stdin.write(json.dumps(call) + "\n")
                self._process.stdin.flush()
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

    @property
    def root(self) -> Path:
        """The file system as the process sees it, with what it alone has mounted."""
        return Path(f"/proc/{self._process.pid}/root")

    def close(self) -> None:
        """End the process; runs under way end by themselves."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=HUNG_SECONDS)
