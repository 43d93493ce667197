"""Locks are freed by death, waited for, refused where they do not work, and seen by `gc`."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from factory.builds.garbage import collect_garbage, register
from factory.builds.swap import laying_out
from factory.errors import StoreError
from factory.store.locks import is_held, locked, unless_locked
from factory.store.stage import StageSpec
from factory.store.store import MANIFEST, Store
from tests.waiting import HUNG_SECONDS

HOLDER = """
import sys
from pathlib import Path
from factory.store.locks import hold, locked
path = Path(sys.argv[2])
if sys.argv[1] == "use":
    file = hold(path)
    print("held", flush=True)
    sys.stdin.read()
with locked(path):
    print("held", flush=True)
    sys.stdin.read()
"""
# Every flock of this process answers as a file system without locks does.
WITHOUT_LOCKS = """
import errno, sys
from pathlib import Path
def refuse(event, arguments):
    if event == "fcntl.flock":
        raise OSError(errno.ENOSYS, "Function not implemented")
sys.addaudithook(refuse)
from factory.builds.garbage import collect_garbage, register
from factory.errors import StoreError
from factory.builds.swap import laying_out
from factory.store.stage import StageSpec
from factory.store.store import Store
home = Path(sys.argv[1])
for work in (
    lambda: Store(home).make(StageSpec("prune", 1, {}, {}), lambda folder: {}),
    lambda: list(collect_garbage(home, recent=True)),
    lambda: laying_out(home / "builds" / "mine").__enter__(),
):
    try:
        work()
    except StoreError as error:
        print(error.message, "|", error.hint)
"""
# No file that this process opens for writing can be made, as on a disk that was mounted read-only.
READ_ONLY = """
import errno, os, sys
from pathlib import Path
from factory.builds.garbage import collect_garbage, register
from factory.errors import StoreError
from factory.builds.swap import laying_out
from factory.store.stage import StageSpec
from factory.store.store import Store
home = Path(sys.argv[1])
register(home, home / "mine", {})
def refuse(event, arguments):
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if writes and str(arguments[0]).startswith(str(home)):
        raise OSError(errno.EROFS, "Read-only file system")
sys.addaudithook(refuse)
for work in (
    lambda: Store(home).make(StageSpec("prune", 1, {}, {}), lambda folder: {}),
    lambda: list(collect_garbage(home, recent=True)),
    lambda: register(home, home / "mine", {}),
    lambda: laying_out(home / "mine").__enter__(),
):
    try:
        work()
    except StoreError as error:
        print(error.message, "|", error.hint)
"""


@contextmanager
def holder(how: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock, or uses the file, until its standard input ends."""
    command = [sys.executable, "-c", HOLDER, how, str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdin
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_a_killed_holder_frees_its_lock_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with holder("lock", path) as process:
        with unless_locked(path) as free:
            assert not free
        process.kill()
        process.wait()
        with locked(path):
            pass


def test_a_lock_is_waited_for_until_its_holder_lets_go(tmp_path: Path) -> None:
    path, waits = tmp_path / "x.lock", []
    with holder("lock", path) as process:
        assert process.stdin

        def let_go() -> None:
            waits.append(process.poll())
            process.stdin.close()  # type: ignore[union-attr]

        with locked(path, on_wait=let_go):
            assert process.wait() == 0
    assert waits == [None]


def told(program: str, home: Path) -> list[str]:
    command = [sys.executable, "-W", "ignore", "-c", program, str(home)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HUNG_SECONDS, check=True)
    return done.stdout.splitlines()


def test_a_file_system_without_locks_is_told(tmp_path: Path) -> None:
    left = tmp_path / "stages" / "prune" / "feedfeedfeedfeed.partial"
    left.mkdir(parents=True)
    (tmp_path / "builds").mkdir()
    hint = "give a folder on another disk with"
    stages = (
        f"the file system of {tmp_path / 'stages' / 'prune'} has no locks | {hint} `home` or FACTORY_HOME"
    )
    assert told(WITHOUT_LOCKS, tmp_path) == [
        stages,
        stages,
        f"the file system of {tmp_path / 'builds'} has no locks | {hint} `out`",
    ]
    assert left.is_dir()


def test_a_read_only_file_system_is_told(tmp_path: Path) -> None:
    left = tmp_path / "stages" / "prune" / "feedfeedfeedfeed.partial"
    left.mkdir(parents=True)
    what, hint = "Read-only file system | give another folder with", "`home` or FACTORY_HOME"
    assert told(READ_ONLY, tmp_path) == [
        f"cannot write to {left.parent}: {what} {hint}",
        f"cannot write to {left.parent}: {what} {hint}",
        f"cannot write to {tmp_path / 'builds'}: {what} {hint}",
        f"cannot write to {tmp_path}: {what} `out`",
    ]


def write_nothing(_folder: Path) -> dict[str, str]:
    return {}


def test_gc_leaves_what_a_run_under_way_uses_however_old_it_is(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = replace(store.make(StageSpec("prune", 1, {}, {}), write_nothing), in_use=None).folder
    with holder("use", folder / MANIFEST) as process:
        os.utime(folder, (0, 0))
        assert is_held(folder / MANIFEST)
        assert list(collect_garbage(store.home, recent=True)) == []
        process.kill()
        process.wait()
        assert [found for found, _ in collect_garbage(store.home)] == [folder]
    assert not folder.exists()


def test_a_stage_that_another_build_uses_is_not_made_again_before_that_is_done(tmp_path: Path) -> None:
    store, spec = Store(tmp_path), StageSpec("prune", 1, {}, {})
    folder = replace(store.make(spec, write_nothing), in_use=None).folder
    inode = (folder / MANIFEST).stat().st_ino
    with holder("use", folder / MANIFEST) as process:
        with pytest.raises(StoreError, match=f"another build is using prune {spec.key}"):
            store.make(spec, write_nothing, rerun=True)
        assert store.make(spec, write_nothing).reused
        assert (folder / MANIFEST).stat().st_ino == inode
        process.kill()
        process.wait()
        assert not store.make(spec, write_nothing, rerun=True).reused
    assert (folder / MANIFEST).stat().st_ino != inode


def test_gc_reads_what_builds_use_once_however_much_it_removes(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from factory.builds.garbage import collect_garbage, register
home, reads = Path(sys.argv[1]), []
for number in range(20):
    (home / "stages" / "prune" / f"{number:016x}").mkdir(parents=True)
    register(home, home / f"build-{number}", {})
sys.addaudithook(lambda event, arguments: reads.append(1) if event == "open" and
                 str(arguments[0]).startswith(str(home / "builds")) else None)
print(len(list(collect_garbage(home, recent=True))), len(reads))
"""
    assert told(program, tmp_path) == ["20 40"]  # once for what is used, once for what killed layouts left
    assert list((tmp_path / "stages" / "prune").iterdir()) == []  # no lock is left for a stage that is gone


def test_gc_finds_what_a_killed_layout_left_beside_a_build(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    build = tmp_path / "builds" / "mine"
    left = [build.with_name(".mine.partial"), build.with_name(".mine.old")]
    for folder in (build, *left):
        folder.mkdir(parents=True)
    register(store.home, build, {})
    with laying_out(build):
        assert list(collect_garbage(store.home, recent=True)) == []
    assert [folder for folder, _ in collect_garbage(store.home, recent=True)] == left
    assert not any(folder.exists() for folder in left)
