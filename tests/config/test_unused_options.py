"""An option that changes nothing is named, with the reason."""

from typing import Any

import pytest

from factory.config.options import HEALING
from factory.config.request import BuildRequest, PlanRequest, Request, SweepRequest
from factory.config.settings import settle
from factory.config.unused_options import unread
from tests.builders.builds import a_source

SOURCE = a_source(num_parameters=1_000_000, config={"max_position_embeddings": 4096})
VALUES: dict[str, Any] = {
    "heal": "sft",
    "heal_data": ["a/b"],
    "heal_steps": 9,
    "heal_lr": 1e-3,
    "heal_rank": 8,
    "heal_modules": "ffn",
    "heal_layers": "seam",
    "heal_bits": 16,
    "next_token_weight": 0.5,
    "seam_weight": 0.5,
    "merge_base": "bf16",
}


def told(kind: type[Request] = BuildRequest, **options: Any) -> list[str]:
    if kind is BuildRequest and "layers" not in options:
        options["drop"] = 0.3
    request = kind.read({"model": "owner/name", **options})
    return unread(request, settle(request, SOURCE, drop=0.3))


def test_every_option_of_healing_has_no_effect_without_it() -> None:
    options = [name for name, (_, option) in BuildRequest.options().items() if option.group == HEALING]
    assert set(options) - VALUES.keys() == {"no_heal", "heal_start", "require_healing"}
    for name, value in (VALUES | {"heal": "distill"}).items():
        assert told(no_heal=True, **{name: value}) == [f"`{name}` has no effect: `no_heal` skips healing"]
        assert not told(**{"heal": "distill", name: value})


def test_a_fit_without_training_reads_its_text_and_its_precision() -> None:
    fit = {"no_heal": True, "heal_start": "seam-fit"}
    assert not told(**fit, heal_data=["a/b"], heal_bits=16)
    assert told(**fit, heal_lr=1e-3, heal_rank=8) == [
        "`heal_lr` and `heal_rank` have no effect: `no_heal` skips training"
    ]


@pytest.mark.parametrize(("kind", "limit"), [(BuildRequest, 7), (SweepRequest, 7)])
def test_options_of_tasks_have_no_effect_without_tasks(kind: type[Request], limit: int) -> None:
    assert told(kind, tasks="none", limit=limit) == ["`limit` has no effect: no tasks are run"]
    assert not told(kind, tasks="boolq", limit=limit)
    assert not told(SweepRequest, tasks="none")  # its limit has a default


def test_documents_for_the_loss_are_read_by_criteria_that_measure_it() -> None:
    (line,) = told(plan_documents=8)
    assert line == "`plan_documents` has no effect: `criterion=angular` measures no loss"
    assert told(layers="3", plan_documents=8) == [
        "`plan_documents` has no effect: `layers` chooses without a text"
    ]
    assert not told(criterion="greedy", plan_documents=8)
    assert not told(PlanRequest, drop=0.3, criterion="all", plan_documents=8)
