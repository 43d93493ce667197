"""Identities differ where documents or questions do, and only there."""

from pathlib import Path

import pytest

from factory.artifacts import DataSource
from factory.config.settings import EvaluateSettings
from factory.errors import UsageError
from factory.evaluation.task_files import read_task_file
from factory.evaluation.tasks import check_tasks, task_identity
from factory.text.text import text_identity


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
    task.write_text("task: here\n" + named.replace("FOLDER", str(questions.parent)))
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
        ("task: [", "not YAML"),
        ("date: 2020-99-99", "not YAML: month must be"),
        ("x: &x {a: b}\n<<: *x", "not YAML: merge keys are not allowed"),
        ('q: !!int "abc"', "not YAML: invalid literal"),
        ('q: !!int ""', "not YAML"),
        ("q: !!bool x", "not YAML"),
        ("q: !!timestamp x", "not YAML"),
        ("[" * 5000, "not YAML"),
        ("dataset_path: x\n", "names no task"),
        ("- a\n", "names no task"),
    ],
)
def test_a_task_file_that_cannot_run_is_refused(tmp_path: Path, content: str | None, problem: str) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=problem):
        check_tasks(EvaluateSettings(tasks=(str(path),)), search=False, run_code=False)


LAUGHS = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))


@pytest.mark.parametrize(
    "content",
    ["date: 2020-99-99", "q: !!bool x", "[" * 5000, "dataset_kwargs: {data_files: &a [*a]}",
     f"a0: &a0 [x]\n{LAUGHS}\ndataset_kwargs: {{data_files: *a11}}"],
)  # fmt: skip
def test_a_member_of_a_group_that_cannot_be_read_is_looked_for_in_vain(tmp_path: Path, content: str) -> None:
    task, beside = tmp_path / "mine.yaml", tmp_path / "other.yaml"
    task.write_text("group: mine\ntask: [first]\n")
    (tmp_path / "first.yaml").write_text("task: first\n")
    before = task_identity(str(task))
    beside.write_text(content)
    assert task_identity(str(task)) == before
    beside.rename(tmp_path / "first.yaml")
    assert task_identity(str(task)) != before


def test_what_lies_beside_a_task_and_is_not_named_does_not_count(tmp_path: Path) -> None:
    task = tmp_path / "mine.yaml"
    task.write_text("task: mine\ndataset_kwargs: {data_files: q*.jsonl}\n".replace("q*", f"{tmp_path}/q*"))
    (tmp_path / "q1.jsonl").write_text("1")
    before = task_identity(str(task))
    for beside in ("copy.yaml", "other.py", "other.jsonl", "q.json"):
        (tmp_path / beside).write_text("task: mine\n")
    assert task_identity(str(task)) == before
    (tmp_path / "q2.jsonl").write_text("2")
    assert task_identity(str(task)) != before


def test_python_that_a_task_names_counts_with_what_lies_beside_it(tmp_path: Path) -> None:
    task = tmp_path / "mine.yaml"
    task.write_text("task: mine\nprocess_docs: !function words.drawn\n")
    (tmp_path / "words.py").write_text("x = 1\n")
    identities = {task_identity(str(task))}
    (tmp_path / "words.py").write_text("x = 2\n")
    identities.add(task_identity(str(task)))
    (tmp_path / "list.json").write_text("[]")
    identities.add(task_identity(str(task)))
    assert len(identities) == 3


GROUP = """group: all
task:
  - mine
  - {task: inline, dataset_path: json, doc_to_text: !function code.text}
  - {group: sub, task: [tagged]}
"""
MINE = """task: mine
include: common/base.yaml
fewshot_config: {sampler: !function os.path.join}
"""
THIRD = """task: third
tag: tagged
metric_list: [{metric: acc}, {metric: nothing_of_the_kind}]
"""


def test_the_python_of_a_task_file_is_named_and_asks_to_be_let_run(tmp_path: Path) -> None:
    files = {
        "all.yaml": GROUP,
        "mine.yaml": MINE,
        "common/base.yaml": "process_docs: !function words.drawn\n",
        "common/words.py": "raise SystemExit('this was run')\n",
        "code.py": "raise SystemExit('this was run')\n",
        "deep/other.yml": "task: other\ntag: [x, tagged]\nclass: !function lm_eval.api.task.Task\n",
        "third.yaml": THIRD,
        "unnamed.yaml": "task: unnamed\ndoc_to_text: !function never.named\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    tasks = EvaluateSettings(tasks=(str(tmp_path / "all.yaml"),))
    with pytest.raises(UsageError) as refused:
        check_tasks(tasks, search=False, run_code=False)
    named = refused.value.message.partition("runs Python: ")[2].split(", ")
    assert sorted(named) == sorted([
        f"doc_to_text: code.text ({tmp_path}/code.py)",
        f"process_docs: words.drawn ({tmp_path}/common/words.py)",
        "sampler: os.path.join (module os.path)",
        "metric: nothing_of_the_kind (fetched by the library evaluate)",
    ])  # fmt: skip
    assert "`run_task_code`" in refused.value.hint
    check_tasks(tasks, search=False, run_code=True)
    found = read_task_file(tmp_path / "all.yaml")
    assert {path.relative_to(tmp_path).as_posix() for path in found.parts} == set(files) - {"unnamed.yaml"}
    assert found.missing == ()


def test_two_files_of_one_name_are_refused_where_a_group_names_it(tmp_path: Path) -> None:
    for name in ("good", "good (copy)"):
        (tmp_path / f"{name}.yaml").write_text("task: good\n")
    group = tmp_path / "group.yaml"
    group.write_text("group: all\ntask: [good, elsewhere]\n")
    with pytest.raises(UsageError, match=r"'good', of the group 'all', is defined by both .*copy"):
        read_task_file(group)
    (tmp_path / "good (copy).yaml").unlink()
    assert read_task_file(group).missing == ("elsewhere",)
    assert read_task_file(tmp_path / "good.yaml").definitions == (tmp_path / "good.yaml",)


@pytest.mark.parametrize("second", ["other/mine.yaml", "boolq"])
def test_two_tasks_of_one_name_are_refused(tmp_path: Path, second: str) -> None:
    (tmp_path / "other").mkdir()
    for place in ("", "other/"):
        (tmp_path / f"{place}mine.yaml").write_text("task: mine\n")
    first, second = (
        ("boolq", second) if second == "boolq" else (f"{tmp_path}/mine.yaml", f"{tmp_path}/{second}")
    )
    with pytest.raises(UsageError, match="twice"):
        check_tasks(EvaluateSettings(tasks=(first, second)), search=False, run_code=False)


def test_what_a_task_file_includes_must_be_there(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("task: mine\ninclude: [base.yaml]\n")
    with pytest.raises(UsageError, match=r"mine\.yaml' includes '.*base\.yaml' does not exist"):
        read_task_file(path)
    (tmp_path / "base.yaml").write_text("include: mine.yaml\n")
    assert read_task_file(path).parts == (tmp_path / "base.yaml", path)


def test_the_name_of_a_task_may_come_from_what_its_file_includes(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("task: base\nnum_fewshot: 2\n")
    path = tmp_path / "mine.yml"
    path.write_text("include: base.yaml\n")
    assert read_task_file(path).name == "base"
