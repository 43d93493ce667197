"""What was typed wins over the recipe, the recipe over the defaults, and the model's length over all."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from factory.config.request import BuildRequest
from factory.config.settings import (
    MAX_TOKENS,
    BuildConfig,
    HealSettings,
    MeasureSettings,
    heal_settings_for,
    load_recipe,
    settle,
)
from factory.errors import UnknownModelError, UsageError
from tests.builders.builds import a_source


def config_of(
    model: str = "some/model",
    *,
    longest: int = 4096,
    repo_id: str | None = "some/model",
    size: int = 7_000_000_000,
    **asked: Any,
) -> BuildConfig:
    source = a_source(repo_id=repo_id, num_parameters=size, config={"max_position_embeddings": longest})
    return settle(BuildRequest(**{"model": model, "drop": 0.3, **asked}), source)


def test_the_defaults_of_a_7b_model_are_the_papers_where_its_objective_is_asked_for() -> None:
    heal = config_of(heal="sft").heal
    assert (heal.modules, heal.layers, heal.bits) == ("ffn", "all", 4)
    assert (heal.learning_rate, heal.batch_size, heal.sequence_length) == (3e-4, 16, 2048)
    assert (heal.warmup_steps, heal.dropout) == (100, 0.05)
    assert heal.num_steps == pytest.approx(5000, rel=0.05)


def test_the_recipe_wins_over_the_defaults_and_what_was_typed_over_the_recipe() -> None:
    recipe = load_recipe("mistral-7b")
    assert config_of("mistral-7b", heal="sft").heal.learning_rate == 3e-6
    typed = config_of("mistral-7b", heal="sft", heal_lr=1e-5, seed=7)
    assert (typed.heal.learning_rate, typed.heal.rank, typed.seed) == (1e-5, recipe.heal.rank, 7)


def test_a_model_is_distilled_unless_something_else_is_asked_for() -> None:
    heal = config_of("mistral-7b").heal
    assert (heal.objective, heal.modules, heal.rank, heal.bits) == ("distill", "all-linear", 128, 4)
    assert (heal.learning_rate, heal.num_steps, heal.batch_size) == (
        pytest.approx(1.5e-4, rel=0.05),
        5000,
        16,
    )


def test_default_sequences_are_cut_to_what_the_model_was_made_for() -> None:
    config = config_of(longest=512)
    lengths = {config.measure.sequence_length, config.heal.sequence_length, config.evaluate.sequence_length}
    assert lengths == {512}


def test_a_small_model_is_distilled_in_many_small_steps_of_a_wide_adapter() -> None:
    heal = config_of(size=135_000_000).heal
    assert heal.num_steps >= 1000
    assert heal.num_steps * heal.batch_size * heal.sequence_length == pytest.approx(3.06e6, rel=0.01)
    assert (heal.rank, heal.bits, heal.schedule, heal.second_moment_decay) == (256, 16, "linear", 0.95)
    plain = config_of(size=135_000_000, heal="sft").heal
    assert (plain.schedule, plain.second_moment_decay, plain.num_steps < 1000) == ("cosine", 0.999, True)


def test_a_model_costs_the_same_by_its_alias_its_name_and_its_folder() -> None:
    names = {
        "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
        "HuggingFaceTB/SmolLM2-135M": "x",
        "./folder": None,
    }
    heals = [config_of(name, repo_id=repo, size=135_000_000).heal for name, repo in names.items()]
    assert heals[0] == heals[1] == heals[2]


def test_a_folder_gets_no_tasks_unless_they_are_asked_for() -> None:
    assert config_of().evaluate.tasks == ("mmlu", "boolq", "gsm8k")
    assert config_of(repo_id=None).evaluate.tasks == ()
    asked = config_of(repo_id=None, tasks=("boolq",))
    assert asked.evaluate.tasks == ("boolq",)


@given(st.integers(min_value=1_000, max_value=10**12), st.integers(min_value=8, max_value=10**6))
def test_every_size_of_model_gets_healing_that_makes_sense(num_parameters: int, max_length: int) -> None:
    heal = heal_settings_for(num_parameters, max_length=max_length)
    tokens = heal.num_steps * heal.batch_size * heal.sequence_length
    assert heal.num_steps >= 100
    assert heal.warmup_steps <= heal.num_steps / 10
    assert 0 < heal.learning_rate <= 3e-3
    assert heal.sequence_length <= max_length
    assert tokens <= MAX_TOKENS + heal.batch_size * heal.sequence_length


@given(st.integers(10**6, 10**12), st.integers(10**6, 10**12))
def test_a_larger_model_never_gets_a_higher_rate_or_fewer_tokens(a: int, b: int) -> None:
    small, large = (heal_settings_for(size, max_length=2048) for size in sorted((a, b)))
    assert small.learning_rate >= large.learning_rate
    assert small.num_steps * small.batch_size <= large.num_steps * large.batch_size + small.batch_size + 16


def test_unknown_names_and_values_out_of_range_are_refused() -> None:
    with pytest.raises(ValidationError, match="learning_rte"):
        HealSettings(learning_rte=1)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        MeasureSettings(num_samples=1)
    for rate in (0, -1, math.inf, math.nan):
        with pytest.raises(ValidationError):
            HealSettings(learning_rate=rate)
    for seed in (-1, 2**32):
        with pytest.raises(ValidationError):
            BuildConfig(reference="x", drop=0.3, seed=seed)


def test_adding_to_nf4_weights_is_refused_where_healing_sees_none() -> None:
    with pytest.raises(UsageError, match=r"`merge_base=nf4`, but .* 16-bit weights") as caught:
        config_of(merge_base="nf4", heal_bits=16)
    assert "`heal_bits=4`" in caught.value.hint
    assert config_of(merge_base="nf4", heal_bits=4).merge_base == "nf4"


def test_an_unknown_alias_offers_the_nearest() -> None:
    with pytest.raises(UnknownModelError) as caught:
        load_recipe("llama-2-7")
    assert "did you mean 'llama-2-7b'" in caught.value.hint


def test_a_short_run_warms_up_for_a_tenth_of_its_steps() -> None:
    warmups = [config_of("mistral-7b", heal_steps=steps).heal.warmup_steps for steps in (1, 10, 150, 5000)]
    assert warmups == [1, 1, 15, 100]


@pytest.mark.parametrize("name", ["next_token_weight", "seam_weight"])
def test_settings_that_only_distillation_reads_are_refused_without_it(name: str) -> None:
    with pytest.raises(UsageError, match=f"`{name}=0.5` without `heal=distill`: sft does not use it"):
        config_of("mistral-7b", heal="sft", **{name: 0.5})


def test_a_share_of_zero_is_a_share() -> None:
    assert config_of("some/model", next_token_weight=0.0).heal.next_token_weight == 0
    assert config_of("some/model").heal.next_token_weight == 0.3
