"""A size in place of a fraction: the smallest cut that reaches it, whichever layers go."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from factory.artifacts import Source
from factory.config.request import BuildRequest, PlanRequest
from factory.errors import DropError, FactoryError, UnsupportedArchitectureError, UsageError
from factory.hub.resolve import resolve
from factory.model.devices import tensor_bytes
from factory.pruning.sizes import cache_bytes, find_goal, left_about, left_without
from tests.builders.builds import a_source
from tests.builders.models import save_llama
from tests.families import config_of

OUTSIDE = 1000  # parameters of the embeddings


def source_of(layers: list[int]) -> Source:
    return a_source(
        num_layers=len(layers),
        layer_parameters=tuple(layers),
        num_parameters=OUTSIDE + sum(layers),
        layer_bytes=tuple(2 * each for each in layers),
        size_bytes=2 * (OUTSIDE + sum(layers)),
    )


def asked(**options: Any) -> BuildRequest:
    return BuildRequest.read({"model": "owner/name", **options})


@given(st.lists(st.integers(1, 50), min_size=3, max_size=7), st.integers(1, 1400))
def test_the_number_of_layers_is_the_smallest_that_is_enough_whichever_go(
    layers: list[int], target: int
) -> None:
    source = source_of(layers)

    def largest(n: int) -> int:
        cuts = combinations(layers[:-1], n)
        return max(source.num_parameters - sum(cut) for cut in cuts)

    enough = [n for n in range(len(layers) - 1) if largest(n) <= target]
    try:
        goal = find_goal(asked(target=target), source)
    except DropError:
        assert not enough or enough[0] == 0
        return
    assert goal
    assert goal.num_dropped == enough[0]
    assert goal.parameters == largest(enough[0])


def test_equal_layers_reach_the_target_exactly() -> None:
    goal = find_goal(asked(target=1700), source_of([100] * 10))
    assert goal
    assert (goal.num_dropped, goal.parameters, goal.weight_bytes) == (3, 1700, 3400)


@given(
    st.lists(st.integers(1, 10**12), min_size=3, max_size=7).flatmap(
        lambda layers: st.tuples(st.just(layers), st.permutations(range(len(layers))))
    )
)
def test_what_is_left_without_layers_of_mean_size_is_the_mean_over_all_cuts(
    drawn: tuple[list[int], list[int]],
) -> None:
    layers, order = drawn
    source, total = source_of(layers), len(layers)
    for n in range(1, total):
        cuts = [
            left_without(source, (order * 2)[start : start + n]) for start in range(total)
        ]  # each n times
        for about, exact in zip(left_about(source, n), zip(*cuts, strict=True), strict=True):
            assert 0 <= about * total - sum(exact) < total  # rounded up, by less than one


def test_memory_is_weights_and_cache_and_a_stated_overhead(tmp_path: Path) -> None:
    source = resolve(str(save_llama(tmp_path, num_layers=6)))
    cached = 2 * 1 * 32 * 2 * 100  # keys and values of one head of 32 in bf16, 100 tokens
    layer = source.layer_bytes[0] + cached
    held = source.size_bytes + 6 * cached
    memory = int(1.1 * (held - 2 * layer)) + 600_000_000
    goal = find_goal(asked(fits=memory, context=100), source)
    assert goal
    assert goal.num_dropped == 2
    assert (goal.cache_bytes, goal.weight_bytes) == (
        4 * cached,
        source.size_bytes - 2 * source.layer_bytes[0],
    )
    assert goal.total_bytes == memory
    less = find_goal(asked(fits=memory - 1, context=100), source)
    assert less
    assert less.num_dropped == 3


@pytest.mark.parametrize(
    "model_type",
    ["gemma2", "gpt2", "deepseek_v3", "falcon_h1"],  # windows, none, compressed in many experts, states
)
def test_the_cache_is_what_transformers_fills(model_type: str) -> None:
    config = config_of(model_type)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type].from_dict(config))
    model.eval().to(torch.bfloat16)
    with torch.inference_mode():
        filled = model(input_ids=torch.zeros((1, 24), dtype=torch.long), use_cache=True).past_key_values
    num_layers = len(filled.layers)
    source = a_source(config=config, num_layers=num_layers, model_type=model_type)
    assert cache_bytes(source, 24) == tuple(tensor_bytes(layer) for layer in filled.layers)


# Refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words", "hint"),
    [
        ({"target": 2000}, "`target=2k`: name has 2k parameters already", "nothing to drop"),
        ({"target": "1.1k"}, "1.2k with the 2 layers that must be kept", "`target=1.2k` at least"),
    ],
)
def test_a_size_that_no_cut_reaches_is_refused_with_the_nearest(
    options: dict[str, Any], words: str, hint: str
) -> None:
    source = source_of([100] * 10).model_copy(update={"name": "name"})
    with pytest.raises(DropError) as refused:
        find_goal(asked(**options), source)
    assert words in refused.value.message
    assert hint in refused.value.hint


def test_the_size_in_the_hint_can_be_followed() -> None:
    source = source_of([1_234_567] * 9)
    with pytest.raises(DropError) as refused:
        find_goal(asked(target=1), source)
    least = refused.value.hint.partition("`target=")[2].partition("`")[0]
    goal = find_goal(asked(target=least), source)
    assert goal
    assert goal.num_dropped == 7


def test_a_context_beyond_the_models_is_refused_and_a_cache_that_cannot_be_told_too() -> None:
    config = {**config_of("llama"), "max_position_embeddings": 64}
    with pytest.raises(UsageError, match="`context=65` is more than the 64 tokens"):
        find_goal(asked(fits="1GB", context=65), a_source(config=config))
    with pytest.raises(UnsupportedArchitectureError, match="its own code"):
        find_goal(asked(fits="1GB"), a_source(config=config, remote_code=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "6X"}, "`target=6X` is not a size"),
        ({"target": "-6B"}, "`target=-6B` is not a size"),
        ({"target": "0"}, "`target=0` is not a size"),
        ({"target": 0}, "`target=0` is not a size"),
        ({"target": "nan"}, "`target=nan` is not a size"),
        ({"target": "6e9"}, "`target=6e9` is not a size"),
        ({"target": "8GB"}, "`target=8GB` is not a size"),
        ({"target": "9" * 30}, "is not a size"),
        ({"fits": "8 giga"}, "`fits=8 giga` is not a size"),
        ({"fits": "0.1 B"}, "`fits=0.1 B` is not a size"),
        ({"target": "6B", "drop": 0.3}, "`drop` with `target`"),
        ({"target": "6B", "fits": "8GB"}, "`target` with `fits`"),
        ({"target": "6B", "layers": [1]}, "`layers` with `target`"),
        ({"drop": 0.3, "context": 100}, "`context` without `fits`"),
        ({"fits": "8GB", "context": 1}, "`context`"),
        ({}, "`drop` is missing"),
    ],
)
def test_a_size_that_is_none_or_one_too_many_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(FactoryError) as refused:
        asked(**options)
    assert words in refused.value.message
    assert refused.value.hint
    if "layers" not in options:
        with pytest.raises(FactoryError):
            PlanRequest.read({"model": "owner/name", **options})


@pytest.mark.parametrize(
    ("written", "number"),
    [("6B", 6 * 10**9), ("1.5b", 1_500_000_000), (" 350 M ", 350_000_000), ("7", 7), (6_000, 6_000)],
)
def test_parameters_are_read_as_people_write_them(written: str | int, number: int) -> None:
    assert asked(target=written).target == number


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("8GB", 8 * 10**9),
        ("8GiB", 8 * 2**30),
        ("7.5 gb", 7_500_000_000),
        ("8G", 8 * 10**9),
        ("512MiB", 2**29),
    ],
)
def test_memory_is_read_as_people_write_it(written: str, number: int) -> None:
    assert asked(fits=written).fits == number
