"""Following a build from elsewhere: what trackers are told, and that no result depends on it."""

import json
import pickle
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import TrainerState

from factory.cli.build import _tracking
from factory.cli.request import ask
from factory.errors import UsageError
from factory.healing.callbacks import Told
from factory.healing.tracking import Tracking, choose
from tests.builders.commands import asked

# As much of trackio as is used, for a machine without it: what it is told lands in a file.
TRACKIO = """
import json, os, sys
def init(**settings):
    print("* a line that must not reach the progress lines")
    print("* nor this one", file=sys.stderr)
    _note(init=settings)
def log(values, step=None):
    _note(log=values, step=step)
def finish():
    _note(finish=True)
def _note(**what):
    with open("told.jsonl", "a") as file:
        file.write(json.dumps(what) + "\\n")
    if os.environ.get("FAILS_IN") in what:
        raise ConnectionError("no Hub\\nfar and wide")
"""


def test_a_missing_tracker_is_told_by_name_and_none_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.path", [])
    for name in ("trackio", "wandb", "tensorboard"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        with pytest.raises(UsageError, match=f"--report-to {name}: {name} is not installed"):
            choose(name)  # type: ignore[arg-type]
    assert choose(None) == "none"
    assert choose("none") == "none"


@pytest.fixture
def trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The stand-in, installed; the file that it writes."""
    (tmp_path / "trackio.py").write_text(TRACKIO)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    kept = sys.modules.pop("trackio", None)
    yield tmp_path / "told.jsonl"
    del sys.modules["trackio"]
    if kept:
        sys.modules["trackio"] = kept


def test_trackio_is_taken_where_it_is_installed_and_told_in_one_run_a_part(
    trackio: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert choose(None) == "trackio"
    with Tracking("trackio", "demo-drop30").run("stages") as log:
        log({"seconds/plan": 1.5}, None)
    begun, *rest = [json.loads(line) for line in trackio.read_text().splitlines()]
    assert (begun["init"]["name"], begun["init"]["resume"]) == ("demo-drop30-stages", "allow")
    assert rest == [{"log": {"seconds/plan": 1.5}, "step": None}, {"finish": True}]
    assert capsys.readouterr() == ("", "")


def test_the_numbers_of_healing_are_told_with_their_steps(trackio: Path) -> None:
    callback, state = Told(Tracking("trackio", "demo")), TrainerState(global_step=3)
    callback.on_train_begin(None, state, None)
    callback.on_log(None, state, None, logs={"loss": 1.5, "note": "no number"})
    callback.on_train_end(None, state, None)
    callback.on_log(None, state, None, logs={"eval_loss": 1.0})  # evaluated once more when it is over
    told = [json.loads(line) for line in trackio.read_text().splitlines()]
    assert told[1:] == [{"log": {"loss": 1.5}, "step": 3}, {"finish": True}]


@pytest.mark.parametrize(
    ("fails_in", "told"),
    [("init", ["init"]), ("log", ["init", "log", "finish"]), ("finish", ["init", "log", "log", "finish"])],
)
def test_a_tracker_that_fails_costs_one_remark_and_nothing_else(
    trackio: Path, monkeypatch: pytest.MonkeyPatch, fails_in: str, told: list[str]
) -> None:
    monkeypatch.setenv("FAILS_IN", fails_in)
    remarks: list[str] = []
    tracking = Tracking("trackio", "demo", remark=remarks.append)
    reached = 0
    for part in ("stages", "heal", "stages"):
        with tracking.run(part) as log:
            log({"loss": 1.5}, 1)
            log({"loss": 1.0}, 2)
            reached += 1
        tracking = pickle.loads(pickle.dumps(replace(tracking, remark=print)))  # as another process gets it
    assert reached == 3
    assert remarks == ["trackio cannot follow this build, which goes on without: no Hub"]
    assert [next(iter(json.loads(line))) for line in trackio.read_text().splitlines()] == told


def test_a_fault_of_the_build_is_not_taken_for_one_of_the_tracker(trackio: Path) -> None:
    tracking = Tracking("trackio", "demo", remark=print)
    with pytest.raises(KeyError, match="of the build"), tracking.run("heal"):
        raise KeyError("of the build")
    assert not tracking.has_failed
    assert "finish" in trackio.read_text()


def test_each_build_of_a_file_is_told_under_a_name_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outs = ("a/x", "b/x", "b/x #2")
    Path("build.yaml").write_text(
        f"model: demo\ndrop: 0.3\nreport-to: none\nbuilds: {json.dumps([{'out': out} for out in outs])}\n"
    )
    names, again = (
        [_tracking(ask(one.model, one.options), one.options).name for one in asked("build.yaml")]
        for _ in range(2)
    )
    assert names == again  # a second attempt goes on with the run
    assert len(set(names)) == len(outs)
    assert all(re.fullmatch(r"x[\w-]*-[0-9a-f]{8}", name) for name in names), names
    (other,) = asked("demo", "--drop", "0.3", "--out", "a/x", "--seed", "1", "--report-to", "none")
    assert _tracking(ask("demo", other.options), other.options).name not in names


def test_no_setting_of_a_build_says_where_it_is_told() -> None:
    told, silent = (asked("demo", "--drop", "0.3", "--report-to", where)[0] for where in ("wandb", "none"))
    assert (told.options["report_to"], silent.options["report_to"]) == ("wandb", "none")
    assert ask("demo", told.options).config == ask("demo", silent.options).config
