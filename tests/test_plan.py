"""The plan takes the block with the smallest distance and never the last layer."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory.artifacts import DataSource, DistanceProfile, layer_ranges
from factory.config import num_dropped
from factory.errors import DropError
from factory.plan import plan

DATA = DataSource(name="x", version="1")


def profile_of(distance: list[list[float]]) -> DistanceProfile:
    rows = tuple(tuple(row) for row in distance)
    size = len(rows) - 1
    return DistanceProfile(
        num_layers=size, num_samples=2, sequence_length=8, num_tokens=16, mean=rows, stderr=rows, data=DATA
    )


@st.composite
def profiles(draw: st.DrawFn) -> DistanceProfile:
    size = draw(st.integers(min_value=3, max_value=12))
    value = st.floats(min_value=0, max_value=1)
    return profile_of([[draw(value) for _ in range(size + 1)] for _ in range(size + 1)])


@given(profiles(), st.data())
def test_no_allowed_block_is_nearer_than_the_chosen_one(
    profile: DistanceProfile, data: st.DataObject
) -> None:
    n = data.draw(st.integers(min_value=1, max_value=profile.num_layers - 2))
    made = plan(profile, block_size=n)
    allowed = [profile.mean[start][start + n] for start in range(profile.num_layers - n)]
    assert made.distance == min(allowed)
    assert made.dropped == tuple(range(made.dropped[0], made.dropped[0] + n))
    assert profile.num_layers - 1 not in made.dropped
    assert sorted(made.kept + made.dropped) == list(range(profile.num_layers))


def test_a_nearer_block_with_the_last_layer_is_passed_over() -> None:
    distance = [[0.5] * 5 for _ in range(5)]
    distance[2][4] = 0.0  # layers 2 and 3 of 4
    distance[0][2] = 0.4
    assert plan(profile_of(distance), block_size=2).dropped == (0, 1)


def test_the_runner_up_is_the_second_nearest() -> None:
    distance = [[0.5] * 6 for _ in range(6)]
    distance[1][3], distance[2][4] = 0.1, 0.2
    made = plan(profile_of(distance), block_size=2)
    assert (made.dropped, made.runner_up_start, made.runner_up_distance) == ((1, 2), 2, 0.2)


@given(st.floats(min_value=0.001, max_value=0.999), st.integers(min_value=2, max_value=200))
def test_a_fraction_means_the_nearest_whole_number_of_layers_or_is_refused(drop: float, layers: int) -> None:
    n = math.floor(drop * layers + 0.5)
    if 1 <= n <= layers - 2:
        assert num_dropped(drop, layers) == n
        assert abs(n - drop * layers) <= 0.5
    else:
        with pytest.raises(DropError) as caught:
            num_dropped(drop, layers)
        assert f"{drop:g}" in caught.value.message


@pytest.mark.parametrize(
    ("layers", "text"),
    [((), ""), ((3,), "3"), ((14, 15, 16, 20), "14–16, 20"), ((2, 1, 0), "0–2"), ((1, 3, 5), "1, 3, 5")],
)
def test_layers_are_written_as_ranges(layers: tuple[int, ...], text: str) -> None:
    assert layer_ranges(layers) == text
