"""Claim: evaluation reads as much in a pass as the GPU has room for, and gives the same figures sooner.

    python benchmarks/evaluate_speed.py MODEL TEXT QUESTIONS [--rival CHECKOUT] [--rounds 3]

QUESTIONS holds the validation rows of PIQA, ARC-Easy and BoolQ as `piqa_plain_text_validation.jsonl`,
`ai2_arc_ARC-Easy_validation.jsonl` and `boolq_validation.jsonl`; prompts and scores are lm-eval's. The rival
is another checkout of this project, by default one that evaluates as here; both take turns, each in a process
of its own whose start is not counted. Times are medians with their range. Answers of 16-bit models depend on
what is read beside a question, so the questions with another score are counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import lm_eval.tasks
import yaml

HARNESS = Path(lm_eval.tasks.__file__).parent
ROOT = Path(__file__).resolve().parents[1]
TASKS = {
    "piqa": ("piqa/piqa.yaml", "piqa_plain_text_validation.jsonl", {}),
    "arc_easy": ("arc/arc_easy.yaml", "ai2_arc_ARC-Easy_validation.jsonl", {}),
    # These rows have true or false instead of 1 or 0.
    "boolq": (
        "super_glue/boolq/default.yaml",
        "boolq_validation.jsonl",
        {"doc_to_target": "{{answer | int}}"},
    ),
}


def write_tasks(questions: Path, folder: Path) -> list[str]:
    """Write lm-eval's task files with local rows; return their paths."""
    found = []
    for name, (like, rows, changes) in TASKS.items():
        value = {
            "include": str(HARNESS / like),
            "task": name,
            "dataset_path": "json",
            "dataset_name": name,
            "dataset_kwargs": {
                "data_files": {"validation": str((questions / rows).absolute())},
                "cache_dir": str(folder / "cache"),
            },
            "training_split": None,
            "test_split": None,
            "validation_split": "validation",
            **changes,
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(value))
        found.append(str(path))
    return found


def work(model: Path, text: Path, tasks: list[str], into: Path, documents: int) -> None:
    """Evaluate in this process, and write the seconds of loss and tasks to `into`."""
    import torch

    try:
        from factory.config.settings import EvaluateSettings
        from factory.evaluation.evaluate import evaluate
        from factory.text.text import open_text
    except ImportError:  # a checkout from before there were folders
        from factory.evaluate import evaluate
        from factory.texts import open_text

        from factory.config import EvaluateSettings
    settings = EvaluateSettings(
        num_documents=documents, tasks=tuple(tasks), num_fewshot=dict.fromkeys(tasks, 0)
    )
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")
    times = [time.perf_counter()]
    seen = {"loss"}

    def progress(_done: int, _total: int, note: str) -> None:
        if note not in seen:
            seen.add(note)
            times.append(time.perf_counter())

    evaluate(model, open_text(str(text), split="validation"), settings=settings, into=into, progress=progress)
    times.append(time.perf_counter())
    (into / "seconds.json").write_text(json.dumps([b - a for a, b in pairwise(times)]))


def scores_of(folder: Path) -> list[float]:
    """Return the score of every question."""
    found = []
    for number in range(len(TASKS)):
        stored = json.loads((folder / f"task-{number}.json").read_text())
        for one in stored if isinstance(stored, list) else [stored]:
            found += [score for task in sorted(one["answers"]) for score in one["answers"][task]]
    return found


def loss_of(folder: Path) -> float:
    """Return the mean loss in nats per token."""
    losses = json.loads((folder / "losses.json").read_text())
    return sum(nats for _, nats in losses) / sum(count for count, _ in losses)


def main() -> None:
    """Print times, their ratio, and what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--rival", type=Path, default=ROOT, metavar="CHECKOUT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if options.child:
            tasks = write_tasks(options.questions, folder)
            work(options.model, options.text, tasks, options.child, options.documents)
            return
        seconds: dict[str, list[list[float]]] = {"this": [], "rival": []}
        for turn in range(options.rounds):
            for name, checkout in (("this", ROOT), ("rival", options.rival.absolute())):
                into = folder / f"{name}-{turn}"
                into.mkdir()
                seconds[name].append(_run(sys.argv, checkout, into))
        for name, runs in seconds.items():
            print(f"{name}: loss {_span([run[0] for run in runs])}, ", end="")
            print(f"tasks {_span([sum(run[1:]) for run in runs])}, whole {_span([sum(run) for run in runs])}")
        ratio = median(map(sum, seconds["rival"])) / median(map(sum, seconds["this"]))
        here, there = scores_of(folder / "this-0"), scores_of(folder / "rival-0")
        differ = sum(one != other for one, other in zip(here, there, strict=True))
        print(f"{ratio:.2f} times as fast; {differ} of {len(here)} questions are scored differently;")
        print(f"loss {loss_of(folder / 'this-0'):.5f} and {loss_of(folder / 'rival-0'):.5f}")


def _run(arguments: list[str], checkout: Path, into: Path) -> list[float]:
    paths = [str(checkout), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)[1:])]
    subprocess.run(
        [sys.executable, *arguments, "--child", str(into)],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    found: list[Any] = json.loads((into / "seconds.json").read_text())
    return found


def _span(values: list[float]) -> str:
    return f"{median(values):.1f} s ({min(values):.1f}–{max(values):.1f})"


if __name__ == "__main__":
    main()
