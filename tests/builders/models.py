"""Tiny models with a byte tokenizer, for tests that need a whole checkpoint; and NF4 by its definition."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from factory.model.tokenizer import Encoder
from tests.families import config_of

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


def merging_tokenizer(around: str = f"{END} $A", pre: pre_tokenizers.PreTokenizer | None = None) -> Any:
    """The byte tokenizer with three merges, as llama.cpp wants at least one; 260 tokens.

    Args:
        around: What is put around a text `$A`.
        pre: How texts are split; None: as GPT-2 does.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([END, *alphabet, "th", "the", "Ġthe"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e"), ("Ġ", "the")]))
    tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=[(END, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END)


def byte_encoder(around: str = "$A") -> Encoder:
    """An encoder of the byte tokenizer for a model with a row for each of its tokens."""
    return Encoder(byte_tokenizer(around), vocab_size=257)


def save_llama(
    folder: Path, *, num_layers: int = 4, seed: int = 0, max_length: int = 256, **options: Any
) -> Path:
    """Write a random Llama with its tokenizer, in bf16; layers do turn the stream.

    Args:
        max_length: Tokens that it was made for. It sets the batch of a healing by default: 16 texts per step
            for 256 tokens, 2 for 2048.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=max_length,
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


def save_family(folder: Path, model_type: str, **fields: Any) -> Path:
    torch.manual_seed(0)
    tokens = {"vocab_size": 257, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    config = config_of(model_type, num_hidden_layers=6, **tokens, **fields)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type].from_dict(config))
    model.to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


# The sixteen values of NF4, as published (arXiv 2305.14314, appendix E).
NF4 = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ]
)  # fmt: skip


def nearest_nf4(weight: torch.Tensor) -> torch.Tensor:
    """A matrix whose blocks of 64 consecutive values are rounded to NF4."""
    blocks = weight.float().flatten().view(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    nearest = NF4[(blocks / scale).unsqueeze(-1).sub(NF4).abs().argmin(dim=-1)]
    return (nearest * scale).view(weight.shape)


def save_lora(folder: Path, base: Path, **settings: Any) -> Path:
    """Write a random LoRA adapter of a model in peft's format, which names its base by this path."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    plain = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **plain | settings)).save_pretrained(folder)
    return folder
