"""Recipes: every file is valid, says where its numbers come from, and agrees with the paper's table."""

import re
from collections import Counter

import pytest
import yaml

from factory.config.references import EMBEDDED, aliases
from factory.config.settings import load_recipe
from factory.errors import UnknownModelError
from factory.resources import RECIPES

# arXiv 2403.17887v1, appendix A: sequence length, peak learning rate, LoRA rank.
PAPER = {
    "llama-2-7b": (2048, 3e-4, 2),
    "llama-2-13b": (4096, 3e-4, 64),
    "llama-2-70b": (4096, 3e-5, 8),
    "qwen-7b": (2048, 3e-4, 64),
    "qwen-14b": (4096, 3e-4, 64),
    "mistral-7b": (2048, 3e-6, 4),
    "phi-2": (2048, 2e-4, 64),
}
OTHERS = {"smollm2-135m", "smollm2-360m", "qwen3-0.6b", "qwen3-8b", "llama-3.2-1b", "llama-3.1-8b", "demo"}


def test_the_known_models_are_the_papers_and_the_chosen_ones() -> None:
    assert set(aliases()) == set(PAPER) | OTHERS


@pytest.mark.parametrize("alias", aliases())
def test_every_recipe_loads_and_says_where_its_numbers_come_from(alias: str) -> None:
    recipe = load_recipe(alias)
    assert recipe.alias == alias
    assert len(recipe.provenance) > 40
    assert recipe.heal is None or recipe.heal.warmup_steps < recipe.heal.num_steps
    assert set(recipe.evaluate.num_fewshot) >= set(recipe.evaluate.tasks)


@pytest.mark.parametrize("alias", aliases())
def test_an_alias_can_be_typed_and_is_never_taken_for_a_repository(alias: str) -> None:
    assert re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", alias)


@pytest.mark.parametrize("alias", aliases())
def test_numbers_are_written_as_yaml_numbers(alias: str) -> None:
    # YAML 1.1 reads "3e-4" as a string: only "3.0e-4" is a number to every reader of the file.
    fields = yaml.safe_load((RECIPES / f"{alias}.yaml").read_text(encoding="utf-8"))
    assert "heal" not in fields or isinstance(fields["heal"]["learning_rate"], float)


@pytest.mark.parametrize("alias", sorted(PAPER))
def test_the_papers_models_carry_the_papers_values(alias: str) -> None:
    heal = load_recipe(alias).heal
    assert heal is not None
    assert (heal.sequence_length, heal.learning_rate, heal.rank) == PAPER[alias]
    assert (heal.batch_size, heal.num_steps, heal.warmup_steps, heal.dropout) == (16, 5000, 100, 0.05)
    assert "2403.17887" in load_recipe(alias).provenance


@pytest.mark.parametrize("alias", sorted(OTHERS - {"demo"}))
def test_models_outside_the_paper_say_so(alias: str) -> None:
    assert load_recipe(alias).provenance.startswith("Not in the paper, not swept")


def test_no_two_recipes_share_a_repository_and_only_the_demo_has_none() -> None:
    recipes = [load_recipe(alias) for alias in aliases()]
    counts = Counter(recipe.repo_id.lower() for recipe in recipes if recipe.repo_id)
    assert max(counts.values()) == 1
    assert [recipe.alias for recipe in recipes if recipe.repo_id is None] == ["demo"]
    assert [recipe.alias for recipe in recipes if recipe.repo_id is None] == [EMBEDDED]


def test_a_repository_is_named_in_full() -> None:
    for alias in aliases():
        repo_id = load_recipe(alias).repo_id
        assert repo_id is None or re.fullmatch(r"[\w.\-]+/[\w.\-]+", repo_id)


@pytest.mark.parametrize(
    ("typed", "nearest"), [("mistral7b", "mistral-7b"), ("Phi2", "phi-2"), ("lama-3.1-8b", "llama-3.1-8b")]
)
def test_a_misspelt_alias_is_answered_with_the_nearest(typed: str, nearest: str) -> None:
    with pytest.raises(UnknownModelError) as caught:
        load_recipe(typed)
    assert typed in caught.value.message
    assert f"did you mean {nearest!r}" in caught.value.hint
