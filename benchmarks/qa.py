"""Measure what a cut and its healing do to task scores: MMLU, BoolQ and BLiMP from local files.

    python benchmarks/qa.py DATA source=MODEL pruned=MODEL healed=MODEL --limits mmlu=40,boolq=600,blimp=60

DATA holds `mmlu/{dev,test}/SUBJECT.jsonl`, `boolq_validation.jsonl` and `blimp/PARADIGM.jsonl`, rows as in
the data sets that lm-eval names. Prompts are lm-eval's own: its task files are included, with the paths of
the rows. A limit counts questions per subject, paradigm or task. The first model is the source.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml

from factory.artifacts import Comparison, TaskScore
from factory.config.settings import EvaluateSettings
from factory.evaluation.answers import read_answers, write_answers
from factory.evaluation.harness import score_task
from factory.evaluation.significance import compare_answers
from factory.model.loading import load_model
from factory.model.tokenizer import load_tokenizer
from factory.report.markdown import number, p_value, percent, signed, with_error
from factory.report.tables import recovery

HARNESS = Path(lm_eval.tasks.__file__).parent
SHOTS = {"mmlu": 5, "boolq": 0, "blimp": 0}
LIMITS = "mmlu=40,boolq=600,blimp=60"


def write_tasks(data: Path, into: Path) -> list[Path]:
    """Write task files for MMLU, BoolQ and BLiMP over the rows in `data`, each in its own folder."""
    mmlu = [
        _task(
            into / "mmlu",
            f"mmlu_{path.stem}",
            like=f"mmlu/default/mmlu_{path.stem}.yaml",
            files={"dev": data / "mmlu" / "dev" / path.name, "test": path},
        )
        for path in sorted((data / "mmlu" / "test").glob("*.jsonl"))
    ]
    blimp = [
        _task(into / "blimp", f"blimp_{path.stem}", like=f"blimp/{path.stem}.yaml", files={"train": path})
        for path in sorted((data / "blimp").glob("*.jsonl"))
    ]
    _task(
        into / "boolq",
        "boolq",
        like="super_glue/boolq/default.yaml",
        files={"validation": data / "boolq_validation.jsonl"},
        doc_to_target="{{answer | int}}",  # these rows have true or false instead of 1 or 0
        training_split=None,
    )
    return [
        _group(into / "mmlu", "mmlu", mmlu),
        into / "boolq" / "boolq.yaml",
        _group(into / "blimp", "blimp", blimp),
    ]


def _task(folder: Path, name: str, *, like: str, files: dict[str, Path], **changes: Any) -> str:
    """Write one of lm-eval's tasks with other rows, under its own name."""
    rows = {split: str(path.absolute()) for split, path in files.items()}
    kwargs = {"data_files": rows, "cache_dir": str(folder.absolute() / "cache")}
    value = {"include": str(HARNESS / like), "task": name, "dataset_path": "json", "dataset_name": name}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(value | {"dataset_kwargs": kwargs} | changes))
    return name


def _group(folder: Path, name: str, tasks: Sequence[str]) -> Path:
    mean = {"metric": "acc", "weight_by_size": True}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"group": name, "task": list(tasks), "aggregate_metric_list": [mean]}))
    return path


def answer(model: Path, tasks: Sequence[Path], *, limits: dict[str, int], into: Path) -> None:
    """Let one model answer; questions with answers in `into` are skipped."""
    into.mkdir(parents=True, exist_ok=True)
    left = [index for index in range(len(tasks)) if read_answers(into, index) is None]
    loaded, tokenizer = (load_model(model), load_tokenizer(model)) if left else (None, None)
    for index in left:
        task = tasks[index]
        settings = EvaluateSettings(
            tasks=(str(task),), num_fewshot={str(task): SHOTS[task.stem]}, limit=limits.get(task.stem)
        )
        scored = score_task(loaded, tokenizer, str(task), settings=settings, progress=_report)
        write_answers(into, index, scored)


def _report(done: int, total: int, note: str) -> None:
    if done % 200 < 8 or done == total:
        print(f"{note}: {done} of {total}", file=sys.stderr, flush=True)


def table(folders: dict[str, Path], num_tasks: int) -> str:
    """Return scores with standard errors; after the first model also change, p-value and recovery."""
    names = list(folders)
    columns = [column for name in names[1:] for column in (name, "change (95 %)", "recovery")]
    lines = [
        f"| | n | chance | {' | '.join([names[0], *columns])} |",
        "|---|" + "--:|" * (3 + len(columns)),
    ]
    for index in range(num_tasks):
        answered = {name: read_answers(folder, index) for name, folder in folders.items()}
        source, *others = [found[0] for found in answered.values() if found is not None]
        cells = [_label(source[0]), f"{source[0].num_samples:,}", number(source[0].chance or 0)]
        cells.append(with_error(source[0].value, source[0].stderr))
        for score, answers in others:
            before, after = ([s for part in sorted(a) for s in a[part]] for a in (source[1], answers))
            change = compare_answers(score.task, before, after)
            share = recovery(source[0], score)
            cells += [with_error(score.value, score.stderr), _change(change)]
            cells.append("n/a" if share is None else percent(share))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _label(score: TaskScore) -> str:
    parts = f" ({len(score.parts)})" if score.parts else ""
    return f"{score.label}{parts}, {score.num_fewshot}-shot, {score.metric}"


def _change(change: Comparison) -> str:
    star = "*" if change.significant else ""
    ends = f"{signed(change.low)} to {signed(change.high)}"
    return f"{signed(change.difference)}{star} ({ends}; {p_value(change.p_value)})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("models", nargs="+", metavar="name=MODEL", help="the source first")
    parser.add_argument(
        "--limits", default=LIMITS, help="questions per subject, task or paradigm; '' for all"
    )
    parser.add_argument("--work", type=Path, help="folder to keep answers in and resume from")
    arguments = parser.parse_args()
    limits = {
        name: int(n) for name, _, n in (one.partition("=") for one in arguments.limits.split(",") if one)
    }
    models = {name: Path(model) for name, _, model in (one.partition("=") for one in arguments.models)}
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        tasks = write_tasks(arguments.data, work / "tasks")
        for name, model in models.items():
            answer(model, tasks, limits=limits, into=work / name)
        print(table({name: work / name for name in models}, len(tasks)))


if __name__ == "__main__":
    main()
