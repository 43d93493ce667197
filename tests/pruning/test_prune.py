"""Pruning on disk: known answers, untouched bytes, and a gate that catches what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    SmolLM3Config,
)

from factory.artifacts import Checkpoint, PruningPlan, Source
from factory.checkpoint.read import read_checkpoint
from factory.errors import VerificationError
from factory.pruning.prune import prune
from factory.pruning.verify import verify, verify_logits, verify_values
from tests.families import assert_same_logits

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = LlamaConfig(**SIZES)


def save_source(
    folder: Path, config: Any = LLAMA, *, identities: range = range(0), max_shard_size: str = "5GB"
) -> Source:
    """A random bf16 model whose layers in `identities` add nothing to the residual stream."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for index in identities:
        layer = model.model.layers[index]
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return describe(folder)


def describe(folder: Path) -> Source:
    config = json.loads((folder / "config.json").read_text())
    tensors = read_checkpoint(folder)
    num_layers = config.get("num_hidden_layers") or config["n_layer"]
    return Source(
        name="toy",
        commit="0" * 40,
        folder=folder,
        model_type=config["model_type"],
        architecture=config["architectures"][0],
        config=config,
        num_layers=num_layers,
        num_parameters=sum(tensor.num_elements for tensor in tensors.values()),
        layer_parameters=(1,) * num_layers,
        size_bytes=1,
        layer_bytes=(1,) * num_layers,
        vocab_size=config["vocab_size"],
        dtype="bfloat16",
    )


def drop(source: Source, layers: tuple[int, ...], folder: Path) -> Checkpoint:
    folder.mkdir()
    plan = PruningPlan(criterion="test", num_layers=source.num_layers, dropped=layers)
    return prune(source, plan, folder=folder)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(torch.arange(40).reshape(2, 20)).logits


@pytest.mark.parametrize("tied", [True, False])
def test_dropping_identity_layers_does_not_move_the_logits(tmp_path: Path, tied: bool) -> None:
    config = LlamaConfig(**SIZES, tie_word_embeddings=tied)
    source = save_source(tmp_path / "source", config, identities=range(2, 5))
    pruned = drop(source, (2, 3, 4), tmp_path / "pruned")
    assert_same_logits(logits(pruned.folder), logits(source.local_folder))


