"""Callbacks of a healing run: progress and speed, tracking, and stopping a run that goes wrong."""

import io
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from itertools import pairwise
from typing import Any

import torch
from accelerate.utils import patch_environment
from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from factory.config.settings import SLOWER
from factory.config.tracking import Tracking
from factory.errors import HealingError
from factory.gpus import peak_flops

SPIKE = 2.0  # times the first loss: worse than not healing at all
SPIKE_NATS = 1.0  # minimum distance above the first loss
PROJECT = "hf-factory"  # project name in trackers
RISES = 3  # consecutive checkpoints


class DivergedError(HealingError):
    """The loss is no longer finite, or far above its starting value."""


class Progress(TrainerCallback):  # type: ignore[misc]
    """Reports steps, loss and speed; stops a run whose loss diverges before that state is saved.

    Args:
        report: Callback that receives steps done, total steps and "loss 2.345, 13,900 tokens/s, MFU 0.37".
        flops_per_token: FLOP of forward and backward passes without adapters, for the utilisation.
    """

    def __init__(self, report: Callable[[int, int, str], None], *, flops_per_token: float) -> None:
        self.report, self.flops_per_token = report, flops_per_token
        self.loss = ""
        self.began: tuple[float, float] | None = None  # seconds and tokens, after the first step
        self.first: float | None = None

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        losses = [float(entry["loss"]) for entry in state.log_history if "loss" in entry]
        self.first, self.began = (losses[0] if losses else None), None

    def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" not in (logs or {}):
            return
        loss = float(logs["loss"])
        self.first = loss if self.first is None else self.first
        self.loss = f"loss {loss:.3f}"
        refuse_run_away("loss", loss, first=self.first, step=state.global_step)

    def on_evaluate(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Check the held-out loss before the checkpoint is saved: a diverged one is useless for resuming."""
        losses = [float(entry["eval_loss"]) for entry in state.log_history if "eval_loss" in entry]
        refuse_run_away("held-out loss", losses[-1], first=losses[0], step=state.global_step)

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        now, tokens = time.monotonic(), float(state.num_input_tokens_seen)
        speed = ""
        if self.began is None:
            self.began = (now, tokens)
        elif now > self.began[0]:
            rate = (tokens - self.began[1]) / (now - self.began[0])
            speed = f", {rate:,.0f} tokens/s" + _utilisation(rate * self.flops_per_token)
        self.report(state.global_step, state.max_steps, self.loss + speed)
        if state.global_step == state.max_steps:  # the last step is a candidate like any other
            control.should_evaluate = control.should_save = True


def refuse_run_away(name: str, loss: float, *, first: float, step: int) -> None:
    """Raise DivergedError if a loss is not finite, or far above the first."""
    if not (math.isfinite(loss) and loss <= first + max((SPIKE - 1) * first, SPIKE_NATS)):
        raise DivergedError(
            f"the {name} is {loss:.4g} at step {step}; it was {first:.4g} at the start",
            hint="a lower `heal_lr` usually helps",
        )


class Report(TrainerCallback):  # type: ignore[misc]
    """Reports the training through transformers' callback for the tracker, until either of them ends.

    A failing tracker causes one warning; its output is hidden. A second attempt at a build continues the
    same run, except in TensorBoard, which shows all attempts of a folder together.
    """

    def __init__(self, tracking: Tracking, tell: Callable[[str], None]) -> None:
        self.tracking, self.tell, self.callback = tracking, tell, None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        with self._guarded():
            self._end_wandb()
            (callback_class,) = get_reporting_integration_callbacks(self.tracking.tracker)
            self.callback = callback_class()
        self._pass_on("on_train_begin", *args, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self._pass_on("on_log", *args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._pass_on("on_train_end", *args, **kwargs)
        with self._guarded():
            self._end_wandb()
        self.callback = None  # a loss logged later would start another run

    def _pass_on(self, event: str, *args: Any, **kwargs: Any) -> None:
        if self.callback is not None:
            with self._guarded():
                getattr(self.callback, event)(*args, **kwargs)

    def _end_wandb(self) -> None:
        """Finish the run, which transformers leaves open and would reuse for the next build."""
        if self.tracking.tracker == "wandb":
            import wandb

            wandb.finish()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        name, printed = self.tracking.run_name, io.StringIO()
        variables = {
            "WANDB_PROJECT": os.environ.get("WANDB_PROJECT", PROJECT),
            "WANDB_RUN_ID": name,
            "WANDB_RESUME": "allow",
            "WANDB_SILENT": "true",
            "TENSORBOARD_LOGGING_DIR": self.tracking.folder / name,
        }
        try:
            with redirect_stdout(printed), redirect_stderr(printed), patch_environment(**variables):
                yield
        except Exception as error:  # noqa: BLE001  no tracker failure may fail the build
            self.callback = None
            reason = next(iter(str(error).splitlines()), repr(error))
            self.tell(f"{self.tracking.tracker} failed; healing continues without it: {reason}")


class EarlyStop(TrainerCallback):  # type: ignore[misc]
    """Stops a run whose held-out loss rises at three consecutive checkpoints in the second half of its steps.

    It does not stop earlier, or because there is no new minimum: while the learning rate is high, the loss
    may be above its starting value, and it falls along with the rate.
    """

    def on_evaluate(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        if rises(state):
            control.should_training_stop = True


def rises(state: Any) -> bool:
    """Return whether the held-out loss in a trainer's state has risen `RISES` times in a row."""
    losses = [
        entry["eval_loss"]
        for entry in state.log_history
        if "eval_loss" in entry and entry["step"] >= state.max_steps / 2
    ][-RISES - 1 :]
    return len(losses) > RISES and all(after > before for before, after in pairwise(losses))


class Slower(TrainerCallback):  # type: ignore[misc]
    """Lowers the learning rate for the rest of a run, after its schedule and optimiser were restored.

    Args:
        step: Step from which the run resumed; later checkpoints already have the lower rate.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_begin(
        self,
        _args: Any,
        state: Any,
        _control: Any,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        if state.global_step > self.step:
            return
        for group in optimizer.param_groups:
            group["lr"] *= SLOWER
            group["initial_lr"] *= SLOWER
        schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)  # accelerate wraps it
        schedule.base_lrs = [SLOWER * rate for rate in schedule.base_lrs]


def _utilisation(flops: float) -> str:
    """Return the model FLOP utilisation of the GPU, ", MFU 0.37"; empty if the GPU's peak is unknown."""
    if not torch.cuda.is_available():
        return ""
    peak = peak_flops(torch.cuda.get_device_name())
    return f", MFU {flops / peak:.2f}" if peak else ""
