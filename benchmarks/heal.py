"""Claim: the default healing takes back more of the loss that a cut adds than the paper's, at equal tokens.

    python benchmarks/heal.py MODEL --layers 11-20 --heal-data TEXT --eval-data TEXT --seeds 3

Every recipe heals the same pruned checkpoint on the same text in the same order; the losses are of the
merged weights, loaded from disk, on text that no recipe saw. The recovered share is
(pruned − healed) / (pruned − source). A recipe is given as settings of healing, `rank=8,learning_rate=3e-3`;
the first one below is the paper's (QLoRA on the feed-forward modules, next tokens) at its best rate for a
model of 26 M parameters. With `--questions`, a folder as in `evaluate_speed.py`, each result also answers
PIQA and ARC-Easy; a recipe's difference from the first one is over the same questions.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from evaluate_speed import write_tasks

from factory.artifacts import Checkpoint, PruningPlan, Source, TaskScore, layer_ranges
from factory.config.options import read_layers
from factory.config.settings import EvaluateSettings, HealSettings
from factory.evaluation.harness import score_task
from factory.evaluation.significance import compare_answers
from factory.healing.heal import heal
from factory.healing.merge import merge
from factory.hub.pull import pull
from factory.hub.resolve import resolve
from factory.model.loading import load_model
from factory.model.losses import token_loss
from factory.model.tokenizer import load_encoder
from factory.pruning.prune import prune
from factory.text.text import Text, open_text

WARMUP_SHARE = 0.1
BATCH = 32  # sequences evaluated at once
Answered = dict[str, tuple[TaskScore, list[float]]]  # by task
RECIPES = (
    "objective=sft,rank=8,learning_rate=3e-3",
    "objective=sft,rank=64,learning_rate=3e-3",
    "objective=distill,modules=all-linear,rank=128,learning_rate=2.5e-3,next_token_weight=0.3,dropout=0,bits=16",
)


def loss_of(folder: Path, text: Text, *, length: int) -> float:
    """Return the token loss, in nats, of a checkpoint over a whole text in pieces of at most `length`."""
    model, encoder = load_model(folder), load_encoder(folder)
    documents = encoder.encode(list(text.documents()))
    pieces = [piece for tokens in documents for piece in encoder.windows(tokens, length=length)]
    return token_loss(model, pieces, batch_size=BATCH)


def answers_of(folder: Path, tasks: Sequence[str]) -> dict[str, tuple[TaskScore, list[float]]]:
    """Return score and answers of each task, zero-shot."""
    if not tasks:
        return {}
    model, tokenizer = load_model(folder), load_encoder(folder).open_ended
    settings, found = EvaluateSettings(tasks=tuple(tasks), num_fewshot=dict.fromkeys(tasks, 0)), {}
    for task in tasks:
        for score, answers in score_task(model, tokenizer, task, settings=settings, progress=lambda *_: None):
            found[score.task] = (score, [float(one) for part in sorted(answers) for one in answers[part]])
    return found


def told(answers: Answered, source: Answered, first: Answered | None) -> str:
    """Return the score of each task, the kept share of the source's lead over chance, and the difference."""
    line = ""
    for task, (score, mine) in answers.items():
        lead = source[task][0].value - (score.chance or 0)
        line += f"; {task} {score.value:.3f} (keeps {(score.value - (score.chance or 0)) / lead:.2f})"
        if first:
            change = compare_answers(task, first[task][1], mine)
            line += (
                f", {change.difference:+.3f} ({change.low:+.3f} to {change.high:+.3f}) from the first recipe"
            )
    return line


def healed(
    source: Source,
    pruned: Checkpoint,
    dropped: tuple[int, ...],
    texts: Sequence[Text],
    *,
    settings: HealSettings,
    seed: int,
    keep: Path | None,
    tasks: Sequence[str],
) -> tuple[list[float], float, Answered]:
    """Heal on the first text; return the merged weights' losses on the others, the seconds, and answers."""
    with tempfile.TemporaryDirectory() as scratch:
        adapter_folder, merged_folder = keep or Path(scratch) / "adapter", Path(scratch) / "merged"
        adapter_folder.mkdir(parents=True)
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
        losses = [loss_of(merged_folder, text, length=settings.sequence_length) for text in texts[1:]]
        return losses, seconds, answers_of(merged_folder, tasks)


