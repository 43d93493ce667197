"""The command line refuses what it cannot mean in one line, at once, and writes nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forks import Ended, fork_once
from tests.waiting import HUNG_SECONDS

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "gradio", "lm_eval")


def run(*arguments: str, home: Path, **variables: str) -> Ended:
    """The command, in a folder of its own."""
    own = {"PATH": "/usr/bin:/bin", "FACTORY_HOME": str(home / "home"), "HF_HOME": str(home / "hf")}
    return fork_once(own | variables, *arguments, folder=home)


def error_of(*arguments: str, home: Path, **variables: str) -> tuple[int, str, str]:
    """Exit code, message and hint; checks that nothing else came out and nothing was written."""
    before = sorted(path.name for path in home.rglob("*"))
    done = run(*arguments, home=home, **variables)
    lines = done.stderr.splitlines()
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert len(lines) == 2, done.stderr
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    assert sorted(path.name for path in home.rglob("*")) == before
    return done.code, lines[0].removeprefix("error: "), lines[1].removeprefix("hint: ")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["schema"], ["build", "demo", "--drop", "0.3", "--print-config"]])
def test_output_that_finds_no_room_is_an_error_however_little_is_missing(
    tmp_path: Path, arguments: list[str], unbuffered: str
) -> None:
    whole = run(*arguments, home=tmp_path).stdout
    place = tmp_path / "printed"
    code = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({len(whole) - 5},) * 2)\n"
        f"from factory.cli.main import main; sys.argv[1:] = {arguments}; main()"
    )
    with place.open("wb") as file:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=file,
            stderr=subprocess.PIPE,
            text=True,
            env={
                "PYTHONUNBUFFERED": unbuffered,
                "PYTHONDONTWRITEBYTECODE": "1",  # under the limit it would write half a file
                "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            },
        )
    assert place.stat().st_size < len(whole)
    assert done.returncode == 1
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: a file would be longer than")
    assert hint.startswith("hint: ")


def test_ctrl_c_while_the_command_line_is_loaded_is_no_traceback() -> None:
    program = """
import sys
class Interrupted:
    def find_spec(self, name, *_):
        if name == "click":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
from factory.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert (done.returncode, done.stderr) == (130, b"")


def test_a_current_folder_that_is_gone_is_told_in_one_line(tmp_path: Path) -> None:
    command = f"rmdir \"$PWD\"; exec '{sys.executable}' -m factory build demo --drop 0.3 --dry-run"
    (tmp_path / "gone").mkdir()
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path / "gone", capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: the current directory no longer exists\nhint: `cd` to another one\n"


def test_a_closed_output_is_no_place_for_the_next_file(tmp_path: Path) -> None:
    program = """
import atexit, os, pathlib, sys
from factory.cli.main import main
atexit.register(lambda: pathlib.Path("seen").write_text(os.readlink("/proc/self/fd/2")))
sys.argv[1:] = ["schema"]
main()
"""
    command = ["bash", "-c", f"exec '{sys.executable}' -c \"$1\" 2>&-", "-", program]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=tmp_path)
    assert (tmp_path / "seen").read_text() == os.devnull


@pytest.mark.parametrize(
    ("arguments", "value", "hint"),
    [
        (["build", "mistral-7", "--drop", "0.3"], "'mistral-7'", "did you mean 'mistral-7b'"),
        (["build", "./nowhere", "--drop", "0.3"], "'./nowhere'", "./folder"),
        (["build", "demo", "--drop", "1.5"], "--drop 1.5", "--drop 0.3"),
        (["build", "demo", "--drop", "0"], "--drop 0 ", "--drop 0.3"),
        (["build", "demo", "--drop", "-1"], "--drop -1", "--drop 0.3"),
        (["build", "demo", "--drop", "nan"], "--drop nan", "--drop 0.3"),
        (["build", "demo", "--drop", "some"], "--drop some", "--drop 0.3"),
        (["build", "demo"], "--drop", "--drop 0.3"),
        (["build", "demo", "--drop", "0.3", "--samples", "1"], "1", "--help"),
        (["build", "demo", "--drop", "0.3", "--rerun", "everything"], "everything", "--help"),
        (["build", "demo", "--drop", "0.3", "--heal-lr", "nan"], "nan", "--heal-lr"),
        (["build", "demo", "--drop", "0.3", "--seed", "-1"], "-1", "--help"),
        (["build", "demo", "--drop", "0.3", "--public"], "--public", "--push-to"),
        (["build", "demo", "--drop", "0.3", "--push-to", "a b"], "'a b'", "owner/name"),
        (["build", "demo", "--drop", "0.3", "--tasks", "mmlu,"], "'mmlu,'", "--tasks"),
        (["build", "demo", "--drop", "0.3", "--tasks", "nix.yaml"], "'nix.yaml'", "YAML file"),
        (["build", "demo", "--drop", "0.3", "--sequence-length", "99999"], "99999", "or fewer"),
        (["sweep", "demo", "--heal-data", "nix.jsonl"], "--heal-data without --heal", "add --heal"),
        (["sweep", "demo", "--heal-steps", "3"], "--heal-steps without --heal", "add --heal"),
        (["build", "demo", "--drop", "0.3", "--for-runtimes", "vllm,lama"], "'lama'", "llama.cpp"),
        (["bild"], "'bild'", "--help"),
        (["show", "nothing"], "'nothing'", "factory build"),
    ],
)
def test_a_usage_error_says_the_value_and_what_to_do(
    tmp_path: Path, arguments: list[str], value: str, hint: str
) -> None:
    code, message, advice = error_of(*arguments, home=tmp_path)
    assert code == 2
    assert value in message
    assert hint in advice