def test_the_kept_layers_are_the_source_s_bytes_under_new_numbers(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", max_shard_size="20KB")
    pruned = drop(source, (1, 4), tmp_path / "pruned")
    before, after = stored(source.local_folder), stored(pruned.folder)
    old_number = {0: 0, 1: 2, 2: 3, 3: 5}
    for name, tensor in after.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(old_number[int(parts[2])])
        assert torch.equal(tensor, before[".".join(parts)])
    assert len(after) == len(before) - 2 * 9
    assert pruned.num_parameters == sum(tensor.numel() for tensor in after.values())
    assert pruned.size_bytes == sum(path.stat().st_size for path in pruned.folder.glob("*.safetensors"))
    assert (pruned.num_layers, set(pruned.files)) == (4, {"model.safetensors"})


def test_an_absent_lm_head_stays_absent(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", LlamaConfig(**SIZES, tie_word_embeddings=True))
    pruned = drop(source, (3,), tmp_path / "pruned")
    assert "lm_head.weight" not in stored(pruned.folder)


def test_config_keeps_its_order_and_loses_the_code_that_is_not_copied(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source")
    config = source.config | {
        "auto_map": {"AutoModelForCausalLM": "modeling_x.LlamaForCausalLM"},
        "_name_or_path": "/home/alice/x",
    }
    (source.local_folder / "modeling_x.py").write_text("raise SystemExit")
    pruned = drop(source.model_copy(update={"config": config}), (1,), tmp_path / "pruned")
    text = (pruned.folder / "config.json").read_text()
    older = {"torch_dtype": "bfloat16", "rope_theta": 10000.0, "rope_scaling": None}
    assert json.loads(text) == source.config | {"num_hidden_layers": 5} | older
    assert list(json.loads(text)) == [*source.config, *older]
    assert text.startswith('{\n  "')
    assert text.endswith("}\n")
    assert not list(pruned.folder.glob("*.py"))


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=96, n_embd=32, n_layer=6, n_head=4, bos_token_id=1, eos_token_id=1),
        GPTNeoXConfig(**{name: value for name, value in SIZES.items() if name != "num_key_value_heads"}),
        MixtralConfig(**SIZES, num_local_experts=4),
        SmolLM3Config(**SIZES, no_rope_layer_interval=3, no_rope_layers=[1, 1, 0, 1, 1, 0]),
        Gemma3TextConfig(
            **SIZES, head_dim=8, sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"] * 2,
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_other_decoders_pass_the_gate_when_their_layers_go(tmp_path: Path, config: Any) -> None:
    source = save_source(tmp_path / "source", config)
    pruned = drop(source, (1, 2), tmp_path / "pruned")
    assert logits(pruned.folder).isfinite().all()


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source", max_shard_size="20KB")
    first = drop(source, (1, 2), tmp_path / "first")
    assert first.files == drop(source, (1, 2), tmp_path / "second").files


def test_tensors_that_the_source_itself_leaves_unused_stay_unused(tmp_path: Path) -> None:
    folder = save_source(tmp_path / "source").local_folder
    edit(
        folder, lambda tensors: tensors | {f"model.layers.{i}.spare.weight": torch.ones(2) for i in range(6)}
    )
    pruned = drop(describe(folder), (1, 2), tmp_path / "pruned")
    assert "model.layers.3.spare.weight" in stored(pruned.folder)


def test_names_without_the_model_s_prefix_are_kept_as_they_are(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=6, n_head=4, bos_token_id=1, eos_token_id=1)
    folder = save_source(tmp_path / "source", config).local_folder
    edit(folder, lambda tensors: {name.removeprefix("transformer."): t for name, t in tensors.items()})
    pruned = drop(describe(folder), (1, 2), tmp_path / "pruned")
    assert "h.3.mlp.c_fc.weight" in stored(pruned.folder)


# The gate ----------------------------------------------------------------------------------------


def edit(folder: Path, change: Any) -> None:
    save_file(change(stored(folder)), folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = save_source(tmp_path / "source").local_folder
    edit(folder, lambda tensors: {n: t for n, t in tensors.items() if "3.mlp.up_proj" not in n})
    with pytest.raises(VerificationError, match=r"missing model\.layers\.3\.mlp\.up_proj\.weight$"):
        verify(folder)


def test_a_tensor_too_many_is_named(tmp_path: Path) -> None:
    folder = save_source(tmp_path / "source").local_folder
    edit(folder, lambda tensors: tensors | {"model.layers.6.mlp.up_proj.weight": torch.ones(2)})
    with pytest.raises(VerificationError, match=r"unexpected model\.layers\.6\.mlp\.up_proj\.weight$"):
        verify(folder)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    folder = save_source(tmp_path / "source").local_folder
    edit(folder, lambda tensors: tensors | {"model.norm.weight": torch.ones(7)})
    with pytest.raises(VerificationError, match=r"of another shape model\.norm\.weight$"):
        verify(folder)


def test_of_many_wrong_tensors_the_first_few_are_named(tmp_path: Path) -> None:
    folder = save_source(tmp_path / "source").local_folder
    edit(folder, lambda tensors: {n: t for n, t in tensors.items() if ".layers.5." not in n})
    with pytest.raises(VerificationError, match=r"missing model\.layers\.5\.input\S+, .* and 5 more$"):
        verify(folder)


def test_experts_of_unequal_shape_do_not_pass(tmp_path: Path) -> None:
    folder = save_source(tmp_path / "source", MixtralConfig(**SIZES, num_local_experts=4)).local_folder
    name = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    edit(folder, lambda tensors: tensors | {name: torch.ones(2, 2)})
    with pytest.raises(VerificationError):
        verify(folder)


def test_a_per_layer_setting_that_went_to_another_layer_shows_in_the_logits(tmp_path: Path) -> None:
    """Names and shapes agree, the model computes something else: only the logits can tell."""
    config = SmolLM3Config(**SIZES, no_rope_layers=[1, 1, 0, 1, 1, 0])
    source = save_source(tmp_path / "source", config)
    pruned = drop(source, (1, 3), tmp_path / "pruned")
    path = pruned.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"no_rope_layers": [1, 1, 0, 1]}))
    verify(pruned.folder)
    with pytest.raises(VerificationError, match="source without the dropped layers"):
        verify_logits(source.local_folder, pruned.folder, dropped=(1, 3))


def test_layers_in_another_order_show_in_the_logits(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source")
    pruned = drop(source, (2,), tmp_path / "pruned")
    swap = {"0": "1", "1": "0"}

    def swapped(name: str) -> str:
        parts = name.split(".")
        return ".".join([*parts[:2], swap.get(parts[2], parts[2]), *parts[3:]]) if len(parts) > 3 else name

    edit(pruned.folder, lambda tensors: {swapped(name): tensor for name, tensor in tensors.items()})
    with pytest.raises(VerificationError, match="logits differ"):
        verify_logits(source.local_folder, pruned.folder, dropped=(2,))


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_values_that_are_not_the_source_s_are_found_in_the_layers_beside_the_cut(
    tmp_path: Path, layer: int
) -> None:
    source = save_source(tmp_path / "source")
    pruned = drop(source, (2, 3), tmp_path / "pruned")
    check = {"kept": (0, 1, 4, 5), "prefix": "model.layers."}
    assert verify_values(source.local_folder, pruned.folder, **check) == 4
    name = f"model.layers.{layer}.mlp.up_proj.weight"
    edit(pruned.folder, lambda tensors: tensors | {name: tensors[name] * 2})
    with pytest.raises(VerificationError, match=f"{name} differs from layer"):
        verify_values(source.local_folder, pruned.folder, **check)


def test_a_source_whose_cache_cuts_its_own_attention_short_is_no_fault_of_the_cut(tmp_path: Path) -> None:
    """transformers gives a cache a window for a setting that the model itself does not read."""
    source = save_source(tmp_path / "source", LlamaConfig(**SIZES, sliding_window=4))
    assert drop(source, (2,), tmp_path / "pruned").verified == ("names and shapes", "logits")


def test_a_plan_for_another_model_is_refused(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source")
    plan = PruningPlan(criterion="test", num_layers=8, dropped=(7,))
    with pytest.raises(VerificationError, match="plan is for 8 layers, but toy has 6"):
        prune(source, plan, folder=tmp_path / "pruned")
