"""Identities differ where documents or questions do, and only there."""

from pathlib import Path

import pytest

from factory.artifacts import DataSource
from factory.config import EvaluateSettings
from factory.errors import UsageError
from factory.identity import check_tasks, task_identity, text_identity


def test_configuration_and_split_of_a_data_set_count() -> None:
    commit = "a" * 40
    texts = [
        DataSource(name=name, version=commit, hub_id="acme/c4", split=split)
        for name in ("acme/c4:en", "acme/c4:de")
        for split in ("train", "validation")
    ]
    assert len({text_identity(text) for text in texts}) == 4


def test_the_same_bytes_in_another_format_are_another_text_but_under_another_name_the_same() -> None:
    names = ("a.jsonl", "b.jsonl", "wiki.train.jsonl", "a.txt", "a.jsonl.xz")
    identities = [text_identity(DataSource(name=name, version="0" * 64)) for name in names]
    assert identities[0] == identities[1] == identities[2]
    assert len(set(identities)) == 3


def test_a_task_file_counts_with_the_files_it_can_include(tmp_path: Path) -> None:
    task = tmp_path / "mine.yaml"
    task.write_text("task: mine\ninclude: base.yaml\n")
    (tmp_path / "base.yaml").write_text("output_type: multiple_choice\n")
    first = task_identity(str(task))
    assert task_identity(str(task)) == first
    (tmp_path / "base.yaml").write_text("output_type: generate_until\n")
    second = task_identity(str(task))
    (tmp_path / "photo.png").write_bytes(b"x")
    assert task_identity(str(task)) == second != first


@pytest.mark.parametrize(
    "named",
    ["dataset_path: json\ndataset_kwargs: {data_files: {test: [FOLDER/q.jsonl]}}", "dataset_path: FOLDER"],
)
def test_a_task_file_counts_with_the_questions_that_it_names_elsewhere(tmp_path: Path, named: str) -> None:
    questions = tmp_path / "elsewhere" / "q.jsonl"
    (tmp_path / "here").mkdir()
    questions.parent.mkdir()
    questions.write_text("1")
    task = tmp_path / "here" / "base.yaml"
    task.write_text(named.replace("FOLDER", str(questions.parent)))
    first = task_identity(str(task))
    assert task_identity(str(task)) == first
    questions.write_text("2")
    assert task_identity(str(task)) != first


def test_the_embedded_task_counts_with_its_text_and_others_by_name() -> None:
    assert task_identity("next_line").startswith("next_line:")
    assert task_identity("boolq") == "boolq"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "does not exist"),
        ("task: [", "no YAML"),
        ("date: 2020-99-99", "no YAML: month must be"),
        ('q: !!int "abc"', "no YAML: invalid literal"),
        ('q: !!int ""', "no YAML"),
        ("q: !!bool x", "no YAML"),
        ("q: !!timestamp x", "no YAML"),
        ("[" * 5000, "no YAML"),
        ("dataset_path: x\n", "names no task"),
        ("- a\n", "names no task"),
    ],
)
def test_a_task_file_that_cannot_run_is_refused(tmp_path: Path, content: str | None, problem: str) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=problem):
        check_tasks(EvaluateSettings(tasks=(str(path),)), search=False)


LAUGHS = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))


@pytest.mark.parametrize(
    "content",
    ["date: 2020-99-99", "q: !!bool x", "[" * 5000, "dataset_kwargs: {data_files: &a [*a]}",
     f"a0: &a0 [x]\n{LAUGHS}\ndataset_kwargs: {{data_files: *a11}}"],
)  # fmt: skip
def test_what_lies_beside_a_task_and_is_no_task_counts_by_its_bytes(tmp_path: Path, content: str) -> None:
    task, beside = tmp_path / "mine.yaml", tmp_path / "other.yaml"
    task.write_text("task: mine")
    beside.write_text(content)
    before = task_identity(str(task))
    beside.write_text(content + " ")
    assert task_identity(str(task)) != before


def test_a_task_file_with_functions_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("task: mine\ncustom_dataset: !function module.function\n")
    check_tasks(EvaluateSettings(tasks=(str(path), "next_line", "mmlu")), search=False)
