"""Run the comparison page of a build's two models on this machine, without network access."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from factory.artifacts import Build
from factory.errors import FactoryError, HubError, ModelError, UsageError
from factory.hub.errors import hub_errors
from factory.hub.resolve import resolve
from factory.resources import DEMO_MODEL, SPACE

HOST = "127.0.0.1"
TERMINAL = "terminal.py"  # which the Space does not need
ENDING = ("SIGTERM", "SIGHUP")  # signals treated like Ctrl-C
SECONDS_TO_END = 5  # before the page's process is killed


def serve(folder: Path, *, source: Path | None, port: int | None, ready: Callable[[str], None]) -> None:
    """Run the comparison page for a build until it is interrupted.

    SIGTERM and a closed terminal end it like Ctrl-C; when this returns, the page's process has ended.

    Args:
        folder: Build folder.
        source: Folder of the source, for a build made from a folder.
        port: Port on the loopback interface; None takes a free one.
        ready: Callback that receives the page's address once it responds.

    Raises:
        UsageError: The port is taken, or the source's folder is missing or contains another model.
        ModelError: The models need their own code.
        HubError: The source is not in the Hub's cache.
        FactoryError: gradio is not installed, or the page exited unexpectedly.
    """
    if importlib.util.find_spec("gradio") is None:
        raise FactoryError("gradio is not installed", hint="pip install gradio")
    environment = {
        **os.environ,
        **pair_environment(folder, source=source),
        "GRADIO_SERVER_NAME": HOST,
        "GRADIO_SERVER_PORT": str(port := free_port(port)),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
    }
    process = None
    with _handled(ENDING, signal.default_int_handler):
        try:
            with _held_back():
                # A new session: Ctrl-C reaches only this process, which then ends the page's.
                process = subprocess.Popen(
                    [sys.executable, str(SPACE / "app.py")],
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                )
            _wait_until_it_answers(process, port)
            ready(f"http://{HOST}:{port}")
            process.wait()
            raise _ended(process)
        except KeyboardInterrupt:
            return
        finally:
            if process:
                _end(process)


def talk(folder: Path, *, source: Path | None, max_tokens: int, temperature: float) -> None:
    """Let the user talk to a build's two models in this terminal until the input ends.

    Args:
        folder: Build folder.
        source: Folder of the source, for a build made from a folder.
        max_tokens: The most tokens of an answer.
        temperature: Of sampling; 0 takes the likeliest token.

    Raises:
        UsageError: The source's folder is missing or contains another model.
        ModelError: The models need their own code, or cannot be loaded.
        HubError: The source is not in the Hub's cache.
    """
    environment = {
        **os.environ,
        **pair_environment(folder, source=source),
        "MAX_NEW_TOKENS": str(max_tokens),
        "TEMPERATURE": str(temperature),
        "HF_HUB_OFFLINE": "1",
    }
    with _handled(("SIGINT",), lambda _number, _frame: None):  # it stops an answer in the process of its own
        done = subprocess.run([sys.executable, str(SPACE / TERMINAL)], env=environment, check=False)
    if done.returncode:
        raise ModelError(
            f"the models of {folder} cannot be loaded, or talking to them failed",
            hint="what the process printed says why",
        )


@contextmanager
def _handled(names: Iterable[str], handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Handle signals with another handler; ignored ones (nohup) stay ignored."""
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]  # Windows has no SIGHUP
    before = {number: signal.getsignal(number) for number in numbers}
    heeded = [number for number in numbers if before[number] is not signal.SIG_IGN]
    for number in heeded:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])


@contextmanager
def _held_back() -> Iterator[None]:
    """Delay Ctrl-C and similar signals: a process that is only being started could not be ended."""
    came: list[int] = []
    with _handled(("SIGINT", *ENDING), lambda number, _frame: came.append(number)):
        yield
    if came:
        raise KeyboardInterrupt


def check_loadable(build: Build) -> None:
    """Refuse models that need their own code, which the page does not run.

    Raises:
        ModelError: The source comes with its own code.
    """
    if build.source.remote_code:
        raise ModelError(
            f"{build.source.name} needs its own code, which the comparison page does not run",
            hint="only architectures built into transformers can be compared",
        )


def pair_environment(folder: Path, *, source: Path | None) -> Mapping[str, str]:
    """Return the page's environment variables for a build: its two models and their commits."""
    build = Build.read(folder)
    check_loadable(build)
    names = {"PRUNED_MODEL": str((folder / "model").resolve()), "PRUNED_REVISION": "", "SOURCE_REVISION": ""}
    repo_id, commit = build.source.repo_id, build.source.commit
    if repo_id is None or source is not None:
        return names | {"SOURCE_MODEL": str(_source_folder(build, source))}
    from huggingface_hub import try_to_load_from_cache

    with hub_errors(repo_id):
        found = try_to_load_from_cache(repo_id, "config.json", revision=commit)
    if not isinstance(found, str):
        raise HubError(
            f"{repo_id} at {commit[:12]} is not in the Hub's cache on this machine",
            hint="pass its folder with `source`, or run the same build again to download it",
        )
    return names | {"SOURCE_MODEL": repo_id, "SOURCE_REVISION": commit}


def _source_folder(build: Build, source: Path | None) -> Path:
    """Return the folder of the source, checked by its content hash if the build records one."""
    if build.source.lineage:
        raise UsageError(
            f"{build.name} was made from an adapter, which cannot be loaded for a comparison",
            hint="merge the adapter into its base, and build from the folder of the merged model",
        )
    if source is None and build.reference != "demo":
        raise UsageError(
            f"{build.name} was made from a folder, {build.source.name!r}, and builds do not record paths",
            hint="pass that folder with `source=FOLDER`",
        )
    folder = source or DEMO_MODEL
    if not folder.is_dir():
        raise UsageError(f"{str(folder)!r} is not a folder", hint="pass the source's folder with `source`")
    commit = resolve(str(folder)).commit
    if build.source.repo_id is None and commit != build.source.commit:
        raise UsageError(
            f"{str(folder)!r} is not the source of {build.name}: "
            f"content hash {commit[:12]}, not {build.source.commit[:12]}",
            hint="pass the unchanged folder that the build was made from with `source`",
        )
    return folder.resolve()


def free_port(port: int | None) -> int:
    """Return the port if it is free, or a free one for None."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port or 0))
        except OSError as error:
            raise UsageError(f"cannot use port {port}: {error.strerror}", hint="omit `port`") from error
        return int(probe.getsockname()[1])


def _wait_until_it_answers(process: subprocess.Popen[bytes], port: int) -> None:
    # Loopback must not go through a proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while process.poll() is None:
        try:
            opener.open(f"http://{HOST}:{port}/", timeout=5).close()
            return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    raise _ended(process)


def _ended(process: subprocess.Popen[bytes]) -> FactoryError:
    return FactoryError(
        f"the comparison page exited unexpectedly with code {process.returncode}",
        hint="see its output above",
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the page's process, by force if it does not comply."""
    process.terminate()
    try:
        process.wait(timeout=SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
