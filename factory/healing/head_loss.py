"""The loss of final states, through the model's own head and without all of their logits at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import kl_div, nll_loss

from factory.model.config_proof import find_layers

CHUNK_VALUES = 2**25  # maximum tokens × vocabulary of fp32 distributions at once
IGNORED = -100  # label of a token that is not predicted


def backbone_of(causal: Any) -> Any:
    """Return the module below the head, which computes the final states.

    That is transformers' `get_decoder`; if this gives the whole model (Llama 4) or the output embeddings
    (ModernBERT's decoder), it is the module that contains the layers.
    """
    found = causal.get_decoder()
    name, layers = find_layers(causal)
    if found is not causal and any(module is layers for module in found.modules()):
        return found
    return causal.get_submodule(name.rpartition(".")[0])


@contextmanager
def head_of(
    causal: Any, output_class: Any, autocast: Callable[[], Any]
) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Yield the model's own function from final states [n, d] to logits [n, v]: some models cap them."""
    backbone = backbone_of(causal)
    own = backbone.__dict__.get("forward")
    given: list[torch.Tensor] = []
    backbone.forward = lambda *_args, **_kwargs: output_class(last_hidden_state=given.pop())

    def logits_of(states: torch.Tensor) -> torch.Tensor:
        given.append(states[None])
        ids = torch.zeros((1, len(states)), dtype=torch.long, device=states.device)
        with autocast():
            logits: torch.Tensor = causal(input_ids=ids, use_cache=False).logits[0]
        return logits

    try:
        yield logits_of
    finally:
        if own is None:
            del backbone.forward
        else:
            backbone.forward = own


class HeadLoss(torch.autograd.Function):
    """Sum over rows of (1 − w) · KL(teacher ‖ student) − w · log student(label), from [n, d] twice and [n].

    Only a few rows of logits exist at a time: the gradient for the student's states is computed in the
    forward pass, so that memory does not grow with tokens × vocabulary. Rows whose label is `IGNORED` add
    nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor | None,
        labels: torch.Tensor,
        weight: float,
        logits_of: Callable[[torch.Tensor], torch.Tensor],
        vocab_size: int,
    ) -> torch.Tensor:
        """Return the sum in nats, in fp32; `weight` is that of the labels, and 1 without a teacher."""
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        trains = ctx.needs_input_grad[0]
        gradient = torch.empty_like(student) if trains else None
        step = max(CHUNK_VALUES // vocab_size, 1)
        for start in range(0, len(student), step):
            rows = slice(start, start + step)
            with torch.set_grad_enabled(trains):
                states = student[rows].detach().requires_grad_(trains)
                log_student = logits_of(states).float().log_softmax(dim=-1)
                nats = weight * nll_loss(log_student, labels[rows], reduction="sum", ignore_index=IGNORED)
            if teacher is not None:
                with torch.no_grad():
                    target = logits_of(teacher[rows]).float().log_softmax(dim=-1)
                with torch.set_grad_enabled(trains):
                    each = kl_div(log_student, target, reduction="none", log_target=True).sum(dim=-1)
                    nats = nats + (1 - weight) * (each * (labels[rows] != IGNORED)).sum()
            if gradient is not None:
                (gradient[rows],) = torch.autograd.grad(nats, states)
            total += nats.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None]:
        """Return the gradient for the student's states; the other arguments have none."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None, None, None
