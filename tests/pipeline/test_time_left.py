"""The time left of a build follows what its stages really take."""

import pytest

from factory.pipeline.costs.time_left import DOUBT, TimeLeft

ESTIMATES = {"measure": 100.0, "heal": 1000.0, "evaluate": 300.0}


def test_before_anything_is_known_it_is_the_estimate() -> None:
    left = TimeLeft(ESTIMATES)
    left.started("measure")
    assert left.left(elapsed=0, remaining=None) == sum(ESTIMATES.values())
    assert left.left(elapsed=30, remaining=None) == sum(ESTIMATES.values()) - 30


def test_a_finished_stage_that_took_twice_as_long_lengthens_the_others() -> None:
    left = TimeLeft(ESTIMATES)
    left.started("measure")
    left.finished("measure", 200)
    left.started("heal")
    assert left.left(elapsed=0, remaining=None) == pytest.approx(1300 * (200 + DOUBT) / (100 + DOUBT))


def test_a_stage_that_runs_tells_its_own_pace() -> None:
    left = TimeLeft(ESTIMATES)
    left.started("heal")  # measuring was reused
    assert left.left(elapsed=100, remaining=400) == pytest.approx(400 + 300 * 0.5, rel=0.05)


def test_parts_of_a_stage_are_counted_together() -> None:
    left = TimeLeft({"evaluate": 300.0})
    left.started("evaluate source")
    left.finished("evaluate source", 100)
    left.started("evaluate healed")
    assert left.left(elapsed=0, remaining=None) == 200
    assert left.left(elapsed=5, remaining=400) == 400


def test_stages_without_an_estimate_change_nothing() -> None:
    left = TimeLeft({})
    left.started("pull")
    left.finished("pull", 100)
    assert left.left(elapsed=1, remaining=None) == 0


def test_a_long_download_before_the_first_stage_adds_its_own_time() -> None:
    left = TimeLeft(ESTIMATES)
    left.started("pull")
    assert left.left(elapsed=60, remaining=40) == 40 + sum(ESTIMATES.values())