@pytest.mark.parametrize("option", ["--calibration-data", "--heal-data", "--eval-data"])
def test_data_that_is_missing_or_empty_is_refused_by_name(tmp_path: Path, option: str) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    for name, problem in (("nix.jsonl", "does not exist"), ("empty.jsonl", "is empty"), (".", "is empty")):
        code, message, _ = error_of("build", "demo", "--drop", "0.3", option, name, home=tmp_path)
        assert code == 1
        assert f"'{name}' {problem}" in message


def test_texts_in_one_option_are_told_to_be_given_one_by_one(tmp_path: Path) -> None:
    code, message, hint = error_of(
        "build", "demo", "--drop", "0.3", "--eval-data", "a.txt,b.txt", home=tmp_path
    )
    assert (code, hint) == (1, "give --eval-data once for each text")
    assert "'a.txt,b.txt' does not exist" in message


def test_a_line_without_text_is_found_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"body": "y"}\n')
    code, message, _ = error_of("build", "demo", "--drop", "0.3", "--heal-data", "a.jsonl", home=tmp_path)
    assert code == 1
    assert "a.jsonl, line 2" in message


@pytest.mark.parametrize("drop", ["0.01", "0.99"])
def test_a_fraction_that_leaves_no_model_is_refused(tmp_path: Path, drop: str) -> None:
    code, message, _ = error_of("build", "demo", "--drop", drop, home=tmp_path)
    assert code == 2
    assert f"--drop {drop}" in message


@pytest.mark.parametrize("name", ["HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"])
def test_a_variable_that_the_hubs_client_cannot_read_is_told(tmp_path: Path, name: str) -> None:
    words = ("build", "demo", "--drop", "0.3", "--dry-run")
    code, message, hint = error_of(*words, home=tmp_path, **{name: "abc"})
    assert code == 2
    assert f"{name} is 'abc'" in message
    assert name in hint
    assert run("--help", home=tmp_path, **{name: "abc"}).code == 0


def test_control_characters_never_reach_the_terminal(tmp_path: Path) -> None:
    done = run("build", "\x1b[31mred\x07", "--drop", "0.3", home=tmp_path)
    assert done.code == 2
    assert "\x1b" not in done.stderr
    assert "\x07" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["build", "--help"],
        ["--version"],
        ["build", "mistral-7", "--drop", "0.3"],
        ["build", "demo", "--drop", "2"],
        ["build", "demo", "--drop", "0.3", "--heal-data", "nix.jsonl"],
        ["bild"],
    ],
)
def test_help_and_usage_errors_import_no_heavy_library(tmp_path: Path, arguments: list[str]) -> None:
    program = (
        "import sys; from factory.cli.main import main\n"
        f"sys.argv = ['factory', *{arguments!r}]\n"
        "try: main()\n"
        f"finally: print(sorted(set(sys.modules) & set({HEAVY!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=HUNG_SECONDS
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_help_names_every_command_and_the_first_thing_to_try(tmp_path: Path) -> None:
    shown = run("--help", home=tmp_path).stdout
    for word in ("build", "push", "show", "ls", "gc", "factory build demo --drop 0.3"):
        assert word in shown


def test_the_command_alone_prints_its_help_as_it_is(tmp_path: Path) -> None:
    alone = run(home=tmp_path)
    assert (alone.code, alone.stdout) == (2, "")
    assert alone.stderr == run("--help", home=tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["build"], "factory build --help"),
        (["help"], "factory --help"),
        (["jobs", "follow"], "factory jobs follow --help"),
        (["build", "demo", "--samples", "1"], "factory build --help"),
        (["build", "demo", "--drop"], "factory build --help"),
        (["build", "demo", "--drop", "0.3", "--dry-run=1"], "factory build --help"),
        (["push", "B", "R", "--message"], "factory push --help"),
        (["jobs", "--json=1"], "factory jobs --help"),
        (["jobs", "follow", "--help=1"], "factory jobs follow --help"),
        (["--version=1"], "factory --help"),
    ],
)
def test_the_hint_is_the_help_of_the_command_that_was_typed(
    tmp_path: Path, arguments: list[str], hint: str
) -> None:
    code, _, advice = error_of(*arguments, home=tmp_path)
    assert (code, advice) == (2, hint)


