"""Compare the estimated needs of a build with the actual ones: disk, host memory, GPU memory.

    python benchmarks/needs.py demo --drop 0.3
    python benchmarks/needs.py FOLDER --drop 0.3 --calibration-data … --heal-data … --eval-data … [any option]

Runs `factory build`, and samples its memory every tenth of a second and its disk more often. The store is
empty, or with `--in FOLDER` kept, so that a second build with other options reuses its stages.
`benchmarks/shapes.py` writes models of known shapes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SECONDS = 0.1
DISK_SECONDS = 0.005  # the trainer's third checkpoint is gone as soon as it is whole
FILLING = ("measure", "search", "heal")  # stages that take larger batches until the GPU is full


@dataclass
class Peak:
    """The largest values seen, in bytes."""

    disk: int = 0
    host: int = 0
    host_at: dict[str, int] = field(default_factory=dict)  # stage → bytes
    gpu: dict[str, int] = field(default_factory=dict)  # stage → bytes


def disk_bytes(folder: Path) -> int:
    """Return the bytes on disk below a folder; files with several names count once."""
    found = {}
    for parent, _, names in os.walk(folder):  # skips folders deleted since they were listed
        for name in names:
            with suppress(FileNotFoundError):
                stat = Path(parent, name).lstat()
                found[stat.st_ino] = stat.st_blocks * 512
    return sum(found.values())


def host_bytes(process: psutil.Process) -> int:
    """Return the private memory of a process and its children, without mapped files."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            memory = one.memory_info()
            total += memory.rss - memory.shared
        except psutil.NoSuchProcess:
            continue
    return total


def gpu_bytes() -> int:
    """Return the memory in use on the first GPU, or 0 without one."""
    command = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return 0
    return int(found.split()[0]) * 2**20


def watch(process: psutil.Process, folder: Path, before: int, peak: Peak, done: threading.Event) -> None:
    """Record the peak of host and GPU memory until the build is done."""
    while not done.wait(SECONDS):
        try:
            host = host_bytes(process)
        except psutil.NoSuchProcess:
            return
        peak.host = max(peak.host, host)
        running = [path.parent.name for path in folder.glob("home/stages/*/*.partial")]
        for stage in running:
            peak.host_at[stage] = max(peak.host_at.get(stage, 0), host)
            peak.gpu[stage] = max(peak.gpu.get(stage, 0), gpu_bytes() - before)


def watch_disk(folder: Path, peak: Peak, done: threading.Event) -> None:
    """Record the peak of the disk until the build is done."""
    while not done.wait(DISK_SECONDS):
        peak.disk = max(peak.disk, disk_bytes(folder))


def measured(arguments: list[str], folder: Path) -> tuple[dict[str, int], Peak]:
    """Return the estimate of a dry run, and the peak of the run itself.

    Args:
        arguments: Arguments of `factory build`.
        folder: Folder for the store and the build; its earlier content is not counted.
    """
    build = [sys.executable, "-m", "factory", "build", *arguments]
    where = ["--home", str(folder / "home"), "--out", str(folder / "build")]
    dry = subprocess.run([*build, *where, "--dry-run", "--json"], stdout=subprocess.PIPE, check=True)
    peak, done, before, disk_before = Peak(), threading.Event(), gpu_bytes(), disk_bytes(folder)
    process = subprocess.Popen([*build, *where])
    watchers = (
        threading.Thread(
            target=watch, args=(psutil.Process(process.pid), folder, before, peak, done), daemon=True
        ),
        threading.Thread(target=watch_disk, args=(folder, peak, done), daemon=True),
    )
    for watcher in watchers:
        watcher.start()
    code = process.wait()
    done.set()
    for watcher in watchers:
        watcher.join()
    if code:
        sys.exit(code)
    peak.disk -= disk_before
    estimate: dict[str, int] = json.loads(dry.stdout)
    return estimate, peak


def rows(estimate: dict[str, int], peak: Peak) -> list[tuple[str, int, int]]:
    """Return name, estimate and measurement in bytes, without stages that fill a GPU on purpose."""
    found = [
        ("disk", estimate["disk_needed"], peak.disk),
        ("host memory", estimate["host_needed"], peak.host),
    ]
    least = max((took for stage, took in peak.gpu.items() if stage not in FILLING), default=0)
    return [*found, ("GPU memory", estimate["memory_needed"], least)] if least else found


def main() -> None:
    """Run the build and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--in", dest="folder", type=Path, help="folder for store and build; default: temporary"
    )
    asked, build = parser.parse_known_args()
    if asked.folder:
        asked.folder.mkdir(parents=True, exist_ok=True)
    with nullcontext(asked.folder) if asked.folder else tempfile.TemporaryDirectory() as folder:
        estimate, peak = measured(build, Path(folder))
    print("| | estimate | measured | ratio |\n|---|--:|--:|--:|")
    for name, estimated, took in rows(estimate, peak):
        print(f"| {name} | {estimated / 1e6:,.1f} MB | {took / 1e6:,.1f} MB | {estimated / took:.2f} |")
    for stage, took in peak.host_at.items():
        print(f"{stage}: host {took / 1e9:.2f} GB, GPU {peak.gpu[stage] / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
