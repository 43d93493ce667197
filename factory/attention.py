"""Attention for packed documents on a GPU: each document for itself, without a mask of all against all."""

import importlib
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

VARLEN = "varlen"  # the name under which torch's own kernel is known to transformers
ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")  # kernels lack it
PROBE_LENGTHS = (5, 1, 17, 9)  # tokens of documents that are packed to try an implementation
CLOSE = 0.05  # of the logits' norm: 16-bit sums in another order stay below, another mask does not


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
    """torch.nn.attention.varlen for transformers: [b, h, t, d] each → [b, t, h, d].

    Args:
        cu_seq_lens_q: Where each packed document begins, and the end: [documents + 1]. None: a row is one.
        max_length_q: Tokens of the longest of them.

    Raises:
        NotImplementedError: Padding, or a kind of attention that the kernel does not know.
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


def use_packed_attention(model: Any) -> str:
    """Let a model attend within packed documents by the fastest means that gives the same as its own.

    Flash attention where it is installed, else torch's variable-length kernel; each is tried on a few
    packed documents first. Without a GPU, and where none agrees, the model keeps what it has.

    Returns:
        The name of what it uses now.
    """
    own: str = model.config._attn_implementation
    if model.device.type != "cuda":
        return own
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, flash_attention_mask)
    installed = {
        "flash_attention_3": is_flash_attn_3_available,
        "flash_attention_2": is_flash_attn_2_available,
        VARLEN: _has_varlen,
    }
    if any(getattr(model.config.get_text_config(), name, 0) for name in ATTENTION_DROPOUTS):
        return own
    expected = _packed_logits(model)
    for name, available in installed.items():
        if not available() or getattr(model.config.get_text_config(), "attention_chunk_size", None):
            continue
        try:
            model.set_attn_implementation(name)
            found = _packed_logits(model)
        except (NotImplementedError, ValueError, RuntimeError, TypeError, ImportError):
            continue  # a kind of attention, a size or a card that this one does not know
        if (found - expected).norm() <= CLOSE * expected.norm():
            return name
    model.set_attn_implementation(own)
    return own


def _has_varlen() -> bool:
    try:
        return hasattr(importlib.import_module("torch.nn.attention.varlen"), "varlen_attn")
    except ImportError:
        return False


@torch.no_grad()
def _packed_logits(model: Any) -> torch.Tensor:
    """Logits of a few packed documents, given as TRL's collator gives them."""
    positions = torch.cat([torch.arange(length) for length in PROBE_LENGTHS])[None].to(model.device)
    bounds = torch.tensor((0, *PROBE_LENGTHS)).cumsum(0).to(model.device, torch.int32)
    ids = (
        torch.arange(1, positions.shape[1] + 1, device=model.device)[None]
        % model.config.get_text_config().vocab_size
    )
    longest = max(PROBE_LENGTHS)
    logits: torch.Tensor = model(
        input_ids=ids,
        position_ids=positions,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=longest,
        max_length_k=longest,
        use_cache=False,
    ).logits.float()
    return logits
