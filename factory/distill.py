"""Distil: the source teaches the model without some of its layers, both on one set of 4-bit weights."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from factory.decoder import decoder_layers
from factory.decoder_proof import find_layers
from factory.trainer import HealTrainer
from factory.trial import Call, bypassed, record_forms

CHUNK_VALUES = 2**25  # tokens × vocabulary whose distributions are in fp32 at once


class DistillTrainer(HealTrainer):
    """HealTrainer whose training loss is the forward KL divergence from the teacher's next tokens.

    The teacher is the same model with all its layers and without the adapter; the student runs without
    the dropped layers and with it. Below the first adapted layer both are the same, so that the student
    starts from the teacher's states there. In evaluation the loss is the student's cross-entropy, as in
    `sft`, so that the two can be compared.

    Args:
        dropped: Layers that the student runs without.
        start: The first layer with an adapter.
        seam_weight: Of the relative squared error of the states behind each cut; 0: without.
    """

    def __init__(
        self, *args: Any, dropped: Sequence[int], start: int = 0, seam_weight: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.causal = self.accelerator.unwrap_model(self.model).get_base_model()
        self.layers, self.dropped, self.start = decoder_layers(self.causal), frozenset(dropped), start
        self.seam_weight = seam_weight
        self.seams = [
            index for index in range(1, len(self.layers)) if index - 1 in dropped and index not in dropped
        ]
        self.forms = record_forms(self.causal)
        self.vocab_size = self.causal.config.get_text_config().vocab_size
        self.one_logit = (
            {"logits_to_keep": 1}
            if "logits_to_keep" in inspect.signature(self.causal.forward).parameters
            else {}
        )
        # For good, not only in the forward pass: activation checkpointing runs layers again in the backward.
        self.bypass = ExitStack()
        self._bypass(self.dropped)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """KL(teacher ‖ student) in nats a predicted token while training."""
        if not self.model.training:
            self._bypass(self.dropped)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = {**inputs, "use_cache": False}
        targets = inputs.pop("labels")[:, 1:] != -100
        teacher, calls = self._teach(model, inputs)
        # Below the first adapted layer both are the same, unless the cut lies there: student and teacher
        # then differ from the first layer on.
        prefix = frozenset(range(self.start if self.start < min(self.dropped) else 0))
        self._bypass(self.dropped | prefix, {max(prefix): calls[self.start]} if prefix else {})
        student, seams = self._states(model, inputs, self.seams if self.seam_weight else ())
        with head_of(self.causal, self.output_class, self.accelerator.autocast) as logits_of:
            rows = (student[:, :-1][targets], teacher[:, :-1][targets])  # [n, d]
            loss = SummedDivergence.apply(*rows, logits_of, self.vocab_size)  # type: ignore[no-untyped-call]
        for index, call in seams.items():
            loss = loss + self.seam_weight * _summed_error(_given(call), _given(calls[index]))
        loss = self._a_token(loss, targets.sum(), num_items_in_batch)
        return (loss, None) if return_outputs else loss

    @torch.no_grad()
    def _teach(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[int, Call]]:
        """Last states of all layers without the adapter, and what the layers behind cuts were given."""
        self._bypass(frozenset())
        model.eval()  # a teacher does not drop out
        try:
            with self.accelerator.unwrap_model(model).disable_adapter():
                return self._states(model, inputs, {self.start, *self.seams})
        finally:
            model.train()

    def _states(
        self, model: Any, inputs: dict[str, Any], watched: Any
    ) -> tuple[torch.Tensor, dict[int, Call]]:
        """States before the head, [b, t, d], and what some layers were given in the pass.

        The whole model is called, which casts, shards and synchronises; its head sees the last token only.
        """
        calls: dict[int, Call] = {}
        states: list[torch.Tensor] = []

        def keep(index: int) -> Callable[..., None]:
            def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                calls[index] = Call(args, kwargs)

            return hook

        def keep_output(_module: Any, _args: Any, output: Any) -> None:
            self.output_class = type(output)
            states.append(output.last_hidden_state)

        with ExitStack() as hooks:
            after = backbone_of(self.causal).register_forward_hook(keep_output)
            hooks.callback(after.remove)
            for index in watched:
                handle = self.layers[index].register_forward_pre_hook(keep(index), with_kwargs=True)
                hooks.callback(handle.remove)
            model(**inputs, **self.one_logit)
        return states[0], calls

    def _bypass(self, skipped: frozenset[int], given: dict[int, Call] | None = None) -> None:
        self.bypass.close()
        self.bypass.enter_context(bypassed(self.layers, skipped, self.forms, given=given))


def _given(call: Call) -> torch.Tensor:
    states: torch.Tensor = call.args[0] if call.args else call.kwargs["hidden_states"]
    return states


def _summed_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of |student − teacher|² / |teacher|², states [b, t, d] each."""
    error = (student.float() - teacher.float()).square().sum(dim=-1)
    return (error / teacher.float().square().sum(dim=-1)).sum()


def backbone_of(causal: Any) -> Any:
    """The module that makes the last states, below the head.

    That is transformers' `get_decoder`; where it gives the whole model (Llama 4) or the output embeddings
    (ModernBERT's decoder), it is what holds the layers.
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
    """A function from last states [n, d] to logits [n, v], by the model's own way: some cap them."""
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


class SummedDivergence(torch.autograd.Function):
    """Sum over rows of KL(softmax(head(teacher)) ‖ softmax(head(student))), [n, d] and [n, d] → a number.

    The logits of a few rows at a time exist, never of all: the gradient for the student's states is worked
    out in the forward pass, so that memory does not grow with tokens × vocabulary.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        logits_of: Callable[[torch.Tensor], torch.Tensor],
        vocab_size: int,
    ) -> torch.Tensor:
        """Forward KL in fp32."""
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        gradient = torch.empty_like(student)
        step = max(CHUNK_VALUES // vocab_size, 1)
        for start in range(0, len(student), step):
            rows = slice(start, start + step)
            with torch.no_grad():
                target = logits_of(teacher[rows]).float().log_softmax(dim=-1)
            with torch.enable_grad():
                states = student[rows].detach().requires_grad_()
                log_student = logits_of(states).float().log_softmax(dim=-1)
                nats = torch.nn.functional.kl_div(log_student, target, reduction="sum", log_target=True)
            (gradient[rows],) = torch.autograd.grad(nats, states)
            total += nats.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """For the student's states alone."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None
