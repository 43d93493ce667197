"""Find lm-eval's tasks, load them once for all models of a build, run them in process, and score them."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets.exceptions import DatasetsError
from huggingface_hub.errors import LocalEntryNotFoundError
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment
from transformers import AutoConfig, set_seed

from factory.artifacts import TaskScore
from factory.config.settings import EvaluateSettings
from factory.errors import DataError, UsageError
from factory.evaluation.answers import Answers
from factory.evaluation.task_files import TaskFile, is_task_file, read_task_file
from factory.evaluation.task_scores import check_scored, rows_of, task_score
from factory.hub.errors import CLIENT_ERRORS, STUMBLES, UNREACHABLE, explain
from factory.parallel import processes
from factory.resources import DEMO_TASKS
from factory.text.hub_data_files import check_data_files

HARNESS_SEED = 1234  # default of lm-eval's command line; draws the few-shot examples
HARNESS_FOLDERS = {"mmlu": "mmlu/default", "boolq": "super_glue/boolq", "gsm8k": "gsm8k"}  # in lm-eval
BOOTSTRAP_ROUNDS = 1000  # for metrics without a formula for the standard error
# Raised for a split, column, template or function that does not exist.
WRONG_IN_A_TASK = (LookupError, ValueError, TypeError, AttributeError, SyntaxError, TemplateError)


def score_task(
    model: Any,
    tokenizer: Any,
    task: str,
    *,
    settings: EvaluateSettings,
    progress: Callable[[int, int, str], None],
) -> list[tuple[TaskScore, Answers]]:
    """Run one lm-eval task, group or tag, given by name or as a YAML file.

    Returns:
        The score and the answers behind it for each row of `rows_of`.

    Raises:
        DataError: lm-eval cannot compute a number from the answers.
        UsageError: A task file does not fit its data.
    """
    from lm_eval.api.model import LM
    from lm_eval.evaluator import evaluate as run_harness

    from factory.evaluation.harness_model import HarnessModel

    name, loaded = load_task(task, shots=settings.num_fewshot.get(task))
    for part in loaded["tasks"].values():
        part.set_fewshot_seed(seed=HARNESS_SEED)
    set_seed(HARNESS_SEED)
    # Not `simple_evaluate`, which also inspects the machine and runs git in the current folder.
    with _explained(task):
        results = run_harness(
            lm=model
            if isinstance(model, LM)
            else HarnessModel(model, tokenizer, report=lambda done, total: progress(done, total, name)),
            task_dict=loaded,
            limit=settings.limit,
            bootstrap_iters=BOOTSTRAP_ROUNDS,
            log_samples=True,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.apply_chat_template,  # as `simple_evaluate` does by default
        )
    runs_code = is_task_file(task) and bool(read_task_file(Path(task)).code)
    scored = results and [
        task_score(row, [loaded["tasks"][part] for part in parts], results, runs_code=runs_code)
        for row, parts in rows_of(name, loaded).items()
    ]
    return processes.from_main(scored)  # other processes get no results


def vllm_model(folder: Path, *, num_gpus: int) -> Any:
    """Return lm-eval's vLLM model on as many GPUs as divide its attention heads; it reports no progress."""
    from lm_eval.models.vllm_causallms import VLLM

    return VLLM(**vllm_arguments(folder, num_gpus=num_gpus))


def vllm_arguments(folder: Path, *, num_gpus: int) -> dict[str, Any]:
    """Return the arguments of lm-eval's vLLM model."""
    heads = AutoConfig.from_pretrained(folder).get_text_config().num_attention_heads
    return {
        "pretrained": str(folder),
        "dtype": "bfloat16",
        "batch_size": "auto",
        "tensor_parallel_size": max(n for n in range(1, max(num_gpus, 1) + 1) if heads % n == 0),
    }


