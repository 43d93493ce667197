"""Merging: equal to peft's own merge, refused where it would be wrong."""

import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
)

from factory.artifacts import Adapter, Checkpoint
from factory.checkpoint.read import read_checkpoint
from factory.config.settings import BuildConfig
from factory.errors import CheckpointError, OverflowedError, VerificationError
from factory.healing.merge import judge, merge
from factory.model.loading import load_model
from factory.model.losses import token_loss
from factory.pipeline.run import Run
from factory.pipeline.stages import merge_stage
from factory.store.store import Store
from factory.text.text import NOTHING, Texts
from tests.builders.builds import an_adapter
from tests.families import config_of

LLAMA = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
GPT2 = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1)

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

TEXT_FIELDS = set(LLAMA.to_dict()) & {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads",
}  # fmt: skip


def save_model(folder: Path, config: Any = LLAMA, *, max_shard_size: str = "20KB") -> Checkpoint:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tensors = read_checkpoint(folder)
    return Checkpoint(
        folder=folder,
        num_layers=config.get_text_config().num_hidden_layers,
        num_parameters=sum(tensor.num_elements for tensor in tensors.values()),
        size_bytes=1,
        files={},
    )


def save_adapter(folder: Path, pruned: Checkpoint, **settings: Any) -> Adapter:
    """A LoRA adapter with random values in both halves, as a training run would leave it."""
    defaults: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["gate_proj", "down_proj", "q_proj"],
    }
    model = AutoModelForCausalLM.from_pretrained(pruned.folder, dtype=torch.bfloat16)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **(defaults | settings)))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    adapted.save_pretrained(folder)
    return describe(folder)


def describe(folder: Path) -> Adapter:
    return an_adapter(folder=folder, quantization="none")


