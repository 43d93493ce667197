"""Task files: only what one names is run, each row is one that lm-eval scores, metrics keep their scale."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from factory.artifacts import Comparison, TaskScore
from factory.config.settings import EvaluateSettings
from factory.errors import DataError, FactoryError, UsageError
from factory.evaluation.answers import write_losses
from factory.evaluation.harness import load_tasks
from factory.evaluation.significance import compare, compare_losses
from tests.builders.evaluation import CHOICES, evaluation_of, questions, save_task
from tests.builders.models import save_llama
from tests.builders.texts import rhymes

ROLLING = "output_type: loglikelihood_rolling\nmetric_list:\n"
ALL_ROLLING = (
    f"{ROLLING}  - metric: word_perplexity\n  - metric: byte_perplexity\n  - metric: bits_per_byte\n"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("other"), seed=1)


def scores(model: Path, into: Path, *tasks: Path, **changes: Any) -> tuple[TaskScore, ...]:
    names = tuple(map(str, tasks))
    return evaluation_of(model, into, rhymes(2), tasks=names, num_documents=2, **changes).tasks


def refusal(task: Path, **changes: Any) -> str:
    with pytest.raises(FactoryError) as refused:
        load_tasks(EvaluateSettings(tasks=(str(task),), **changes))
    return refused.value.message


def remarks(task: Path, **changes: Any) -> list[str]:
    return load_tasks(EvaluateSettings(tasks=(str(task),), **changes))


# One file ---------------------------------------------------------------------------------------


def test_the_file_that_was_given_is_scored_whatever_else_defines_its_name(
    model: Path, tmp_path: Path
) -> None:
    wrong = save_task(tmp_path, "good", questions(4))
    wrong.rename(tmp_path / "a good (copy).yaml")
    (tmp_path / "a good (copy).yaml").write_text(
        (tmp_path / "a good (copy).yaml").read_text() + "process_docs: !function words.never\n"
    )
    (tmp_path / "words.py").write_text("raise SystemExit('this was run')\n")
    given = save_task(tmp_path, "good", questions(6)).rename(tmp_path / "good.yml")
    (score,) = scores(model, tmp_path / "into", given)
    assert (score.task, score.num_samples, score.runs_code) == ("good", 6, False)


def test_python_that_a_task_file_names_is_run_and_the_score_says_so(model: Path, tmp_path: Path) -> None:
    (tmp_path / "words.py").write_text("def first(rows):\n    return rows.select(range(3))\n")
    task = save_task(tmp_path, "mine", questions(6), CHOICES + "process_docs: !function words.first\n")
    (score,) = scores(model, tmp_path / "into", task)
    assert (score.num_samples, score.runs_code) == (3, True)


def test_a_template_cannot_reach_what_is_behind_its_values(tmp_path: Path) -> None:
    task = save_task(tmp_path, "mine", questions(2))
    task.write_text(task.read_text().replace("{{q}}", "{{q.__class__}}"))
    assert "access to attribute '__class__'" in refusal(task)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (CHOICES + "unsafe_code: true\n", "runs programs written by the model"),
        (CHOICES + "tag: false\n", "lm-eval does not recognise"),
        (CHOICES + "doc_to_image: q\n", "asks about images or sounds"),
        (CHOICES.replace("acc", "bypass"), "no metric but 'bypass'"),
        (CHOICES + "process_docs: !function nowhere_at_all.first\n", "cannot run task"),
        (CHOICES + "process_docs: !function json.first\n", "no function 'first'"),
        (CHOICES + "process_docs: !function empty.rows\n", "lm-eval cannot use the task file"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_the_work(tmp_path: Path, more: str, problem: str) -> None:
    (tmp_path / "empty.py").write_text("def rows(docs):\n    return docs.select([])\n")
    assert problem in refusal(save_task(tmp_path, "mine", questions(2), more))


# Groups and tags --------------------------------------------------------------------------------


def group_of(folder: Path, name: str, tasks: list[str], more: str = "") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(f"group: {name}\ntask: {json.dumps(tasks)}\n{more}")
    return path


MEAN = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"


def test_a_group_without_a_score_of_its_own_has_one_for_each_member_that_has(
    model: Path, tmp_path: Path
) -> None:
    for name, count in (("a", 2), ("b", 3), ("c", 4), ("d", 5)):
        save_task(tmp_path, name, questions(count), CHOICES + f"tag: {'pair' if name in 'cd' else 'else'}\n")
    group_of(tmp_path, "averaged", ["a", "b"], MEAN)
    group_of(tmp_path, "tagged", ["pair"])
    task = group_of(tmp_path, "all", ["averaged", "tagged"])
    into = tmp_path / "into"
    assert [(score.task, score.num_samples) for score in scores(model, into, task)] == [
        ("averaged", 5), ("c", 4), ("d", 5)
    ]  # fmt: skip
    found = compare(into, into, num_tasks=1)
    assert [(one.measure, one.num_items) for one in found[1:]] == [("averaged", 5), ("c", 4), ("d", 5)]


def test_a_group_does_not_average_what_only_some_of_its_tasks_give(model: Path, tmp_path: Path) -> None:
    save_task(tmp_path, "a", questions(2))
    save_task(tmp_path, "b", questions(2), CHOICES.replace("acc", "brier_score"))
    task = group_of(tmp_path, "mixed", ["a", "b"], MEAN)
    accuracy, brier = scores(model, tmp_path / "into", task, limit=1)
    assert (accuracy.task, accuracy.metric, accuracy.num_samples) == ("a", "acc", 1)
    assert (brier.task, brier.higher_is_better, brier.is_share, brier.arrow) == ("b", False, False, "↓")


def test_a_group_whose_tasks_have_other_shots_does_not_say_those_of_the_first(
    model: Path, tmp_path: Path
) -> None:
    for shots in (0, 1):
        save_task(
            tmp_path, f"t{shots}", questions(3), CHOICES + f"fewshot_split: test\nnum_fewshot: {shots}\n"
        )
    (score,) = scores(model, tmp_path / "into", group_of(tmp_path, "both", ["t0", "t1"], MEAN))
    assert (score.num_fewshot, score.shots) == (None, "shots differ")


@pytest.mark.parametrize(
    ("tasks", "problem"),
    [
        ([], "is a group without tasks"),
        ([f"t{n}" for n in range(21)], "has no score of its own, but 21 members"),
    ],
)
def test_a_group_without_rows_or_with_too_many_is_refused(
    tmp_path: Path, tasks: list[str], problem: str
) -> None:
    for name in tasks:
        save_task(tmp_path, name, questions(1))
    assert problem in refusal(group_of(tmp_path, "all", tasks))


def test_one_score_is_not_asked_for_twice(tmp_path: Path) -> None:
    one = save_task(tmp_path, "a", questions(1))
    group = group_of(tmp_path, "all", ["a"])
    with pytest.raises(UsageError, match="requests 'a' twice"):
        load_tasks(EvaluateSettings(tasks=(str(one), str(group))))


# Metrics ----------------------------------------------------------------------------------------


def texts(count: int) -> list[dict[str, Any]]:
    return [{"q": "", "answer": f"{text} {'and more ' * n}"} for n, text in enumerate(rhymes(count))]


@pytest.mark.parametrize("metric", ["word_perplexity", "byte_perplexity", "bits_per_byte"])
def test_a_perplexity_falls_and_is_compared_by_its_nats(
    model: Path, other_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], metric: str
) -> None:
    task = save_task(tmp_path, "wiki", texts(6), f"{ROLLING}  - metric: {metric}\n")
    (before,) = scores(model, tmp_path / "source", task)
    (after,) = scores(other_model, tmp_path / "pruned", task)
    assert (before.metric, before.higher_is_better, before.is_share, before.chance) == (
        metric,
        False,
        False,
        None,
    )
    _, compared = compare(tmp_path / "source", tmp_path / "pruned", num_tasks=1)
    assert compared.difference == pytest.approx(after.value - before.value, rel=1e-6)
    assert compared.low < compared.difference < compared.high
    assert compared.num_items == 6
    assert "Running loglikelihood" not in capsys.readouterr().err
    assert before.name == f"wiki {metric} ↓"


def test_a_perplexity_is_worse_by_as_much_as_its_nats_say(tmp_path: Path) -> None:
    """Units and nats by hand: exp(10 / 10) before and exp(15 / 10) after."""
    nats = {"source": [[4, 4.0], [6, 6.0]], "pruned": [[4, 5.0], [6, 10.0]]}
    for name, pairs in nats.items():
        (tmp_path / name).mkdir()
        write_losses(tmp_path / name, [(1, 1.0), (1, 1.0)])
        value = math.exp(sum(loss for _, loss in pairs) / 10)
        score = {"task": "w", "label": "w", "metric": "word_perplexity", "value": value, "stderr": None,
                 "num_fewshot": 0, "num_samples": 2, "chance": None, "version": ""}  # fmt: skip
        (tmp_path / name / "task-0.json").write_text(json.dumps([{"score": score, "answers": {"w": pairs}}]))
    _, found = compare(tmp_path / "source", tmp_path / "pruned", num_tasks=1)
    in_nats: Comparison = compare_losses("w", nats["source"], nats["pruned"])  # type: ignore[arg-type]
    assert found.difference == pytest.approx(math.exp(1.5) - math.exp(1))
    assert found.p_value == in_nats.p_value
    assert found.high == pytest.approx(math.e * (math.exp(in_nats.high) - 1))


def test_of_several_metrics_the_first_with_a_number_is_shown_and_no_score_is_a_clear_error(
    model: Path, tmp_path: Path
) -> None:
    named = "process_results: !function words.scored\nmetric_list:\n"
    both = "".join(f"  - {{metric: {name}, aggregation: mean}}\n" for name in ("bypass", "size"))
    (tmp_path / "words.py").write_text("def scored(doc, results):\n    return {'bypass': 1, 'size': 250.0}\n")
    rolling = "output_type: loglikelihood_rolling\n"
    task = save_task(tmp_path, "sized", texts(2), rolling + named + both)
    (score,) = scores(model, tmp_path / "into", task)
    assert (score.metric, score.value, score.higher_is_better, score.is_share) == ("size", 250.0, None, False)
    (tmp_path / "words.py").write_text("def scored(doc, results):\n    return {'bypass': 1}\n")
    with pytest.raises(DataError, match="lm-eval gives no number for task 'unsized'"):
        scores(model, tmp_path / "no", save_task(tmp_path, "unsized", texts(2), rolling + named + both))


@pytest.mark.parametrize(
    ("metric", "arrow"), [("bleu", "↑"), ("chrf", "↑"), ("ter", "↓"), ("exact_match", "↑")]
)
def test_a_metric_of_written_text_keeps_its_scale_and_direction(
    model: Path, tmp_path: Path, metric: str, arrow: str
) -> None:
    written = (
        "output_type: generate_until\ngeneration_kwargs: {until: ['x'], max_gen_toks: 4}\nmetric_list:\n"
    )
    task = save_task(tmp_path, "said", texts(2), f"{written}  - metric: {metric}\n")
    task.write_text(task.read_text().replace("'{{q}}'", "'say: {{q}}'"))
    (score,) = scores(model, tmp_path / "into", task, limit=1)
    assert (score.metric, score.arrow, score.writes) == (metric, arrow, True)
    assert score.is_share == (metric == "exact_match")
    assert score.shown(score.value).endswith("%") == score.is_share


@pytest.mark.parametrize(("metric", "arrow"), [("mcc", "↑"), ("f1", "↑"), ("brier_score", "↓")])
def test_a_metric_over_all_choices_is_no_share_of_right_ones(
    model: Path, tmp_path: Path, metric: str, arrow: str
) -> None:
    task = save_task(tmp_path, "chosen", questions(4), CHOICES.replace("acc", metric))
    (score,) = scores(model, tmp_path / "into", task, limit=1)
    assert (score.metric, score.arrow, score.is_share, score.chance) == (metric, arrow, False, None)


def test_a_perplexity_beyond_the_float_range_is_a_clear_error(model: Path, tmp_path: Path) -> None:
    """A text of one word, as in languages that put no spaces between them."""
    task = save_task(
        tmp_path, "wiki", [{"q": "", "answer": "x" * 300}], f"{ROLLING}  - metric: word_perplexity\n"
    )
    with pytest.raises(DataError, match=r"cannot compute the score of '.*wiki\.yaml': math range error"):
        scores(model, tmp_path / "into", task)


# What lm-eval does not say ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("splits", "shown"),
    [
        ("", True),
        ("fewshot_split: test\n", False),
        ("fewshot_split: other\n", False),
        ("fewshot_config: {samples: [{q: a, choices: [one, two], answer: 0}]}\n", False),
    ],
)
def test_examples_that_may_hold_the_answer_to_a_question_are_refused(
    tmp_path: Path, splits: str, shown: bool
) -> None:
    task = save_task(tmp_path, "shown", questions(6), CHOICES + splits)
    shutil.copy(tmp_path / "shown.jsonl", tmp_path / "other.jsonl")
    text = task.read_text().replace("    test: ", f"    other: {tmp_path / 'other.jsonl'}\n    test: ")
    task.write_text(text)
    name = str(task)
    assert remarks(task, num_fewshot={name: 0}) == []
    if shown:
        assert "come from the questions that it asks" in refusal(task, num_fewshot={name: 2})
    else:
        assert remarks(task, num_fewshot={name: 2}) == []


def test_answers_that_become_dates_are_told(tmp_path: Path) -> None:
    rows = [
        {"q": "when?", "choices": ["one", "two"], "answer": 0, "day": f"1969-07-{day}"} for day in (20, 21)
    ]
    (told,) = remarks(save_task(tmp_path, "dates", rows))
    assert "has dates in 'day'" in told
