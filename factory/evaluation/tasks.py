"""Check tasks, and identify them in stage keys: equal identities give equal results."""

import hashlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from factory.config.settings import EvaluateSettings
from factory.errors import UsageError
from factory.evaluation.task_files import TASK_SUFFIXES, is_task_file, read_task_file, task_files
from factory.resources import DEMO_TASKS
from factory.store.files import sha256_of_file
from factory.text.standard_library import fingerprint

KNOWN_TASKS = {"mmlu", "boolq", "gsm8k"}  # spared the scan of lm-eval's list, which takes 18 s
BESIDE_PYTHON = {*TASK_SUFFIXES, ".py", ".jsonl", ".json"}  # files that Python is likely to read
MAX_BYTES = 64 * 2**20  # read for one identity


def task_identity(task: str) -> str:
    """Return a task's name; for a YAML file also a hash of its content and of all files it names."""
    if is_task_file(task):
        digest = hashlib.sha256("\0".join(_parts(Path(task))).encode())
        return f"{Path(task).name}:{digest.hexdigest()}"
    if _is_embedded(task):
        return f"{task}:{fingerprint('held-out')}"  # its questions are derived from that text
    return task


def _is_embedded(task: str) -> bool:
    return task in {path.stem for path in DEMO_TASKS.glob("*.yaml")}


def check_tasks(settings: EvaluateSettings, *, search: bool, run_code: bool) -> None:
    """Check that all tasks can be run.

    Args:
        search: Whether to ask lm-eval about names neither embedded nor well known, which takes 18 s.
        run_code: Whether task files may run Python.

    Raises:
        UsageError: A task file is missing, names no task or runs Python without permission, two tasks have
            one name, or lm-eval does not know a name.
    """
    files = task_files(settings.tasks)
    unknown = []
    named: dict[str, str] = {}
    for task in settings.tasks:
        found = files.get(task)
        if found and found.code and not run_code:
            raise UsageError(
                f"task file {task!r} runs Python: {', '.join(found.code)}",
                hint="read it first; `run_task_code` runs it with your permissions",
            )
        name = found.name if found else task
        if name in named:
            raise UsageError(
                f"`tasks` names {name!r} twice: {named[name]} and {task}", hint="remove one of them"
            )
        named[name] = task
        if not found and not _is_embedded(task) and task not in KNOWN_TASKS:
            unknown.append(task)
    if unknown and search:
        from lm_eval.tasks import TaskManager

        known = TaskManager().all_tasks
        for task in unknown:
            if task not in known:
                raise UsageError(f"lm-eval has no task {task!r}", hint="`lm-eval ls tasks` lists them all")


def check_backend(settings: EvaluateSettings) -> None:
    """Refuse a backend that is not installed here.

    Raises:
        UsageError: vLLM is requested but not installed.
    """
    if settings.backend == "vllm" and find_spec("vllm") is None:
        raise UsageError(
            "`eval_backend=vllm`: vLLM is not installed here",
            hint="`pip install vllm` on a machine with a GPU, or omit the option",
        )


def _parts(task: Path) -> Iterator[str]:
    """Yield a hash of each file that lm-eval reads for a task file; beyond the limit only name and size.

    Python code can read any file beside it, so these files count too.
    """
    found = read_task_file(task)
    folders = sorted({part.parent for part in found.parts if part.suffix == ".py"})
    beside = [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in BESIDE_PYTHON]
    data = [path for named in found.data.values() for files in named.values() for path in files.paths]
    inside = [file for path in data for file in (path, *sorted(path.rglob("*")))]
    left = MAX_BYTES
    for path in dict.fromkeys(path for path in (*found.parts, *beside, *inside) if path.is_file()):
        size = path.stat().st_size
        left -= size
        yield f"{path.name}:{sha256_of_file(path) if left >= 0 else size}"
