"""What a text or a task is, as part of a stage's key: equal identities give equal results."""

import hashlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from factory.artifacts import DataSource, sha256_of_file
from factory.config import EvaluateSettings
from factory.demo import corpus
from factory.errors import UsageError
from factory.references import DATA_SUFFIXES, local_path

EMBEDDED_TASKS = Path(__file__).parent / "demo" / "tasks"
KNOWN_TASKS = {"mmlu", "boolq", "gsm8k"}  # need no look into lm-eval's list, which takes 18 s
TASK_SUFFIXES = (".yaml", ".yml")
BESIDE_A_TASK = {*TASK_SUFFIXES, ".py", ".jsonl", ".json"}  # what a task file can include
MOST_BYTES = 64 * 2**20  # read for one identity


def text_identity(data: DataSource) -> str:
    """What decides the documents: for a data set also configuration and split, for a file its format."""
    part = f", part {data.part}" if data.part else ""
    if data.hub_id:
        return f"{data.name}:{data.split}@{data.version}{part}"
    if data.name.startswith("stdlib:"):
        return f"{data.name}@{data.version}{part}"
    suffix = max((s for s in DATA_SUFFIXES if data.name.endswith(s)), key=len, default="")
    return f"{data.version}{suffix}{part}"


def task_identity(task: str) -> str:
    """A task's name; for a YAML file with its content and that of the files beside it."""
    if is_task_file(task):
        return f"{Path(task).name}:{_folder_hash(Path(task))}"
    if _is_embedded(task):
        return f"{task}:{corpus.fingerprint('held-out')}"  # its questions are made from that text
    return task


def is_task_file(task: str) -> bool:
    """Whether a task is given as a file, not by name."""
    return Path(task).suffix in TASK_SUFFIXES


def _is_embedded(task: str) -> bool:
    return task in {path.stem for path in EMBEDDED_TASKS.glob("*.yaml")}


def check_tasks(settings: EvaluateSettings, *, search: bool) -> None:
    """Accept tasks that can be run.

    Args:
        search: Ask lm-eval about names that are neither embedded nor well known; takes 18 s.

    Raises:
        UsageError: A task file that is missing or names no task, or a name that nobody knows.
    """
    unknown = []
    for task in settings.tasks:
        if is_task_file(task):
            task_name(Path(task))
        elif not _is_embedded(task) and task not in KNOWN_TASKS:
            unknown.append(task)
    if unknown and search:
        from lm_eval.tasks import TaskManager

        known = TaskManager().all_tasks
        for task in unknown:
            if task not in known:
                raise UsageError(f"lm-eval knows no task {task!r}", hint="`lm-eval ls tasks` prints them all")


def check_backend(settings: EvaluateSettings) -> None:
    """Refuse what is to answer the tasks and is not installed here.

    Raises:
        UsageError: It is not.
    """
    if settings.backend == "vllm" and find_spec("vllm") is None:
        raise UsageError(
            "--eval-backend vllm: vLLM is not installed here",
            hint="`pip install vllm` on a machine with a GPU, or leave the option out",
        )


class _Lenient(yaml.SafeLoader):
    """Reads lm-eval's files: their tags (`!function`) stand for themselves."""


def _any_tag(_loader: yaml.SafeLoader, _tag: str, node: yaml.Node) -> str:
    return str(node.value)


_Lenient.add_multi_constructor("!", _any_tag)
# What reading such a file raises: PyYAML takes `2020-99-99` for a date, `!!bool x` for a key, and so on.
UNREADABLE = (
    *(yaml.YAMLError, OSError, RecursionError),
    *(ValueError, LookupError, AttributeError, TypeError),
)


def task_name(path: Path) -> str:
    """The name of the task, or group, that an lm-eval YAML file defines.

    Raises:
        UsageError: No such file, no YAML, or one that names no task.
    """
    if not local_path(str(path)).is_file():
        raise UsageError(
            f"task file {str(path)[:200]!r} does not exist", hint="give a task name or a YAML file"
        )
    try:
        value: Any = yaml.load(path.read_text(encoding="utf-8"), Loader=_Lenient)
    except UNREADABLE as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"task file {str(path)!r} is no YAML: {reason}", hint="mend it") from error
    names = [value.get(key) for key in ("task", "group")] if isinstance(value, dict) else []
    for name in names:
        if isinstance(name, str) and name:
            return name
    raise UsageError(f"task file {str(path)!r} names no task", hint="an lm-eval YAML has a line `task: NAME`")


def local_data(part: Path) -> set[str]:
    """Paths of this machine that a file of lm-eval takes questions from, as they are written there."""
    if part.suffix not in TASK_SUFFIXES:
        return set()
    try:
        value: Any = yaml.load(part.read_text(encoding="utf-8"), Loader=_Lenient)
    except UNREADABLE:  # nothing that lm-eval could read
        return set()
    value = value if isinstance(value, dict) else {}
    options = value.get("dataset_kwargs")
    named = [options.get(key) for key in ("data_files", "data_dir")] if isinstance(options, dict) else []
    if "/" in str(value.get("dataset_path", "")):  # without one it is a format: json
        named.append(value["dataset_path"])
    return {text for text in _texts(named) if local_path(text).exists()}


def _texts(value: Any) -> Iterator[str]:
    """All texts within; each part once, however often YAML's aliases repeat it, also within itself."""
    left, seen = [value], set()
    while left:
        part = left.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict | list) and id(part) not in seen:
            seen.add(id(part))
            left += part.values() if isinstance(part, dict) else part


def _folder_hash(task: Path) -> str:
    digest = hashlib.sha256()
    for part in _parts(task):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def _parts(task: Path) -> Iterator[str]:
    """The task file by its content, then what it may read; past the bound by name and size alone."""
    yield sha256_of_file(task)
    beside = [
        path
        for path in sorted(task.parent.iterdir())
        if path.suffix in BESIDE_A_TASK and path != task and path.is_file()
    ]
    named = [Path(data) for part in (task, *beside) for data in sorted(local_data(part))]
    inside = [file for path in named for file in (path, *sorted(path.rglob("*"))) if file.is_file()]
    left = MOST_BYTES
    for path in dict.fromkeys((*beside, *inside)):
        size = path.stat().st_size
        left -= size
        yield f"{path.name}:{sha256_of_file(path) if left >= 0 else size}"
