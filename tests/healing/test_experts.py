"""Experts that are one parameter: healed, merged and recorded as such, or refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from factory.artifacts import PruningPlan
from factory.errors import UnsupportedArchitectureError
from factory.healing.heal import heal
from factory.healing.lora import as_named, check_targets, find_targets
from factory.healing.merge import merge
from factory.hub.resolve import resolve
from factory.model.config_proof import on_meta
from factory.model.loading import load_model
from factory.pruning.prune import prune
from factory.report.summaries import describe_healing
from tests.builders.builds import an_adapter
from tests.builders.healing import SETTINGS
from tests.builders.models import save_family
from tests.builders.texts import rhymes, text_of
from tests.families import assert_same_logits, config_of

EXPERTS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
ATTENTION = [f"self_attn.{part}_proj" for part in "koqv"]


@pytest.mark.parametrize(
    ("model_type", "fields", "settings", "adapted"),
    [
        ("mixtral", {}, {}, dict.fromkeys(range(4), EXPERTS)),
        (
            "qwen3_moe",
            {"mlp_only_layers": [4]},
            {"objective": "distill", "modules": "all-linear", "layers": "seam"},
            {
                1: [*ATTENTION, *EXPERTS],
                2: [*ATTENTION, "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"],
                3: [*ATTENTION, *EXPERTS],
            },
        ),
    ],
    ids=["sft", "distill"],
)
def test_experts_are_healed_and_the_merged_model_is_the_one_in_training(
    tmp_path: Path,
    model_type: str,
    fields: dict[str, Any],
    settings: dict[str, Any],
    adapted: dict[int, list[str]],
) -> None:
    source, dropped = save_family(tmp_path / "source", model_type, **fields), (2, 3)
    for name in ("pruned", "adapter", "merged"):
        (tmp_path / name).mkdir()
    plan = PruningPlan(criterion="chosen", num_layers=6, dropped=dropped)
    pruned = prune(resolve(str(source)), plan, folder=tmp_path / "pruned")
    adapter = heal(
        pruned,
        text_of(rhymes(60)),
        source_folder=source,
        dropped=dropped,
        settings=SETTINGS.model_copy(update=settings),
        seed=0,
        folder=tmp_path / "adapter",
        progress=lambda *_: None,
    )
    assert adapter.curve[-1].loss < adapter.curve[0].loss * (0.7 if adapter.objective == "distill" else 0.98)
    assert (adapter.quantization, adapter.experts, adapter.left_out) == ("nf4", tuple(EXPERTS), ())

    merge(pruned, adapter, folder=tmp_path / "merged", base="nf4")
    base, ids = load_model(pruned.folder, four_bit=True), torch.arange(1, 33)[None]
    with torch.no_grad():
        unhealed = base(ids).logits
        with as_named():
            trained = PeftModel.from_pretrained(base, adapter.folder)
        healed, found = trained(ids).logits, load_model(tmp_path / "merged")(ids).logits
        with trained.disable_adapter():
            assert_same_logits(trained(ids).logits, unhealed)
    # By the norm: rounding to bf16 may send a token whose experts are nearly even to another one.
    assert (found - healed).norm() < 0.1 * (healed - unhealed).norm()

    weights = load_file(adapter.folder / "adapter_model.safetensors")
    assert all(tensor.any() for tensor in weights.values())
    inner = {"mlp.experts": EXPERTS[0], "mlp.experts.base_layer": EXPERTS[1]}  # peft's names for them
    names: dict[int, set[str]] = {}
    for name in weights:
        number, _, module = name.split(".layers.")[1].split(".lora_")[0].partition(".")
        names.setdefault(int(number), set()).add(inner.get(module, module))
    assert names == {layer: set(modules) for layer, modules in adapted.items()}


@pytest.mark.parametrize(
    ("model_type", "part"),
    [
        *((name, "mlp") for name in ("deepseek_v3", "glm4_moe", "gpt_oss", "mixtral", "qwen3_moe")),
        ("granitemoehybrid", "block_sparse_moe"),
        ("jamba", "feed_forward"),
    ],
)
def test_experts_that_follow_transformers_own_interface_are_adapted(model_type: str, part: str) -> None:
    targets = find_targets(on_meta(config_of(model_type)), "ffn")
    assert targets.experts == [f"{part}.experts.down_proj", f"{part}.experts.gate_up_proj"]
    assert targets.left_out == []


@pytest.mark.parametrize("model_type", ["hunyuan_v1_moe", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_routers_stay_as_they_are(model_type: str) -> None:
    targets = find_targets(on_meta(config_of(model_type)), "all-linear")
    assert targets.modules
    assert not [name for name in targets.modules if {"gate", "shared_expert_gate"} & set(name.split("."))]


def test_what_stands_in_the_place_of_attention_is_no_feed_forward_module() -> None:
    config = on_meta(config_of("granitemoehybrid"))
    assert any("mamba" in name for name in find_targets(config, "all-linear").modules)
    assert not any("mamba" in name for name in find_targets(config, "ffn").modules)


LLAMA4 = ["feed_forward.experts.down_proj", "feed_forward.experts.gate_up_proj"]


def test_other_experts_are_refused_by_name_and_attention_is_offered() -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"\(feed_forward\.experts\.down_proj\)") as caught:
        check_targets(config_of("llama4_text"), "ffn")
    assert "`heal_modules=all-linear`" in caught.value.hint
    targets = find_targets(on_meta(config_of("llama4_text")), "all-linear")
    assert (targets.experts, targets.left_out) == ([], LLAMA4)
    assert set(ATTENTION) < set(targets.modules)
    with pytest.raises(
        UnsupportedArchitectureError, match="no known LoRA fits its experts"
    ):  # peft's special case
        check_targets(config_of("mixtral", num_local_experts=1, num_experts_per_tok=1), "ffn")


def test_experts_that_are_fused_in_a_way_not_known_here_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_targets(config_of("mixtral"), "ffn")
    monkeypatch.setattr("factory.model.experts.PLAIN_CONVERSIONS", ())
    with pytest.raises(UnsupportedArchitectureError, match=r"\(mlp\.experts\.down_proj\)"):
        check_targets(config_of("mixtral"), "ffn")
    check_targets(config_of("gpt_oss"), "ffn")  # nothing is fused


def test_packed_weights_are_refused_before_there_are_any() -> None:
    packed = config_of("gpt_oss") | {"quantization_config": {"quant_method": "mxfp4"}}
    with pytest.raises(UnsupportedArchitectureError, match=r"packed \(mxfp4\)") as caught:
        check_targets(packed, "all-linear")
    assert "`no_heal`" in caught.value.hint


@pytest.mark.parametrize(
    ("fields", "dropout", "says"),
    [
        ({"experts": EXPERTS}, 0.05, ("no dropout", "experts in 16 bits, not in NF4")),
        ({"experts": EXPERTS, "quantization": "none"}, 0.0, ()),
        ({"left_out": LLAMA4}, 0.05, ("experts in 16 bits, not in NF4", f"no adapter on {LLAMA4[0]}")),
    ],
)
def test_the_terminal_says_what_is_otherwise_with_experts(
    fields: dict[str, Any], dropout: float, says: tuple[str, ...]
) -> None:
    told = describe_healing(an_adapter(**fields), requested_steps=12, requested_dropout=dropout).split("; ")[
        2:
    ]
    assert len(told) == len(says)
    assert all(line.startswith(start) for line, start in zip(told, says, strict=True))
