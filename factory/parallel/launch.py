"""Spread one stage's work over several processes that `accelerate launch` starts, one per GPU."""

import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import torch

from factory.errors import UsageError, WorkerError
from factory.hub import remote_code
from factory.parallel import processes
from factory.resources import ACCELERATE_CONFIGS

JOB, RESULT, LOG = "job.pickle", "result.pickle", "log"
STOPPING_SECONDS = 10.0
PATIENCE = timedelta(days=7)  # dead processes are noticed in other ways; a live one may download for hours
Progress = Callable[[int, int, str], None]
Case = Literal["cpu", "gpus", "fsdp"]  # a file of `ACCELERATE_CONFIGS` each
T = TypeVar("T")


def num_processes(requested: int | None) -> int:
    """Return how many processes a stage may use: as requested, by default one per visible GPU.

    Raises:
        UsageError: There are fewer GPUs or, without a GPU, fewer cores.
    """
    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    if requested is None:
        return max(gpus, 1)
    if requested > (gpus or cores):
        raise UsageError(
            f"`processes={requested}` is more than the {gpus or cores} {'GPUs' if gpus else 'cores'} here",
            hint=f"give {gpus or cores} or fewer; CUDA_VISIBLE_DEVICES selects the GPUs to use",
        )
    return requested


def spread(
    work: Callable[..., T],
    *,
    processes: int,
    case: Case | None = None,
    progress: Progress,
    tell: Callable[[str], None] | None = None,
) -> T:
    """Call `work(progress=…)` in several processes at once, and return the main one's result.

    With one process, it is called here. Several are started by `accelerate launch` with the file of
    `ACCELERATE_CONFIGS` for the case, and end when this process does, however that happens.

    Args:
        work: Picklable function that divides its work with `factory.parallel.processes`.
        processes: Number of processes.
        case: Configuration file; None: "gpus" if there are any, else "cpu".
        progress: Called with the reports of the main process.
        tell: If given, `work` also takes a `tell`, and this is called with what the main process tells.

    Raises:
        WorkerError: A process ended without an error message.
        Exception: The error that `work` raised in the process that failed first.
    """
    if processes == 1:
        return work(progress=progress, **({"tell": tell} if tell else {}))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # a worker will share the first GPU
    with tempfile.TemporaryDirectory(prefix="factory-") as name:
        folder = Path(name)
        (folder / JOB).write_bytes(pickle.dumps((list(remote_code.registered), work, tell is not None)))
        with (folder / LOG).open("wb") as log:
            launched = subprocess.Popen(
                _command(folder, processes=processes, case=case),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(processes),
                start_new_session=True,  # Ctrl-C reaches only this process, which then ends the others
            )
        try:
            _follow(launched, progress, tell)
        finally:
            _end(launched)
        return _result(folder, launched.returncode)  # type: ignore[no-any-return]


def _command(folder: Path, *, processes: int, case: Case | None) -> list[str]:
    config = ACCELERATE_CONFIGS / f"{case or ('gpus' if torch.cuda.is_available() else 'cpu')}.yaml"
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)),
        *("--num_processes", str(processes), "--module", "factory.parallel.launch", str(folder)),
    ]


def _environment(processes: int) -> dict[str, str]:
    threads = max(torch.get_num_threads() // processes, 1)
    # Otherwise gloo looks up the host's name.
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    return loopback | os.environ | {"OMP_NUM_THREADS": str(threads)}


def _follow(
    launched: subprocess.Popen[bytes], progress: Progress, tell: Callable[[str], None] | None
) -> None:
    """Forward what the main process reports and tells until all processes have ended."""
    assert launched.stdout is not None
    for line in launched.stdout:
        said = None
        with suppress(ValueError):  # printed by a library before the worker took over the pipe
            said = json.loads(line)
        match said:
            case [int(done), int(total), str(note)]:
                progress(done, total, note)
            case str(told) if tell:
                tell(told)
    launched.wait()


def _end(launched: subprocess.Popen[bytes]) -> None:
    """Close the workers' standard input, which ends them, and wait for the launcher."""
    for stream in (launched.stdin, launched.stdout):
        if stream:
            stream.close()
    try:
        launched.wait(timeout=STOPPING_SECONDS)
    except subprocess.TimeoutExpired:
        launched.kill()
        launched.wait()


def _result(folder: Path, code: int) -> Any:
    """Return the main process's result, or raise the first error of any process."""
    raised = sorted(folder.glob("raised-*"), key=lambda path: path.stat().st_mtime_ns)
    if raised:
        error, text = pickle.loads(raised[0].read_bytes())
        error.add_note(f"in {raised[0].name.removeprefix('raised-')} of the processes:\n{text}")
        raise error
    if code == 0 and (folder / RESULT).is_file():
        return pickle.loads((folder / RESULT).read_bytes())
    lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip(" =-")), "it printed nothing")
    raise WorkerError(
        f"a process started by `accelerate launch` died (code {code}): {last[:200]}",
        hint=processes.IF_GONE,
    )


def _take_part(folder: Path) -> None:
    """Do one process's part of the job in `folder`."""
    from accelerate import PartialState

    reports = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # libraries' output must not mix with reports
    threading.Thread(target=_end_with_parent, daemon=True).start()
    PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    if not processes.is_main():
        reports.close()
    trusted, work, tells = pickle.loads((folder / JOB).read_bytes())
    for source in trusted:
        remote_code.register(source)
    said: dict[str, Any] = {"tell": partial(_say, reports)} if tells else {}
    value = work(progress=lambda done, total, note="": _say(reports, [done, total, note]), **said)
    if processes.is_main():
        (folder / RESULT).write_bytes(pickle.dumps(value))
    torch.distributed.destroy_process_group()


def _say(reports: BinaryIO, what: list[Any] | str) -> None:
    """Hand on a report of progress, or a line to tell; only the main process's count."""
    if processes.is_main():
        reports.write(json.dumps(what).encode() + b"\n")


def _end_with_parent() -> None:
    """Exit when standard input closes: it is a pipe from the process that the user started."""
    while os.read(0, 1):
        pass
    os._exit(1)


def _main(folder: Path) -> None:
    try:
        _take_part(folder)
    except Exception as caught:  # noqa: BLE001  raised again in the main program
        error = processes.gone(caught) if processes.is_of_connection(caught) else caught
        try:
            pickled = pickle.dumps((error, traceback.format_exc()))
            pickle.loads(pickled)
        except Exception:  # noqa: BLE001  an exception can hold anything
            pickled = pickle.dumps((RuntimeError(str(error) or repr(error)), traceback.format_exc()))
        partial = folder / f"partial-{os.environ['RANK']}"
        partial.write_bytes(pickled)
        partial.rename(folder / f"raised-{os.environ['RANK']}")
        os._exit(1)  # without waiting for processes that wait for this one


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
