"""Heal a pruned checkpoint: train a QLoRA adapter with TRL's SFTTrainer."""

import gc
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # otherwise TRL reports its use

import pyarrow.compute
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, TrainerState, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig

from factory.artifacts import Adapter, Checkpoint, LossPoint, SeamFit
from factory.config.objectives import OBJECTIVES
from factory.config.settings import HealSettings
from factory.config.tracking import NO_TRACKING, Tracking
from factory.errors import HealingError
from factory.healing.batch_size import fit_passes
from factory.healing.callbacks import PROJECT, DivergedError, EarlyStop, Progress, Report, Slower
from factory.healing.data import data_sets
from factory.healing.lora import (
    Targets,
    adapter_tensors,
    as_named,
    find_targets,
    first_adapted,
    lora_config,
    save_adapter,
    save_guard,
)
from factory.healing.packing import use_packed_attention
from factory.healing.seam.fit import load_factors, set_start
from factory.healing.trainers import TRAINERS, HealTrainer
from factory.model.config_proof import find_layers
from factory.model.devices import best_device
from factory.model.loading import fuse_norms, load_model, matrix_weights
from factory.model.tokenizer import load_encoder, of_row
from factory.parallel import processes
from factory.text.text import Text

CURVE_POINTS = 50
POINTS_PER_CHECKPOINT = 5  # of the curve: about ten checkpoints per run, each with the held-out loss
TRAINER_STATE = "trainer_state.json"
SLOWED = "slowed.json"  # in the stage's folder: the step from which the learning rate is lower
# Files of a complete checkpoint, with alternative names; trainer_state.json is written last.
CHECKPOINT_FILES = (("adapter_model.safetensors", "pytorch_model_fsdp*"), ("optimizer*",), ("scheduler.pt",))


@dataclass(frozen=True)
class Student:
    """The model in training, with the position of its adapter."""

    model: Any
    targets: Targets
    lora: LoraConfig
    start: int  # first layer with an adapter
    names: dict[int, str]  # kept layer of the source → its name here
    new_names: dict[str, str]  # prefix of a module's name here → in the pruned checkpoint
    num_weights: int  # in the matrices of its layers
    packs: bool  # whether it keeps documents in one row apart


def heal(
    pruned: Checkpoint,
    text: Text,
    *,
    source_folder: Path,
    dropped: Sequence[int],
    settings: HealSettings,
    seed: int,
    folder: Path,
    progress: Callable[[int, int, str], None],
    tell: Callable[[str], None] = lambda _: None,
    tracking: Tracking = NO_TRACKING,
    seam: SeamFit | None = None,
) -> Adapter:
    """Train a LoRA over the NF4 model (arXiv 2403.17887, appendix A).

    If the objective has a teacher, the source is loaded and its dropped layers are skipped in memory: with
    them and without the adapter it is the teacher. Works in `folder`: resumes from the last trainer
    checkpoint there, and leaves peft's adapter files and the held-out sequences. Training stops early if
    the held-out loss keeps rising, and the adapter with the lowest one is returned. If the loss diverges,
    training returns to the last checkpoint at a lower learning rate; the second time it stops, with the
    adapter of the best checkpoint, or one that changes nothing.

    Args:
        source_folder: Folder of the source of `pruned`.
        dropped: Layers of the source that `pruned` lacks.
        progress: Callback that receives steps done, total steps, and loss and speed.
        tell: Callback that receives one line about what does not work as it could, such as a tracker.
        tracking: Tracker that also receives the losses.
        seam: What `fit_seams` has kept in `folder`, to start from; None: start from no change.

    Raises:
        DataError: There is too little text.
        HealingError: The loss is not finite before the first step.
        UnsupportedArchitectureError: The model has no modules that LoRA can adapt.
    """
    set_seed(seed)
    encoder = load_encoder(pruned.folder)
    with processes.main_first():
        guard, train = data_sets(text, encoder, settings=settings, seed=seed, folder=folder)
    start = partial(
        begin,
        tokenizer=encoder.tokenizer,
        texts=(guard, train),
        dropped=dropped,
        settings=settings,
        seed=seed,
        folder=folder,
        progress=progress,
        tell=tell,
        tracking=tracking,
        seam=seam,
    )
    base = source_folder if OBJECTIVES[settings.objective].loads_source else pruned.folder
    load = partial(load_model, base, four_bit=settings.bits == 4, to_shard=processes.sharded())
    student, trainer = start(load())
    ran_away = train_on(trainer, folder)
    if ran_away and not processes.from_main(slowed_at(folder) is not None):
        if processes.is_main():
            last = last_whole_checkpoint(trainer_folder(folder))
            step = int(last.rpartition("-")[2]) if last else 0
            (folder / SLOWED).write_text(json.dumps({"step": step}), encoding="utf-8")
        trainer = student = None  # type: ignore[assignment]
        gc.collect()
        set_seed(seed)
        student, trainer = start(load())
        ran_away = train_on(trainer, folder)
    ended_at = trainer.state.global_step if ran_away else None
    if ran_away:
        back_to_best(trainer)
        if seam and not trainer.state.global_step:
            set_start(trainer.model, student.names, seam, load_factors(folder))
    guard_curve = _curve(trainer.state.log_history, "eval_loss")  # first, since evaluate() adds the best step
    after = float(trainer.evaluate()["eval_loss"])
    tensors = adapter_tensors(trainer.model)
    if processes.is_main():
        save_adapter(trainer.model, tensors, folder, targets=student.targets, new_names=student.new_names)
        save_guard(folder, [of_row(row) for row in guard])
    return Adapter(
        folder=folder,
        objective=settings.objective,
        quantization="nf4" if settings.bits == 4 else "none",
        rank=settings.rank,
        learning_rate=settings.learning_rate,
        target_modules=tuple(student.targets.modules),
        experts=tuple(student.targets.experts),
        left_out=tuple(student.targets.left_out),
        layers=settings.layers,
        num_steps=trainer.state.global_step,
        best_step=trainer.state.best_global_step,
        num_tokens=int(trainer.state.num_input_tokens_seen),
        sequence_length=settings.sequence_length,
        packed=student.packs,
        num_trainable_parameters=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        curve=_curve(trainer.state.log_history, "loss"),
        guard_curve=guard_curve,
        seam=seam,
        guard_loss_before=seam.loss_before
        if seam
        else next(e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e),
        guard_loss_after=after,
        slowed_at_step=slowed_at(folder),
        ran_away_at_step=ended_at,
        data=text.data,
    )


