"""Builds struck down at random moments, and stages that rot, end as if nothing had happened."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kills import BUILD, COMMAND, KINDS, Bench, Outcome, bench, moments, strike

MOMENTS = 20
TELLS = ("SIGINT", "memory", "file size", "full disk")  # the process lives to say why it ends


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with bench(tmp_path_factory.mktemp("kills")) as made:
        yield made


@pytest.fixture(scope="module")
def outcomes(found: Bench) -> list[Outcome]:
    asked = moments(found, MOMENTS, seed=1)
    return [strike(found, moment, str(number)) for number, moment in enumerate(asked)]


@pytest.mark.parametrize("number", range(MOMENTS))
def test_a_build_struck_down_at_any_moment_ends_as_if_undisturbed(
    outcomes: list[Outcome], number: int
) -> None:
    outcome = outcomes[number]
    assert outcome.faults == (), (outcome.moment, outcome.first, outcome.second)
    if outcome.moment.kind in TELLS and outcome.first.code != 0:
        assert "Traceback" not in outcome.first.stderr


def test_the_moments_strike_in_every_way_while_work_is_under_way(outcomes: list[Outcome]) -> None:
    assert {outcome.moment.kind for outcome in outcomes} == set(KINDS)
    assert sum(outcome.first.code != 0 for outcome in outcomes) > MOMENTS / 2


def test_a_heal_that_is_killed_once_its_work_is_done_is_not_done_again(found: Bench, tmp_path: Path) -> None:
    place = tmp_path / "copy"
    shutil.copytree(found.folder / "runs" / "undisturbed", place, symlinks=True)
    (healed,) = place.glob("home/stages/heal/*/stage.json")
    partial = healed.parent.rename(f"{healed.parent}.partial")
    (partial / "stage.json").unlink()
    (partial / "trainer").mkdir()  # it was being removed
    again = found.processes[""].run(*COMMAND, "--home", "home", folder=place)
    assert again.code == 0, again.stderr
    assert "✓ heal               0.0 s" in again.stdout
    assert again.stdout.count("reused") == 9
    assert not (healed.parent / "trainer").exists()


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()  # it may share its bytes with another folder
    path.write_bytes(content)


@pytest.fixture
def place(found: Bench, tmp_path: Path) -> Path:
    """A copy of the undisturbed build and its store."""
    shutil.copytree(found.folder / "runs" / "undisturbed", tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


def test_a_flipped_bit_in_any_stage_is_found_and_made_good(found: Bench, place: Path) -> None:
    process, home = found.processes[""], ("--home", "home")
    flipped = {}
    for number, path in enumerate(sorted(place.glob("home/stages/*/*/stage.json"))):
        names = sorted(json.loads(path.read_text())["files"])
        flipped[path.parent] = names[number % len(names)]
        flip_a_bit(path.parent / flipped[path.parent])
    assert len(flipped) == 9
    verified = process.run("verify", str(BUILD), *home, folder=place)
    assert verified.code == 1
    for stage, name in flipped.items():
        assert f"{stage.name}  changed: {name}" in verified.stdout
    assert "is missing or has changed since it was made (and 8 more)" in verified.stderr
    again = process.run(*COMMAND, *home, folder=place)
    assert again.code == 0, again.stderr
    assert again.stdout.count("has changed since it was made; making it again") == 9
    whole = process.run("verify", str(BUILD), *home, folder=place)
    assert (whole.code, whole.stdout.count("unchanged")) == (0, 10)


def test_what_was_made_from_a_stage_stays_if_that_comes_out_the_same_again(found: Bench, place: Path) -> None:
    (pruned,) = place.glob("home/stages/prune/*/model.safetensors")
    flip_a_bit(pruned)
    again = found.processes[""].run(*COMMAND, "--home", "home", folder=place)
    assert again.code == 0, again.stderr
    assert "model.safetensors has changed since it was made; making it again" in again.stdout
    assert again.stdout.count("reused") == 9
