"""The process behind `tests.forks`: it has imported much, and begins others as copies of itself."""

import ctypes
import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

NEW_MOUNTS, NEW_USERS = 0x00020000, 0x10000000  # of Linux' unshare(2)

# Nearly all of what a start takes. None of them reads a variable of the tests when it is imported.
SLOW = (
    "torch", "torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint",
    "torch.distributed.fsdp", "torch.distributed._composable.fsdp", "bitsandbytes",
    "scipy.io", "scipy.optimize", "scipy.stats", "sklearn.metrics", "pandas", "pyarrow.dataset",
    "pyarrow.parquet", "matplotlib.figure", "matplotlib.font_manager", "matplotlib.backends.backend_svg",
    "rich.progress", "rich.table", "click", "jinja2", "pydantic", "yaml", "httpx", "safetensors.torch",
    "tokenizers", "PIL.Image", "factory.cli.main",
)  # fmt: skip


def serve(modules: Sequence[str]) -> None:
    """Import the modules, and carry out calls, JSON lines on standard input, until it is closed."""
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # or each copy looks through, and so copies, all that was imported whenever it collects
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in os.fdopen(0, encoding="utf-8"):
        if os.fork() == 0:
            call = json.loads(line)
            _go_on(**call) if "modules" in call else _supervise(call)


def _go_on(
    *, into: str, environment: dict[str, str], modules: Sequence[str], disk: tuple[str, str] | None
) -> NoReturn:
    """Serve calls from a pipe, in another environment and with more modules."""
    if disk:
        _mount(*disk)
    Path(into, "pid").write_text(str(os.getpid()))
    os.dup2(os.open(f"{into}/calls", os.O_RDONLY), 0)
    _set_environment(environment)
    serve(modules)
    os._exit(0)


def _set_environment(variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)


def _mount(folder: str, options: str) -> None:
    """Mount a file system in memory that only this process and its copies see, as `unshare -Urm` does."""
    maps = {"setgroups": "deny", "uid_map": f"0 {os.getuid()} 1", "gid_map": f"0 {os.getgid()} 1"}
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_USERS | NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in maps.items():
        Path("/proc/self", name).write_text(text)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)


def _supervise(call: dict[str, Any]) -> NoReturn:
    """Write down how a run ends, also one that a signal ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        _run(call)
    into = Path(call["into"])
    (into / "pid").write_text(str(pid))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    (into / "draft").write_text(str(code))
    (into / "draft").rename(into / "code")
    os._exit(0)


def _run(call: dict[str, Any]) -> NoReturn:
    if call["environment"] is not None:
        _set_environment(call["environment"])
    os.chdir(call["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{call['into']}/{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    longest, most = call["file_bytes"], resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    if longest is not None:
        sys.dont_write_bytecode = True  # under the limit it would write half a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (longest, most))
    program = call["program"]
    sys.argv = ["factory" if program is None else "-c", *call["arguments"]]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # `factory … &` ignores it
    try:
        exec(call["before"], {})
        if program is None:
            from factory.__main__ import main

            main()
        else:
            exec(program, {"__name__": "__main__"})
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        code = 70
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # they are files here, under the same limit on files
            stream.flush()
    if longest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))  # for what coverage writes at the end
    os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1:])
