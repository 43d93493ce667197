"""Each criterion and each objective is one value, and what it names exists."""

import pytest
from pydantic import ValidationError

from factory.artifacts import PruningPlan
from factory.config.criteria import CHOSEN, CRITERIA, DEFAULT_CRITERION, criterion_of
from factory.config.objectives import OBJECTIVES
from factory.config.settings import HealSettings, PlanSettings
from factory.healing.trainers import TRAINERS
from factory.pruning.criteria import FROM_PROFILE
from factory.pruning.search import BY_LOSS
from factory.report.summaries import describe_plan
from tests.builders.builds import an_adapter


def test_each_criterion_has_a_function_that_reads_what_its_row_says() -> None:
    assert set(FROM_PROFILE) == {one.name for one in CRITERIA.values() if not one.searches}
    assert set(BY_LOSS) == {one.name for one in CRITERIA.values() if one.searches}


def test_each_objective_has_a_trainer() -> None:
    assert TRAINERS.keys() == OBJECTIVES.keys()


def test_settings_and_values_take_the_names_of_the_tables_alone() -> None:
    for name in CRITERIA:
        assert PlanSettings(criterion=name).criterion == name
    for name in OBJECTIVES:
        assert HealSettings(objective=name).objective == an_adapter(objective=name).objective
    with pytest.raises(ValidationError, match="Input should be 'angular', "):
        PlanSettings(criterion="shallowest")
    with pytest.raises(ValidationError, match="Input should be 'sft'"):
        HealSettings(objective="reward")


@pytest.mark.parametrize(
    ("criterion", "by"), [("angular", ""), ("greedy", " by greedy"), ("chosen", " by choice"), ("x", " by x")]
)
def test_the_terminal_names_a_criterion_unless_it_is_the_default(criterion: str, by: str) -> None:
    plan = PruningPlan(criterion=criterion, num_layers=4, dropped=(1,))
    assert describe_plan(plan) == f"dropping 1 of 4 layers (25%){by}: 1"


def test_the_card_has_a_paragraph_for_every_criterion_but_the_one_that_it_explains_anyway() -> None:
    assert [name for name in CRITERIA if not criterion_of(name).card] == [DEFAULT_CRITERION.name]
    assert criterion_of(CHOSEN.name).card
