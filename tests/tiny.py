"""Tiny models with a byte tokenizer, for tests that need a whole checkpoint on disk."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from factory.artifacts import Adapter, DataSource
from factory.model.tokenizer import Encoder

END = "<|end|>"


def byte_tokenizer(around: str = "$A") -> PreTrainedTokenizerFast:
    """One token per byte, and an end token that also begins texts and pads.

    Args:
        around: What is put around a text `$A`, such as f"{END} $A".
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([END, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=[(END, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END)


def byte_encoder(around: str = "$A") -> Encoder:
    """An encoder of the byte tokenizer for a model with a row for each of its tokens."""
    return Encoder(byte_tokenizer(around), vocab_size=257)


def save_llama(folder: Path, *, num_layers: int = 4, seed: int = 0, **options: Any) -> Path:
    """Write a random Llama with its tokenizer, in bf16; layers do turn the stream."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=True,
        **options,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def rhymes(count: int) -> list[str]:
    """Documents that a tiny model can learn something of in a few steps."""
    words = ["one", "two", "three", "four", "five", "six"]
    return [" ".join(words[(start + step) % len(words)] for step in range(40)) for start in range(count)]


def an_adapter(**fields: Any) -> Adapter:
    """What a healing says of itself, with some of its facts chosen."""
    values: dict[str, Any] = {
        "objective": "sft",
        "quantization": "nf4",
        "rank": 4,
        "learning_rate": 1e-2,
        "target_modules": ("mlp.up_proj",),
        "num_steps": 12,
        "num_tokens": 1536,
        "sequence_length": 64,
        "num_trainable_parameters": 1,
        "curve": (),
        "guard_loss_before": 3.0,
        "guard_loss_after": 2.5,
        "data": DataSource(name="rhymes", version="1"),
    }
    return Adapter(**values | fields)
