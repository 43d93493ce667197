"""The shell completes commands and options after one command, which names what it changes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forks import Ended, fork_once
from tests.waiting import HUNG_SECONDS

PROGRAMS = Path(sys.executable).parent
PLACES = {
    "bash": (".local/share/factory/completion.bash", ".bashrc"),
    "zsh": (".local/share/factory/completion.zsh", ".zshrc"),
    "fish": (".config/fish/completions/factory.fish", None),
}


def run(*arguments: str, home: Path, **variables: str) -> Ended:
    own = {"PATH": "/usr/bin:/bin", "HOME": str(home)}
    return fork_once(own | variables, "completion", *arguments, folder=home)


@pytest.mark.parametrize("shell", PLACES)
def test_installing_names_the_changed_files_and_happens_once(tmp_path: Path, shell: str) -> None:
    script, startup = PLACES[shell]
    before = "alias ll='ls -l'"  # without a line break at its end
    if startup:
        (tmp_path / startup).write_text(before)
    done = run("--install", home=tmp_path, SHELL=f"/usr/bin/{shell}")
    assert done.code == 0, done.stderr
    named = [f"wrote {tmp_path / script}", *([f"added a line to {tmp_path / startup}"] if startup else [])]
    assert done.stdout.splitlines() == [*named, f"a new {shell} completes `factory`"]
    assert (tmp_path / script).read_text() == run("--shell", shell, home=tmp_path).stdout
    if startup:
        assert (tmp_path / startup).read_text() == f'{before}\n. "{tmp_path / script}"\n'
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = run("--install", "--shell", shell, home=tmp_path)
    assert again.stdout == f"already installed: {tmp_path / script}\n"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


# What a shell is asked to print, once it has read its startup file, for `factory bui`.
ASKED = {
    "bash": """. ~/.bashrc
        COMP_WORDS=(factory bui) COMP_CWORD=1
        _factory_completion factory
        echo "${COMPREPLY[0]}" """,
    "fish": "complete --do-complete 'factory bui'",
}


@pytest.mark.parametrize("shell", ASKED)
def test_the_shell_completes_a_command(tmp_path: Path, shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not here")
    run("--install", "--shell", shell, home=tmp_path)
    environment = {"HOME": str(tmp_path), "PATH": f"{PROGRAMS}:{os.environ['PATH']}"}
    done = subprocess.run(
        [shell, "-c", ASKED[shell]], env=environment, capture_output=True, text=True, timeout=HUNG_SECONDS
    )
    assert done.stdout.split()[0] == "build", done.stderr


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("factory bui", "build"),
        ("factory build --hea", "--heal-steps"),
        ("factory build --tokens al", "all"),
        ("factory build mistr", "mistral-7b"),
        ("factory jobs fol", "follow"),
    ],
)
def test_commands_options_values_and_models_are_completed(tmp_path: Path, words: str, completed: str) -> None:
    asked = {"_FACTORY_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = fork_once({"HOME": str(tmp_path), **asked}, folder=tmp_path)
    assert f"plain,{completed}" in done.stdout.splitlines()
    assert not any(tmp_path.iterdir())


def test_a_shell_that_is_not_known_is_refused_with_those_that_are(tmp_path: Path) -> None:
    for variables, problem in (({"SHELL": "/bin/tcsh"}, "'/bin/tcsh'"), ({}, "SHELL is not set")):
        done = run(home=tmp_path, **variables)
        error, hint = done.stderr.splitlines()
        assert done.code == 2
        assert problem in error
        assert hint == "hint: --shell bash, or zsh or fish"


def test_a_startup_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / ".bashrc").mkdir()
    done = run("--install", "--shell", "bash", home=tmp_path)
    assert done.code == 1
    assert f"cannot write {tmp_path / '.bashrc'}" in done.stderr
