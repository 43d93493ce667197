"""An evaluation of a tiny model, and tasks with questions of their own."""

import json
from pathlib import Path
from typing import Any

from factory.artifacts import Evaluation
from factory.config.settings import EvaluateSettings
from factory.evaluation.evaluate import evaluate
from tests.builders.texts import text_of

CHOICES = "output_type: multiple_choice\ndoc_to_choice: choices\nmetric_list:\n  - metric: acc\n"
SETTINGS = EvaluateSettings(data="x", num_documents=50, sequence_length=64, tasks=())


def quiet(_done: int, _total: int, _note: str) -> None: ...


def evaluation_of(model: Path, into: Path, documents: list[str], **changes: Any) -> Evaluation:
    into.mkdir(exist_ok=True)
    settings = SETTINGS.model_copy(update=changes)
    return evaluate(model, text_of(documents), settings=settings, into=into, progress=quiet)


def save_task(folder: Path, name: str, rows: list[dict[str, Any]], more: str = CHOICES) -> Path:
    """A YAML task of lm-eval with its questions beside it."""
    data = folder / f"{name}.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    task = folder / f"{name}.yaml"
    task.write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
        f"test_split: test\ndoc_to_text: '{{{{q}}}}'\ndoc_to_target: answer\n{more}"
    )
    return task


def questions(count: int) -> list[dict[str, Any]]:
    return [
        {"q": f"{word} and", "choices": ["one", "two"], "answer": index % 2}
        for index, word in enumerate("abcdefghij"[:count])
    ]