def slowed_at(folder: Path) -> int | None:
    """Return the step from which the learning rate is lower, or None if it was never lowered."""
    path = folder / SLOWED
    return int(json.loads(path.read_text(encoding="utf-8"))["step"]) if path.exists() else None


def train_on(trainer: HealTrainer, folder: Path) -> bool:
    """Train from the last checkpoint, or from the start; return whether the loss diverged, which ends it.

    A start from scratch measures the held-out loss inside training: with several processes, a model already
    prepared for evaluation alone would not be prepared again.
    """
    last = processes.from_main(last_whole_checkpoint(trainer_folder(folder)) if processes.is_main() else None)
    trainer.args.eval_on_start = last is None
    try:
        trainer.train(resume_from_checkpoint=last)
    except DivergedError:
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        return True
    return False


def back_to_best(trainer: HealTrainer) -> None:
    """Restore a trainer's best checkpoint after divergence; without one, an adapter that changes nothing.

    Raises:
        HealingError: The loss was not finite before the first step, so the model is at fault.
    """
    if best := trainer.state.best_model_checkpoint:
        trainer._load_best_model()
        trainer.state = TrainerState.load_from_json(str(Path(best) / TRAINER_STATE))
        return
    before = [entry for entry in trainer.state.log_history if "eval_loss" in entry][:1]
    if not (before and math.isfinite(before[0]["eval_loss"])):
        raise HealingError(
            "the loss on held-out text is not a number before the first step of healing",
            hint="the model's weights or their 4-bit form overflow; `no_heal` skips healing",
        )
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    trainer.state = TrainerState(log_history=before)


def trainer_folder(folder: Path) -> Path:
    """Return the folder of the trainer's checkpoints; a sharded model has its own kind."""
    return folder / ("trainer-sharded" if processes.sharded() else "trainer")


def last_whole_checkpoint(output_folder: Path) -> str | None:
    """Return the trainer's last complete checkpoint, or None.

    Checkpoints only partly written or partly removed are deleted; the trainer writes its state last.
    """
    for checkpoint in output_folder.glob("checkpoint-*"):
        if not _is_whole(checkpoint):
            shutil.rmtree(checkpoint)
    last: str | None = get_last_checkpoint(str(output_folder)) if output_folder.is_dir() else None
    return last


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return all(any(next(checkpoint.glob(name), None) for name in names) for names in CHECKPOINT_FILES)