def load_tasks(settings: EvaluateSettings) -> list[str]:
    """Load all tasks with their data, so that missing data shows before the work.

    Returns:
        What may be wrong with the scores, a line each.

    Raises:
        DataError: The questions of a task cannot be read.
        HubError: The questions cannot be downloaded from the Hub.
        UsageError: A task is unknown, a task file does not fit its data, or a score is requested twice.
    """
    requested: dict[str, str] = {}
    remarks: dict[str, None] = {}
    for task in settings.tasks:
        name, loaded = load_task(task, shots=settings.num_fewshot.get(task))
        for row in rows_of(name, loaded):
            if row in requested:
                raise UsageError(
                    f"`tasks` requests {row!r} twice, by {requested[row]} and by {task}",
                    hint="remove one of them",
                )
            requested[row] = task
        remarks |= dict.fromkeys(_remarks(task, loaded))
    return list(remarks)


def _remarks(task: str, loaded: Any) -> Iterator[str]:
    """Yield what may be wrong with the scores of a task, which lm-eval 0.4.13 does not say."""
    for part in loaded["tasks"].values():
        if part.get_config("num_fewshot") and _shows_answers(part):
            what = f"the examples of {task!r} come from the questions that it asks, answers included"
            if is_task_file(task):
                raise UsageError(
                    what,
                    hint="name the split in the file as `fewshot_split` and as `test_split`: then lm-eval "
                    "leaves out the question itself",
                )
            yield what
        if is_task_file(task) and (dates := list(dict.fromkeys(_dates(part.dataset)))):
            names = ", ".join(map(repr, dates))
            yield f"{task!r} has dates in {names}: lm-eval shows them with a time, as '1969-07-20 00:00:00'"


def _shows_answers(part: Any) -> bool:
    """Return whether the examples are drawn from the questions that are asked, without leaving one out."""
    shots, config = part.fewshot_cfg, part.config
    if shots.split is None and shots.samples is not None:
        return False
    drawn = shots.split or config.training_split or config.validation_split or config.test_split
    asked = config.test_split or config.validation_split
    return bool(drawn == asked and shots.split != config.test_split)


def _dates(dataset: Any) -> Iterator[str]:
    """Yield the columns of JSON that `datasets` took for dates, whose text is another then."""
    for rows in dataset.values():
        for name, feature in rows.features.items():
            if str(getattr(feature, "dtype", "")).startswith("timestamp"):
                yield name


@lru_cache
def load_task(task: str, *, shots: int | None) -> tuple[str, Any]:
    """Return the task's name, and lm-eval's task or tasks with their data, cached for all models of a build.

    MMLU alone has 57 data sets, and checking whether each is up to date takes hundreds of requests.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings concern its own command line
    _mute_metrics()
    _sandbox_templates()
    name, manager = _find_task(task)
    with _explained(task):
        loaded = _with_data(task, name, manager)
    check_scored(task, name, loaded)
    for part in loaded["tasks"].values():
        if part.get_config("num_fewshot") != 0:  # 0 in the task's own file means that examples never fit
            default = part.get_config("num_fewshot") or 0
            part.set_config(key="num_fewshot", value=default if shots is None else shots)
    return name, loaded


def _with_data(task: str, name: str, manager: Any) -> Any:
    """Load lm-eval's task or tasks of a name, with their questions."""
    try:
        _check_data(name, manager)
        return manager.load([name])
    except (DatasetsError, *CLIENT_ERRORS) as error:
        # `datasets` also raises RuntimeError for a data set that is a program, which is not the Hub's fault.
        about_the_hub = not isinstance(error, RuntimeError)
        data_set = next(iter(_data_sets_of(name, manager)), name)
        explained = explain(error, repo_id=f"datasets/{data_set}") if about_the_hub else None
        if explained is None and isinstance(error, STUMBLES):
            raise  # caused by the task's own settings
        raise explained or DataError(
            f"cannot load the questions of {task!r}: {(str(error) or repr(error)).splitlines()[0]}",
            hint="check that its data set exists and is accessible, or remove it from `tasks`",
        ) from error


def _mute_metrics() -> None:
    """Stop lm-eval 0.4.13 from printing a line per bootstrapped error between those of the build."""
    from lm_eval.api import metrics

    metrics.print = lambda *_args, **_kwargs: None


