"""The Python interface: the options of the command line by name, and results that show themselves."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import factory
from factory.config.request import BuildRequest, PlanRequest, PruneRequest, Request, SweepRequest
from factory.errors import HubError, UsageError
from factory.evaluation.speed import compare_speed
from tests.builders.commands import BRIEF

QUICKLY = {
    "no_heal": True,
    "tasks": "none",
    "samples": 2,
    "eval_documents": 2,
    "sequence_length": 16,
}


@pytest.mark.parametrize(
    ("function", "request_"),
    [
        (factory.build, BuildRequest),
        (factory.preview, BuildRequest),
        (factory.plan, PlanRequest),
        (factory.sweep, SweepRequest),
        (factory.prune, PruneRequest),
    ],
)
def test_a_function_takes_the_options_of_its_command(
    function: Callable[..., Any], request_: type[Request]
) -> None:
    shown = inspect.signature(function).parameters
    rows = {name: option for name, (_, option) in request_.options().items() if not option.on_terminal}
    assert set(shown) - {"reporter"} == set(rows)
    assert all(option.help in (function.__doc__ or "") for option in rows.values())
    assert "see above" not in (function.__doc__ or "")


def test_a_package_that_is_only_imported_loads_nothing_heavy() -> None:
    assert "build" in dir(factory)
    with pytest.raises(AttributeError, match="no attribute 'bild'"):
        factory.bild  # noqa: B018


def test_a_build_is_made_shown_and_loaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_speed, "__kwdefaults__", compare_speed.__kwdefaults__ | BRIEF)
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"
    preview = factory.preview("demo", drop=0.3, home=home, **QUICKLY)
    assert "24 → 17" in preview._repr_html_()
    assert preview.numbers.num_dropped == 7
    made = factory.build("demo", drop=0.3, home=home, out=tmp_path / "x", **QUICKLY)
    assert made.plan.num_layers == 24
    assert list(made.evaluations) == ["source", "pruned"]
    assert list(made.table["source"])[:1] != []
    assert "<table" in made._repr_html_()
    assert repr(made).splitlines()[0].split()[:2] == ["measure", "source"]
    assert made.figure()._repr_png_().startswith(b"\x89PNG")
    assert made.model.config.num_hidden_layers == 24 - len(made.plan.dropped)
    assert made.tokenizer("def")["input_ids"]
    assert made.card.startswith("---\n")
    again = factory.load(tmp_path / "x")
    assert again.record.model_dump(mode="json") == made.record.model_dump(mode="json")
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(HubError, match="not logged in"):
        again.push("me/x")


def test_plans_and_pruning_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plans = factory.plan("demo", drop=0.2, samples=2, sequence_length=16, home=tmp_path / "home")
    assert list(plans.table["criterion"]) == ["angular"]
    assert len(plans.chosen.dropped) == 5
    pruned = factory.prune("demo", layers=[3, "7-8"], out="smaller", home=tmp_path / "home")
    assert pruned.plan.dropped == (3, 7, 8)
    assert pruned.model.config.num_hidden_layers == 21
    assert factory.prune("demo", layers="3,7-8", out="smaller", home=tmp_path / "home").reused
    with pytest.raises(UsageError, match="`gguf=Q9` is not a type"):
        pruned.export_gguf("Q9")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": 1.5}, "`drop=1.5` is not a fraction between 0 and 1"),
        ({}, "`drop` is missing"),
        ({"drop": 0.3, "heal_step": 3}, "unknown option 'heal_step'"),
        ({"drop": 0.3, "layers": [3]}, "`layers` with `drop`"),
        ({"drop": 0.3, "samples": "8"}, "`samples`: '8' should be a valid integer"),
        ({"drop": 0.3, "on": "a100-large"}, "`on` works on the command line only"),
    ],
)
def test_a_wrong_option_is_named_without_dashes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        factory.build("demo", **options)
    assert raised.value.message.startswith(message)
    assert "--" not in raised.value.message


def test_a_folder_that_is_not_a_build_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a build folder"):
        factory.load(tmp_path)
