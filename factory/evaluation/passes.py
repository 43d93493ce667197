"""How much text one pass of an evaluation reads."""

from typing import Any

import torch

ROWS = 8  # sequences of a pass on a CPU, which is as fast with few
MOST_TOKENS = 2**14  # of a pass on a GPU: more make no model faster
LOGIT_SHARE = 0.25  # of the free memory
BYTES_PER_LOGIT = 8  # logits and their logarithms, in 32 bits each


def pass_tokens(model: Any) -> int | None:
    """Return how many tokens a pass may have on the model's GPU, padding included; None on a CPU."""
    if model.device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(model.device)
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    per_token = BYTES_PER_LOGIT * model.config.get_text_config().vocab_size
    return max(1, min(MOST_TOKENS, int(LOGIT_SHARE * free / per_token)))


def num_rows(longest: int, tokens: int | None) -> int:
    """Return how many sequences fit a pass whose longest has this many tokens."""
    return ROWS if tokens is None else max(1, tokens // max(longest, 1))
