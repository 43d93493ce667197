"""`factory doctor` tells what a machine lacks before a build finds out."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from factory.cli.main import cli
from tests.forks import Ended, fork_once

NOWHERE = "http://127.0.0.1:9"  # nothing listens on the discard port


def examined(home: Path, *arguments: str, **variables: str) -> Ended:
    own = {"PATH": "/usr/bin:/bin", "FACTORY_HOME": str(home / "home"), "HF_HOME": str(home / "hf")}
    return fork_once(own | variables, "doctor", *arguments, folder=home)


def test_a_machine_that_can_build_is_told_what_it_has(tmp_path: Path) -> None:
    done = examined(tmp_path, "--json", HF_HUB_OFFLINE="1")
    found = {finding["what"]: finding for finding in json.loads(done.stdout)}
    assert sys.executable in found["Python"]["value"]
    assert {"torch", "transformers", "trl", "GPU", "4-bit weights", "memory", "stages", "Hub"} <= set(found)
    assert str(tmp_path / "home") in found["stages"]["value"]
    assert found["Hub"]["value"] == "offline, as HF_HUB_OFFLINE says"
    assert not any(found[name]["problem"] for name in ("torch", "transformers", "4-bit weights", "Hub"))
    assert not any(tmp_path.iterdir())


def test_a_hub_that_does_not_answer_is_one_problem_with_a_hint(tmp_path: Path) -> None:
    done = examined(tmp_path, HF_ENDPOINT=NOWHERE, HF_TOKEN="hf_made_up")
    lines = done.stdout.splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("✗ Hub"))
    assert NOWHERE in lines[place]
    assert "no connection" in lines[place + 1]
    assert lines[place + 2].lstrip().startswith("hint: ")
    assert done.code == 1
    assert done.stderr == ""


def test_little_room_is_a_problem_with_the_option_that_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("factory.cli.installation.doctor.LITTLE_DISK", 10**18)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = CliRunner().invoke(cli, ["doctor", "--home", str(tmp_path)])
    assert f"✗ stages           {tmp_path}" in done.output
    assert "use another disk with --home or FACTORY_HOME" in done.output
    assert done.exit_code == 1


def test_without_a_library_that_the_other_checks_need_it_is_named_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "factory.cli.installation.doctor.requires", lambda _: ["click>=8", "no-such-library>=2"]
    )
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails
    done = CliRunner().invoke(cli, ["doctor"])
    assert "✗ no-such-library  not installed" in done.output
    assert "hint: pip install 'no-such-library>=2'" in done.output
    assert "GPU" not in done.output
    assert isinstance(done.exception, SystemExit)
    assert done.exit_code == 1


def test_what_a_build_does_not_need_is_no_problem_and_is_in_the_json_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("factory.cli.installation.doctor.OPTIONAL", {"no-such-library": "`factory space`"})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    listed = CliRunner().invoke(cli, ["doctor", "--home", str(tmp_path)]).output
    assert "- no-such-library  not installed; only for `factory space`" in listed
    (found,) = (
        one
        for one in json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).output)
        if one["what"] == "no-such-library"
    )
    assert not found["problem"]


def test_a_program_that_was_never_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factory.cli.installation.doctor.PACKAGE", "never-installed")
    done = CliRunner().invoke(cli, ["doctor"])
    assert "✗ never-installed  not installed" in done.output
    assert "in a clone of the repository: pip install ." in done.output
    assert done.exit_code == 1
