"""Distil: the source teaches the model without some of its layers, both on one set of 4-bit weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from trl import SFTTrainer

from factory.decoder import decoder_layers
from factory.trial import bypassed, record_forms

ROWS = 256  # tokens whose whole distributions are in fp32 at once


class DistillTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose training loss is the forward KL divergence from the teacher's next-token distribution.

    The teacher is the same model with all its layers and without the adapter; the student runs without
    the dropped layers and with it. In evaluation the loss is the student's cross-entropy, as in `sft`, so
    that the two can be compared.

    Args:
        dropped: Layers that the student runs without.
    """

    def __init__(self, *args: Any, dropped: Sequence[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        inner = self.accelerator.unwrap_model(self.model)
        self.layers, self.dropped = decoder_layers(inner.get_base_model()), frozenset(dropped)
        self.forms = record_forms(inner.get_base_model())
        # For good, not only in the forward pass: activation checkpointing runs layers again in the backward.
        self.student = bypassed(self.layers, self.dropped, self.forms)
        self.student.__enter__()

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """KL(teacher ‖ student) in nats a predicted token while training."""
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = {**inputs, "use_cache": False}
        targets = inputs.pop("labels")[:, 1:] != -100
        with torch.no_grad(), self._teacher(model):
            teacher = model(**inputs).logits
        outputs = model(**inputs)
        rows = (outputs.logits[:, :-1][targets], teacher[:, :-1][targets])  # [n, v]
        loss = SummedDivergence.apply(*rows)  # type: ignore[no-untyped-call]
        loss = loss / (targets.sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    @contextmanager
    def _teacher(self, model: Any) -> Iterator[None]:
        """All layers, no adapter."""
        self.student.__exit__(None, None, None)
        try:
            with self.accelerator.unwrap_model(model).disable_adapter():
                yield
        finally:
            self.student = bypassed(self.layers, self.dropped, self.forms)
            self.student.__enter__()


class SummedDivergence(torch.autograd.Function):
    """Sum over rows of KL(softmax(teacher) ‖ softmax(student)), [n, v] and [n, v] → a number.

    The gradient, softmax(student) − softmax(teacher), is worked out in the forward pass a few rows at a
    time and put where the teacher's logits were, so that nothing of their size is held besides.
    """

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Forward KL in fp32; overwrites `teacher`."""
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        for start in range(0, len(student), ROWS):
            rows = slice(start, start + ROWS)
            log_student = student[rows].float().log_softmax(dim=-1)
            log_teacher = teacher[rows].float().log_softmax(dim=-1)
            weights = log_teacher.exp()
            total += (weights * (log_teacher - log_student)).sum()
            teacher[rows] = (log_student.exp() - weights).to(teacher.dtype)
        ctx.save_for_backward(teacher)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """softmax(student) − softmax(teacher), for the student alone."""
        (difference,) = ctx.saved_tensors
        return difference * grad.to(difference.dtype), None
