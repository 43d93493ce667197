"""Answer lm-eval's requests with a loaded model, as many in a pass as the GPU has room for."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from accelerate import Accelerator
from lm_eval.models.huggingface import HFLM

from factory.evaluation.passes import ROWS, num_rows, pass_tokens
from factory.parallel import processes

QUESTIONS = 64  # whose tokens are remembered


class HarnessModel(HFLM):  # type: ignore[misc]
    """lm-eval's own class for transformers, which reports requests done instead of showing progress bars.

    Args:
        model: Loaded model.
        tokenizer: Its tokenizer.
        report: Callback that receives the requests done and their total.
    """

    done, total = 0, 0
    size, following = 0, 0  # of the present pass, and the first request after it

    def __init__(self, model: Any, tokenizer: Any, *, report: Callable[[int, int], None]) -> None:
        self.report, self.most = report, pass_tokens(model)
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=ROWS if self.most is None else "auto",  # which asks for the size of each pass
        )
        self.tok_encode = lru_cache(QUESTIONS)(super().tok_encode)  # a question comes with each choice
        if processes.count() > 1:  # lm-eval takes a loaded model to be that of a single process
            self.accelerator = Accelerator()
            self._rank, self._world_size = processes.index(), processes.count()

    def loglikelihood(self, requests: list[Any], **_: Any) -> Any:
        self.done, self.total = 0, len(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> Any:
        self.done, self.total = 0, len(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], **_: Any) -> Any:
        self.done, self.total = 0, len(requests)
        return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> Any:
        return super()._loglikelihood_tokens(requests, **(kwargs | {"disable_tqdm": True}))

    def _batch_scheduler(self, pos: int, requests: Any) -> int:
        """Return the size of the pass with this request; the first of a pass is its longest."""
        if pos in (0, self.following):
            _, context, continuation = requests[pos]
            self.size = num_rows(min(len(context) + len(continuation), self.max_length), self.most)
            self.following = pos + self.size
        return self.size

    def _detect_batch_size(self, *_: Any, **__: Any) -> int:
        """Return the size of passes that generate, or that score a whole text window by window."""
        return ROWS

    def _model_call(self, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._count(len(inputs))
        return super()._model_call(inputs, *args, **kwargs)

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._count(len(context))
        return super()._model_generate(context, *args, **kwargs)

    def _count(self, rows: int) -> None:
        self.done = min(self.done + rows, self.total)
        self.report(self.done, self.total)
