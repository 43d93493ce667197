"""Trainers for both objectives: the text's next tokens, or the source's distribution over them."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers.utils.import_utils import is_cuda_stream_capturing
from trl import SFTTrainer

from factory.config.settings import HealSettings
from factory.errors import UnsupportedArchitectureError
from factory.healing.callbacks import rises
from factory.healing.cuda_graphs import PassGraphs
from factory.healing.head_loss import IGNORED, HeadLoss, backbone_of, head_of
from factory.healing.packing import use_packed_attention
from factory.model.layers import Call, bypassed, decoder_layers, record_forms
from factory.parallel import processes

PASSES = 2**20  # more than a step can have


class HealTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose dropout and held-out loss do not depend on the number of processes."""

    step, passes = -1, 0  # present step of this process, and its passes in that step
    control: Any
    graphs: PassGraphs | None = None  # of its passes, once `fit_passes` has found that they can be captured

    @classmethod
    def options(cls, settings: HealSettings, *, dropped: Sequence[int], start: int) -> dict[str, Any]:
        """Return arguments that only this trainer takes.

        Args:
            settings: Settings of the healing.
            dropped: Layers of the source that the student lacks.
            start: First layer with an adapter.
        """
        return {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.causal = self.accelerator.unwrap_model(self.model).get_base_model()
        self.vocab_size = self.causal.config.get_text_config().vocab_size
        takes = inspect.signature(self.causal.forward).parameters
        self.one_logit = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        if processes.count() > 1 and not processes.sharded():
            # Else accelerate wraps it in DDP, which averages gradients within a pass: that can neither
            # be captured, nor do without a parameter, such as one of an expert that no token reached.
            self.accelerator.prepare_model(self.model, evaluation_mode=True)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the next-token loss in nats per token, through the model's own head."""
        inputs, labels = _divided(inputs)
        states, _ = self._states(model, inputs)
        loss = self._share(self._head_loss(states, None, labels, 1.0), labels, num_items_in_batch)
        return (loss, None) if return_outputs else loss

    def _states(
        self, model: Any, inputs: dict[str, Any], watched: Any = ()
    ) -> tuple[torch.Tensor, dict[int, Call]]:
        """Return the states before the head, [b, t, d], and the inputs of some layers in that pass.

        Calls the whole model, which casts, shards and synchronises; its head gets the last token only.
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
                layer = decoder_layers(self.causal)[index]
                hooks.callback(layer.register_forward_pre_hook(keep(index), with_kwargs=True).remove)
            logits = model(**inputs, **self.one_logit).logits
        if processes.sharded():  # FSDP makes whole what it divided where a backward pass meets this output
            states[0] = states[0] + 0 * logits.sum()
        return states[0], calls

    def _head_loss(
        self, student: torch.Tensor, teacher: torch.Tensor | None, labels: torch.Tensor, weight: float
    ) -> torch.Tensor:
        """Return the sum over the predicted tokens in nats, from states [b, t, d] and labels [b, t − 1]."""
        # To find these tokens the processor waits for the GPU, which a captured pass may not do.
        rows = slice(None) if is_cuda_stream_capturing() else (labels != IGNORED).flatten()
        states = [None if s is None else s[:, :-1].flatten(0, 1)[rows] for s in (student, teacher)]
        with head_of(self.causal, self.output_class, self.accelerator.autocast) as logits_of:
            loss: torch.Tensor = HeadLoss.apply(  # type: ignore[no-untyped-call]
                *states, labels.flatten()[rows], weight, logits_of, self.vocab_size
            )
        return loss

    def _share(self, nats: torch.Tensor, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        """Return a pass's share of the loss of its step, from the sum over its tokens."""
        total = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        loss = nats / torch.as_tensor(total).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the gradients of all are averaged
        return loss

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """Seed each pass by its position in the whole batch, which is dealt to the processes in turn."""
        if self.step != self.state.global_step:
            self.step, self.passes = self.state.global_step, 0
        place = self.passes * processes.count() + processes.index()
        self.passes += 1
        torch.manual_seed(((self.args.seed * 2**20 + self.step) * PASSES + place) % 2**63)
        run = partial(super().training_step, model)
        if self.graphs:
            run = partial(self.graphs.run, run)
        loss = run(inputs, num_items_in_batch)
        if self.accelerator.sync_gradients and not processes.sharded():  # the last pass of a step
            processes.average(_gradients(self.model))
        return loss

    def _prepare_for_training(self, *args: Any, **more: Any) -> Any:
        model, *rest = super()._prepare_for_training(*args, **more)
        if processes.sharded():
            self._begin_sharded(model)
        return model, *rest

    def _begin_sharded(self, model: Any) -> None:
        """Do what takes a model that can run, which it can only now.

        All but its layers stay whole once they were gathered. The head is called once per chunk of tokens, of
        which the processes have different numbers, so it must not wait for all processes each time.

        Raises:
            UnsupportedArchitectureError: Packed documents would see each other.
        """
        for module in {*model.modules()}.difference(decoder_layers(self.causal)):
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(False, recurse=False)
                module.set_reshard_after_backward(False, recurse=False)
        model.eval()
        if not all(processes.gather([use_packed_attention(model) is not None])):
            raise UnsupportedArchitectureError(
                f"{self.causal.config.model_type} cannot be divided among GPUs: "
                "it reads packed documents as if they were one",
                hint="use a GPU that holds the whole model, or `no_heal`",
            )

    def _init_training_state(self, *args: Any, **more: Any) -> Any:
        """Look for the best checkpoint beside the last one, as the folder may come from another machine."""
        begun = super()._init_training_state(*args, **more)
        self.state.best_model_checkpoint = self._best_checkpoint()
        return begun

    def _best_checkpoint(self) -> str | None:
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        return str(best) if best.is_dir() else None

    def _run_epoch(self, **kwargs: Any) -> None:
        """Take no step if training resumed from its final checkpoint; the trainer would take one more."""
        if self.state.global_step >= self.state.max_steps or rises(self.state):
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def _save_checkpoint(self, *args: Any, **more: Any) -> None:
        """Look for the best checkpoint once it is written, with the same result for all processes.

        The trainer looks before a sharded model is written: unless another process has begun to write the
        last checkpoint, it does not see that one and ends with the weights of the one before.
        """
        super()._save_checkpoint(*args, **more)
        self.state.best_model_checkpoint = processes.from_main(self._best_checkpoint())

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the held-out loss in nats per token, weighting all tokens equally in any batching."""
        self.model.eval()
        size = self.args.per_device_eval_batch_size
        mine = processes.share(range(len(self.eval_dataset)))
        longest = max(processes.gather([len(mine)]))
        found = []
        for start in range(0, longest, size):
            # A pass of a sharded model needs all processes: one without rows left repeats the first row.
            rows = mine[start : start + size]
            batch = self.data_collator([self.eval_dataset[row] for row in rows or [0]])
            inputs = self._prepare_inputs(batch)
            tokens = int((inputs["labels"][:, 1:] != -100).sum()) if rows else 0
            with self.accelerator.autocast():
                loss = float(self.compute_loss(self.model, inputs))
            found.append((tokens, loss * tokens if tokens else 0.0))
        found = processes.gather(found)
        metrics = {"eval_loss": math.fsum(nats for _, nats in found) / sum(tokens for tokens, _ in found)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class DistillTrainer(HealTrainer):
    """HealTrainer whose training loss is the forward KL divergence from the teacher, and the next-token loss.

    The teacher is the same model with all layers and without the adapter; the student runs without the
    dropped layers and with the adapter. Below the first adapted layer both are the same, so the student
    starts from the teacher's states there. In evaluation the loss is the student's cross-entropy, as in
    `sft`, so that the two are comparable. Of conversations, only the answers' tokens count, as in `sft`:
    nothing else is ever written by the model, and the held-out loss is of the same.

    Args:
        dropped: Layers that the student lacks.
        start: First layer with an adapter.
        seam_weight: Weight of the relative squared error of the states after each cut; 0 turns it off.
        next_token_weight: Share of the text's next-token loss; the divergence has the rest.
    """

    @classmethod
    def options(cls, settings: HealSettings, *, dropped: Sequence[int], start: int) -> dict[str, Any]:
        """Return arguments that only this trainer takes."""
        return {"dropped": dropped, "start": start} | settings.model_dump(
            include={"seam_weight", "next_token_weight"}
        )

    def __init__(
        self,
        *args: Any,
        dropped: Sequence[int],
        start: int = 0,
        seam_weight: float = 0.0,
        next_token_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.layers, self.dropped, self.start = decoder_layers(self.causal), frozenset(dropped), start
        self.seam_weight, self.next_token_weight = seam_weight, next_token_weight
        self.seams = [
            index for index in range(1, len(self.layers)) if index - 1 in dropped and index not in dropped
        ]
        self.forms = {} if processes.sharded() else record_forms(self.causal)
        # Permanently, not only in the forward pass: checkpointing runs layers again in the backward pass.
        self.bypass = ExitStack()
        self._bypass(self.dropped)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return KL(teacher ‖ student) and next-token loss, weighted and summed, in nats per token."""
        if not self.model.training:
            self._bypass(self.dropped)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs, labels = _divided(inputs)
        teacher, calls = self._teach(model, inputs)
        # Below the first adapted layer both are the same, unless the cut is there: then student and teacher
        # differ from the first layer.
        prefix = frozenset(range(self.start if self.start < min(self.dropped) else 0))
        self._bypass(self.dropped | prefix, {max(prefix): calls[self.start]} if prefix else {})
        student, seams = self._states(model, inputs, self.seams if self.seam_weight else ())
        loss = self._head_loss(student, teacher, labels, self.next_token_weight)
        for index, call in seams.items():
            error = _squared_error(_given(call), _given(calls[index]))[:, :-1]
            loss = loss + self.seam_weight * (error * (labels != IGNORED)).sum()
        loss = self._share(loss, labels, num_items_in_batch)
        return (loss, None) if return_outputs else loss

    def _begin_sharded(self, model: Any) -> None:
        self.bypass.close()
        super()._begin_sharded(model)
        self.forms = record_forms(self.causal, model)
        self._bypass(self.dropped)

    @torch.no_grad()
    def _teach(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[int, Call]]:
        """Return the teacher's final states, and the inputs of the layers after cuts."""
        self._bypass(frozenset())
        model.eval()  # no dropout in the teacher
        try:
            with self.accelerator.unwrap_model(model).disable_adapter():
                return self._states(model, inputs, {self.start, *self.seams})
        finally:
            model.train()

    def _bypass(self, skipped: frozenset[int], given: dict[int, Call] | None = None) -> None:
        self.bypass.close()
        self.bypass.enter_context(bypassed(self.layers, skipped, self.forms, given=given))


TRAINERS: Mapping[str, type[HealTrainer]] = {"sft": HealTrainer, "distill": DistillTrainer}  # by objective


def _gradients(model: Any) -> list[torch.Tensor]:
    """Return each trained parameter's gradient: zeros where no pass reached it, as in a captured pass."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


def _divided(inputs: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
    """Return what the model is given, and the labels of all tokens but the first, [b, t − 1]."""
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    return rest | {"use_cache": False}, inputs["labels"][:, 1:]


def _given(call: Call) -> torch.Tensor:
    states: torch.Tensor = call.args[0] if call.args else call.kwargs["hidden_states"]
    return states


def _squared_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return |student − teacher|² / |teacher|² of each token, from states [b, t, d] each."""
    error = (student.float() - teacher.float()).square().sum(dim=-1)
    return error / teacher.float().square().sum(dim=-1)