def settings_of(recipe: str, *, tokens: int, length: int, batch_size: int) -> HealSettings:
    """Return settings for a number of tokens; those in the recipe, `name=value,…`, override the others."""
    fields: dict[str, object] = {"batch_size": batch_size, "sequence_length": length}
    for name, value in (pair.split("=") for pair in recipe.split(",")):
        fields[name] = int(value) if value.isdigit() else value
    steps = max(tokens // (int(str(fields["batch_size"])) * length), 1)
    return HealSettings.model_validate(
        {"num_steps": steps, "warmup_steps": int(WARMUP_SHARE * steps), **fields}
    )


def main() -> None:
    """Print a line after each recipe and seed, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--layers", required=True, help="layers to drop: 11-20")
    parser.add_argument("--heal-data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--dev-data", help="text to choose recipes on; its loss is shown as well")
    parser.add_argument("--recipe", action="append", help="settings of healing; repeatable")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--questions", type=Path, help="folder of questions")
    parser.add_argument("--keep", type=Path, help="folder for the adapters of the first seed")
    options = parser.parse_args()
    source = pull(resolve(options.model))
    dropped = read_layers(options.layers)
    data = [options.heal_data, options.eval_data, *([options.dev_data] if options.dev_data else [])]
    texts = [open_text(reference, split="train") for reference in data]
    length = options.sequence_length
    with tempfile.TemporaryDirectory() as folder:
        plan = PruningPlan(criterion="chosen", num_layers=source.num_layers, dropped=dropped)
        pruned = prune(source, plan, folder=Path(folder), progress=lambda *_: None)
        whole, cut = (loss_of(path, texts[1], length=length) for path in (source.local_folder, Path(folder)))
        (Path(folder) / "tasks").mkdir()
        tasks = write_tasks(options.questions, Path(folder) / "tasks")[:2] if options.questions else []
        before = answers_of(source.local_folder, tasks)
        firsts: dict[int, Answered] = {}
        head = f"layers {layer_ranges(dropped)}, {options.tokens:,} tokens"
        after = told(answers_of(Path(folder), tasks), before, None)
        print(f"{head}: loss source {whole:.4f}{told(before, before, None)}", flush=True)
        print(f"{head}: loss pruned {cut:.4f}{after}", flush=True)
        rows = []
        for number, recipe in enumerate(options.recipe or RECIPES):
            settings = settings_of(
                recipe, tokens=options.tokens, length=length, batch_size=options.batch_size
            )
            shares, losses, times = [], [], []
            for seed in range(options.first_seed, options.first_seed + options.seeds):
                keep = options.keep / str(number) if options.keep and seed == options.first_seed else None
                (loss, *dev), seconds, answers = healed(
                    source, pruned, dropped, texts, settings=settings, seed=seed, keep=keep, tasks=tasks
                )
                losses.append(loss)
                times.append(seconds)
                shares.append((cut - loss) / (cut - whole))
                print(
                    f"{head}: {recipe} seed {seed}: {loss:.4f}, {shares[-1]:.3f} in {seconds:.0f} s"
                    + "".join(f"; dev {nats:.4f}" for nats in dev)
                    + told(answers, before, firsts.get(seed)),
                    flush=True,
                )
                firsts.setdefault(seed, answers)
            spread = f" ± {stdev(shares):.3f}" if len(shares) > 1 else ""
            rows.append(f"| {recipe} | {mean(losses):.4f} | {mean(shares):.3f}{spread} | {mean(times):.0f} |")
    print(f"\n| {head} | loss | recovered | seconds |\n|---|--:|--:|--:|\n" + "\n".join(rows))


if __name__ == "__main__":
    main()
