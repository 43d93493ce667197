"""Decoder surgery: finding the stack, renumbering names, rewriting configurations, proving the result."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from factory.errors import UnsupportedArchitectureError, UnsupportedFieldError
from factory.model.architecture import (
    DecoderStack,
    locate,
    prune_config,
    renumber,
)
from factory.model.config_proof import check_decoder, verify_structure
from factory.model.layers import decoder_layers, skip_layers
from tests.families import FAMILIES, assert_same_logits, build, config_of, plain

# Names --------------------------------------------------------------------------------------------


def names(prefix: str, num_layers: int) -> list[str]:
    return [f"{prefix}{i}.mlp.experts.{e}.w.weight" for i in range(num_layers) for e in range(3)]


def test_the_stack_is_found_without_importing_torch() -> None:
    code = (
        "import sys; from factory.model.architecture import locate;"
        "print(locate({'model_type': 'llama', 'num_hidden_layers': 1}, ['model.layers.0.w']).tensor_prefix,"
        "'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["model.layers.", "False", "False"]


@pytest.mark.parametrize("prefix", ["model.layers.", "transformer.h.", "h.", "gpt_neox.layers."])
def test_the_stack_is_the_first_numbered_part_of_the_names(prefix: str) -> None:
    config = {"model_type": "any", "num_hidden_layers": 4}
    assert locate(config, ["wte.weight", *names(prefix, 4)]) == DecoderStack("any", 4, prefix)


def test_the_text_stack_is_taken_where_the_vision_tower_is_as_deep() -> None:
    config = {"model_type": "gemma3", "text_config": {"num_hidden_layers": 4}, "vision_config": {}}
    tensors = names("model.language_model.layers.", 4) + names("model.vision_tower.encoder.layers.", 4)
    assert locate(config, tensors).tensor_prefix == "model.language_model.layers."


def test_a_count_that_config_json_leaves_out_comes_from_the_class() -> None:
    assert locate({"model_type": "qwen2"}, names("model.layers.", 32)).num_layers == 32


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, [], "t5 is an encoder-decoder"),
        ({"model_type": "t5"}, [], "t5 is an encoder-decoder"),
        ({"model_type": "llama", "num_hidden_layers": 4}, names("a.layers.", 3), "found none"),
        (
            {"model_type": "x", "num_hidden_layers": 2},
            names("a.layers.", 2) + names("b.layers.", 2),
            "found a.layers., b.layers.",
        ),
        ({"model_type": "nonesuch"}, [], "nonesuch is not known to transformers"),
        ({"model_type": "nonesuch", "auto_map": {}}, [], "nonesuch needs custom code"),
        ({}, [], "config.json names no model_type"),
        ({"model_type": "llama", "num_hidden_layers": 10**12}, names("a.layers.", 4), "found none"),
        ({"model_type": "llama", "num_hidden_layers": 0}, names("a.layers.", 4), "found none"),
        ({"model_type": "llama", "num_hidden_layers": 2}, ["a.layers.01.w", "a.layers.²."], "found none"),
        ({"model_type": "llama", "num_hidden_layers": 2}, [f"a.layers.{'9' * 5000}.w"], "found none"),
    ],
)
def test_what_has_no_single_stack_is_refused_by_name(
    config: dict[str, Any], tensors: list[str], said: str
) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=said):
        locate(config, tensors)


@given(st.data(), st.integers(2, 40), st.integers(0, 2))
def test_renumbering_is_a_bijection_onto_the_layers_that_stay(
    data: st.DataObject, num_layers: int, num_extra: int
) -> None:
    kept = sorted(data.draw(st.sets(st.integers(0, num_layers - 1), min_size=1)))
    stack = DecoderStack("any", num_layers, "model.layers.")
    kept_index = {old: new for new, old in enumerate(kept)}
    old_names = ["lm_head.weight", *names("model.layers.", num_layers + num_extra)]
    new_names = [renumber(name, stack=stack, kept_index=kept_index) for name in old_names]
    expected = ["lm_head.weight", *names("model.layers.", len(kept) + num_extra)]
    assert [name for name in new_names if name is not None] == expected


# Fields -------------------------------------------------------------------------------------------


def test_a_llama_changes_in_one_field_only() -> None:
    config = plain("llama")
    assert prune_config(config, kept=[0, 1, 5, 7]) == {**config, "num_hidden_layers": 4}
    assert config["num_hidden_layers"] == 8


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {"layer_types": ["full_attention"] * 6}),
        ("llama", {"layer_types": ["full_attention"] * 9}),
        ("llama", {"hidden_size": "wide"}),
        ("llama", {"hidden_act": "nonesuch"}),
        ("smollm3", {"no_rope_layers": [1] * 6}),
    ],
)
def test_a_configuration_that_was_wrong_before_the_cut_is_told_as_such(
    model_type: str, fields: dict[str, Any]
) -> None:
    with pytest.raises((UnsupportedArchitectureError, UnsupportedFieldError)) as caught:
        check_decoder({**config_of(model_type), **fields}, num_parameters=10**6)
    assert "own config.json is wrong" in caught.value.hint


def test_a_configuration_that_the_cut_alone_makes_impossible_blames_the_kept_layers() -> None:
    with pytest.raises(UnsupportedFieldError, match="without the dropped layers") as caught:
        verify_structure(plain("llama"), plain("llama", layer_types=["full_attention"]), [0, 1])
    assert "the kept layers" in caught.value.hint


def test_windows_that_follow_from_the_class_are_written_down() -> None:
    types = prune_config(plain("gemma2"), kept=[0, 3, 4, 6])["layer_types"]
    sliding, full = "sliding_attention", "full_attention"
    assert types == [sliding, full, sliding, sliding]


def test_position_encodings_stay_with_their_layers() -> None:
    pruned = prune_config(plain("smollm3"), kept=[0, 3, 4, 7])
    assert pruned["no_rope_layers"] == [1, 0, 1, 0]


def test_thresholds_count_the_kept_layers_below_them() -> None:
    config = plain("qwen2", use_sliding_window=True, max_window_layers=4)
    pruned = prune_config(config, kept=[0, 3, 4, 7])
    assert pruned["max_window_layers"] == 2
    assert pruned["layer_types"] == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert prune_config(config_of("deepseek_v3"), kept=[2, 3, 7])["first_k_dense_replace"] == 1


def test_lists_of_layer_numbers_follow_their_layers() -> None:
    assert prune_config(config_of("qwen3_moe"), kept=[0, 2, 5, 6])["mlp_only_layers"] == [1, 3]


def test_the_nested_text_config_is_edited() -> None:
    text = config_of("gemma3_text", layer_types=["full_attention", "sliding_attention"] * 4)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 8}
    config = {"model_type": "gemma3", "text_config": text, "vision_config": vision}
    pruned = prune_config(config, kept=[1, 3, 4])
    assert pruned["text_config"]["num_hidden_layers"] == 3
    assert pruned["text_config"]["layer_types"] == ["sliding_attention"] * 2 + ["full_attention"]
    assert pruned["vision_config"] == vision


def test_names_of_layers_in_quantisation_settings_are_renumbered() -> None:
    settings = {"modules_to_not_convert": ["lm_head", "model.layers.1.mlp", "model.layers.7.mlp"]}
    pruned = prune_config({**plain("llama"), "quantization_config": settings}, kept=[0, 2, 7])
    assert pruned["quantization_config"] == {"modules_to_not_convert": ["lm_head", "model.layers.2.mlp"]}


def test_names_of_other_stacks_keep_their_numbers_in_quantisation_settings() -> None:
    names = ["model.visual.blocks.1.attn.qkv", "mtp.layers.1.mlp.gate", "model.layers.7.mlp"]
    settings = {"modules_to_not_convert": names}
    pruned = prune_config({**plain("llama"), "quantization_config": settings}, kept=[0, 2, 7])
    kept = [*names[:2], "model.layers.2.mlp"]
    assert pruned["quantization_config"] == {"modules_to_not_convert": kept}


def test_overrides_of_single_layers_follow_their_layers() -> None:
    types = ["sliding_attention", "full_attention"] * 4
    config = plain("gemma4_text", hidden_size_per_layer_input=0, global_head_dim=16, layer_types=types)
    pruned = prune_config(config, kept=[0, 1, 2, 4, 7])
    assert pruned["per_layer_config"] == {"1": {"head_dim": 16}, "4": {"head_dim": 16}}


def test_patterns_become_explicit() -> None:
    pruned = prune_config(config_of("gpt_neo"), kept=[0, 2, 3])
    assert pruned["attention_types"] == [[["global"], 1], [["global"], 1], [["local"], 1]]
    recurrent = prune_config(plain("recurrent_gemma"), kept=[1, 2, 5])
    assert recurrent["block_types"] == ["recurrent", "attention", "attention"]


@pytest.mark.parametrize(
    ("config", "kept", "said"),
    [
        (plain("diffllama"), [0, 2], "diffllama: layer 2 as layer 1 would have self_attn.lambda_init"),
        (plain("minimax"), [0, 2, 7], "MiniMaxLightningAttention.get_slope_rate computes with"),
        (plain("gemma3n_text"), [0, 1], "gemma3n_text: hidden_size_per_layer_input = 256"),
        (plain("llama", mystery=[1, 2, 3, 4, 5, 6, 7, 8]), [0, 1], "llama: mystery has 8 entries"),
        (plain("llama", odd_layers=[3]), [0, 1], "llama: odd_layers has 1 entries"),
        (plain("llama", group={"mystery": [0] * 8}), [0, 1], "llama: group.mystery has 8 entries"),
        (
            {**plain("llama"), "quantization_config": {"ignore": [r"re:.*\.(3|4)\.mlp.*"]}},
            [0, 1],
            "quantization_config chooses layers by 're:",
        ),
        (
            {**plain("llama"), "quantization_config": {"ignore": [r"re:model\.layers\.[0-3]\..*"]}},
            [0, 1],
            "quantization_config chooses layers by 're:",
        ),
        (
            plain("jamba", attn_layer_period=2, attn_layer_offset=1, num_experts=1),
            [0, 2],
            "jamba: layer 2 as layer 1",
        ),
        (
            plain(
                "gemma4_text",
                hidden_size_per_layer_input=0,
                num_kv_shared_layers=4,
                layer_types=["sliding_attention", "full_attention"] * 4,
            ),
            [0, 1, 2, 5],
            "num_kv_shared_layers = 4: layer 5 reads the keys and values of layer 3",
        ),
        (
            plain("kimi_linear", layer_types=["linear_attention"] * 7 + ["full_attention"]),
            [0, 1],
            "layer_types would have no attention layer left",
        ),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else None,
)
def test_what_cannot_be_right_is_refused_by_the_name_of_its_field(
    config: dict[str, Any], kept: list[int], said: str
) -> None:
    with pytest.raises(UnsupportedFieldError, match=said):
        prune_config(config, kept=kept)


def test_a_period_is_accepted_where_the_kept_layers_still_follow_it() -> None:
    config = plain("jamba", attn_layer_period=2, attn_layer_offset=1, num_experts=1)
    assert prune_config(config, kept=[0, 1, 4, 7])["num_hidden_layers"] == 4


def test_what_loads_only_as_something_else_is_refused_by_name() -> None:
    with pytest.raises(
        UnsupportedArchitectureError, match="qwen2_vl is not among the causal language models"
    ):
        prune_config({"model_type": "qwen2_vl", "num_hidden_layers": 8}, kept=[0, 1])


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_kernel_of_another_repository_is_refused(name: str, nested: bool) -> None:
    asked = {name: "mallory/kernel"}
    with pytest.raises(UnsupportedFieldError, match=f"{name} = 'mallory/kernel' asks for a kernel"):
        prune_config(plain("llama", **({"text_config": asked} if nested else asked)), kept=[0, 1])


@pytest.mark.parametrize("count", [10**6, 10**12])
def test_labels_without_number_are_refused_before_each_gets_a_name(count: int) -> None:
    with pytest.raises(UnsupportedFieldError, match=f"num_labels = {count} is too large"):
        prune_config(plain("llama", num_labels=3) | {"num_labels": count}, kept=[0, 1])


def test_weights_of_another_name_are_refused() -> None:
    with pytest.raises(UnsupportedFieldError, match=r"transformers_weights = 'other\.bin'"):
        prune_config(plain("llama", transformers_weights="other.bin"), kept=[0, 1])


@pytest.mark.parametrize(
    "fields",
    [
        {"num_kv_shared_layers": -1}, {"num_kv_shared_layers": 1.5}, {"attention_types": []},
        {"scale_depth": 10**400}, {"block_types": {"a": 1}}, {"indexer_types": []}, {"head_dim": 10**400},
        {"text_config": {}}, {"decoder": True},
    ],
    ids=lambda fields: next(iter(fields)),
)  # fmt: skip
def test_values_that_no_field_can_have_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises((UnsupportedFieldError, UnsupportedArchitectureError)):
        prune_config(plain("llama", **fields), kept=[0, 1, 3])


def test_an_encoder_with_a_language_model_head_is_refused() -> None:
    with pytest.raises(UnsupportedArchitectureError, match="bert: is_decoder is false"):
        prune_config(plain("bert"), kept=[0, 1])


def test_a_field_that_was_not_rewritten_is_found_in_the_structure() -> None:
    config = config_of("gemma2")
    wrong = {**config, "num_hidden_layers": 3, "layer_types": config["layer_types"][:3]}
    verify_structure(config, wrong, [0, 1, 2])
    with pytest.raises(UnsupportedFieldError, match="gemma2: layer 2 as layer 1 would have"):
        verify_structure(config, wrong, [0, 2, 3])


# Random decoders, random cuts ---------------------------------------------------------------------

WINDOWED = st.sampled_from(["sliding_attention", "full_attention"])


def lists(kind: st.SearchStrategy[Any]) -> Callable[[int], st.SearchStrategy[Any]]:
    return lambda num_layers: st.lists(kind, min_size=num_layers, max_size=num_layers)


def with_attention(other: str) -> Callable[[int], st.SearchStrategy[Any]]:
    """transformers counts tokens by an attention layer: models without any cannot run."""
    return lambda n: lists(st.sampled_from([other, "full_attention"]))(n).filter(
        lambda t: "full_attention" in t
    )


def below(num_layers: int) -> st.SearchStrategy[int]:
    return st.integers(0, num_layers)


# Of each type the fields that make its layers differ, and what they may be in a model of so many layers.
RANDOM: dict[str, dict[str, Callable[[int], st.SearchStrategy[Any]]]] = {
    "cohere2": {"layer_types": lists(WINDOWED)},
    "deepseek_v3": {"first_k_dense_replace": below},
    "gemma2": {"layer_types": lists(WINDOWED)},
    "gemma3_text": {"layer_types": lists(WINDOWED)},
    "glm4_moe": {"first_k_dense_replace": below},
    "gpt_neo": {
        "attention_types": lambda n: lists(st.sampled_from(["global", "local"]))(n).map(lambda t: [[t, 1]])
    },
    "gpt_oss": {"layer_types": lists(WINDOWED)},
    "jamba": {
        "attn_layer_period": lambda _: st.integers(1, 3),
        "expert_layer_period": lambda _: st.integers(1, 2),
    },
    "lfm2": {"layer_types": with_attention("conv")},
    "llama": {},
    "llama4_text": {
        "no_rope_layers": lists(st.integers(0, 1)),
        "moe_layers": lambda n: st.sets(st.integers(0, n - 1)).map(sorted),
        "layer_types": lists(st.sampled_from(["chunked_attention", "full_attention"])),
    },
    "minicpm3": {"scale_depth": lambda _: st.floats(0.5, 2)},
    "qwen2": {"use_sliding_window": lambda _: st.booleans(), "max_window_layers": below},
    "qwen3_moe": {
        "mlp_only_layers": lambda n: st.sets(st.integers(0, n - 1)).map(sorted),
    },
    "qwen3_next": {"layer_types": with_attention("linear_attention")},
    "smollm3": {"no_rope_layers": lists(st.integers(0, 1))},
}


@st.composite
def random_cuts(draw: st.DrawFn) -> tuple[dict[str, Any], list[int]]:
    """A configuration and the layers to keep of it."""
    model_type = draw(st.sampled_from(sorted(RANDOM)))
    num_layers = draw(st.integers(2, 8))
    fields = {name: draw(values(num_layers)) for name, values in RANDOM[model_type].items()}
    counted = "num_layers" if model_type == "gpt_neo" else "num_hidden_layers"
    if "layer_types" in FAMILIES[model_type] and "layer_types" not in fields:
        fields["layer_types"] = FAMILIES[model_type]["layer_types"][:num_layers]
    kept = draw(st.sets(st.integers(0, num_layers - 1), min_size=1))
    return config_of(model_type, **{counted: num_layers}, **fields), sorted(kept)


def parts(layer: torch.nn.Module) -> dict[str, Any]:
    """What decides a layer's attention, window, position encoding and experts, as it was built."""
    found: dict[str, Any] = {}
    for path, module in layer.named_modules():
        found[path, "class"] = type(module).__name__
        for name in ("layer_type", "attention_type", "sliding_window", "use_rope", "is_sliding", "is_local"):
            if hasattr(module, name):
                found[path, name] = getattr(module, name)
    return found | {name: tuple(tensor.shape) for name, tensor in layer.named_parameters()}