def merged_by_peft(
    pruned: Checkpoint, adapter: Adapter, *, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(pruned.folder, dtype=dtype)
    merged = PeftModel.from_pretrained(model, adapter.folder).merge_and_unload().to(torch.bfloat16)
    folder = adapter.folder / "merged"
    merged.save_pretrained(folder)
    return stored_tensors(folder)


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_rounds_to(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the last bit of bf16, or to that of fp32 where a weight and its update all but cancel out."""
    torch.testing.assert_close(actual, expected, rtol=2**-7, atol=1e-6)


def assert_equals_peft(tmp_path: Path, config: Any, **settings: Any) -> None:
    pruned = save_model(tmp_path / "pruned", config)
    adapter = save_adapter(tmp_path / "adapter", pruned, **settings)
    (tmp_path / "merged").mkdir()
    result = merge(pruned, adapter, folder=tmp_path / "merged")
    before, after = stored_tensors(pruned.folder), stored_tensors(result.folder)
    expected = merged_by_peft(pruned, adapter)
    assert after.keys() == before.keys() == expected.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    stored_pairs = [n for n in load_file(adapter.folder / "adapter_model.safetensors") if "lora_A" in n]
    assert len(changed) == len(stored_pairs) > 0
    for name in after:
        assert_rounds_to(after[name], expected[name])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"gate_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 64}},
    ],
    ids=["plain", "rank-stabilised", "patterns"],
)
def test_the_result_is_what_peft_makes_of_the_bf16_model(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert_equals_peft(tmp_path, LLAMA, **settings)


def test_a_weight_of_many_blocks_becomes_what_peft_makes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("factory.healing.merge.ROWS", 2)
    assert_equals_peft(tmp_path, LLAMA)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("mixtral", {"use_rslora": True}),  # a matrix for each expert on disk, two of them fused on loading
        ("qwen3_moe", {"target_parameters": EXPERTS[1:], "alpha_pattern": {"down_proj": 32}}),
        ("gpt_oss", {"rank_pattern": {"experts.down_proj": 2}}),  # one tensor on disk, [experts, in, out]
    ],
)
def test_experts_that_are_one_parameter_merge_as_in_peft(
    tmp_path: Path, model_type: str, settings: dict[str, Any]
) -> None:
    config = CONFIG_MAPPING[model_type].from_dict(config_of(model_type))
    pruned = save_model(tmp_path / "pruned", config)
    adapter = save_adapter(
        tmp_path / "adapter",
        pruned,
        **{"target_modules": ["q_proj"], "target_parameters": EXPERTS, **settings},
    )
    (tmp_path / "merged").mkdir()
    before = stored_tensors(pruned.folder)
    after = stored_tensors(merge(pruned, adapter, folder=tmp_path / "merged").folder)
    # In 16 bits peft rounds the update of experts before it adds it.
    expected = merged_by_peft(pruned, adapter, dtype=torch.float32)
    assert after.keys() == before.keys() == expected.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    told = (*(["down"] if "qwen" in model_type else ["gate_up", "down", ".w"]), "q_proj")
    meant = {n for n in after if any(part in n for part in told) and ("experts" in n or "q_proj" in n)}
    assert changed == {name for name in meant if "bias" not in name}
    assert len(changed) > 8
    for name in after:
        assert_rounds_to(after[name], expected[name])


def test_transposed_weights_of_gpt2_merge_as_in_peft(tmp_path: Path) -> None:
    assert_equals_peft(tmp_path, GPT2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)


def test_an_adapter_of_four_bit_training_merges_transposed_though_it_does_not_say_so(tmp_path: Path) -> None:
    square = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_inner=32, n_layer=2, n_head=2)
    pruned = save_model(tmp_path / "pruned", square)
    adapter = save_adapter(tmp_path / "adapter", pruned, target_modules=["c_fc"], fan_in_fan_out=True)
    expected = merged_by_peft(pruned, adapter)
    edit_config(adapter, fan_in_fan_out=False)  # bitsandbytes makes plain linear layers of Conv1D
    (tmp_path / "merged").mkdir()
    result = stored_tensors(merge(pruned, adapter, folder=tmp_path / "merged").folder)
    for name, tensor in result.items():
        assert_rounds_to(tensor, expected[name])


def test_names_without_the_model_s_prefix_find_their_updates(tmp_path: Path) -> None:
    pruned = save_model(tmp_path / "pruned", GPT2, max_shard_size="1GB")
    adapter = save_adapter(tmp_path / "adapter", pruned, target_modules=["c_fc"], fan_in_fan_out=True)
    expected = merged_by_peft(pruned, adapter)
    weights = {name.removeprefix("transformer."): t for name, t in stored_tensors(pruned.folder).items()}
    save_file(weights, pruned.folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "merged").mkdir()
    result = stored_tensors(merge(pruned, adapter, folder=tmp_path / "merged").folder)
    assert result.keys() == weights.keys()
    assert not torch.equal(result["h.1.mlp.c_fc.weight"], weights["h.1.mlp.c_fc.weight"])
    for name, tensor in result.items():
        assert_rounds_to(tensor, expected[f"transformer.{name}"])


def test_updates_reach_tensors_that_load_under_another_name(tmp_path: Path) -> None:
    """Gemma 3 stores language_model.model.layers… and loads it as model.language_model.layers…"""
    text = {name: value for name, value in LLAMA.to_dict().items() if name in TEXT_FIELDS}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(
        text_config=text | {"head_dim": 8}, vision_config=vision, mm_tokens_per_image=4, boi_token_index=90,
        eoi_token_index=91, image_token_index=92,
    )  # fmt: skip
    assert_equals_peft(tmp_path, config, target_modules=r".*language_model.*\.(up|down)_proj")


def test_the_merged_folder_loads_and_says_what_it_was_merged_into(tmp_path: Path) -> None:
    pruned = save_model(tmp_path / "pruned")
    adapter = save_adapter(tmp_path / "adapter", pruned)
    (tmp_path / "merged").mkdir()
    result = merge(pruned, adapter, folder=tmp_path / "merged")
    assert result.merge_base == "source weights"
    assert result.num_parameters == pruned.num_parameters
    assert (result.folder / "config.json").read_bytes() == (pruned.folder / "config.json").read_bytes()
    assert AutoModelForCausalLM.from_pretrained(result.folder).num_parameters() == pruned.num_parameters


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("lora_bias", True),
        ("trainable_token_indices", [1]),
        ("layer_replication", [[0, 1]]),
        ("a_variant_of_tomorrow", {"rho": 1}),
    ],
)
def test_more_than_plain_lora_is_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    pruned = save_model(tmp_path / "pruned")
    adapter = save_adapter(tmp_path / "adapter", pruned)
    edit_config(adapter, **{field: value})
    with pytest.raises(CheckpointError, match=field):
        merge(pruned, adapter, folder=tmp_path / "merged")


def test_a_variant_as_peft_itself_saves_it_is_refused_by_name(tmp_path: Path) -> None:
    pruned = save_model(tmp_path / "pruned")
    adapter = save_adapter(tmp_path / "adapter", pruned, use_dora=True)
    with pytest.raises(CheckpointError, match="use_dora"):
        merge(pruned, adapter, folder=tmp_path / "merged")


@pytest.mark.parametrize(("field", "value"), [("bias", "all"), ("init_lora_weights", "pissa")])
def test_settings_that_change_other_weights_are_refused(tmp_path: Path, field: str, value: str) -> None:
    pruned = save_model(tmp_path / "pruned")
    adapter = save_adapter(tmp_path / "adapter", pruned)
    edit_config(adapter, **{field: value})
    with pytest.raises(CheckpointError, match=f"{field}={value}"):
        merge(pruned, adapter, folder=tmp_path / "merged")


def edit_config(adapter: Adapter, **fields: Any) -> None:
    path = adapter.folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(adapter: Adapter, edit: Any) -> None:
    path = adapter.folder / "adapter_model.safetensors"
    save_file(edit(load_file(path)), path)


def test_an_update_without_its_tensor_is_an_error_by_name(tmp_path: Path) -> None:
    pruned = save_model(tmp_path / "pruned")
    adapter = save_adapter(tmp_path / "adapter", pruned)
    edit_tensors(adapter, lambda t: {name.replace("layers.2.", "layers.7."): v for name, v in t.items()})
    with pytest.raises(VerificationError, match=r"model\.layers\.7\.\S+weight"):
        merge(pruned, adapter, folder=tmp_path / "merged")


def test_half_a_pair_is_an_error_by_name(tmp_path: Path) -> None:
    pruned = save_model(tmp_path / "pruned")
    adapter = save_adapter(tmp_path / "adapter", pruned)
    gone = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    edit_tensors(adapter, lambda t: {name: v for name, v in t.items() if name != gone})
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.down_proj\.lora_B"):
        merge(pruned, adapter, folder=tmp_path / "merged")


def test_an_adapter_for_another_width_is_an_error(tmp_path: Path) -> None:
    pruned = save_model(tmp_path / "pruned")
    adapter = save_adapter(tmp_path / "adapter", pruned)
    edit_tensors(adapter, lambda t: {n: v[:, :-1].clone() if "lora_A" in n else v for n, v in t.items()})
    with pytest.raises(VerificationError, match=r"do not fit"):
        merge(pruned, adapter, folder=tmp_path / "merged")


def test_a_rank_that_the_weights_do_not_have_is_an_error(tmp_path: Path) -> None:
    pruned = save_model(tmp_path / "pruned")
    adapter = save_adapter(tmp_path / "adapter", pruned)
    edit_config(adapter, r=8)
    with pytest.raises(VerificationError, match="of rank 8 do not fit"):
        merge(pruned, adapter, folder=tmp_path / "merged")


@pytest.mark.parametrize("content", ["", "[]", '{"peft_type": "LORA"}', '{"peft_type": "IA3"}'])
def test_a_damaged_adapter_configuration_is_an_error_with_its_path(tmp_path: Path, content: str) -> None:
    pruned = save_model(tmp_path / "pruned")
    adapter = save_adapter(tmp_path / "adapter", pruned)
    (adapter.folder / "adapter_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        merge(pruned, adapter, folder=tmp_path / "merged")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_adapter_is_an_error_by_name(tmp_path: Path, value: float) -> None:
    pruned = save_model(tmp_path / "pruned")
    adapter = save_adapter(tmp_path / "adapter", pruned)
    edit_tensors(adapter, lambda t: {n: v.fill_(value) if "2.mlp.down" in n else v for n, v in t.items()})
    (tmp_path / "merged").mkdir()
    with pytest.raises(OverflowedError, match=r"model\.layers\.2\.mlp\.down_proj\.weight"):
        merge(pruned, adapter, folder=tmp_path / "merged")


def test_quantised_weights_are_refused_by_dtype(tmp_path: Path) -> None:
    pruned = save_model(tmp_path / "pruned", max_shard_size="1GB")
    adapter = save_adapter(tmp_path / "adapter", pruned)
    weights = stored_tensors(pruned.folder)
    name = "model.layers.1.mlp.gate_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, pruned.folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        merge(pruned, adapter, folder=tmp_path / "merged")


def test_the_base_with_the_lower_loss_on_the_held_out_text_is_taken(tmp_path: Path) -> None:
    pruned = save_model(tmp_path / "pruned")
    adapter = save_adapter(tmp_path / "adapter", pruned).model_copy(update={"quantization": "nf4"})
    (adapter.folder / "guard.json").write_text(json.dumps([[1, 2, 3, 4, 5], [6, 7, 8]]))
    losses = {}
    for base in ("bf16", "nf4"):
        (tmp_path / base).mkdir()
        made = merge(pruned, adapter, folder=tmp_path / base, base=base)  # type: ignore[arg-type]
        losses[made.merge_base] = made
    (tmp_path / "auto").mkdir()
    auto = merge(pruned, adapter, folder=tmp_path / "auto")
    assert auto.merge_losses is not None
    assert set(auto.merge_losses) == set(losses) == {"source weights", "NF4 weights, unpacked"}
    assert auto.merge_base == min(auto.merge_losses, key=auto.merge_losses.__getitem__)
    assert losses["source weights"].files != losses["NF4 weights, unpacked"].files
    assert auto.files == losses[auto.merge_base].files
    assert sorted(path.name for path in auto.folder.iterdir()) == sorted(
        path.name for path in (tmp_path / "bf16").iterdir()
    )


def near_the_largest_number(folder: Path, *, share: float, added: float) -> tuple[Checkpoint, Adapter]:
    """A model in fp16 with a weight of that share of 40,000, and an adapter that adds to it."""
    pruned = save_model(folder / "pruned", max_shard_size="1GB")
    adapter = save_adapter(folder / "adapter", pruned).model_copy(update={"quantization": "nf4"})
    (adapter.folder / "guard.json").write_text(json.dumps([[1, 2, 3, 4, 5], [6, 7, 8]]))
    weights = {name: tensor.half() for name, tensor in stored_tensors(pruned.folder).items()}
    weights["model.layers.1.mlp.gate_proj.weight"][0, :2] = torch.tensor([40_000.0, share * 40_000.0])
    save_file(weights, pruned.folder / "model.safetensors", metadata={"format": "pt"})

    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        a, b = (
            next(tensors[name] for name in tensors if f"layers.1.mlp.gate_proj.lora_{side}" in name)
            for side in "AB"
        )
        a[0, 1], b[0, 0] = 1.0, added / 2  # α / r is 2
        return tensors

    edit_tensors(adapter, edit)
    return pruned, adapter


@pytest.mark.parametrize(
    ("share", "added", "is_left"),  # NF4 takes 0.85 of the largest for 0.72 of it, and 0.9 for 1
    [(0.85, 33_000.0, "NF4 weights, unpacked"), (0.9, 27_000.0, "source weights")],
)
def test_a_base_that_overflows_leaves_the_other(
    tmp_path: Path, share: float, added: float, is_left: str
) -> None:
    pruned, adapter = near_the_largest_number(tmp_path, share=share, added=added)
    (tmp_path / "merged").mkdir()
    merged = merge(pruned, adapter, folder=tmp_path / "merged")
    assert merged.merge_base == is_left
    assert set(merged.merge_losses or {}) == {is_left}
    assert sorted(path.name for path in merged.folder.iterdir() if path.is_dir()) == []


class Told:
    """A reporter that remembers the lines of finished stages."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def started(self, stage: str) -> None: ...
    def progressed(self, stage: str, done: int, total: int, note: str) -> None: ...
    def finished(self, stage: str, summary: str, seconds: float, reused: bool) -> None:
        self.lines.append(summary)

    def waiting(self, stage: str) -> None: ...
    def damaged(self, stage: str, file: str) -> None: ...


@pytest.mark.parametrize("base", ["auto", "bf16"])
def test_a_heal_that_overflows_on_every_base_is_one_that_did_not_help(
    tmp_path: Path, base: Literal["auto", "bf16"]
) -> None:
    pruned, adapter = near_the_largest_number(tmp_path, share=0.9, added=60_000.0)
    config = BuildConfig(reference="m", drop=0.3, merge_base=base)
    told = Told()
    run = Run(config, Store(tmp_path / "home"), told, Texts(NOTHING, NOTHING, NOTHING))
    run.keys |= {"prune": "0" * 16, "heal": "1" * 16}
    for _ in range(2):
        healed = merge_stage(run, pruned, adapter)
        assert healed.guard_losses is not None
        assert math.isfinite(healed.guard_losses["unhealed"])
        assert (healed.helped, healed.is_finite, healed.files) == (False, False, {})
        assert {path.name for path in healed.folder.iterdir()} == {"stage.json", "checkpoint.json"}
    line = "the adapter makes weights infinite or NaN, so the unhealed model ships"
    assert told.lines == [line, line]


@pytest.mark.parametrize("helps", [True, False])
def test_what_ships_is_decided_by_the_losses_of_the_files_not_of_the_training(
    tmp_path: Path, helps: bool
) -> None:
    pruned = save_model(tmp_path / "pruned")
    adapter = save_adapter(tmp_path / "adapter", pruned)
    assert adapter.guard_loss_after < adapter.guard_loss_before  # so much for the training
    (tmp_path / "merged").mkdir()
    merged = merge(pruned, adapter, folder=tmp_path / "merged")
    better = load_model(merged.folder if helps else pruned.folder)
    sequence = torch.tensor([[1]])
    for _ in range(40):  # what one of the two would write
        sequence = torch.cat([sequence, better(sequence).logits[:, -1:].argmax(-1)], dim=1)
    (adapter.folder / "guard.json").write_text(json.dumps(sequence.tolist()))
    judged = judge(merged, pruned, adapter)
    assert judged.guard_losses is not None
    assert judged.helped is helps
    for name, folder in (("unhealed", pruned.folder), ("healed", merged.folder)):
        assert judged.guard_losses[name] == token_loss(load_model(folder), sequence.tolist())


def test_the_nf4_base_is_what_the_model_was_in_training(tmp_path: Path) -> None:
    pruned = save_model(tmp_path / "pruned")
    adapter = save_adapter(tmp_path / "adapter", pruned).model_copy(update={"quantization": "nf4"})
    (tmp_path / "merged").mkdir()
    merge(pruned, adapter, folder=tmp_path / "merged", base="nf4")
    trained = PeftModel.from_pretrained(load_model(pruned.folder, four_bit=True), adapter.folder)
    merged = load_model(tmp_path / "merged")
    ids = torch.arange(1, 17)[None]
    with torch.no_grad():
        expected, found = trained(ids).logits, merged(ids).logits
    assert torch.allclose(found, expected, atol=0.02 * float(expected.abs().max()))
