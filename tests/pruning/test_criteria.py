"""The plan takes the block with the smallest distance and never the last layer."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory.artifacts import (
    CutLoss,
    CutLosses,
    DataSource,
    DistanceProfile,
    PruningPlan,
    Source,
    layer_ranges,
)
from factory.config.settings import num_dropped
from factory.errors import DataError, DropError, ModelError
from factory.hub.resolve import resolve
from factory.pruning.criteria import choose, plan
from factory.pruning.profile_files import read_profile
from factory.resources import DEMO_MODEL

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


# Other criteria ---------------------------------------------------------------------------------


def flat_profile(num_layers: int, *, influence: tuple[float, ...] | None = None) -> DistanceProfile:
    profile = profile_of([[0.5] * (num_layers + 1) for _ in range(num_layers + 1)])
    return profile.model_copy(update={"influence": influence})


@given(st.integers(min_value=3, max_value=40), st.data())
def test_the_deepest_layers_but_the_last_are_the_simple_heuristic(
    num_layers: int, data: st.DataObject
) -> None:
    n = data.draw(st.integers(min_value=1, max_value=num_layers - 2))
    made = plan(flat_profile(num_layers), block_size=n, criterion="deepest")
    assert made.dropped == tuple(range(num_layers - n - 1, num_layers - 1))


@given(st.lists(st.floats(min_value=0, max_value=2), min_size=3, max_size=20), st.data())
def test_block_influence_takes_the_layers_that_turn_the_states_least(
    influence: list[float], data: st.DataObject
) -> None:
    n = data.draw(st.integers(min_value=1, max_value=len(influence) - 2))
    profile = flat_profile(len(influence), influence=tuple(influence))
    made = plan(profile, block_size=n, criterion="block-influence")
    assert len(made.dropped) == n
    assert max(influence[layer] for layer in made.dropped) <= min(influence[layer] for layer in made.kept)


def test_a_block_that_the_surgery_does_not_allow_is_passed_over() -> None:
    distance = [[0.5] * 6 for _ in range(6)]
    distance[1][3], distance[2][4] = 0.1, 0.2
    made = plan(profile_of(distance), block_size=2, may_drop=lambda layers: 1 not in layers)
    assert (made.dropped, made.distance) == ((2, 3), 0.2)
    with pytest.raises(ModelError, match="no block of 2 layers can be dropped"):
        plan(profile_of(distance), block_size=2, may_drop=lambda _: False)
    with pytest.raises(ModelError, match="layers 2–3 cannot be dropped"):
        plan(profile_of(distance), block_size=2, criterion="deepest", may_drop=lambda _: False)


def losses_of(*behind: tuple[float, float]) -> CutLosses:
    cuts = tuple(
        CutLoss(dropped=(index,), nats=3 + ahead, stderr=0.1, behind=ahead, behind_stderr=error)
        for index, (ahead, error) in enumerate(behind)
    )
    return CutLosses(source=cuts[0], cuts=cuts, num_documents=9, sequence_length=8, data=DATA)


def plans_of(*criteria: str) -> list[PruningPlan]:
    return [PruningPlan(criterion=name, num_layers=9, dropped=(1,)) for name in criteria]


@pytest.mark.parametrize(
    ("behind", "chosen", "why"),
    [
        (((0.3, 0.1), (0.5, 0.1), (0.0, 0.0)), "greedy", "0.300 ahead of the next"),
        (((0.1, 0.1), (0.5, 0.1), (0.0, 0.0)), "angular", "within noise of the lowest loss (greedy"),
        (((0.0, 0.0), (0.5, 0.1), (0.1, 0.1)), "angular", "though greedy is within noise"),
    ],
)
def test_the_least_loss_is_taken_but_among_level_ones_the_simplest(
    behind: tuple[tuple[float, float], ...], chosen: str, why: str
) -> None:
    found, reason = choose(plans_of("angular", "deepest", "greedy"), losses_of(*behind))
    assert found == chosen
    assert why in reason


# Profiles from elsewhere ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source() -> Source:
    return resolve(str(DEMO_MODEL))


def write_pruneme(path: Path, *, n: int, num_layers: int) -> Path:
    rows = [f"{start},{start + n},{0.5 - 0.01 * start}" for start in range(1, num_layers - n + 1)]
    path.write_text("block_start,block_end,average_distance\n" + "\n".join(rows), encoding="utf-8")
    return path


def test_a_profile_of_ours_is_read_back(tmp_path: Path, source: Source) -> None:
    profile = flat_profile(source.num_layers).model_copy(update={"source_commit": source.commit})
    profile.write(tmp_path)
    assert read_profile(tmp_path, source=source) == profile
    assert read_profile(tmp_path / "profile.json", source=source) == profile


def test_a_profile_from_before_ties_and_norms_were_recorded_is_read(tmp_path: Path, source: Source) -> None:
    profile = flat_profile(source.num_layers)
    old = profile.model_dump_json(exclude={"ties", "first_norm", "other_norm"})
    (tmp_path / "profile.json").write_text(old, encoding="utf-8")
    found = read_profile(tmp_path, source=source)
    assert (found.sink, plan(found, block_size=3).ties) == (None, ())


def test_ties_and_norms_are_read_back(tmp_path: Path, source: Source) -> None:
    size = source.num_layers + 1
    norms = {"first_norm": (1.0,) * 9 + (90.0,) * (size - 9), "other_norm": (1.0,) * size}
    profile = flat_profile(source.num_layers).model_copy(update={"ties": {3: (4, 5)}, **norms})
    profile.write(tmp_path)
    assert read_profile(tmp_path, source=source) == profile
    assert profile.sink == 8
    damaged = profile.model_copy(update={"first_norm": (1.0,)})
    damaged.write(tmp_path)
    with pytest.raises(DataError, match="does not contain 25 norms"):
        read_profile(tmp_path, source=source)


def test_the_plan_names_blocks_that_tie_with_it_and_may_be_dropped() -> None:
    rows = [[0.5] * 7 for _ in range(7)]
    rows[2][4] = 0.1
    profile = profile_of(rows).model_copy(update={"ties": {2: (0, 3)}})
    assert plan(profile, block_size=2).ties == (0, 3)
    assert plan(profile, block_size=2, may_drop=lambda layers: 0 not in layers).ties == (3,)
    assert plan(profile, block_size=2, may_drop=lambda layers: layers[0] != 2).ties == ()  # not the nearest
    assert plan(profile, block_size=3).ties == ()


def test_a_row_of_pruneme_is_the_distance_across_zero_based_layers(tmp_path: Path, source: Source) -> None:
    profile = read_profile(write_pruneme(tmp_path / "p.csv", n=8, num_layers=24), source=source)
    assert profile.mean[3][11] == pytest.approx(0.47)
    made = plan(profile, block_size=8)
    assert made.dropped == tuple(range(15, 23))  # the block from 16 on holds the last layer
    with pytest.raises(DataError, match="no distances across 7 layers") as caught:
        plan(profile, block_size=7)
    assert "covers 8 layers" in caught.value.hint
    with pytest.raises(DataError, match="no Block Influence"):
        plan(profile, block_size=8, criterion="block-influence")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x,y\n1,2\n", "lacks block_start"),
        ("a.csv", "block_start,block_end,average_distance\n1,9,0.1\n2,x,0.1\n", "line 3"),
        ("a.csv", "block_start,block_end,average_distance\n1,9,1.5\n", "line 2"),
        ("a.csv", "block_start,block_end,average_distance\n1,9,0.1\n", "with 9 layers; model has 24"),
        ("a.json", "{", "cannot read"),
        ("a.json", "[]", "cannot read"),
        ("absent", None, "no profile at"),
    ],
)
def test_what_is_no_profile_of_this_model_is_told_in_one_line(
    tmp_path: Path, source: Source, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_profile(tmp_path / name, source=source)
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_a_profile_of_another_model_is_refused(tmp_path: Path, source: Source) -> None:
    flat_profile(9).write(tmp_path)
    with pytest.raises(DataError, match="with 9 layers; model has 24"):
        read_profile(tmp_path, source=source)
    flat_profile(24).model_copy(update={"source_commit": "ab" * 20}).write(tmp_path)
    with pytest.raises(DataError, match="another model or revision"):
        read_profile(tmp_path, source=source)
    text = (tmp_path / "profile.json").read_text(encoding="utf-8")
    (tmp_path / "profile.json").write_text(text.replace("0.5", "7.5", 1), encoding="utf-8")
    with pytest.raises(DataError, match="outside 0 to 1"):
        read_profile(tmp_path, source=source)
    flat_profile(24, influence=(math.nan,) * 24).write(tmp_path)
    with pytest.raises(DataError, match="Block Influence that is not finite"):
        read_profile(tmp_path, source=source)


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
