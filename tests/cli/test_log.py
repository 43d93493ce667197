"""A run leaves a log in the home folder, and with --verbose shows it; secrets are in neither."""

import json
from pathlib import Path

import pytest

from factory.cli.log import MOST_FILES, without_secrets
from tests.builders.models import save_llama
from tests.forks import Ended, fork_once

PRUNE = ("prune", "./model", "--layers", "1", "--out", "smaller")
TOKEN = "hf_" + "a1B2" * 6
# What libraries do while the work goes on: one with handlers of its own, a careful and a careless one.
REMARKS = f"""
import logging, warnings
import factory.pipeline.prune as pipeline
whole = pipeline.remove_layers
def remarking(*arguments, **settings):
    logging.getLogger("transformers.models").warning("a remark of transformers")
    logging.getLogger("other").warning("a remark of another with {TOKEN}")
    logging.getLogger("other").info("a detail")
    logging.getLogger("other").warning("%d layers", "no number")
    warnings.warn("a warning")
    return whole(*arguments, **settings)
pipeline.remove_layers = remarking
"""


def run(*arguments: str, home: Path, before: str = "", **variables: str) -> Ended:
    own = {"PATH": "/usr/bin:/bin", "FACTORY_HOME": str(home / "home"), "HF_HOME": str(home / "hf")}
    return fork_once(own | variables, *arguments, folder=home, before=before)


def log_of(home: Path) -> str:
    (path,) = (home / "logs").iterdir()
    return path.read_text()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_llama(tmp_path / "model")
    return tmp_path


def test_the_log_holds_command_versions_stages_and_what_libraries_say_but_no_secret(place: Path) -> None:
    done = run(*PRUNE, home=place, before=REMARKS)
    assert (done.code, done.stderr) == (0, "")
    text = log_of(place / "home")
    assert text.splitlines()[0].endswith(" ".join(PRUNE))
    assert "transformers 5." in text
    assert "prune: started" in text
    assert "prune: done" in text
    assert "transformers.models: a remark of transformers" in text
    assert "a remark of another with ***" in text
    assert "other: '%d layers'" in text
    assert "UserWarning: a warning" in text
    assert "a detail" not in text
    assert "done" in text.splitlines()[-1]


@pytest.mark.parametrize("words", [("-v", *PRUNE), (*PRUNE, "--verbose")])
def test_verbose_shows_the_log_beside_the_result(place: Path, words: tuple[str, ...]) -> None:
    done = run(*words, "--json", home=place, before=REMARKS)
    assert json.loads(done.stdout)["kept"] == [0, 2, 3]
    for told in ("prune: started", "a remark of transformers", "another with ***", "a detail", "a warning"):
        assert told in done.stderr
    assert done.stderr.count("a remark of transformers") == 1


def test_a_fault_names_the_log_that_holds_its_traceback(place: Path) -> None:
    broken = "import factory.pipeline.prune as p\np.remove_layers = lambda *_, **__: 1 / 0"
    done = run(*PRUNE, home=place, before=broken)
    assert done.code == 70
    text = log_of(place / "home")
    assert str(place / "home" / "logs") in done.stderr.splitlines()[1]
    assert "ZeroDivisionError" in text
    assert "Traceback" in text


@pytest.mark.parametrize("words", [(*PRUNE, "--dry-run"), (*PRUNE, "-v", "--dry-run"), ("-v", "--help")])
def test_where_nothing_is_done_no_log_is_left(place: Path, words: tuple[str, ...]) -> None:
    assert run(*words, home=place).code == 0
    assert not (place / "home").exists()


def test_the_log_lies_in_the_home_that_was_given(place: Path) -> None:
    assert run(*PRUNE, "--home", "own", home=place).code == 0
    assert "prune: done" in log_of(place / "own")
    assert not (place / "home").exists()


def test_a_log_that_cannot_be_written_costs_the_run_nothing(place: Path) -> None:
    (place / "home").mkdir()
    (place / "home" / "logs").write_text("no folder")
    done = run(*PRUNE, home=place)
    assert (done.code, done.stderr) == (0, "")
    assert (place / "smaller" / "model.safetensors").is_file()


def test_the_oldest_logs_are_removed(place: Path) -> None:
    folder = place / "home" / "logs"
    folder.mkdir(parents=True)
    for number in range(MOST_FILES + 2):
        (folder / f"2026-01-01T00-00-{number:02}.000000.log").touch()
    run(*PRUNE, home=place)
    left = sorted(path.name for path in folder.iterdir())
    assert len(left) == MOST_FILES
    assert left[0] == "2026-01-01T00-00-03.000000.log"


def test_gc_removes_logs_that_are_old_enough(place: Path) -> None:
    run(*PRUNE, home=place)
    run("gc", home=place)
    assert "prune: done" in log_of(place / "home")
    run("gc", "--all", home=place)
    assert not (place / "home" / "logs").exists()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"factory push b --message {TOKEN}", "factory push b --message ***"),
        ("https://me:pass@host/x", "https://***@host/x"),
        ("GET https://host/x?X-Amz-Signature=abc&y=1 200", "GET https://host/x?*** 200"),
        ("Authorization: Bearer abc.def-1", "Authorization: Bearer ***"),
        ("{'token': 'abcdef', 'n': 1}", "{'token': '***', 'n': 1}"),
        ("WANDB_API_KEY=0123 factory", "WANDB_API_KEY=*** factory"),
        ("the value open-sesame", "the value ***"),
        ("16,351 tokens of text, tokens: last", "16,351 tokens of text, tokens: last"),
    ],
)
def test_secrets_are_hidden(text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "open-sesame")
    assert without_secrets(text) == shown
