"""Differences between two models are those of the textbook tests, and their intervals hold what they say."""

import math
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from factory.artifacts import TaskScore
from factory.evaluation.answers import read_answers, write_answers, write_losses
from factory.evaluation.significance import compare, compare_answers, compare_losses

ANSWERS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=200)


@settings(deadline=None)
@given(ANSWERS)
def test_right_and_wrong_answers_are_compared_by_mcnemars_exact_test(pairs: list[tuple[bool, bool]]) -> None:
    before, after = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    found = compare_answers("task", before, after)
    lost, gained = pairs.count((True, False)), pairs.count((False, True))
    expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1
    assert found.p_value == pytest.approx(expected)
    assert found.difference == pytest.approx((sum(after) - sum(before)) / len(pairs))
    assert -1 <= found.low <= found.difference + 2 / len(pairs)
    assert found.difference - 2 / len(pairs) <= found.high <= 1
    assert found.low < found.high  # also where no answer changed: more questions could have shown one


def test_the_published_example_of_mcnemars_test_comes_out() -> None:
    # Agresti, Categorical Data Analysis: 86 of 1600 approved once and not again, 150 the other way about.
    before = [1.0] * 794 + [1.0] * 150 + [0.0] * 86 + [0.0] * 570
    after = [1.0] * 794 + [0.0] * 150 + [1.0] * 86 + [0.0] * 570
    found = compare_answers("approval", before, after)
    assert found.difference == -0.04
    assert found.stderr == pytest.approx(0.0095, abs=5e-5)
    assert (found.low, found.high) == (pytest.approx(-0.059, abs=5e-4), pytest.approx(-0.021, abs=5e-4))
    assert found.p_value < 0.0001
    assert found.significant


def test_scores_between_right_and_wrong_are_compared_by_a_paired_t_test() -> None:
    draw = random.Random(0)
    before = [draw.random() for _ in range(40)]
    after = [score + draw.gauss(0.05, 0.2) for score in before]
    found, expected = compare_answers("task", before, after), stats.ttest_rel(after, before)
    assert found.p_value == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_losses_of_documents_of_one_length_are_compared_by_a_paired_t_test() -> None:
    draw = random.Random(1)
    before = [(100, draw.uniform(200, 400)) for _ in range(30)]
    after = [(100, nats + draw.gauss(1, 5)) for _, nats in before]
    found = compare_losses("loss", before, after)
    expected = stats.ttest_rel([n / 100 for _, n in after], [n / 100 for _, n in before])
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.difference == pytest.approx(
        sum(n for _, n in after) / 3000 - sum(n for _, n in before) / 3000
    )


def test_long_documents_count_by_their_tokens() -> None:
    found = compare_losses("loss", [(10, 20.0), (1000, 2000.0)], [(10, 40.0), (1000, 2000.0)])
    assert found.difference == pytest.approx(20 / 1010)


def test_two_equal_models_do_not_differ_and_two_shifted_ones_do() -> None:
    losses = [(10, 20.0), (20, 50.0), (30, 55.0)]
    same = compare_losses("loss", losses, losses)
    assert (same.difference, same.p_value, same.significant) == (0, 1, False)
    shifted = compare_losses("loss", losses, [(count, nats + count) for count, nats in losses])
    assert (shifted.difference, shifted.significant) == (1, True)


def test_a_loss_that_is_no_number_is_never_called_harmless() -> None:
    found = compare_losses("loss", [(10, 20.0), (20, 50.0)], [(10, math.nan), (20, 50.0)])
    assert found.significant


def test_intervals_hold_the_true_difference_as_often_as_they_say() -> None:
    draw, hits = random.Random(2), 0
    for _ in range(400):
        kinds = draw.choices(((1, 1), (1, 0), (0, 1), (0, 0)), weights=(60, 10, 5, 25), k=80)
        found = compare_answers("task", [float(a) for a, _ in kinds], [float(b) for _, b in kinds])
        hits += found.low <= -0.05 <= found.high
    assert 0.92 < hits / 400 < 0.99


def test_two_evaluations_are_compared_from_their_folders(tmp_path: Path) -> None:
    score = TaskScore(
        task="t", label="T", metric="acc", value=0.5, stderr=None, num_fewshot=0, num_samples=4, chance=None,
        version="",
    )  # fmt: skip
    answers = {"source": {"b": [1.0, 1.0], "a": [0.0, 0.0]}, "pruned": {"a": [0.0, 1.0], "b": [0.0, 1.0]}}
    for name, losses in (
        ("source", [(5, 9.0), (0, 0.0), (7, 9.0)]),
        ("pruned", [(5, 9.0), (0, 0.0), (7, 21.0)]),
    ):
        (tmp_path / name).mkdir()
        write_losses(tmp_path / name, losses)
        write_answers(tmp_path / name, 0, [(score, answers[name])])
        write_answers(tmp_path / name, 1, [(score, {})])  # its score is no mean over questions
    loss, task = compare(tmp_path / "source", tmp_path / "pruned", num_tasks=2)
    assert (loss.measure, loss.difference, loss.num_items) == ("loss", 1, 2)
    assert (task.measure, task.difference, task.num_items) == ("t", 0, 4)
    assert task.stderr == pytest.approx(math.sqrt(2) / 4)  # one answer gained, one lost
    assert read_answers(tmp_path / "source", 2) is None
