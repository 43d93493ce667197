"""`hf factory` through the real `hf`: registered, run with its exit codes, listed, removed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from factory import __version__
from tests.waiting import HUNG_SECONDS

HF = Path(sys.executable).with_name("hf")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    done = run(sys.executable, "-m", "factory", "extension", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("hf factory runs ")
    return tmp_path


def run(*command: str | Path, home: Path) -> subprocess.CompletedProcess[str]:
    own = {"HOME": str(home), "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    return subprocess.run(
        command, cwd=home, env={**os.environ, **own}, capture_output=True, text=True, timeout=HUNG_SECONDS
    )


def test_hf_runs_the_factory_and_hands_on_its_answers(home: Path) -> None:
    done = run(HF, "factory", "--version", home=home)
    assert (done.returncode, done.stdout) == (0, f"factory, version {__version__}\n")
    done = run(HF, "factory", "build", "demo", "--drop", "2", home=home)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --drop 2 is not a fraction")
    assert "Usage: hf factory build" in run(HF, "factory", "build", "--help", home=home).stdout


def test_hf_lists_and_forgets_it(home: Path) -> None:
    assert f"hf-factory {__version__}" in run(HF, "extensions", "list", home=home).stdout
    assert run(HF, "extensions", "remove", "factory", home=home).returncode == 0
    assert not (home / ".local/share/hf/extensions/hf-factory").exists()