def _sandbox_templates() -> None:
    """Make lm-eval render templates in a sandbox, so that they cannot run arbitrary Python.

    Each template is compiled once: lm-eval 0.4.13 does it for every question, which took more than half of
    an evaluation on a GPU.
    """
    from lm_eval import utils

    if not isinstance(utils.env, SandboxedEnvironment):
        sandbox = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        sandbox.filters |= utils.env.filters
        sandbox.from_string = lru_cache(sandbox.from_string)  # type: ignore[assignment, method-assign]
        utils.env = sandbox


@contextmanager
def _explained(task: str) -> Iterator[None]:
    """Explain in one line what is wrong with a task file, or with the numbers of any task."""
    try:
        yield
    except ArithmeticError as error:
        raise DataError(
            f"lm-eval cannot compute the score of {task!r}: {error}",
            hint="try another metric for these texts, or remove the task from `tasks`",
        ) from error
    except ImportError as error:
        raise UsageError(f"cannot run task {task!r} here: {error}", hint="install what it imports") from error
    except WRONG_IN_A_TASK as error:
        if explained := explain(error, repo_id=f"datasets/{task}"):
            raise explained from error
        if not is_task_file(task):  # a bug of lm-eval, which has no remedy here
            raise
        raise UsageError(
            f"lm-eval cannot use the task file {task!r}: {(str(error) or repr(error)).splitlines()[0]}",
            hint="compare its splits, columns and templates with its data",
        ) from error


def _data_sets_of(name: str, manager: Any) -> list[str]:
    """Return the data set of a task, or those of a group's tasks."""
    settings = {entry: known.cfg or {} for entry, known in manager.task_index.items() if name in entry}
    paths = [settings.get(name, {}), *settings.values()]
    return list(dict.fromkeys(str(found["dataset_path"]) for found in paths if "dataset_path" in found))


def _check_data(name: str, manager: Any) -> None:
    """Refuse Hub data sets whose card points elsewhere; offline, the questions come from the cache."""
    for path in _data_sets_of(name, manager):
        if "/" in path and not Path(path).exists():  # others are a format, a folder or a program
            with contextlib.suppress(LocalEntryNotFoundError, *UNREACHABLE):
                check_data_files(path, revision=None)


def _find_task(task: str) -> tuple[str, Any]:
    """Return the task's name and a manager that knows it; the default scan takes 18 s, so it comes last."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    if is_task_file(task):
        found = read_task_file(Path(task))
        return found.name, _manager_of(found)
    if (DEMO_TASKS / f"{task}.yaml").is_file():
        return task, TaskManager(include_path=str(DEMO_TASKS), include_defaults=False)
    if task in HARNESS_FOLDERS:
        folder = str(Path(lm_eval.tasks.__file__).parent / HARNESS_FOLDERS[task])
        manager = TaskManager(include_path=folder, include_defaults=False)
        if task in manager.all_tasks:
            return task, manager
    manager = TaskManager()
    if task not in manager.all_tasks:
        raise UsageError(f"lm-eval has no task {task!r}", hint="`lm-eval ls tasks` lists them all")
    return task, manager


def _manager_of(found: TaskFile) -> Any:
    """Return a manager that knows a task file and what it names, including lm-eval's tasks if needed.

    lm-eval takes a folder, and of two files in it that define one name the first; so it is given a folder
    with these files only.
    """
    from lm_eval.tasks import TaskManager

    with TemporaryDirectory() as folder:
        for number, path in enumerate(found.definitions):
            (Path(folder) / f"{number}.yaml").symlink_to(path.resolve())
        manager = TaskManager(include_path=folder, include_defaults=bool(found.missing))
        for entry in manager.task_index.values():
            entry.yaml_path = entry.yaml_path and entry.yaml_path.resolve()
    taken = {entry.yaml_path for entry in manager.task_index.values()}
    for path in found.definitions:
        if path.resolve() not in taken:  # lm-eval skips it silently
            raise UsageError(
                f"lm-eval does not recognise {str(path)!r} as a task",
                hint="compare its keys with lm-eval's guide",
            )
    for name in found.missing:
        if name not in manager.task_index:
            raise UsageError(
                f"{name!r}, of the group {found.name!r}, is neither in its folder nor one of lm-eval's tasks",
                hint="a group's tasks are looked up by name in its folder",
            )
    return manager
