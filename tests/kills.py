"""A build struck down at a random moment and run again, many times: `python -m tests.kills --moments 200`.

Each time the second run must end as if nothing had happened: the same weights, nothing done twice that was
complete, nothing left that `factory gc` does not find.
"""

import argparse
import json
import os
import random
import shutil
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factory.builds.garbage import collect_garbage
from factory.builds.swap import whole_beside
from factory.store.files import PARTIAL, sha256_of_file
from factory.store.store import MANIFEST, damage
from tests.builders.models import save_llama
from tests.builders.texts import rhymes
from tests.forks import Ended, Forks, can_mount

MODULES = (
    "torch", "transformers.models.llama.modeling_llama", "datasets", "lm_eval", "matplotlib.figure",
    "factory.pruning.measure", "factory.pruning.prune", "factory.healing.heal", "factory.healing.merge",
    "factory.evaluation.evaluate", "tests.builders.brief_speed", "factory.report.card", "factory.hub.pull",
    "factory.builds.folder", "factory.pipeline.costs.preview", "factory.report.figures",
    "factory.pipeline.build", "matplotlib.backends.backend_svg", "peft.tuners.lora.bnb", "scipy.io",
)  # fmt: skip
COMMAND = (
    "build", "tiny", "--drop", "0.4", "--tasks", "none", "--samples", "4", "--eval-documents", "2",
    "--sequence-length", "32", "--heal-steps", "4",
    "--calibration-data", "measured.jsonl", "--heal-data", "healed.jsonl", "--eval-data", "evaluated.jsonl",
)  # fmt: skip
BUILD = Path("builds") / "tiny-drop40"
KINDS = ("SIGKILL", "SIGTERM", "SIGINT", "memory", "file size", "full disk", "clock jump")
MOMENTARY = ("seconds", "speed")
# Where a new thread has no memory for its first step, Python waits for that step for ever.
HUNG_SECONDS = 60.0
YEAR = 365 * 24 * 3600
# What the process does to itself, after so much work or at its n-th event on the file system. Work is in
# seconds of the processor: on a busy machine a moment is as far on as on an idle one.
STRIKE = """
import mmap, os, resource, signal, struct, sys, threading, time

how, seconds, event, amount, counter, ballast = {arguments!r}
FILES = {{"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.utime", "shutil.copyfile"}}
with open(counter, "r+b") as file:
    counted = mmap.mmap(file.fileno(), 16)
seen, over, start = 0, False, time.process_time()
sys.dont_write_bytecode = True  # under a limit it would write half a file

def strike():
    if how.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, how))
    elif how == "memory":
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + amount,) * 2)
    elif how == "file size":
        resource.setrlimit(resource.RLIMIT_FSIZE, (amount, amount))
    elif how == "full disk":
        with open(ballast, "wb", buffering=0) as file:
            try:
                while file.write(bytes(65536)):
                    pass
            except OSError:
                pass
    elif how == "clock jump":
        real, real_ns = time.time, time.time_ns
        time.time = lambda: real() + amount
        time.time_ns = lambda: real_ns() + amount * 10**9
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()

def watch(name, _arguments):
    global seen, over
    if name in FILES:
        seen += 1
        counted[:] = struct.pack("qd", seen, time.process_time() - start)
        if seen == event and not over:
            over = True
            strike()

def strike_after():
    while time.process_time() - start < seconds:
        time.sleep(0.005)
    strike()

sys.addaudithook(watch)
if seconds is not None:
    threading.Thread(target=strike_after, daemon=True).start()
"""


@dataclass(frozen=True)
class Moment:
    """When and how a build is struck."""

    kind: str
    seconds: float | None  # of work, after its start
    event: int | None  # or this one of its opens, renames, …
    amount: int  # of a clock jump, seconds; of a limit on files or further memory, bytes


@dataclass(frozen=True)
class Outcome:
    """What came of one moment."""

    moment: Moment
    first: Ended
    stage: str  # that was under way, or "after the end"
    second: Ended
    faults: tuple[str, ...]  # empty where the second run ended as if nothing had happened


@dataclass(frozen=True)
class Bench:
    """Where builds run: a folder with the model and its texts, and the process that runs the command."""

    folder: Path
    disk: Path | None  # a small file system of its own, where that is allowed
    process: Forks
    undisturbed: dict[str, Any]
    seconds: float  # of work that the undisturbed build took
    num_events: int