def begin(
    model: Any,
    *,
    tokenizer: Any,
    texts: tuple[Dataset, Dataset],
    dropped: Sequence[int],
    settings: HealSettings,
    seed: int,
    folder: Path,
    progress: Callable[[int, int, str], None],
    tell: Callable[[str], None] = lambda _: None,
    tracking: Tracking = NO_TRACKING,
    seam: SeamFit | None = None,
) -> tuple[Student, HealTrainer]:
    """Return the student and its trainer, before the first step.

    Args:
        model: The pruned model or its source, as the objective requires, in NF4.
        texts: Held-out and training sequences.
        dropped: Layers of the source that the student lacks.
        seam: What `fit_seams` has kept in `folder`, to start from.
    """
    student = _student(model, dropped=dropped, settings=settings)
    trainer = _trainer(
        student,
        tokenizer,
        *texts,
        dropped=dropped,
        settings=settings,
        seed=seed,
        folder=folder,
        tracking=tracking,
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            # TRL casts QLoRA adapters to bf16, in which small weight updates are rounded away.
            parameter.data = parameter.data.float()
    for module in trainer.model.modules() if best_device().type == "cuda" else ():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False  # autocast would only cast it back to 16 bits
    if seam:
        set_start(trainer.model, student.names, seam, load_factors(folder))
    if not processes.sharded():
        processes.copy_from_main([p for p in trainer.model.parameters() if p.requires_grad])
    fit_passes(trainer, tell)
    trainer.remove_callback(PrinterCallback)  # only the command line prints
    trainer.add_callback(Progress(progress, flops_per_token=4 * student.num_weights))
    if processes.is_main() and tracking.tracker != "none":
        trainer.add_callback(Report(tracking, tell))
    trainer.add_callback(EarlyStop())
    if (step := slowed_at(folder)) is not None:
        trainer.add_callback(Slower(step))
    return student, trainer


def _student(model: Any, *, dropped: Sequence[int], settings: HealSettings) -> Student:
    packs = True  # if FSDP will shard the model: no part of it can run before, so its trainer checks that
    if not processes.sharded():
        packs = all(processes.gather([use_packed_attention(model) is not None]))
    if best_device().type == "cuda":
        fuse_norms(model)
    prefix, layers = find_layers(model)
    targets = find_targets(model, settings.modules)
    gone = frozenset(dropped if OBJECTIVES[settings.objective].loads_source else ())
    kept = [index for index in range(len(layers)) if index not in gone]
    survivors = [index for index in range(len(layers) + len(dropped) - len(gone)) if index not in dropped]
    first = survivors.index(first_adapted(survivors, dropped, seam=settings.layers == "seam"))
    adapted = {f"{prefix}.{index}": layers[index] for index in kept[first:]}
    return Student(
        model=model,
        targets=targets,
        lora=lora_config(targets, adapted, rank=settings.rank, dropout=settings.dropout),
        start=kept[first],
        names={old: f"{prefix}.{here}" for old, here in zip(survivors, kept, strict=True)},
        new_names={f"{prefix}.{old}.": f"{prefix}.{new}." for new, old in enumerate(kept)},
        num_weights=sum(matrix_weights(layers[index]) for index in kept),
        packs=packs,
    )


def _trainer(
    student: Student,
    tokenizer: Any,
    guard: Dataset,
    train: Dataset,
    *,
    dropped: Sequence[int],
    settings: HealSettings,
    seed: int,
    folder: Path,
    tracking: Tracking,
) -> HealTrainer:
    on_gpu = best_device().type == "cuda"
    every = max(1, settings.num_steps // CURVE_POINTS)
    rows = settings.batch_size
    if not student.packs:  # same tokens per step, although each row has only one, perhaps short, document
        mean_length = pyarrow.compute.mean(pyarrow.compute.list_value_length(train.data["input_ids"])).as_py()
        rows *= max(1, round(settings.sequence_length / mean_length))
    arguments = SFTConfig(
        **settings.for_trainer,
        output_dir=str(trainer_folder(folder)),
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=rows // processes.count(),
        weight_decay=0.0,
        router_aux_loss_coef=0.0,  # routers are not trained, and the loss is next-token loss only
        packing=student.packs,
        packing_strategy="bfd_split",  # plain bfd drops the tails of long documents
        bf16=on_gpu,
        use_cpu=not on_gpu,
        gradient_checkpointing=False,  # see batch_size.py
        include_num_input_tokens_seen="non_padding",
        logging_steps=every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # show losses that are not finite
        eval_strategy="steps",
        eval_steps=POINTS_PER_CHECKPOINT * every,
        save_steps=POINTS_PER_CHECKPOINT * every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        seed=seed,
        data_seed=seed,
        report_to="none",  # `Report` does it, and survives a failing tracker
        project=PROJECT,
        run_name=tracking.run_name,
        trackio_static_space_id=False,  # publish no copy of the tracked values
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
    )
    arguments._n_gpu = 1  # used by this process; otherwise the batch is multiplied by all visible GPUs
    trainer = TRAINERS[settings.objective]
    with as_named():
        return trainer(
            model=student.model,
            args=arguments,
            train_dataset=train,
            eval_dataset=guard,
            processing_class=tokenizer,
            peft_config=student.lora,
            **trainer.options(settings, dropped=dropped, start=student.start),
        )


def _curve(history: list[dict[str, Any]], name: str) -> tuple[LossPoint, ...]:
    return tuple(
        LossPoint(step=entry["step"], loss=round(float(entry[name]), 4)) for entry in history if name in entry
    )
