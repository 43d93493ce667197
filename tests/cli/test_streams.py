"""A reader that goes away: work with a result goes on to its end, and what only prints ends quietly."""

import fcntl
import os
import re
import select
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.builders.models import save_llama

ENDED = 141  # what a shell says of `seq 100000 | true`


def left_at_once(folder: Path, *arguments: str, both: bool = False, unbuffered: str = "") -> tuple[int, str]:
    """Exit code, and standard error where it is not `both` that go to the reader who leaves."""
    read, written = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "factory", *arguments],
        cwd=folder,
        env=os.environ | {"FACTORY_HOME": str(folder / "home"), "PYTHONUNBUFFERED": unbuffered},
        stdout=written,
        stderr=written if both else subprocess.PIPE,
        text=True,
    )
    os.close(written)
    return done.returncode, done.stderr or ""


@pytest.mark.parametrize(("both", "unbuffered"), [(False, ""), (True, "1")])
def test_a_command_that_makes_a_folder_goes_on_to_its_end(
    tmp_path: Path, both: bool, unbuffered: str
) -> None:
    save_llama(tmp_path / "model")
    words = ("prune", "./model", "--layers", "1", "--out", "smaller")
    assert left_at_once(tmp_path, *words, both=both, unbuffered=unbuffered) == (0, "")
    assert (tmp_path / "smaller" / "model.safetensors").is_file()


@pytest.mark.parametrize("arguments", [["ls"], ["schema"], ["--help"], ["plan", "--help"]])
def test_a_command_that_only_prints_ends_as_a_shell_expects(tmp_path: Path, arguments: list[str]) -> None:
    assert left_at_once(tmp_path, *arguments) == (ENDED, "")
    assert left_at_once(tmp_path, *arguments, unbuffered="1") == (ENDED, "")


@pytest.mark.parametrize("arguments", [[], ["show", "nothing"], ["bild"], ["build", "demo", "--drop", "2"]])
def test_an_error_keeps_its_exit_code_though_it_is_not_read(tmp_path: Path, arguments: list[str]) -> None:
    assert left_at_once(tmp_path, *arguments, both=True) == (2, "")


def closed_terminal() -> int:
    window, terminal = os.openpty()
    os.close(window)
    return terminal


def reset_connection() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    theirs.close()
    return ours.detach()


@pytest.mark.parametrize("output", [closed_terminal, reset_connection])
def test_a_terminal_or_connection_that_goes_away_is_a_reader_that_does(
    tmp_path: Path, output: Callable[[], int]
) -> None:
    for arguments, code in ((["schema"], ENDED), (["show", "nothing"], 2)):
        number = output()
        command = [sys.executable, "-m", "factory", *arguments]
        done = subprocess.run(command, cwd=tmp_path, stdout=number, stderr=subprocess.PIPE, text=True)
        os.close(number)
        assert done.returncode == code
        assert "Traceback" not in done.stderr


def test_a_slow_reader_of_an_output_that_does_not_block_gets_all_of_it() -> None:
    command = [sys.executable, "-m", "factory", "schema"]
    whole = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    read, written = os.pipe()
    room = fcntl.fcntl(written, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(written, False)
    process = subprocess.Popen(command, stdout=written, stderr=subprocess.PIPE)
    os.close(written)
    select.select([read], [], [])
    while process.poll() is None and _held(read) < room:
        pass
    with os.fdopen(read, "rb") as reader:
        assert reader.read() == whole
    assert process.communicate()[1] == b""
    assert process.returncode == 0


def _held(number: int) -> int:
    return int.from_bytes(fcntl.ioctl(number, termios.FIONREAD, bytes(4)), sys.byteorder)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("nope 2>&-", 2),
        ("nope 2>/dev/full", 2),
        ("2>/dev/full", 2),
        ("2>&-", 2),
        ("schema >/dev/full 2>&1", 1),
        ("schema >/dev/full 2>&-", 1),
        ("schema >&- 2>&-", 0),
    ],
)
def test_an_exit_code_does_not_depend_on_where_its_error_can_be_printed(command: str, code: int) -> None:
    words = ["bash", "-c", f"exec '{sys.executable}' -m factory {command}"]
    assert subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == code


def test_an_error_is_broken_between_words_on_a_terminal() -> None:
    window, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    subprocess.run([sys.executable, "-m", "factory", "show", "nothing at all"], stderr=terminal)
    os.close(terminal)
    lines = [re.sub(r"\x1b\[\d+m", "", line) for line in os.read(window, 4096).decode().splitlines()]
    os.close(window)
    assert " ".join(lines).startswith("error: 'nothing at all' is not a build folder hint: ")
    assert len(lines) > 2
    assert max(map(len, lines)) <= 40