def cut_state(config: dict[str, Any], state: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """The weights that stay, under their new names: each once, and none beside them."""
    stack = locate(config, state)
    kept_index = {old: new for new, old in enumerate(kept)}
    renamed = {renumber(name, stack=stack, kept_index=kept_index): value for name, value in state.items()}
    renamed.pop(None, None)
    in_layers = [name for name in state if name.startswith(stack.tensor_prefix)]
    gone = [name for name in in_layers if int(name[len(stack.tensor_prefix) :].split(".")[0]) not in kept]
    assert len(renamed) == len(state) - len(gone)
    return renamed


@settings(max_examples=60, deadline=None)
@given(random_cuts())
def test_each_kept_layer_keeps_its_kind_window_position_encoding_and_experts(
    cut: tuple[dict[str, Any], list[int]],
) -> None:
    config, kept = cut
    try:
        pruned = prune_config(config, kept=kept)
    except UnsupportedFieldError:  # a period that the kept layers break, no attention left
        assert config["model_type"] in ("jamba", "lfm2", "qwen3_next")
        return
    with torch.device("meta"):
        before, after = (decoder_layers(build(each)) for each in (config, pruned))
    assert [parts(layer) for layer in after] == [parts(before[layer]) for layer in kept]


@settings(max_examples=40, deadline=None)
@given(random_cuts())
def test_random_cuts_of_random_decoders_compute_what_the_original_does_with_its_layers_skipped(
    cut: tuple[dict[str, Any], list[int]],
) -> None:
    config, kept = cut
    try:
        pruned = build(prune_config(config, kept=kept))
    except UnsupportedFieldError:
        return
    original = build(config)
    pruned.load_state_dict(cut_state(config, original.state_dict(), kept))  # raises if any name differs
    tokens = torch.randint(3, 64, (1, 12))
    dropped = sorted({*range(len(decoder_layers(original)))} - {*kept})
    with torch.no_grad(), skip_layers(original, dropped):
        assert_same_logits(pruned(tokens).logits, original(tokens).logits)
