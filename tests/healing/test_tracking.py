"""Following a healing from elsewhere: what trackers get, and that no result depends on it."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerState

from factory.api.progress import Bars
from factory.config.tracking import Tracking, choose_tracker
from factory.errors import UsageError
from factory.healing.callbacks import PROJECT, Report
from factory.pipeline.prepare import _tracking, settle_all
from tests.builders.commands import asked

SILENT = Bars()

# As much of trackio as transformers uses, for a machine without it: what it gets lands in a file.
TRACKIO = """
import json, os, sys
from types import SimpleNamespace
def init(**settings):
    print("* a line that must not reach the progress lines")
    print("* nor this one", file=sys.stderr)
    _note(init=settings)
def log(values):
    _note(log=values)
def finish():
    _note(finish=True)
def _note(**what):
    with open("noted.jsonl", "a") as file:
        file.write(json.dumps(what) + "\\n")
    if os.environ.get("FAILS_IN") in what:
        raise ConnectionError("no Hub\\nfar and wide")
context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))
class config(dict):
    update = staticmethod(lambda values, allow_val_change: None)
config = config()
"""
ARGUMENTS = SimpleNamespace(
    to_dict=dict,
    project=PROJECT,
    run_name="demo",
    trackio_space_id=None,
    trackio_bucket_id=None,
    hub_private_repo=None,
)


def test_a_missing_tracker_is_named_and_none_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.path", [])
    for name in ("trackio", "wandb", "tensorboard"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        with pytest.raises(UsageError, match=f"`report_to={name}`: {name} is not installed"):
            choose_tracker(name)  # type: ignore[arg-type]
    assert choose_tracker(None) == "none"
    assert choose_tracker("none") == "none"


@pytest.fixture
def trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The stand-in, installed; the file that it writes."""
    (tmp_path / "trackio.py").write_text(TRACKIO)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    kept = sys.modules.pop("trackio", None)
    yield tmp_path / "noted.jsonl"
    del sys.modules["trackio"]
    if kept:
        sys.modules["trackio"] = kept


def report(tracking: Tracking, *, tell: Callable[[str], None]) -> None:
    """Train for two steps, and log once more when it is over."""
    callback, state = Report(tracking, tell), TrainerState(global_step=3)
    model = SimpleNamespace(num_parameters=lambda: 1)
    callback.on_train_begin(ARGUMENTS, state, None, model=model)
    for loss in (1.5, 1.25):
        callback.on_log(ARGUMENTS, state, None, model=model, logs={"loss": loss})
    callback.on_train_end(ARGUMENTS, state, None, model=model)
    callback.on_log(ARGUMENTS, state, None, model=model, logs={"eval_loss": 1.0})


def noted(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_trackio_is_chosen_if_it_is_installed_and_gets_the_losses_in_one_run(
    trackio: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert choose_tracker(None) == "trackio"
    report(Tracking("trackio", "demo"), tell=pytest.fail)
    begun, *rest = noted(trackio)
    assert {"project": PROJECT, "name": "demo", "resume": "allow"}.items() <= begun["init"].items()
    losses = [{"train/loss": loss, "train/global_step": 3} for loss in (1.5, 1.25)]
    assert rest == [*({"log": values} for values in losses), {"finish": True}]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("fails_in", "calls"),
    [("init", ["init"]), ("log", ["init", "log"]), ("finish", ["init", "log", "log", "finish"])],
)
def test_a_tracker_that_fails_costs_one_warning_and_nothing_else(
    trackio: Path, monkeypatch: pytest.MonkeyPatch, fails_in: str, calls: list[str]
) -> None:
    monkeypatch.setenv("FAILS_IN", fails_in)
    warnings: list[str] = []
    report(Tracking("trackio", "demo"), tell=warnings.append)
    assert warnings == ["trackio failed; healing continues without it: no Hub"]
    assert [next(iter(note)) for note in noted(trackio)] == calls


def test_the_files_of_tensorboard_lie_in_a_folder_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorboard.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorboard", raising=False)
    folders: list[Path] = []

    class Writer:
        def __init__(self, log_dir: str) -> None:
            folders.append(Path(log_dir))

        def __getattr__(self, _name: str) -> Any:
            return lambda *_args, **_kwargs: None

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    arguments, state = SimpleNamespace(to_json_string=str), TrainerState()
    callback = Report(Tracking("tensorboard", "demo", tmp_path / "runs"), tell=pytest.fail)
    callback.on_train_begin(arguments, state, None)
    callback.on_train_end(arguments, state, None)
    assert folders == [tmp_path / "runs" / "demo"]
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_each_build_of_a_file_is_tracked_under_a_name_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outs = ("a/x", "b/x", "b/x #2")
    Path("build.yaml").write_text(
        f"model: demo\ndrop: 0.3\nreport-to: none\nbuilds: {json.dumps([{'out': out} for out in outs])}\n"
    )
    names, again = (
        [_tracking(one).run_name for one in settle_all(asked("build.yaml"), SILENT)] for _ in range(2)
    )
    assert names == again  # a second attempt goes on with the run
    assert len(set(names)) == len(outs)
    assert all(re.fullmatch(r"x[\w-]*-[0-9a-f]{8}", name) for name in names), names
    requests = asked("demo", "--drop", "0.3", "--out", "a/x", "--seed", "1", "--report-to", "none")
    (other,) = settle_all(requests, SILENT)
    assert _tracking(other).run_name not in names


def test_no_setting_of_a_build_depends_on_its_tracking() -> None:
    tracked, silent = (
        settle_all(asked("demo", "--drop", "0.3", "--report-to", where), SILENT)[0]
        for where in ("wandb", "none")
    )
    assert (tracked.request.report_to, silent.request.report_to) == ("wandb", "none")
    assert tracked.config == silent.config