def test_advice_of_libraries_stays_off_the_screen_and_their_errors_do_not(tmp_path: Path) -> None:
    program = """
import logging, subprocess, sys, warnings
from factory.cli.main import main
sys.argv[1:] = ["schema"]
main()
import datasets, huggingface_hub
for name in ("bitsandbytes.backends", "peft", "trl", "matplotlib", "datasets.load", "huggingface_hub.x"):
    logging.getLogger(name).warning("install another package")
warnings.warn("deprecated")
subprocess.run([sys.executable, "-c", "import warnings; warnings.warn('deprecated')"], check=True)
logging.getLogger("bitsandbytes").error("no library")
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == "no library\n"


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (("build", "demo", "--drop", "0.3", "--samples", "1"), "'--samples': 1 is not from 2 to"),
        (("build", "demo", "--drop", "0.3", "--heal-lr", "0"), "'--heal-lr': 0.0 is not greater than 0"),
        (("build", "demo", "--drop", "0.3", "--next-token-weight", "-1"), "-1.0 is not 0"),
        (("chat", ".", "--max-tokens", "0"), "'--max-tokens': 0 is not from 1 to 100000"),
    ],
)
def test_a_number_beyond_a_limit_is_told_the_limit(tmp_path: Path, typed: tuple[str, ...], told: str) -> None:
    code, message, _ = error_of(*typed, home=tmp_path)
    assert code == 2
    assert told in message


def test_a_printed_build_file_with_a_budget_can_be_built(tmp_path: Path) -> None:
    printed = run("build", "demo", "--drop", "0.3", "--budget", "3h", "--print-config", home=tmp_path)
    (tmp_path / "again.yaml").write_text(printed.stdout)
    again = run("build", "again.yaml", "--print-config", home=tmp_path)
    assert (again.code, again.stdout) == (0, printed.stdout), again.stderr


FAULTY = """
import factory.builds.garbage as garbage
def contents(store):
    return {}["missing"]
garbage.contents = contents
"""


def test_a_fault_of_the_program_is_two_lines_and_a_file_for_the_report(tmp_path: Path) -> None:
    own = {"PATH": "/usr/bin:/bin", "FACTORY_HOME": str(tmp_path / "home")}
    done = fork_once(own, "ls", folder=tmp_path, before=FAULTY)
    error, hint = done.stderr.splitlines()
    assert (done.code, error) == (70, "error: a fault of the program: KeyError: 'missing'")
    (path,) = (tmp_path / "home" / "logs").iterdir()
    assert hint.endswith(str(path))
    kept = path.read_text()
    assert kept.splitlines()[0].endswith("ls")
    assert "Traceback" in kept
    assert "KeyError: 'missing'" in kept
    assert "transformers 5." in kept


def test_an_empty_store_lists_and_collects_nothing(tmp_path: Path) -> None:
    assert run("ls", home=tmp_path).code == 0
    done = run("gc", home=tmp_path)
    assert (done.code, done.stdout) == (0, "0 bytes freed\n")


def test_a_dry_run_prints_the_preview_and_writes_nothing(tmp_path: Path) -> None:
    done = run("build", "demo", "--drop", "0.3", "--dry-run", "--json", home=tmp_path)
    assert done.code == 0, done.stderr
    preview = json.loads(done.stdout)
    assert (preview["num_layers"], preview["num_dropped"]) == (24, 7)
    assert preview["parameters_after"] < preview["parameters_before"]
    assert not (tmp_path / "builds").exists()
    assert not (tmp_path / "home" / "stages").exists()


def test_a_build_that_is_not_healed_cannot_require_it(tmp_path: Path) -> None:
    options = ("--drop", "0.3", "--no-heal", "--require-healing")
    code, message, hint = error_of("build", "demo", *options, home=tmp_path)
    assert (code, hint) == (2, "remove one of them")
    assert "--require-healing cannot be combined with --no-heal" in message


def test_a_place_where_no_build_can_lie_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in ("/", "file", "file/below"):
        code, message, _ = error_of("build", "demo", "--drop", "0.3", "--out", out, home=tmp_path)
        assert code == 1
        assert out in message
