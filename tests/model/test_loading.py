"""What is loaded has the values that are on disk, in four bits too, and can be padded and trained."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

from factory.errors import ModelError
from factory.model.loading import fuse_norms, load_model
from factory.model.losses import pad_batch
from tests.builders.models import nearest_nf4, save_llama


@pytest.mark.parametrize("width", [64, 96, 128, 160])
def test_four_bit_layers_compute_with_nf4_values_whatever_their_width(tmp_path: Path, width: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    full, four = load_model(tmp_path), load_model(tmp_path, four_bit=True)
    inputs = torch.randn(3, 5, width)
    for name in ("gate_proj", "down_proj"):
        weight = getattr(full.model.layers[0].mlp, name).weight
        vectors = inputs if name == "gate_proj" else torch.cat([inputs, inputs], dim=-1)
        expected = vectors @ nearest_nf4(weight).T
        with torch.no_grad():
            actual = getattr(four.model.layers[0].mlp, name)(vectors)
        # A value halfway between two codes may round either way.
        assert (actual - expected).norm() / expected.norm() < 1e-2
    assert any(isinstance(module, Linear4bit) for module in four.modules()) == (width % 32 == 0)


def test_parameters_that_would_be_made_up_are_refused(tmp_path: Path) -> None:
    folder = save_llama(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight"
    whole = tensors.pop(lost)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks {lost}, which transformers fills with random values"):
        load_model(folder)
    save_file({**tensors, lost: whole[1:].clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks {lost}"):
        load_model(folder)


SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def test_norms_are_fused_where_that_changes_nothing() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, rms_norm_eps=1e-5)).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        before = model(ids).logits
        assert fuse_norms(model) == 5
        assert torch.allclose(model(ids).logits, before, atol=1e-6)


def test_norms_that_compute_something_else_are_left_alone() -> None:
    assert fuse_norms(GemmaForCausalLM(GemmaConfig(**SMALL)).eval()) == 0  # adds 1 to its weights


def test_a_loaded_model_is_in_evaluation_mode_and_full_precision_on_a_cpu(tmp_path: Path) -> None:
    model = load_model(save_llama(tmp_path))
    assert not model.training
    assert model.dtype == torch.float32


def test_rows_are_padded_on_the_right_and_masked() -> None:
    ids, mask = pad_batch([[5, 6, 7], [8]], pad_token_id=3)
    assert ids.tolist() == [[5, 6, 7], [8, 3, 3]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
