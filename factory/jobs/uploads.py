"""Files for a job: its build file, and the local files that it names."""

import hashlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from factory.config.options import reads_healing_text
from factory.config.references import LocalFiles, aliases, local_data, share_of, with_share
from factory.config.request import BuildRequest
from factory.errors import UsageError
from factory.evaluation.task_files import task_files
from factory.jobs.submit import MOUNT

OF_SUBMITTING = ("on", "timeout", "state")  # options of the job, not of its build
LOCAL = "local"  # folder of uploaded local files, below the mount
FILES = ("model", "calibration-data", "heal-data", "eval-data")
Files = dict[str, Path | bytes]  # name below the mount → file or content to upload


def carried(
    requests: Sequence[BuildRequest], *, upload: bool, bucket: str
) -> tuple[list[dict[str, Any]], Files]:
    """Return the builds of the job's build file, and the local files to upload for it.

    Args:
        upload: Permission to upload local files.

    Raises:
        UsageError: A build reads local files, and they may not be uploaded.
    """
    files: Files = {}
    given = []
    for request in requests:
        values = {key: value for key, value in request.file_values().items() if key not in OF_SUBMITTING}
        if not reads_healing_text(request):
            values.pop("heal-data", None)
        for key in [key for key in FILES if key in values]:
            several = isinstance(values[key], list)
            with request.located(key.replace("-", "_")):
                taken = []
                for value in values[key] if several else [values[key]]:
                    data, share = share_of(str(value)) if key == "heal-data" else (str(value), 1.0)
                    place = _carried(data, files, upload=upload, bucket=bucket)
                    taken.append(with_share(place, share))
            values[key] = taken if several else taken[0]
        if request.tasks:
            with request.located("tasks"):
                values["tasks"] = _tasks(request.tasks, files, upload=upload, bucket=bucket)
        given.append(values)
    return given, files


def _carried(reference: str, files: Files, *, upload: bool, bucket: str) -> str:
    """Return a reference for the job; what is local is uploaded."""
    if reference in aliases() or (local := local_data(reference)) is None:
        return reference
    path, column = local
    _check_upload(path, upload=upload, bucket=bucket)
    found = LocalFiles.find(str(path))
    assert found is not None  # the request has been checked
    return _taken(found, files) + (f"#{column}" if column else "")


def _take(path: Path, files: Files) -> str:
    """Add a local path to the uploads, and return its path in the job."""
    place = f"{_place(path)}/{path.resolve().name}"
    files |= {f"{place}{inside}": file for inside, file in _inside(path)}
    return f"{MOUNT}/{place}"


def _tasks(tasks: Sequence[str], files: Files, *, upload: bool, bucket: str) -> list[str]:
    """Return the tasks for the job; a task file is uploaded with all files that it names, in place."""
    renamed = {}
    for name, found in task_files(tasks).items():
        _check_upload(Path(name), upload=upload, bucket=bucket)
        for data in (each for named in found.data.values() for each in named.values()):
            for path in data.paths:
                _check_upload(path, upload=upload, bucket=bucket)
        parts = {_plain(part): found.data.get(part, {}) for part in found.parts}
        root = Path(os.path.commonpath([part.parent for part in parts]))
        place = _place(root)
        for part, named in parts.items():
            files[f"{place}/{part.relative_to(root).as_posix()}"] = _part(part, named, files)
        renamed[name] = f"{MOUNT}/{place}/{_plain(Path(name)).relative_to(root).as_posix()}"
    return [renamed.get(task, task) for task in tasks]


def _plain(path: Path) -> Path:
    """Return an absolute path without `..`; links stay, since other files use their names."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def _part(part: Path, named: Mapping[str, LocalFiles], files: Files) -> Path | bytes:
    """Return a file of a task, with the local data that it names renamed to their paths in the job."""
    if not named:
        return part
    text = part.read_text(encoding="utf-8")
    for name, data in named.items():
        text = re.sub(rf"(?<![\w./-]){re.escape(name)}(?![\w./-])", _taken(data, files), text)
    return text.encode()


def _taken(data: LocalFiles, files: Files) -> str:
    """Add local files to the uploads, and return their path or pattern in the job."""
    if not data.pattern:
        return _take(data.root, files)
    place = _place(data.root)
    files |= {f"{place}/{path.relative_to(data.root).as_posix()}": path for path in data.paths}
    return f"{MOUNT}/{place}/{data.pattern}"


def _check_upload(path: Path, *, upload: bool, bucket: str) -> None:
    """Ask before uploading a local path; without a terminal, demand the flag."""
    if upload:
        return
    asks = sys.stdin.isatty() and sys.stderr.isatty()
    if asks and click.confirm(
        f"{path} is on this machine: upload it to your private bucket {bucket}?", err=True
    ):
        return
    raise UsageError(
        f"{str(path)!r} is on this machine, where no job can read it",
        hint=f"`upload` puts it into your private bucket {bucket} first",
    )


def _place(path: Path) -> str:
    """Return a folder that tells local paths with the same name apart."""
    return f"{LOCAL}/{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]}"


def _inside(path: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files of a path, each with its name relative to the path."""
    if path.is_file():
        yield "", path
        return
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in inside.parts):
            yield f"/{inside.as_posix()}", file