@contextmanager
def bench(folder: Path) -> Iterator[Bench]:
    """Make the model, and build it once undisturbed."""
    save_llama(folder / "tiny", num_layers=6, max_length=2048)
    for name in ("measured", "healed", "evaluated"):
        lines = [json.dumps({"text": f"{name} {text}"}) for text in rhymes(4)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "scratch").mkdir()
    variables = {
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(folder / "scratch"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    disk = folder / "disk" if can_mount() else None
    if disk:
        disk.mkdir()
    process = Forks(variables, modules=MODULES, disk=(disk, "size=40m") if disk else None)
    try:
        bare = Bench(folder, disk, process, {}, 0.0, 0)
        for name in ("warm", "undisturbed"):  # the first takes longer than any that follows
            place = folder / "runs" / name
            _place(bare, place)
            ended = _run(bare, place, Moment("none", None, None, 0))
            assert ended.code == 0, ended.stderr
        num_events, seconds = struct.unpack("qd", (place / "counted").read_bytes())
        yield Bench(folder, disk, process, result(place), seconds, num_events)
    finally:
        process.close()


def moments(found: Bench, count: int, *, seed: int) -> list[Moment]:
    """Every kind in turn, half of them by time and half by an event on the file system.

    There is an odd number of kinds: each comes by time in one turn and by an event in the next.
    """
    draw = random.Random(seed)
    made = []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        by_time = number % 2 == 0
        amounts = {
            "clock jump": draw.choice([-10 * YEAR, -3600, 3600, 10 * YEAR]),
            "memory": draw.choice([2**20, 2**24, 2**26]),
        }
        made.append(
            Moment(
                kind,
                draw.uniform(0, found.seconds) if by_time else None,
                None if by_time else draw.randint(1, found.num_events),
                amounts.get(kind, draw.choice([1_000, 5_000, 40_000])),
            )
        )
    return made


def strike(found: Bench, moment: Moment, name: str) -> Outcome:
    """Run a build that is struck, look at what it left, run it again, and look again."""
    disk = found.disk if moment.kind == "full disk" else None
    place = (disk or found.folder / "runs") / name
    seen = _place(found, place)
    first = _run(found, place, moment)
    (seen / "ballast").unlink(missing_ok=True)
    if moment.kind == "clock jump":
        _shift_times(seen, moment.amount)
    home, faults = seen / "home", []
    complete = {path.parent: _identity(path.parent) for path in _manifests(home)}
    faults += [f"{folder.name} is not whole" for folder in complete if damage(folder)]
    stage = _stage_under_way(seen, first)
    faults += _check_garbage(home)
    second = _run(found, place, Moment("none", None, None, 0))
    faults += _compare(seen, found, second, complete)
    faults += _check_nothing_left(seen, found.folder / "scratch")
    shutil.rmtree(seen)
    return Outcome(moment, first, stage, second, tuple(faults))


def _place(found: Bench, place: Path) -> Path:
    """A folder for one build, with links to the model and the texts, as it is seen from here."""
    seen = found.process.root / place.relative_to("/")
    seen.mkdir(parents=True)
    for path in ("tiny", "measured.jsonl", "healed.jsonl", "evaluated.jsonl"):
        (seen / path).symlink_to(found.folder / path)
    (seen / "counted").write_bytes(bytes(16))
    return seen


def _run(found: Bench, place: Path, moment: Moment) -> Ended:
    kind = moment.kind if moment.kind != "full disk" or found.disk else "file size"
    files = (str(place / "counted"), str(place / "ballast"))
    arguments = (kind, moment.seconds, moment.event, moment.amount, *files)
    before = STRIKE.format(arguments=arguments)
    patience = HUNG_SECONDS + 5 * found.seconds if kind == "memory" else None
    return found.process.run(
        *COMMAND, "--home", "home", folder=place, before=before, patience_seconds=patience
    )


def _manifests(home: Path) -> list[Path]:
    return [path for path in home.glob(f"stages/*/*/{MANIFEST}") if path.parent.suffix != PARTIAL]


def _identity(folder: Path) -> list[tuple[str, int, str]]:
    """Which files lie there: names, inodes and sums."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.name, path.stat().st_ino, sha256_of_file(path)) for path in files]


def result(place: Path) -> dict[str, Any]:
    """What a build made, without what differs from run to run: every published file that is the model's."""
    record: dict[str, Any] = json.loads((place / BUILD / "build.json").read_text())
    files = {
        path.relative_to(place).as_posix(): sha256_of_file(path)
        for path in sorted((place / BUILD / "model").rglob("*"))
        if path.is_file() and path.name not in ("build.json", "README.md")  # which say how long it took
    }
    return {"record": {k: v for k, v in record.items() if k not in MOMENTARY}, "files": files}


def _stage_under_way(place: Path, ended: Ended) -> str:
    if ended.code == 0:
        return "after the end"
    partials = sorted(place.glob(f"home/stages/*/*{PARTIAL}"), key=lambda path: path.stat().st_ctime)
    if partials:
        return partials[-1].parent.name
    return "card" if (place / "home" / "stages" / "speed").is_dir() else "between stages"


def _check_garbage(home: Path) -> list[str]:
    """Every folder of the store is garbage, since no build is finished; or its build is."""
    build = home.parent / BUILD
    if not home.is_dir() or (build / "build.json").is_file() or whole_beside(build):
        return []
    listed = {folder for folder, _ in collect_garbage(home, recent=True, dry_run=True)}
    return [f"gc does not find {path.name}" for path in home.glob("stages/*/*/") if path not in listed]


def _compare(
    place: Path, found: Bench, second: Ended, complete: dict[Path, list[tuple[str, int, str]]]
) -> list[str]:
    if second.code:
        return [f"not resumed: {second.stderr[-300:]}"]
    faults = []
    if result(place) != found.undisturbed:
        faults.append("another result")
    faults += [f"{folder} was made twice" for folder, was in complete.items() if _identity(folder) != was]
    if partial := sorted(path.name for path in place.rglob(f"*{PARTIAL}")):
        faults.append(f"left behind: {partial}")
    return faults


def _check_nothing_left(place: Path, scratch: Path) -> list[str]:
    """Once its build is gone, gc leaves locks and records alone; temporary files are gone as well."""
    shutil.rmtree(place / BUILD, ignore_errors=True)
    list(collect_garbage(place / "home", recent=True))
    left = [path for path in (place / "home").rglob("*") if path.is_file() and path.suffix != ".lock"]
    left = [path for path in left if path.parent.name != "builds"]
    left += list((place / "builds").iterdir()) if (place / "builds").is_dir() else []
    left += list(scratch.iterdir())
    return [f"left for good: {path.name}" for path in left]


def _shift_times(place: Path, seconds: int) -> None:
    """Let every file be as old as it would be had the clock jumped."""
    for path in place.rglob("*"):
        if not path.is_symlink() and path.exists():
            then = max(path.stat().st_mtime + seconds, 0)
            os.utime(path, (then, then))


def table(outcomes: Sequence[Outcome]) -> str:
    """A row a kind: tried, cut short, resumed, identical, lost; then where they struck."""
    rows = ["| struck by | moments | cut short | resumed | identical | lost |", "|---|--:|--:|--:|--:|--:|"]
    for kind in (*KINDS, "all"):
        mine = [outcome for outcome in outcomes if kind in (outcome.moment.kind, "all")]
        cut = sum(outcome.first.code != 0 for outcome in mine)
        resumed = sum(outcome.second.code == 0 for outcome in mine)
        good = sum(not outcome.faults for outcome in mine)
        rows.append(f"| {kind} | {len(mine)} | {cut} | {resumed} | {good} | {len(mine) - good} |")
    stages = Counter(outcome.stage for outcome in outcomes)
    where = ", ".join(f"{stage} {count}" for stage, count in stages.most_common())
    return "\n".join([*rows, "", f"Under way when struck: {where}."])


def main() -> None:
    """Strike many builds, one after another, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory() as folder, bench(Path(folder)) as found:
        sys.stderr.write(f"undisturbed: {found.seconds:.1f} s, {found.num_events} events\n")
        for number, moment in enumerate(moments(found, asked.moments, seed=asked.seed)):
            outcome = strike(found, moment, str(number))
            outcomes.append(outcome)
            seen = [line for line in outcome.first.stderr.splitlines() if line.strip()]
            sys.stderr.write(
                f"{number:>4} {moment} {outcome.stage}: {outcome.first.code} {seen[-2:]} {outcome.faults}\n"
            )
    sys.stdout.write(table(outcomes) + "\n")
    sys.exit(any(outcome.faults for outcome in outcomes))


if __name__ == "__main__":
    main()
