"""Documents are packed only for models that read each of them as if it were alone."""

from pathlib import Path

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from factory.healing.data import data_sets
from factory.healing.packing import use_packed_attention
from factory.model.tokenizer import load_encoder
from tests.builders.healing import SETTINGS, run
from tests.builders.models import byte_tokenizer
from tests.builders.texts import text_of
from tests.families import build, config_of


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3_moe", "gpt2", "phi3", "gpt_neox"])
def test_a_model_that_keeps_packed_documents_apart_is_found_to(model_type: str) -> None:
    model = build(config_of(model_type))
    assert use_packed_attention(model) == "eager" == model.config._attn_implementation


@pytest.mark.parametrize(
    "model_type",
    ["opt", "bloom", "mpt", "gpt_oss", "mamba", "recurrent_gemma", "lfm2"],  # the last one raises
)
def test_a_model_that_reads_across_packed_documents_is_found_out(model_type: str) -> None:
    assert use_packed_attention(build(config_of(model_type))) is None


@pytest.mark.parametrize(
    "model_type", ["llama", "qwen3_moe", "gpt2", "gemma2", "bloom", "xglm", "jamba", "opt"]
)
def test_sixteen_bits_tell_the_same(model_type: str) -> None:
    model = build(config_of(model_type))
    verdict = use_packed_attention(model)
    assert use_packed_attention(model.to(torch.bfloat16)) == verdict


def test_what_all_tokens_of_the_vocabulary_share_hides_nothing() -> None:
    model = build(config_of("opt"))
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _module, _args, logits: logits + 100)
    assert use_packed_attention(model) is None


def test_what_reads_across_documents_is_healed_on_one_a_row_and_padding_is_not_counted(
    tmp_path: Path,
) -> None:
    size = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = OPTConfig(
        **size, vocab_size=257, word_embed_proj_dim=32, max_position_embeddings=128, pad_token_id=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    letters = "abcdefghijklmnopqrstuvwxyz+-*=_"
    documents = [letter * (10, 40, 10, 10, 10)[place % 5] for place, letter in enumerate(letters)]
    settings = SETTINGS.model_copy(update={"bits": 16, "num_steps": 12})
    text, encoder = text_of(documents), load_encoder(tmp_path / "model")
    _, rows = data_sets(text, encoder, settings=settings, seed=0, folder=tmp_path)
    assert len(rows) == 24
    adapter = run(tmp_path / "model", tmp_path / "adapter", settings=settings, documents=documents)
    assert not adapter.packed
    # Three epochs, each row once in each: 6 rows of 18.5 tokens a step, in place of 2 of 64.
    assert adapter.num_tokens == 3 * sum(map(len, rows["input_ids"]))
