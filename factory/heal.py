"""Heal: QLoRA on the pruned checkpoint with TRL's SFTTrainer; the result is an adapter."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports its use otherwise

import torch
from datasets import Dataset, Features, List, Value, disable_progress_bars
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from factory.artifacts import Adapter, Checkpoint, LossPoint
from factory.config import HealSettings
from factory.decoder import decoder_layers
from factory.decoder_proof import find_layers
from factory.distill import DistillTrainer
from factory.errors import DataError, HealingError, UnsupportedArchitectureError
from factory.models import load_model, load_tokenizer
from factory.texts import Text, windows

disable_progress_bars()

GUARD_SEQUENCES = 64  # held back from the healing text
GUARD_SHARE = 0.1  # at most, of the training tokens
CURVE_POINTS = 50
PEFT_PREFIX = "base_model.model."
CHECKPOINTS = 10  # trainer checkpoints over a run


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
) -> Adapter:
    """Train a LoRA on the feed-forward modules of the NF4 model (arXiv 2403.17887, appendix A).

    With `settings.objective` "distill", the source is loaded and its layers left out in memory: with them
    and without the adapter it is the teacher. Works in `folder`, resumes from the last trainer checkpoint
    found there, and leaves peft's adapter files in it. `progress` gets steps done, steps in all and the
    latest loss.

    Args:
        source_folder: The model that `pruned` was made from.
        dropped: Its layers that `pruned` lacks.

    Raises:
        DataError: Too little text.
        HealingError: The loss is no longer finite.
        UnsupportedArchitectureError: No feed-forward modules that LoRA can adapt.
    """
    set_seed(seed)
    tokenizer = load_tokenizer(pruned.folder)
    guard, train = _data_sets(text, tokenizer, settings=settings, seed=seed, folder=folder)
    distils = settings.objective == "distill"
    model = load_model(source_folder if distils else pruned.folder, four_bit=True)
    modules = feed_forward_modules(model)
    prefix, layers = find_layers(model)
    gone = frozenset(dropped if distils else ())
    kept = [index for index in range(len(layers)) if index not in gone]
    trainer = _trainer(
        partial(DistillTrainer, dropped=dropped) if distils else SFTTrainer,
        model,
        tokenizer,
        _adapted(layers, modules, prefix=prefix, kept=kept),
        train,
        guard,
        settings=settings,
        seed=seed,
        folder=folder,
    )
    trainer.remove_callback(PrinterCallback)  # only the command line prints
    trainer.add_callback(_Progress(progress))
    before = float(trainer.evaluate()["eval_loss"])  # LoRA starts as the identity
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(Path(trainer.args.output_dir)))
    after = float(trainer.evaluate()["eval_loss"])
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    new_names = {f"{prefix}.{old}.": f"{prefix}.{new}." for new, old in enumerate(kept)}
    _save_adapter(trainer.model, folder, modules=modules, new_names=new_names)
    for scratch in ("trainer", "tokens"):
        shutil.rmtree(folder / scratch, ignore_errors=True)
    return Adapter(
        folder=folder,
        objective=settings.objective,
        quantization="nf4",
        rank=settings.rank,
        learning_rate=settings.learning_rate,
        target_modules=tuple(modules),
        num_steps=settings.num_steps,
        num_tokens=int(trainer.state.num_input_tokens_seen),
        sequence_length=settings.sequence_length,
        num_trainable_parameters=trainable,
        curve=_curve(trainer.state.log_history),
        guard_loss_before=before,
        guard_loss_after=after,
        data=text.data,
    )


def last_whole_checkpoint(output_folder: Path) -> str | None:
    """The trainer's last checkpoint, None without one; what was cut short while being written is removed.

    The trainer writes `trainer_state.json` last.
    """
    for checkpoint in output_folder.glob("checkpoint-*"):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
    last: str | None = get_last_checkpoint(str(output_folder)) if output_folder.is_dir() else None
    return last


def feed_forward_modules(model: Any) -> list[str]:
    """Names, relative to a layer, of the linear modules outside attention: ["mlp.down_proj", …].

    Raises:
        UnsupportedArchitectureError: There are none, or experts are fused into one parameter.
    """
    names: set[str] = set()
    for layer in decoder_layers(model):
        for name, module in layer.named_modules():
            attention = any("att" in part.lower() or "mixer" in part.lower() for part in name.split("."))
            router = name.split(".")[-1] in ("gate", "router")
            if isinstance(module, torch.nn.Linear) and not attention and not router:
                names.add(name)
    if not names:
        raise UnsupportedArchitectureError(
            f"{model.config.model_type}: no feed-forward linear modules for LoRA to adapt",
            hint="build it without healing: --no-heal",
        )
    return sorted(names)


def _data_sets(
    text: Text, tokenizer: Any, *, settings: HealSettings, seed: int, folder: Path
) -> tuple[Dataset, Dataset]:
    """Guard and training sequences, tokenised. Training stops taking text at its token budget."""
    budget = settings.num_steps * settings.batch_size * settings.sequence_length
    documents = _documents(text, tokenizer, settings=settings, seed=seed)
    guard_tokens = min(GUARD_SEQUENCES * settings.sequence_length, int(GUARD_SHARE * budget))
    guard = take_guard(documents, num_tokens=guard_tokens)
    sequences = chain.from_iterable(documents)
    first = next(sequences, None)
    if first is None:
        raise DataError(
            f"{text.data.name} holds too little text to heal on",
            hint="give more with --heal-data, or build without healing: --no-heal",
        )
    scratch = folder / "tokens"
    shutil.rmtree(scratch, ignore_errors=True)  # cut short: made again from the same text
    train = Dataset.from_generator(
        lambda: ({"input_ids": tokens} for tokens in _until(chain([first], sequences), num_tokens=budget)),
        features=Features({"input_ids": List(Value("int32"))}),
        cache_dir=str(scratch),
        fingerprint=f"heal-{seed}",
    )
    return Dataset.from_dict({"input_ids": guard}), train


def take_guard(documents: Iterator[list[list[int]]], *, num_tokens: int) -> list[list[int]]:
    """Sequences of the first documents; what is left of the last of them is nobody's.

    A document is in the guard or in the training text, never in both: pieces of one document are too
    much alike for one to say whether training on the other helped.
    """
    guard: list[list[int]] = []
    for document in documents:
        for sequence in document:
            guard.append(sequence)
            if sum(map(len, guard)) >= num_tokens:
                return guard
    return guard


def _documents(text: Text, tokenizer: Any, *, settings: HealSettings, seed: int) -> Iterator[list[list[int]]]:
    """Each document as its sequences, the end token behind the last."""
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for document in text.shuffled(seed):
        yield list(windows(tokenizer(document).input_ids + end, length=settings.sequence_length))


def _until(sequences: Iterator[list[int]], *, num_tokens: int) -> Iterator[list[int]]:
    taken = 0
    for sequence in sequences:
        yield sequence
        taken += len(sequence)
        if taken >= num_tokens:
            return


def _adapted(layers: Any, modules: list[str], *, prefix: str, kept: list[int]) -> list[str]:
    """Full names of the modules of the kept layers that LoRA adapts."""
    return [
        f"{prefix}.{index}.{name}"
        for index in kept
        for name, _ in layers[index].named_modules()
        if name in modules
    ]


def _trainer(
    trainer_class: Callable[..., SFTTrainer],
    model: Any,
    tokenizer: Any,
    modules: list[str],
    train: Dataset,
    guard: Dataset,
    *,
    settings: HealSettings,
    seed: int,
    folder: Path,
) -> SFTTrainer:
    on_gpu = model.device.type == "cuda"
    arguments = SFTConfig(
        output_dir=str(folder / "trainer"),
        max_steps=settings.num_steps,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_steps,
        weight_decay=0.0,
        packing=True,
        packing_strategy="bfd_split",  # plain bfd drops the tails of long documents
        max_length=settings.sequence_length,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        gradient_checkpointing=on_gpu,
        include_num_input_tokens_seen="non_padding",
        logging_steps=max(1, settings.num_steps // CURVE_POINTS),
        logging_nan_inf_filter=False,  # a loss that is not finite must show
        save_steps=max(1, settings.num_steps // CHECKPOINTS),
        save_total_limit=2,
        seed=seed,
        data_seed=seed,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
    )
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank,
        lora_dropout=settings.dropout,
        target_modules=modules,
        bias="none",
        task_type="CAUSAL_LM",
    )
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=guard,
        processing_class=tokenizer,
        peft_config=lora,
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            # TRL casts QLoRA adapters to bf16, where a small update to a weight rounds to nothing.
            parameter.data = parameter.data.float()
    return trainer


class _Progress(TrainerCallback):  # type: ignore[misc]
    """Reports steps and loss; stops a run whose loss is no longer finite."""

    def __init__(self, report: Callable[[int, int, str], None]) -> None:
        self.report = report
        self.note = ""

    def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        self.note = f"loss {float(loss):.3f}"
        if not torch.tensor(float(loss)).isfinite():
            raise HealingError(
                f"the loss is {loss} at step {state.global_step}",
                hint="a lower --heal-lr usually helps",
            )

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        self.report(state.global_step, state.max_steps, self.note)


def _curve(history: list[dict[str, Any]]) -> tuple[LossPoint, ...]:
    return tuple(
        LossPoint(step=entry["step"], loss=round(float(entry["loss"]), 4))
        for entry in history
        if "loss" in entry
    )


def _save_adapter(model: Any, folder: Path, *, modules: list[str], new_names: dict[str, str]) -> None:
    """peft's two files, for the pruned checkpoint and without the local path that peft writes as its base.

    Args:
        new_names: Beginning of a module's name in the trained model → in the pruned checkpoint.
    """
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": None, "target_modules": modules}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    weights = folder / "adapter_model.safetensors"
    tensors = {}
    for name, tensor in load_file(weights).items():
        old = next(old for old in new_names if f"{PEFT_PREFIX}{old}" in name)
        tensors[name.replace(old, new_names[old], 1)] = tensor
    save_file(tensors, weights, metadata={"format": "pt"})
