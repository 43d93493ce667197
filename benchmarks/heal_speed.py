"""Claim: healing is faster than with TRL's defaults, at the same loss, and a 70B model heals in 40 GB.

    python benchmarks/heal_speed.py --shape mistral-7b --drop 0.3
    python benchmarks/heal_speed.py --shape llama-70b --drop 0.4 --cap-gb 40 --ways sft,distill

The rival is `SFTTrainer` with QLoRA and its own defaults, packing on, at several batch sizes. All
train the same feed-forward adapters of rank 64 on the same text, the demo's, at the same effective batch;
`seam` trains only from the last layer before the cut on, `distill` learns from the source. The weights are
random and made on the device, for speed, memory and the agreement of losses only. MFU counts 4 operations per
token and weight of the student's matrices (forward, and backward for the states only) against the maker's
dense bf16 peak. Recomputation, adapters and the teacher are not counted.
"""

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from measure import cap
from peft import LoraConfig
from shapes import SHAPES, random_model
from transformers import TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from factory.config.settings import HealSettings
from factory.gpus import peak_flops
from factory.healing.data import data_sets
from factory.healing.heal import begin
from factory.healing.lora import find_targets
from factory.model.devices import device_name
from factory.model.layers import decoder_layers
from factory.model.loading import matrix_weights
from factory.model.tokenizer import load_encoder
from factory.resources import DEMO_MODEL
from factory.text.text import open_text

WARM_STEPS = 2  # untimed steps of every run
LAST = 5  # last steps, whose mean loss is shown


class Clock(TrainerCallback):
    """Records time and tokens after each step."""

    def __init__(self) -> None:
        self.times: list[tuple[float, int]] = []

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append((time.perf_counter(), int(state.num_input_tokens_seen)))


def plain(
    model: Any, tokenizer: Any, texts: Any, *, settings: HealSettings, seed: int, folder: Path, batch: int
) -> Any:
    """Make TRL's trainer as its documentation suggests."""
    return SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            max_steps=settings.num_steps,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=settings.batch_size // batch,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=settings.warmup_steps,
            packing=True,
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
            packing_strategy="bfd_split",
            max_length=settings.sequence_length,
            include_num_input_tokens_seen="non_padding",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        ),
        train_dataset=texts[1],
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=settings.rank,
            lora_alpha=settings.rank,
            lora_dropout=settings.dropout,
            target_modules=find_targets(model, "ffn").modules,
            task_type="CAUSAL_LM",
        ),
    )


def run(make: Callable[[], Any], *, weights: int) -> dict[str, Any]:
    """Train, and return tokens per second, utilisation, peak memory and the last losses."""
    gc.collect()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.empty_cache()
    trainer = make()
    clock = Clock()
    trainer.add_callback(clock)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    spans = [
        (after[1] - before[1]) / (after[0] - before[0])
        for before, after in zip(clock.times[WARM_STEPS:-1], clock.times[WARM_STEPS + 1 :], strict=True)
    ]
    rate = median(spans)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    peak = peak_flops(torch.cuda.get_device_name()) if on_gpu else None
    return {
        "tokens/s": rate,
        "spread": (min(spans), max(spans)),
        "MFU": 4 * weights * rate / peak if peak else float("nan"),
        "GB": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else float("nan"),
        "loss": (losses[0], mean(losses[-LAST:])),
        "pass": f"{trainer.args.per_device_train_batch_size} × {trainer.args.max_length}"
        + ", activations recomputed" * trainer.model.is_activation_checkpointing,
        "attention": trainer.model.config._attn_implementation,
    }


def main() -> None:
    """Print a line after each way of training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    parser.add_argument("--drop", type=float, default=0.3125)
    parser.add_argument("--cap-gb", type=float)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--modules", default="ffn")
    parser.add_argument("--bits", type=int, choices=(4, 16), default=4)
    parser.add_argument("--ways", default="trl:1,trl:2,trl:4,sft,seam,distill,distill-seam")
    options = parser.parse_args()
    if options.cap_gb:
        cap(options.cap_gb)
    config = SHAPES[options.shape]
    number = int(options.drop * config.num_hidden_layers + 0.5)
    start = (config.num_hidden_layers - number) * 2 // 3  # where deep blocks usually begin
    dropped = tuple(range(start, start + number))
    settings = HealSettings(
        num_steps=options.steps,
        warmup_steps=min(5, options.steps // 2),
        batch_size=options.batch_size,
        sequence_length=options.sequence_length,
        rank=options.rank,
        dropout=options.dropout,
        modules=options.modules,
        bits=options.bits,
    )
    encoder = load_encoder(DEMO_MODEL)
    tokenizer = encoder.tokenizer
    print(
        f"{options.shape}, layers {dropped[0]}–{dropped[-1]} dropped, {options.bits} bits; "
        f"torch {torch.__version__}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as scratch:
        text = open_text("stdlib:train", split="train")
        texts = data_sets(text, encoder, settings=settings, seed=0, folder=Path(scratch))
        texts = (texts[0].select(range(1)), texts[1])
        for way in options.ways.split(","):
            name, _, batch = way.partition(":")
            distils = name.startswith("distill")
            set_seed(0)
            cut = config.__class__(
                **{**config.to_dict(), "num_hidden_layers": config.num_hidden_layers - number}
            )
            gc.collect()
            model = random_model(config if distils else cut, four_bit=options.bits == 4)
            model.is_loaded_in_4bit = options.bits == 4
            if way == options.ways.split(",")[0] and torch.cuda.is_available():
                print(f"on {device_name(model.device)}; weights {torch.cuda.memory_allocated() / 1e9:.2f} GB")
            weights = matrix_weights(decoder_layers(model))
            weights = weights * cut.num_hidden_layers // len(decoder_layers(model))
            folder = Path(scratch) / way.replace(":", "-")
            mine = settings.model_copy(
                update={
                    "objective": "distill" if distils else "sft",
                    "layers": "seam" if "seam" in name else "all",
                }
            )
            if name == "trl":
                make = lambda model=model, batch=batch, folder=folder: plain(  # noqa: E731
                    model, tokenizer, texts, settings=settings, seed=0, folder=folder, batch=int(batch)
                )
            else:
                make = lambda model=model, mine=mine, folder=folder: begin(  # noqa: E731
                    model, tokenizer=tokenizer, texts=texts, dropped=dropped, settings=mine, seed=0,
                    folder=folder, progress=lambda *_: None,
                )[1]  # fmt: skip
            try:
                result = run(make, weights=weights)
            except torch.cuda.OutOfMemoryError as error:
                print(f"{way}: out of memory: {str(error)[:100]}", flush=True)
                continue
            finally:
                del model, make
            low, high = result["spread"]
            print(
                f"{way}: {result['tokens/s']:,.0f} tokens/s ({low:,.0f}–{high:,.0f}), "
                f"MFU {result['MFU']:.3f}, "
                f"peak {result['GB']:.1f} GB, {result['pass']} per pass, {result['attention']}; loss first "
                f"{result['loss'][0]:.4f}, mean of the last {LAST} {result['loss'][1]:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
