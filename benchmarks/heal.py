"""Healing recipes beside one another: how much of the loss that a cut costs each wins back, at equal tokens.

Every recipe heals the same pruned checkpoint on the same text in the same order; the losses are of the
merged weights, loaded from disk, on text that no recipe saw. Recovered is
(pruned − healed) / (pruned − source).
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev

from factory import hub
from factory.artifacts import Checkpoint, PruningPlan, Source, layer_ranges
from factory.commands.options import Layers
from factory.config import EvaluateSettings, HealSettings
from factory.evaluate import evaluate
from factory.heal import heal
from factory.merge import merge
from factory.prune import prune
from factory.texts import Text, open_text

WARMUP_SHARE = 0.1
RECIPES = ("sft/ffn/all/8/3e-3", "sft/ffn/all/64/3e-3", "distill/all-linear/seam/64/3e-3")


def loss_of(folder: Path, text: Text, settings: EvaluateSettings) -> float:
    """Token loss of the checkpoint in a folder, in nats."""
    with tempfile.TemporaryDirectory() as into:
        return evaluate(folder, text, settings=settings, into=Path(into), progress=lambda *_: None).loss.nats


def healed_loss(
    source: Source,
    pruned: Checkpoint,
    dropped: tuple[int, ...],
    texts: tuple[Text, Text],
    *,
    settings: HealSettings,
    evaluation: EvaluateSettings,
    seed: int,
) -> tuple[float, float]:
    """Loss of the merged weights, and the seconds that healing took."""
    with tempfile.TemporaryDirectory() as scratch:
        adapter_folder, merged_folder = Path(scratch) / "adapter", Path(scratch) / "merged"
        adapter_folder.mkdir()
        merged_folder.mkdir()
        start = time.monotonic()
        adapter = heal(
            pruned,
            texts[0],
            source_folder=source.local_folder,
            dropped=dropped,
            settings=settings,
            seed=seed,
            folder=adapter_folder,
            progress=lambda *_: None,
        )
        seconds = time.monotonic() - start
        merge(pruned, adapter, folder=merged_folder)
        return loss_of(merged_folder, texts[1], evaluation), seconds


def recipe_of(text: str, *, tokens: int, length: int, batch_size: int) -> HealSettings:
    """`objective/modules/layers/rank/rate[/dropout[/seam weight]]` as settings for a number of tokens."""
    objective, modules, layers, rank, rate, *rest = text.split("/")
    dropout, seam_weight = (float(value) for value in [*rest, *("0.05", "0")[len(rest) :]])
    steps = max(tokens // (batch_size * length), 1)
    return HealSettings.model_validate(
        {
            "objective": objective,
            "modules": modules,
            "layers": layers,
            "rank": rank,
            "learning_rate": rate,
            "dropout": dropout,
            "seam_weight": seam_weight,
            "num_steps": steps,
            "warmup_steps": int(WARMUP_SHARE * steps),
            "batch_size": batch_size,
            "sequence_length": length,
        }
    )


def main() -> None:
    """Print a line a recipe and seed as it ends, then the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--layers", required=True, help="that are dropped: 11-20")
    parser.add_argument("--heal-data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--eval-documents", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    source = hub.pull(hub.resolve(arguments.model))
    dropped = Layers().convert(arguments.layers, None, None)
    texts = open_text(arguments.heal_data, split="train"), open_text(arguments.eval_data, split="validation")
    length = arguments.sequence_length
    evaluation = EvaluateSettings(
        num_documents=arguments.eval_documents, sequence_length=length, tasks=(), num_fewshot={}
    )
    with tempfile.TemporaryDirectory() as folder:
        plan = PruningPlan(criterion="chosen", num_layers=source.num_layers, dropped=dropped)
        pruned = prune(source, plan, folder=Path(folder), progress=lambda *_: None)
        whole, cut = (loss_of(path, texts[1], evaluation) for path in (source.local_folder, Path(folder)))
        print(
            f"layers {layer_ranges(dropped)} dropped; loss source {whole:.4f}, pruned {cut:.4f}; "
            f"{arguments.tokens:,} tokens a heal",
            flush=True,
        )
        rows = []
        for name in arguments.recipes.split(","):
            settings = recipe_of(
                name, tokens=arguments.tokens, length=length, batch_size=arguments.batch_size
            )
            shares, losses, times = [], [], []
            for seed in range(arguments.seeds):
                loss, seconds = healed_loss(
                    source, pruned, dropped, texts, settings=settings, evaluation=evaluation, seed=seed
                )
                losses.append(loss)
                times.append(seconds)
                shares.append((cut - loss) / (cut - whole))
                print(f"{name} seed {seed}: {loss:.4f}, {shares[-1]:.3f} in {seconds:.0f} s", flush=True)
            spread = f" ± {stdev(shares):.3f}" if len(shares) > 1 else ""
            rows.append(f"| {name} | {mean(losses):.4f} | {mean(shares):.3f}{spread} | {mean(times):.0f} |")
    print("\n| recipe | loss | recovered | seconds |\n|---|--:|--:|--:|\n" + "\n".join(rows))


if __name__ == "__main__":
    main()
