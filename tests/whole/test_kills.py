"""Builds struck down at random moments, and stages that rot, end as if nothing had happened."""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.builders.files import flip_a_bit
from tests.kills import BUILD, COMMAND, KINDS, Bench, Outcome, bench, moments, result, strike

MOMENTS = 7  # each kind once; `python -m tests.kills` takes hundreds
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


# Ends the process without a word at the n-th event of the interpreter whose name and first argument match:
# from outside that is a power cut at a chosen moment.
KILLER = r"""
import os, re, signal, sys
def watch(name, arguments):
    if name == {event!r} and arguments and re.search({pattern!r}, str(arguments[0])):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
"""
STAGES = (  # event of the interpreter, its first argument: one in each stage, in the order of a build
    ("os.rename", r"stages/measure/\w+\.partial$"),
    ("os.mkdir", r"stages/plan/\w+\.partial$"),
    ("open", r"stages/prune/\w+\.partial/config\.json"),
    ("os.mkdir", r"stages/heal/\w+\.partial/trainer/checkpoint-"),
    ("open", r"stages/merge/\w+\.partial/model\.safetensors"),
    ("os.rename", r"stages/evaluate/\w+\.partial/stage\.json\.partial$"),
    ("open", r"stages/speed/\w+\.partial/speed\.json"),
    ("open", r"\.tiny-drop40\.partial/model/README\.md"),
)


def test_killed_in_every_stage_and_run_again_it_ends_as_if_undisturbed(found: Bench, tmp_path: Path) -> None:
    for name in ("tiny", "measured.jsonl", "healed.jsonl", "evaluated.jsonl"):
        (tmp_path / name).symlink_to(found.folder / name)
    command = (*COMMAND, "--home", "home")
    for event, pattern in STAGES:
        before = KILLER.format(event=event, pattern=pattern)
        done = found.process.run(*command, folder=tmp_path, before=before)
        assert done.code == -signal.SIGKILL, (pattern, done.stdout, done.stderr)
        assert not (tmp_path / BUILD).exists()
    last = found.process.run(*command, folder=tmp_path)
    assert last.code == 0, last.stderr
    assert last.stdout.count("reused") == 9  # everything but the card
    assert result(tmp_path) == found.undisturbed


def test_a_heal_that_is_killed_once_its_work_is_done_is_not_done_again(found: Bench, tmp_path: Path) -> None:
    place = tmp_path / "copy"
    shutil.copytree(found.folder / "runs" / "undisturbed", place, symlinks=True)
    (healed,) = place.glob("home/stages/heal/*/stage.json")
    partial = healed.parent.rename(f"{healed.parent}.partial")
    (partial / "stage.json").unlink()
    (partial / "trainer").mkdir()  # it was being removed
    made = {path: path.stat().st_mtime_ns for path in partial.iterdir() if path.is_file()}
    again = found.process.run(*COMMAND, "--home", "home", folder=place)
    assert again.code == 0, again.stderr
    assert "✓ heal" in again.stdout
    kept = {partial / path.name: path.stat().st_mtime_ns for path in healed.parent.iterdir()}
    assert made.items() <= kept.items()
    assert again.stdout.count("reused") == 9
    assert not (healed.parent / "trainer").exists()


@pytest.fixture
def place(found: Bench, tmp_path: Path) -> Path:
    """A copy of the undisturbed build and its store."""
    shutil.copytree(found.folder / "runs" / "undisturbed", tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


def test_a_flipped_bit_in_any_stage_is_found_and_made_good(found: Bench, place: Path) -> None:
    process, home = found.process, ("--home", "home")
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
    again = found.process.run(*COMMAND, "--home", "home", folder=place)
    assert again.code == 0, again.stderr
    assert "model.safetensors has changed since it was made; making it again" in again.stdout
    assert again.stdout.count("reused") == 9


# The file system answers as one that is read-only below a folder, or knows no hard links.
REFUSING = """
import errno, os, sys
def refuse(event, arguments):
    writes = event in ("os.mkdir", "os.rename", "os.remove", "os.utime") or (
        event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR))
    if writes and {part!r} in os.fsdecode(arguments[0] if isinstance(arguments[0], (str, bytes)) else ""):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), arguments[0])
    if event == "os.link" and {part!r} == "links":
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))
sys.addaudithook(refuse)
"""


@pytest.mark.parametrize("part", ["home/stages/plan", "home/stages/speed", "home/builds"])
def test_a_store_with_a_read_only_part_is_told(found: Bench, place: Path, part: str) -> None:
    for folder in [*place.glob("home/stages/plan/*/"), *place.glob("home/stages/speed/*/")]:
        shutil.rmtree(folder)
    told = found.process.run(*COMMAND, "--home", "home", folder=place, before=REFUSING.format(part=part))
    assert told.code == 1, told.stdout + told.stderr
    error, hint = told.stderr.splitlines()
    assert error.startswith("error: cannot write to ")
    assert f"{part}" in error
    assert "Read-only file system" in error
    assert hint == "hint: give another folder with --home or FACTORY_HOME"


def test_where_there_are_no_hard_links_files_are_copied(found: Bench, place: Path) -> None:
    shutil.rmtree(place / BUILD)
    done = found.process.run(*COMMAND, "--home", "home", folder=place, before=REFUSING.format(part="links"))
    assert done.code == 0, done.stderr
    weights = place / BUILD / "model" / "model.safetensors"
    assert weights.stat().st_nlink == 1
    original = found.folder / "runs" / "undisturbed" / BUILD / "model" / "model.safetensors"
    assert weights.read_bytes() == original.read_bytes()
