"""Stages are complete or absent, are made once, and are found again by what decides their result."""

import errno
import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory.artifacts import Build, Publication, Source
from factory.builds.folder import link_or_copy
from factory.builds.garbage import collect_garbage, register, registered_builds
from factory.builds.integrity import changed_in
from factory.builds.swap import laying_out, restore
from factory.errors import DiskSpaceError, StoreError, VerificationError
from factory.store.stage import StageSpec
from factory.store.store import Store, damage
from tests.waiting import HUNG_SECONDS, until


def spec(**parameters: object) -> StageSpec:
    return StageSpec("prune", 1, parameters, {"source": "0" * 40})


def write_hello(folder: Path) -> dict[str, str]:
    (folder / "hello.txt").write_text("hello")
    return {}


def garbage(store: Store, *, recent: bool = False) -> list[Path]:
    return [folder for folder, _ in collect_garbage(store.home, recent=recent, dry_run=True)]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_the_key_does_not_depend_on_the_order_of_parameters(parameters: dict[str, object]) -> None:
    backwards = dict(reversed(list(parameters.items())))
    assert StageSpec("s", 1, parameters, {}).key == StageSpec("s", 1, backwards, {}).key


@given(st.integers(), st.integers())
def test_different_parameters_give_different_keys(a: int, b: int) -> None:
    assert (spec(n=a).key == spec(n=b).key) == (a == b)


def test_stage_version_and_inputs_are_part_of_the_key() -> None:
    keys = {
        StageSpec("prune", 1, {}, {"source": "a"}).key,
        StageSpec("prune", 2, {}, {"source": "a"}).key,
        StageSpec("merge", 1, {}, {"source": "a"}).key,
        StageSpec("prune", 1, {}, {"source": "b"}).key,
    }
    assert len(keys) == 4


def test_a_stage_is_made_once_and_then_reused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    calls = []

    def work(folder: Path) -> dict[str, str]:
        calls.append(folder)
        return write_hello(folder)

    first = store.make(spec(n=1), work)
    second = store.make(spec(n=1), work)
    assert (first.reused, second.reused, len(calls)) == (False, True, 1)
    assert first.folder == second.folder
    assert (first.folder / "hello.txt").read_text() == "hello"
    manifest = json.loads((first.folder / "stage.json").read_text())
    assert manifest["files"] == {"hello.txt": 5}
    assert manifest["parameters"] == {"n": 1}


