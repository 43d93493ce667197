"""Pad batches and compute their next-token losses."""

from collections.abc import Sequence
from typing import Any

import torch

from factory.model.tokenizer import Answered


def pad_batch(sequences: list[list[int]], *, pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad token lists to a batch: ids and attention mask, both [b, s]."""
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), longest), pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(sequences), longest), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, : len(sequence)] = 1
    return ids, mask


def answers_in(sequences: Sequence[list[int]]) -> torch.Tensor | None:
    """Return which tokens of a padded batch are in answers, [b, s]; None if it holds no conversations."""
    if not any(isinstance(sequence, Answered) for sequence in sequences):
        return None
    masks = [sequence.answers if isinstance(sequence, Answered) else [] for sequence in sequences]
    return pad_batch(masks, pad_token_id=0)[0].bool()


def row_losses(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    *,
    num_given: int = 1,
    answers: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's number of predicted tokens and summed next-token loss in nats: [b], float64.

    Args:
        ids: Tokens, [b, s], right-padded, on the model's device.
        mask: Attention mask, [b, s], 1 on real tokens.
        num_given: Number of tokens at the start of each row that are not predicted.
        answers: Tokens to predict, [b, s], on any device; None: all.
    """
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # [b, s, v]
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    targets[:, : num_given - 1] = -100
    if answers is not None:
        targets = targets.masked_fill(~answers[:, 1:].to(targets.device), -100)
    nats = [  # one row at a time: fp32 logits are large
        torch.nn.functional.cross_entropy(row.float(), target, reduction="sum")
        for row, target in zip(logits[:, :-1], targets.to(logits.device), strict=True)
    ]
    return (targets != -100).sum(dim=1).double(), torch.stack(nats).double()


@torch.inference_mode()
def token_loss(model: Any, sequences: Sequence[list[int]], *, batch_size: int = 1) -> float:
    """Return the mean next-token loss in nats over token lists; every predicted token counts equally.

    Of conversations, the tokens of answers are predicted.
    """
    counts, nats = 0.0, 0.0
    for start in range(0, len(sequences), batch_size):
        batch = list(sequences[start : start + batch_size])
        ids, mask = (tensor.to(model.device) for tensor in pad_batch(batch, pad_token_id=0))
        tokens, sums = row_losses(model, ids, mask, answers=answers_in(batch))
        counts, nats = counts + float(tokens.sum()), nats + float(sums.sum())
    return nats / counts
