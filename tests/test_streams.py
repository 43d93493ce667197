"""A reader that goes away: work with a result goes on to its end, and what only prints ends quietly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import save_llama

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
