"""The demo's text and task: nothing held out is trained on, every process sees the same, answers are fair."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factory.demo.next_line import Item
from factory.demo.next_line import items as next_line_items
from factory.errors import DataError
from factory.text.standard_library import HELD_OUT, Part, documents, fingerprint, modules
from tests.places import ROOT


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small standard library with one file of every kind that is treated in its own way."""
    files = {
        "textwrap.py": "held = 'out'\n",
        "queue.py": "held = 'out too'\n",
        "abc.py": "a = 1\n",
        "json/decoder.py": "b = 2\n",
        "test/test_abc.py": "c = 3\n",
        "test/test_textwrap.py": "held = 'test'\n",
        "test/test_queue/test_more.py": "held = 'test folder'\n",
        "site-packages/other.py": "foreign = 1\n",
        "encodings/cp1252.py": "table = 1\n",
        "_sysconfigdata__linux_.py": "generated = 1\n",
        "empty.py": "\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "test/test_latin.py").write_bytes(b"# coding: latin-1\nname = '\xe9'\n")
    (tmp_path / "huge.py").write_text("x = 1\n" * 100_000, encoding="utf-8")
    return tmp_path


# The text ---------------------------------------------------------------------------------------


def test_no_held_out_module_is_trained_on() -> None:
    held_out = set(documents("held-out"))
    assert len(held_out) == len(HELD_OUT)
    assert held_out.isdisjoint(documents("train"))
    assert held_out.isdisjoint(documents("train", include_tests=True))


def test_both_splits_are_large_enough_to_train_and_to_evaluate_on() -> None:
    assert sum(map(len, documents("held-out"))) > 400_000
    assert sum(map(len, documents("train"))) > 5_000_000


def test_train_is_all_written_source_but_tests_and_held_out_modules(library: Path) -> None:
    assert list(documents("train", root=library)) == ["a = 1\n", "b = 2\n"]


def test_tests_can_be_added_but_not_those_of_held_out_modules(library: Path) -> None:
    texts = list(documents("train", root=library, include_tests=True))
    assert texts == ["a = 1\n", "b = 2\n", "c = 3\n"]


def test_held_out_follows_the_order_of_its_names(library: Path) -> None:
    assert list(HELD_OUT) == sorted(HELD_OUT)
    assert list(documents("held-out", root=library)) == ["held = 'out too'\n", "held = 'out'\n"]


def test_a_fingerprint_changes_with_content_and_with_names(library: Path) -> None:
    before = fingerprint("train", root=library)
    held_out = fingerprint("held-out", root=library)
    assert fingerprint("train", root=library) == before
    (library / "abc.py").write_text("a = 2\n", encoding="utf-8")
    changed = fingerprint("train", root=library)
    (library / "abc.py").rename(library / "abd.py")
    renamed = fingerprint("train", root=library)
    assert len({before, changed, renamed}) == 3
    assert fingerprint("held-out", root=library) == held_out


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_an_interpreter_without_sources_is_an_error_that_names_the_folder(
    split: Part, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="no source files") as error:
        list(documents(split, root=tmp_path / "python311.zip"))
    assert str(tmp_path / "python311.zip") in error.value.message


# The task ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return next_line_items(modules())


def test_there_are_hundreds_of_items_with_four_distinct_choices(items: list[Item]) -> None:
    assert len(items) >= 300
    assert len({item["place"] for item in items}) == len(items)
    assert all(len({choice.strip() for choice in item["choices"]}) == 4 for item in items)


@pytest.mark.parametrize("limit", [40, 100, 400])
def test_right_answers_are_spread_evenly_also_over_the_first_items(items: list[Item], limit: int) -> None:
    counts = Counter(item["answer"] for item in items[:limit])
    assert max(counts.values()) - min(counts[place] for place in range(4)) <= 1


def test_the_right_answer_is_the_line_that_follows_the_context(items: list[Item]) -> None:
    sources = modules()
    for item in items:
        name, _, line = item["place"].partition(":")
        lines = sources[name].splitlines()
        assert item["choices"][item["answer"]] == lines[int(line) - 1]
        assert item["context"].split("\n") == lines[int(line) - 13 : int(line) - 1]


def test_wrong_answers_have_the_shape_of_the_right_one_and_stand_elsewhere(
    items: list[Item],
) -> None:
    sources = {name: source.splitlines() for name, source in modules().items()}
    for item in items:
        name, _, line = item["place"].partition(":")
        right = item["choices"].pop(item["answer"])
        near = sources[name][max(int(line) - 25, 0) : int(line) + 24]
        for wrong in item["choices"]:
            assert wrong in sources[name]
            assert wrong not in near
            assert len(wrong) - len(wrong.lstrip()) == len(right) - len(right.lstrip())
            assert abs(len(wrong) - len(right)) <= len(right) / 4
        item["choices"].insert(item["answer"], right)


def test_the_shortest_line_is_no_better_a_guess_than_any(items: list[Item]) -> None:
    shortest = [min(range(4), key=lambda n: len(item["choices"][n])) == item["answer"] for item in items]
    assert sum(shortest) / len(items) < 0.3


def test_comments_and_docstrings_are_not_asked_for() -> None:
    source = "\n".join(
        f'def function_{n}(first, second):\n    """A docstring\n    of two lines."""\n'
        "    # a comment of fair length\n"
        f"    return first * {n} + second\n"
        for n in range(60)
    )
    made = next_line_items({"made": source}, count=1000)
    assert made
    for item in made:
        assert all(
            choice.lstrip().startswith(("def function_", "return first")) for choice in item["choices"]
        )


def test_a_line_that_the_context_already_holds_is_not_asked_for() -> None:
    assert next_line_items({"made": "repeated_call(argument)\n" * 200}) == []


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["alpha", "beta", "gamma", "delta"]), max_size=120), st.integers(0, 20))
def test_items_of_any_module_are_well_formed(names: list[str], count: int) -> None:
    source = "".join(f"{name}_value = compute({n % 17})\n" for n, name in enumerate(names))
    made = next_line_items({"made": source}, count=count)
    assert len(made) <= count
    for item in made:
        assert len(set(item["choices"])) == 4
        assert f"{item['context']}\n{item['choices'][item['answer']]}\n" in source


def test_every_process_makes_the_same_text_and_items(items: list[Item]) -> None:
    program = (
        "import json; from factory.demo import next_line; from factory.text import standard_library as text;"
        "print(json.dumps([text.fingerprint('train'), next_line.items(text.modules())]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, check=True, capture_output=True
    )
    assert json.loads(answer.stdout) == [fingerprint("train"), items]


def test_lm_eval_asks_for_the_four_lines_after_the_context(items: list[Item]) -> None:
    from lm_eval.tasks import TaskManager, get_task_dict

    tasks = ROOT / "factory" / "demo" / "tasks"
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    task = get_task_dict(["next_line"], manager)["next_line"]
    task.build_all_requests(limit=8)
    asked = [request.args for request in task.instances]
    expected = [(item["context"], "\n" + choice) for item in items[:8] for choice in item["choices"]]
    assert asked == expected
    assert set(task.aggregation()) == {"acc", "acc_norm"}