def test_work_that_fails_leaves_nothing_with_the_final_name(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def work(folder: Path) -> dict[str, str]:
        write_hello(folder)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.make(spec(), work)
    assert store.find(spec()) is None


@pytest.mark.parametrize("resumable", [True, False])
def test_only_a_resumable_stage_sees_what_an_earlier_attempt_left(tmp_path: Path, resumable: bool) -> None:
    store = Store(tmp_path)
    seen = []

    def work(folder: Path) -> dict[str, str]:
        seen.append((folder / "hello.txt").exists())
        if len(seen) == 1:
            write_hello(folder)
            raise ValueError("cut short")
        return write_hello(folder)

    with pytest.raises(ValueError):
        store.make(spec(), work, resumable=resumable)
    store.make(spec(), work, resumable=resumable)
    assert seen == [False, resumable]


def test_rerun_makes_a_complete_stage_again_from_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.make(spec(), write_hello)

    def work(folder: Path) -> dict[str, str]:
        (folder / "other.txt").write_text("x")
        return {}

    result = store.make(spec(), work, rerun=True)
    assert not result.reused
    assert not (result.folder / "hello.txt").exists()


def write_numbered(folder: Path) -> dict[str, str]:
    """Another text whenever it is called in a store."""
    calls = folder.parents[2] / "calls"
    calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
    (folder / "hello.txt").write_text(calls.read_text())
    return {}


def make_and_die_renaming(home: Path, nth: int) -> None:
    renamed = 0

    def die(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal renamed
        if event == "os.rename" and Path(os.fsdecode(str(arguments[0]))).is_dir():
            renamed += 1
            if renamed == nth:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    Store(home).make(spec(), write_numbered, made_from={"a": "other"})


@pytest.mark.parametrize("nth", [1, 2])
def test_a_stage_whose_maker_was_killed_between_its_two_names_is_not_made_again(
    tmp_path: Path, nth: int
) -> None:
    store = Store(tmp_path)
    folder = replace(store.make(spec(), write_numbered, made_from={"a": "one"}), in_use=None).folder
    killed = multiprocessing.get_context("spawn").Process(target=make_and_die_renaming, args=(tmp_path, nth))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert folder.exists() == (nth == 1)
    aside = {path.name.partition(".")[2].partition("-")[0] for path in folder.parent.glob("*/")}
    assert aside == ({"", "partial"} if nth == 1 else {"old", "partial"})
    assert len(garbage(store, recent=True)) == 2
    result = store.make(spec(), write_numbered, made_from={"a": "other"})
    assert result.reused
    assert (folder / "hello.txt").read_text() == "xx"
    assert damage(folder) == []
    assert list(folder.parent.glob("*/")) == [folder]


def test_a_partial_folder_with_a_changed_file_is_not_taken_for_complete(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = replace(store.make(spec(), write_hello), in_use=None).folder
    partial = folder.rename(folder.with_name(folder.name + ".partial"))
    (partial / "hello.txt").write_text("jello")
    result = store.make(spec(), lambda folder: write_hello(folder), resumable=True)
    assert not result.reused
    assert (folder / "hello.txt").read_text() == "hello"
    assert damage(folder) == []


def test_a_stage_in_use_is_kept_aside_when_it_is_made_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = store.make(spec(), write_numbered, made_from={"a": "one"})
    second = store.make(spec(), write_numbered, made_from={"a": "other"})
    (old,) = first.folder.parent.glob("*.old-*.partial")
    assert [(path / "hello.txt").read_text() for path in (old, second.folder)] == ["x", "xx"]
    assert second.folder == first.folder
    register(store.home, finished_build(tmp_path / "build"), {"prune": second.key})
    assert garbage(store, recent=True) == []  # both are held
    assert first.in_use
    assert second.in_use
    first.in_use.close()
    second.in_use.close()
    assert garbage(store, recent=True) == [old]
    assert store.make(spec(), write_numbered, made_from={"a": "other"}).reused
    assert not old.exists()


def finished_build(folder: Path) -> Path:
    folder.mkdir()
    (folder / "build.json").write_text("{}")
    return folder


def slow_work(folder: Path) -> dict[str, str]:
    (folder / "started").write_text("")
    time.sleep(HUNG_SECONDS)
    return {}


def make_slowly(home: Path) -> None:
    Store(home).make(spec(), slow_work)


def test_a_stage_whose_maker_was_killed_is_made_by_the_next(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=make_slowly, args=(tmp_path,), daemon=True)
    process.start()
    started = tmp_path / "stages" / "prune" / f"{spec().key}.partial" / "started"
    until(started.exists)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    result = Store(tmp_path).make(spec(), write_hello)  # the dead one's lock is free
    assert sorted(path.name for path in result.folder.iterdir()) == ["hello.txt", "stage.json"]


def count_and_make(home: Path) -> None:
    def work(folder: Path) -> dict[str, str]:
        with (home / "calls").open("a") as file:
            file.write("x")
        time.sleep(0.3)
        return write_hello(folder)

    Store(home).make(spec(), work)


def test_four_at_once_make_a_stage_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=count_and_make, args=(tmp_path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(HUNG_SECONDS)
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "calls").read_text() == "x"


def lay_out_slowly(build: Path, log: Path) -> None:
    with laying_out(build), log.open("a") as file:
        file.write("(")
        file.flush()
        time.sleep(0.2)
        file.write(")")


def test_builds_into_one_folder_take_turns_whatever_their_stores(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    log = tmp_path / "log"
    processes = [
        context.Process(target=lay_out_slowly, args=(tmp_path / "builds" / "mine", log)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(HUNG_SECONDS)
    assert log.read_text() == "()()()"
    assert list((tmp_path / "builds").iterdir()) == []  # the lock went with the last of them


@pytest.mark.parametrize("name", [b"caf\xe9", b"two\nlines", b"\xff\xfe"])
def test_a_build_can_lie_in_a_folder_whose_name_is_no_text(tmp_path: Path, name: bytes) -> None:
    build = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    build.mkdir()
    (build / "build.json").write_text("{}")
    store = Store(tmp_path / "home")
    register(store.home, build, {})
    assert list(registered_builds(store.home)) == [build]


def test_garbage_is_what_no_build_uses(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    used, unused = (replace(store.make(spec(n=n), write_hello), in_use=None) for n in (1, 2))
    partial = used.folder.with_name("feedfeedfeedfeed.partial")
    partial.mkdir()
    build = tmp_path / "build"
    build.mkdir()
    (build / "build.json").write_text("{}")
    register(store.home, build, {"prune": used.key})
    assert garbage(store) == []  # younger than a day
    assert sorted(garbage(store, recent=True)) == sorted([unused.folder, partial])
    assert list(registered_builds(store.home)) == [build]
    (build / "build.json").unlink()  # the user deleted the build
    assert used.folder in garbage(store, recent=True)


def test_garbage_is_nothing_of_a_build_that_was_killed_between_its_two_names(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    used = replace(store.make(spec(n=1), write_hello), in_use=None)
    build = tmp_path / "build"
    register(store.home, build, {"prune": used.key})
    for name in (".build.old", ".build.partial"):
        (tmp_path / name / "model").mkdir(parents=True)
        for file in ("build.json", "profile.json"):
            (tmp_path / name / file).write_text("{}")
    assert garbage(store, recent=True) == []
    assert registered_builds(store.home) == {}
    restore(build)
    assert (build / "build.json").is_file()
    assert garbage(store, recent=True) == [tmp_path / ".build.partial"]


def test_garbage_passes_over_what_went_away_and_what_is_used_meanwhile(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    made = [replace(store.make(spec(n=n), write_hello), in_use=None) for n in range(3)]
    first, gone, used = sorted(made, key=lambda stage: stage.folder)
    first.folder.with_name("0" * 16).symlink_to(tmp_path)
    build = tmp_path / "build"
    build.mkdir()
    (build / "build.json").write_text("{}")
    found = collect_garbage(store.home, recent=True)
    assert next(found)[0] == first.folder
    gone.folder.rename(tmp_path / "gone")
    register(store.home, build, {"prune": used.key})
    assert list(found) == []
    assert used.folder.is_dir()


def test_times_that_estimates_start_from_are_garbage_once_they_are_old(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    paces = store.home / "paces"
    paces.mkdir(parents=True)
    (paces / f"{'0' * 16}.json").write_text("{}")
    assert garbage(store) == []
    assert [found for found, _ in collect_garbage(store.home, recent=True)] == [paces]
    assert not paces.exists()


def test_a_manifest_without_sums_is_damage(tmp_path: Path) -> None:
    folder = Store(tmp_path).make(spec(), write_hello).folder
    assert damage(folder) == []
    (folder / "stage.json").write_text("{}")
    assert damage(folder) == ["stage.json"]


@pytest.mark.parametrize(("name", "key"), [("", "0" * 16), ("thesis", "0" * 16), ("prune", "../../x")])
def test_a_stage_that_cannot_be_is_not_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, key: str
) -> None:
    monkeypatch.setattr("factory.builds.integrity.changed_since_laid_out", lambda *_: [])
    build = Build.model_construct(stages={name: key})
    with pytest.raises(VerificationError, match="not a stage"):
        changed_in(build, tmp_path, store=Store(tmp_path))


def test_a_home_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.write_text("")
    with pytest.raises(StoreError, match="cannot write") as caught:
        Store(home).make(spec(), write_hello)
    assert "`home`" in caught.value.hint
    with pytest.raises(StoreError, match="home is not a folder"):
        changed_in(Build.model_construct(stages={}), tmp_path, store=Store(home))


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_stage_with_a_damaged_manifest_is_made_again_and_not_listed(tmp_path: Path, content: str) -> None:
    store = Store(tmp_path)
    result = store.make(spec(), write_hello)
    (result.folder / "stage.json").write_text(content)
    assert store.find(spec()) is None
    assert list(store.stages()) == []
    assert not store.make(spec(), write_hello).reused


def test_a_stage_that_was_made_from_other_bytes_is_made_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = replace(store.make(spec(n=1), write_hello), in_use=None)
    second = store.make(spec(n=2), write_hello, made_from={first.key: first.digest})
    assert store.find(spec(n=2), made_from={first.key: first.digest})
    same = replace(store.make(spec(n=1), write_hello, rerun=True), in_use=None)
    assert same.digest == first.digest

    def write_other(folder: Path) -> dict[str, str]:
        (folder / "hello.txt").write_text("olleh")
        return {}

    other = store.make(spec(n=1), write_other, rerun=True)
    assert store.find(spec(n=2), made_from={other.key: other.digest}) is None
    again = store.make(spec(n=2), write_hello, made_from={other.key: other.digest})
    assert (second.reused, again.reused) == (False, False)
    assert store.find(spec(n=2), made_from={other.key: other.digest})


def test_a_stage_with_a_file_cut_short_is_made_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    result = store.make(spec(), write_hello)
    (result.folder / "hello.txt").write_text("he")
    assert not store.make(spec(), write_hello).reused
    assert (result.folder / "hello.txt").read_text() == "hello"


def test_a_rerun_that_fails_leaves_the_finished_stage(tmp_path: Path) -> None:
    store = Store(tmp_path)
    result = replace(store.make(spec(), write_hello), in_use=None)

    def work(_folder: Path) -> dict[str, str]:
        raise ValueError("cut short")

    with pytest.raises(ValueError):
        store.make(spec(), work, rerun=True)
    assert (result.folder / "hello.txt").read_text() == "hello"


def test_garbage_never_names_a_folder_that_is_not_the_stores(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (tmp_path / "stages" / "thesis" / ("0" * 16)).mkdir(parents=True)
    (tmp_path / "stages" / "prune" / "photos").mkdir(parents=True)
    assert garbage(store, recent=True) == []


def test_a_damaged_registration_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "builds").mkdir()
    (tmp_path / "builds" / "x.json").write_text("{}")
    with pytest.raises(StoreError, match=r"x\.json is damaged"):
        garbage(Store(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"repo_id": 1}', 100_000 * "["])
def test_a_damaged_record_is_told_with_its_place(tmp_path: Path, text: str) -> None:
    for record in (Publication, Source):
        (tmp_path / record.file_name).write_text(text)
        with pytest.raises(StoreError, match=f"cannot read .*{record.file_name}"):
            record.read(tmp_path)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    def work(_folder: Path) -> dict[str, str]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(DiskSpaceError, match="the disk is full, while writing"):
        Store(tmp_path).make(spec(), work)


def test_linked_files_share_their_bytes_also_through_a_symbolic_link(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_text("weights")
    (tmp_path / "snapshot").symlink_to(blob)
    link_or_copy(tmp_path / "snapshot", tmp_path / "published")
    assert not (tmp_path / "published").is_symlink()
    assert (tmp_path / "published").stat().st_ino == blob.stat().st_ino
