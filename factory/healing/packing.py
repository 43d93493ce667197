"""Pack documents so that each is read as if alone, on a GPU without a full attention mask."""

import importlib
import math
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

VARLEN = "varlen"  # name under which torch's own kernel is registered in transformers
ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")  # kernels lack it
PROBE_LENGTHS = (17, 5, 1, 9)  # tokens of the documents packed to try an implementation
# Relative to the logits' norm: other orders of sums stay below, visible neighbours or wrong positions do not
# (.1 to .8 in tiny models of Bloom, Falcon, MPT, OPT and RecurrentGemma; rounding is 1e-6 in fp32).
CLOSE, CLOSE_16_BITS = 0.001, 0.05
OTHER_START = 101  # first token of the document that replaces another
SPREAD = 8  # times the rounding of a document without neighbours (observed: 3.6), as 16-bit errors add up


def varlen_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Adapt torch.nn.attention.varlen to transformers: [b, h, t, d] each → [b, t, h, d].

    Args:
        cu_seq_lens_q: Starts of the packed documents and the end: [documents + 1]; None: each row is one.
        max_length_q: Length of the longest document.

    Raises:
        NotImplementedError: There is padding, or a kind of attention that the kernel does not support.
    """
    from torch.nn.attention.varlen import varlen_attn

    unknown = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if attention_mask is not None or dropout or unknown or not getattr(module, "is_causal", True):
        raise NotImplementedError(f"variable-length attention with a mask, dropout or {unknown}")
    rows, heads, length, _ = query.shape
    if cu_seq_lens_q is None:
        cu_seq_lens_q = torch.arange(rows + 1, dtype=torch.int32, device=query.device) * length
    longest = max_length_q or length
    dtype = value.dtype if value.dtype != torch.float32 else torch.bfloat16
    q, k, v = (
        states.to(dtype).transpose(1, 2).flatten(0, 1).repeat_interleave(heads // states.shape[1], dim=1)
        for states in (query, key, value)
    )
    before = -1 if sliding_window is None else sliding_window - 1
    output = varlen_attn(
        q, k, v, cu_seq_lens_q, cu_seq_lens_q, longest, longest, scale=scaling, window_size=(before, 0)
    )
    assert isinstance(output, torch.Tensor)
    return output.view(rows, length, heads, -1).to(query.dtype), None


def use_packed_attention(model: Any) -> str | None:
    """Make a model use the fastest attention that keeps packed documents apart.

    On a GPU that is flash attention if installed, or torch's variable-length kernel; otherwise the model's
    own. Each is tried on a few short documents, whose logits must be the same packed and alone.

    Returns:
        The name of the attention now in use; None if none keeps documents apart, so they must not be packed.
    """
    own: str = model.config._attn_implementation
    names = (own, *_kernels(model))
    with torch.no_grad():
        rows = [torch.tensor([ids], device=model.device) for ids in _probe(model)]
        alone = torch.cat([_centred(model(input_ids=row, use_cache=False).logits[0]) for row in rows])
    off = {name: _off(model, name, alone) for name in names}
    # The first document never sees another, so its difference shows how far this model rounds.
    close = max(CLOSE if model.dtype == torch.float32 else CLOSE_16_BITS, SPREAD * off[own].first)
    unseen = max(CLOSE, off[own].first)  # experts may get batches of other sizes, and round differently
    fit = [name for name in names if off[name].all <= close and off[name].seen <= unseen]
    chosen = fit[-1] if fit else own
    if model.config._attn_implementation != chosen:
        model.set_attn_implementation(chosen)
    return chosen if fit else None


@dataclass(frozen=True)
class _Off:
    """Relative errors of packed documents' logits, compared with each document alone."""

    first: float = 0.0  # of the first document
    all: float = math.inf  # of all documents
    seen: float = math.inf  # of the later documents when the first, which they must not see, is replaced


def _off(model: Any, name: str, alone: torch.Tensor) -> _Off:
    documents, first = _probe(model), slice(PROBE_LENGTHS[0])
    others = [_probe(model, start=OTHER_START)[0], *documents[1:]]
    try:
        if model.config._attn_implementation != name:
            model.set_attn_implementation(name)
        packed, replaced = _packed_logits(model, documents), _packed_logits(model, others)
    except (NotImplementedError, ValueError, RuntimeError, TypeError, ImportError):
        return _Off()  # does not support this kind of attention, size or GPU
    later = slice(PROBE_LENGTHS[0], None)
    pairs = ((packed[first], alone[first]), (packed, alone), (replaced[later], packed[later]))
    return _Off(*(float((found - expected).norm() / expected.norm()) for found, expected in pairs))


def _centred(logits: torch.Tensor) -> torch.Tensor:
    """Return logits in fp32 minus their mean over the vocabulary, which changes no probability."""
    return logits.float() - logits.float().mean(dim=-1, keepdim=True)


def _kernels(model: Any) -> list[str]:
    """Return the names of this machine's kernels for packed documents, if they may suit the model."""
    config = model.config.get_text_config()
    if model.device.type != "cuda" or getattr(config, "attention_chunk_size", None):
        return []
    if any(getattr(config, name, 0) for name in ATTENTION_DROPOUTS):
        return []
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, flash_attention_mask)
    installed = {
        "flash_attention_3": is_flash_attn_3_available,
        "flash_attention_2": is_flash_attn_2_available,
        VARLEN: _has_varlen,
    }
    return [name for name, available in installed.items() if available()]


def _has_varlen() -> bool:
    try:
        return hasattr(importlib.import_module("torch.nn.attention.varlen"), "varlen_attn")
    except ImportError:
        return False


def _probe(model: Any, *, start: int = 1) -> list[list[int]]:
    """Return short documents of distinct tokens."""
    tokens = (number % model.config.get_text_config().vocab_size for number in count(start))
    return [list(islice(tokens, length)) for length in PROBE_LENGTHS]


@torch.no_grad()
def _packed_logits(model: Any, documents: list[list[int]]) -> torch.Tensor:
    """Return centred logits of documents packed as in training, [tokens, v]."""
    row = {"input_ids": list(chain.from_iterable(documents)), "seq_lengths": list(map(len, documents))}
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([row])
    del batch["labels"]
    inputs = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
    return _centred(model(**inputs, use_cache=False).logits[0])
