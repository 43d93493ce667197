"""The trainer of healing: TRL's, with the same steps and guard loss in one process and in several."""

import math
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from trl import SFTTrainer

from factory import processes
from factory.watch import rises

PASSES = 2**20  # more than a step can have
TRIED = 32  # tokens that TRL's head and the model's own are compared on
CLOSE, CLOSE_16_BITS = 1e-3, 2e-2  # nats a token


class HealTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose dropout and guard loss are the same however many processes share the work."""

    step, passes = -1, 0  # where in training this process is, and its passes in that step
    control: Any
    fuses: bool | None = None  # whether TRL's head computes what the model's own does; None: not tried yet

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of next tokens by TRL's head, which makes no logits, or by the model's own.

        TRL 1.16 multiplies the last states with the output embeddings. That is not the whole head of BERT
        and its like, nor of decoders that cap their logits by another name than Gemma 2's (RecurrentGemma,
        xLSTM).
        """
        if self.fuses is None:
            self.fuses = self._head_can_be_fused(model, inputs["input_ids"])
        if self.fuses:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**rest | {"use_cache": False})
        logits = outputs.logits[:, :-1].flatten(0, 1).float()
        loss = cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
        loss = self._a_token(loss, (labels != -100).sum(), num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _a_token(self, nats: torch.Tensor, num_tokens: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        """A pass's share of the loss of its step, from the sum over its tokens."""
        total = num_tokens if num_items_in_batch is None else num_items_in_batch
        loss = nats / torch.as_tensor(total).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the gradients of all are averaged
        return loss

    @torch.no_grad()
    def _head_can_be_fused(self, model: Any, input_ids: torch.Tensor) -> bool:
        trains = model.training
        model.eval()
        tokens = input_ids[:1, :TRIED]
        try:
            with self.accelerator.autocast():
                fused = model(input_ids=tokens, labels=tokens, fused_lm_head=True).loss
                logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
        except (AttributeError, RuntimeError, TypeError):  # no backbone is found, or a head of another width
            return False
        finally:
            model.train(trains)
        far = abs(float(fused - cross_entropy(logits.float(), tokens[0, 1:])))
        return far <= (CLOSE if logits.dtype == torch.float32 else CLOSE_16_BITS)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """Seed each pass by its place in the whole batch, which is dealt out to the processes by turns."""
        if self.step != self.state.global_step:
            self.step, self.passes = self.state.global_step, 0
        place = self.passes * processes.count() + processes.index()
        self.passes += 1
        torch.manual_seed(((self.args.seed * 2**20 + self.step) * PASSES + place) % 2**63)
        return super().training_step(model, inputs, num_items_in_batch)

    def _init_training_state(self, *args: Any, **more: Any) -> Any:
        """Look for the best checkpoint beside the last one: the folder may have come from another machine."""
        begun = super()._init_training_state(*args, **more)
        self.state.best_model_checkpoint = self._best_checkpoint()
        return begun

    def _best_checkpoint(self) -> str | None:
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        return str(best) if best.is_dir() else None

    def _run_epoch(self, **what: Any) -> None:
        """Take no step where the checkpoint gone on from was the last: the trainer would take one more."""
        if self.state.global_step >= self.state.max_steps or rises(self.state):
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**what)

    def _save_checkpoint(self, *args: Any, **more: Any) -> None:
        """Look for the best checkpoint when it is there, and for all alike.

        The trainer looks before a sharded model is written: it sees the last checkpoint only if another
        process has begun to write it, and ends with the weights of the one before if not.
        """
        super()._save_checkpoint(*args, **more)
        self.state.best_model_checkpoint = processes.from_main(self._best_checkpoint())

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The guard's loss in nats a token: all tokens count alike, however they are batched and shared."""
        self.model.eval()
        size = self.args.per_device_eval_batch_size
        mine = processes.share(range(len(self.eval_dataset)))
        most = max(processes.gather([len(mine)]))
        found = []
        for start in range(0, most, size):
            # A sharded model takes all processes to a pass: one that has no rows left repeats the first.
            rows = mine[start : start + size]
            batch = self.data_collator([self.eval_dataset[row] for row in rows or [0]])
            inputs = self._prepare_inputs(batch)
            tokens = int((inputs["labels"][:, 1:] != -100).sum()) if rows else 0
            with self.accelerator.autocast():
                loss = float(self.compute_loss(self.model, inputs))
            found.append((tokens, loss * tokens if tokens else 0.0))
        self._metrics["eval"].clear()  # TRL's entropy and the like, which nobody reads
        found = processes.gather(found)
        metrics = {"eval_loss": math.fsum(nats for _, nats in found) / sum(tokens for tokens, _ in found)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
