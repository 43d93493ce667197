"""A build.json that was damaged, cut short or put together is refused in one line by every command."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from factory.artifacts import Build, DistanceProfile, PruningPlan
from factory.cli.main import cli
from factory.errors import StoreError
from tests.builders.builds import demo_healed, on_two_texts

WITHOUT = object()
COMMANDS = ("show", "chat", "card", "verify", "push", "space --no-browser", "export --gguf F16")


def changed(record: Any, path: str, value: object) -> Any:
    """The record with another value at a path, or without one."""
    *parents, last = path.split(".")
    part = record
    for name in parents:
        part = part[name]
    part[last] = value
    if value is WITHOUT:
        del part[last]
    return record


def written(folder: Path, path: str, value: object) -> Path:
    """A folder with the record of a build that was changed at a path."""
    record = changed(json.loads(on_two_texts().text()), path, value)
    (folder / "model").mkdir()
    (folder / Build.file_name).write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("evaluations", WITHOUT, "evaluations: Field required"),
        ("evaluations", {}, "it has no evaluation of the source model"),
        ("evaluations.source", WITHOUT, "it has no evaluation of the source model"),
        ("evaluations.pruned", WITHOUT, "it has no evaluation of the pruned model"),
        ("evaluations.healed", WITHOUT, "it has no evaluation of the healed model"),
        ("shipped", "source", "shipped: Input should be 'healed' or 'pruned'"),
        ("evaluations.source.more_losses", [], "its evaluations are not of the same texts"),
        ("plan.num_layers", 1000, "it tells of 1000 layers of a model of 10"),
        ("source.layer_bytes", [1], "it tells of 1 layers of a model of 10"),
        ("plan.dropped", [3, 10], "plan: its layers are not ascending numbers below 10"),
        ("plan.dropped", [4, 3], "plan: its layers are not ascending numbers below 10"),
        ("plan.num_layers", 10**12, "it tells of 1000000000000 layers of a model of 10"),
        ("source.config", {}, "the configuration of its source has no model_type"),
        ("source.config.num_hidden_layers", None, "the configuration of its source has no model_type"),
    ],
)
def test_a_record_whose_parts_do_not_fit_is_refused(
    tmp_path: Path, path: str, value: object, message: str
) -> None:
    folder = written(tmp_path, path, value)
    with pytest.raises(StoreError) as refused:
        Build.read(folder)
    assert refused.value.message.startswith(f"cannot read {folder / 'build.json'}: {message}")
    assert "run the same `factory build` again" in refused.value.hint


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_on_a_build_refuses_a_record_that_was_cut_short(tmp_path: Path, command: str) -> None:
    folder = written(tmp_path, "evaluations", {})
    name, *options = command.split()
    done = CliRunner().invoke(cli, [name, str(folder), *options])
    assert isinstance(done.exception, StoreError)
    assert "it has no evaluation of the source model" in done.exception.message


def test_a_record_of_another_version_names_that_version(tmp_path: Path) -> None:
    folder = written(tmp_path, "evaluations", {})
    record = json.loads((folder / "build.json").read_text()) | {"factory_version": "0.0.9"}
    (folder / "build.json").write_text(json.dumps(record))
    with pytest.raises(StoreError) as refused:
        Build.read(folder)
    assert refused.value.hint == "use factory 0.0.9, which wrote it"


def test_a_plan_has_a_distance_for_its_runner_up() -> None:
    with pytest.raises(ValueError, match="runner-up"):
        PruningPlan(criterion="angular", num_layers=4, dropped=(1,), runner_up_start=2)


def test_a_profile_that_was_cut_short_is_refused() -> None:
    fields: dict[str, Any] = {"num_layers": 2, "num_samples": 1, "sequence_length": 8, "num_tokens": 8}
    whole, short = [[0.0] * 3] * 3, [[0.0] * 3] * 2
    data = demo_healed().calibration
    assert DistanceProfile(**fields, mean=whole, stderr=whole, data=data)
    with pytest.raises(ValueError, match="the distances between 3 boundaries"):
        DistanceProfile(**fields, mean=whole, stderr=short, data=data)
