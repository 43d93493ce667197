"""config.json in both forms: known answers of each family, and nothing that transformers reads changes."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING

from factory.model.architecture import prune_config
from factory.pruning.config_forms import PERIOD_NAMES, with_older_forms
from tests.families import FAMILIES, HYBRID, config_of

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
PLAIN = {"rope_type": "default"}


def per_kind(full: dict[str, Any], sliding: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


def added(config: dict[str, Any]) -> dict[str, Any]:
    written = with_older_forms(config)
    assert {name: written[name] for name in config} == config
    return {name: value for name, value in written.items() if name not in config}


def rope(theta: float, scaling: dict[str, Any] | None = None, **others: Any) -> dict[str, Any]:
    return {"rope_theta": theta, "rope_scaling": scaling, **others}


KNOWN: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {"rope_parameters": {**PLAIN, "rope_theta": 1e5}}, rope(1e5)),
    "llama3": ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, rope(5e5, LLAMA3)),
    "linear": ("llama", {"rope_parameters": {**LINEAR, "rope_theta": 1e4}}, rope(1e4, LINEAR)),
    "yarn": ("qwen3", {"rope_parameters": {**YARN, "rope_theta": 1e6}}, rope(1e6, YARN)),
    "a base that config.json leaves to the class": ("smollm3", {"rope_parameters": PLAIN}, rope(2e6)),
    "a part of each head": ("stablelm", {}, rope(1e4, partial_rotary_factor=0.25)),
    "other names": ("gpt_neox", {}, {"rotary_emb_base": 1e4, "rotary_pct": 0.25, "rope_scaling": None}),
    "Gemma 3": (
        "gemma3_text",
        per_kind({**LINEAR, "rope_theta": 1e6}, {**PLAIN, "rope_theta": 2e4}),
        rope(1e6, LINEAR, rope_local_base_freq=2e4, sliding_window_pattern=6),
    ),
    "OLMo 3": ("olmo3", per_kind({**YARN, "rope_theta": 5e5}, {**PLAIN, "rope_theta": 5e5}), rope(5e5, YARN)),
    "OLMo 3 with two bases, which it could not have": (
        "olmo3",
        per_kind({**PLAIN, "rope_theta": 5e5}, {**PLAIN, "rope_theta": 1e4}),
        {},
    ),
    "Phi-3 with its own keys": (
        "phi3",
        {
            "rope_parameters": {"rope_type": "longrope", **LONG, "rope_theta": 1e4},
            "original_max_position_embeddings": 32,
        },
        rope(1e4, {"type": "longrope", **LONG}, partial_rotary_factor=1.0),
    ),
    "Cohere 2": ("cohere2", {}, rope(1e4, sliding_window_pattern=4)),
    "Qwen3-MoE": ("qwen3_moe", {}, rope(1e4, num_experts=4)),
    "no RoPE": ("gpt2", {}, {}),
}


@pytest.mark.parametrize("case", KNOWN)
def test_the_older_form_stands_beside_the_new_one(case: str) -> None:
    model_type, fields, expected = KNOWN[case]
    assert added(config_of(model_type, **fields)) == expected


def test_an_older_config_json_stays_as_it_is() -> None:
    config = config_of("llama")
    del config["rope_parameters"]
    config |= {
        "rope_theta": 1e5,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "torch_dtype": "bfloat16",
    }
    del config["dtype"]
    assert with_older_forms(config) == config


def test_older_names_that_contradict_the_new_ones_say_what_transformers_reads() -> None:
    config = config_of("llama", rope_parameters={**PLAIN, "rope_theta": 1e5}, dtype="bfloat16")
    written = with_older_forms(config | {"rope_theta": 1e4, "torch_dtype": "float32"})
    assert (written["rope_theta"], written["torch_dtype"]) == (1e5, "bfloat16")


def test_the_nested_text_config_gets_both_forms() -> None:
    text = config_of("gemma3_text", dtype="bfloat16")
    config = {"model_type": "gemma3", "text_config": text, "dtype": "bfloat16"}
    written = with_older_forms(config)
    assert written == {
        **config,
        "text_config": with_older_forms(text),
        "torch_dtype": "bfloat16",
    }
    assert written["text_config"]["rope_local_base_freq"] == 1e4


@pytest.mark.parametrize(
    "model_type", [*FAMILIES, "gemma3n_text", "olmo3", "exaone4", "cohere2_moe", "apertus"]
)
def test_transformers_reads_the_same_with_both_forms(model_type: str) -> None:
    config = config_of(model_type)
    written = with_older_forms(config)
    new = added(config)
    read = CONFIG_MAPPING[model_type].from_dict
    assert without(read(dict(written)), new) == without(read(dict(config)), new)
    assert ("rope_scaling" in written) == bool(config.get("rope_parameters"))


def without(config: Any, names: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in names}


@pytest.mark.parametrize(
    ("dropped", "period"),
    [
        ((), 4),
        ((3,), 7),
        ((4,), None),
        ((0, 4), 3),
        ((1, 2, 5, 6), 2),
        ((0, 1, 2, 4, 5, 6), 1),
        ((3, 7), None),
        ((7,), 4),
    ],
)
@pytest.mark.parametrize("model_type", ["cohere2", "gemma3_text"])
def test_a_period_is_that_of_the_layers_that_stay_or_is_gone(
    model_type: str, dropped: tuple[int, ...], period: int | None
) -> None:
    config = config_of(model_type, layer_types=HYBRID) | dict.fromkeys(PERIOD_NAMES, 4)
    kept = [layer for layer in range(8) if layer not in dropped]
    written = with_older_forms(prune_config(config, kept=kept))
    assert [written.get(name) for name in PERIOD_NAMES] == [period] * 2


@pytest.mark.parametrize(
    ("dropped", "pattern"),
    [((), "LLLG"), ((0, 4), "LLG"), ((2,), "LLGL"), ((3, 7), "L")],
)
def test_the_letters_of_exaone_4_spell_the_layers_that_stay(dropped: tuple[int, ...], pattern: str) -> None:
    config = config_of("exaone4", sliding_window_pattern="LLLG", layer_types=HYBRID)
    kept = [layer for layer in range(8) if layer not in dropped]
    assert with_older_forms(prune_config(config, kept=kept))["sliding_window_pattern"] == pattern


@given(kinds=st.lists(st.sampled_from(["sliding_attention", "full_attention"]), min_size=1, max_size=12))
def test_a_period_that_is_written_gives_the_list_back(kinds: list[str]) -> None:
    config = config_of("gemma3_text", num_hidden_layers=len(kinds), layer_types=kinds)
    period = with_older_forms(config).get("sliding_window_pattern")
    periods = [
        number
        for number in range(1, len(kinds) + 1)
        if kinds == ["sliding_attention" if (i + 1) % number else "full_attention" for i in range(len(kinds))]
    ]
    assert period == (periods[0] if periods else None)


def test_both_forms_are_written_once_only() -> None:
    once = with_older_forms(config_of("gemma3_text", dtype="bfloat16"))
    assert with_older_forms(once) == once
