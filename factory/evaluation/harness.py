"""lm-eval's tasks: found, loaded once for all models of a build, run in process, and scored."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
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

TASK_BATCH_SIZE = 8
HARNESS_SEED = 1234  # of lm-eval's command line: examples shown are drawn with it
HARNESS_FOLDERS = {"mmlu": "mmlu/default", "boolq": "super_glue/boolq", "gsm8k": "gsm8k"}  # in lm-eval
BOOTSTRAP_ROUNDS = 1000  # for metrics whose standard error has no formula
# A split, column, template or function that it lacks.
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
        For each row of `rows_of` the score and the answers that it is made of.

    Raises:
        DataError: Answers that lm-eval makes no number of.
        UsageError: A task file that does not fit its data.
    """
    from lm_eval.evaluator import evaluate as run_harness

    name, loaded = load_task(task, shots=settings.num_fewshot.get(task))
    for part in loaded["tasks"].values():
        part.set_fewshot_seed(seed=HARNESS_SEED)
    set_seed(HARNESS_SEED)
    # Not `simple_evaluate`, which also surveys the machine and asks git about the folder it runs in.
    with _explained(task):
        results = run_harness(
            lm=_harness_model(model, tokenizer, lambda done, total: progress(done, total, name)),
            task_dict=loaded,
            limit=settings.limit,
            bootstrap_iters=BOOTSTRAP_ROUNDS,
            log_samples=True,
        )
    runs_code = is_task_file(task) and bool(read_task_file(Path(task)).code)
    scored = results and [
        task_score(row, [loaded["tasks"][part] for part in parts], results, runs_code=runs_code)
        for row, parts in rows_of(name, loaded).items()
    ]
    return processes.from_main(scored)  # other processes get no results


def _harness_model(model: Any, tokenizer: Any, report: Callable[[int, int], None]) -> Any:
    """lm-eval's own model class, but for its progress bars: rows done are reported instead."""
    from lm_eval.api.model import LM
    from lm_eval.models.huggingface import HFLM

    if isinstance(model, LM):
        return model

    class Reporting(HFLM):  # type: ignore[misc]
        done, total = 0, 0

        def loglikelihood(self, requests: list[Any], **_: Any) -> Any:
            self.done, self.total = 0, len(requests)
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> Any:
            self.done, self.total = 0, len(requests)
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: list[Any], **_: Any) -> Any:
            self.done, self.total = 0, len(requests)
            return super().generate_until(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> Any:
            return super()._loglikelihood_tokens(requests, **(kwargs | {"disable_tqdm": True}))

        def _model_call(self, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._count(len(inputs))
            return super()._model_call(inputs, *args, **kwargs)

        def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._count(len(context))
            return super()._model_generate(context, *args, **kwargs)

        def _count(self, rows: int) -> None:
            self.done = min(self.done + rows, self.total)
            report(self.done, self.total)

    harness_model = Reporting(pretrained=model, tokenizer=tokenizer, batch_size=TASK_BATCH_SIZE)
    if processes.count() > 1:  # a model that is loaded already is taken for one process's
        harness_model.accelerator = Accelerator()
        harness_model._rank, harness_model._world_size = processes.index(), processes.count()
    return harness_model


def vllm_model(folder: Path, *, num_gpus: int) -> Any:
    """lm-eval's vLLM model over as many of the GPUs as divide its attention heads. It reports no progress."""
    from lm_eval.models.vllm_causallms import VLLM

    return VLLM(**vllm_arguments(folder, num_gpus=num_gpus))


def vllm_arguments(folder: Path, *, num_gpus: int) -> dict[str, Any]:
    """What lm-eval's vLLM model is made with."""
    heads = AutoConfig.from_pretrained(folder).get_text_config().num_attention_heads
    return {
        "pretrained": str(folder),
        "dtype": "bfloat16",
        "batch_size": "auto",
        "tensor_parallel_size": max(n for n in range(1, max(num_gpus, 1) + 1) if heads % n == 0),
    }


def load_tasks(settings: EvaluateSettings) -> None:
    """Load all tasks with their data, so that what cannot be had shows before the work.

    Raises:
        DataError: A task's questions that cannot be read.
        HubError: The questions could not be had from the Hub.
        UsageError: An unknown task, a task file that does not fit its data, or one score asked for twice.
    """
    asked: dict[str, str] = {}
    for task in settings.tasks:
        name, loaded = load_task(task, shots=settings.num_fewshot.get(task))
        for row in rows_of(name, loaded):
            if row in asked:
                raise UsageError(
                    f"`tasks` asks for {row!r} twice, by {asked[row]} and by {task}",
                    hint="leave one of them out",
                )
            asked[row] = task


@lru_cache
def load_task(task: str, *, shots: int | None) -> tuple[str, Any]:
    """The task's name, and lm-eval's task or tasks with their data; once for all models of a build.

    MMLU alone is 57 data sets, and asking whether each is up to date takes hundreds of requests.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about its command line
    _mute_metrics()
    _sandbox_templates()
    name, manager = _find_task(task)
    with _explained(task):
        loaded = _with_data(task, name, manager)
    check_scored(task, name, loaded)
    for part in loaded["tasks"].values():
        if part.get_config("num_fewshot") != 0:  # 0 in the task's own file means: never any
            default = part.get_config("num_fewshot") or 0
            part.set_config(key="num_fewshot", value=default if shots is None else shots)
    return name, loaded


def _with_data(task: str, name: str, manager: Any) -> Any:
    """lm-eval's task or tasks of a name, with their questions."""
    try:
        _check_data(name, manager)
        return manager.load([name])
    except (DatasetsError, *CLIENT_ERRORS) as error:
        # `datasets` also raises RuntimeError for a data set that is a program, which is no fault of the Hub.
        about_the_hub = not isinstance(error, RuntimeError)
        data_set = next(iter(_data_sets_of(name, manager)), name)
        told = explain(error, repo_id=f"datasets/{data_set}") if about_the_hub else None
        if told is None and isinstance(error, STUMBLES):
            raise  # over the task's own settings
        raise told or DataError(
            f"cannot load the questions of {task!r}: {(str(error) or repr(error)).splitlines()[0]}",
            hint="its data set must be there and within reach; `tasks` can leave it out",
        ) from error


def _mute_metrics() -> None:
    """Keep lm-eval 0.4.13 from printing a line for each bootstrapped error between those of the build."""
    from lm_eval.api import metrics

    metrics.print = lambda *_args, **_kwargs: None


def _sandbox_templates() -> None:
    """Have lm-eval fill in templates without the attributes through which one could run any Python."""
    from lm_eval import utils

    if not isinstance(utils.env, SandboxedEnvironment):
        sandbox = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        sandbox.filters |= utils.env.filters
        utils.env = sandbox


@contextmanager
def _explained(task: str) -> Iterator[None]:
    """Say in one line what is wrong with a task file, or with the numbers of any task."""
    try:
        yield
    except ArithmeticError as error:
        raise DataError(
            f"lm-eval cannot compute the score of {task!r}: {error}",
            hint="another metric may suit these texts; `tasks` can leave the task out",
        ) from error
    except ImportError as error:
        raise UsageError(
            f"task {task!r} does not run here: {error}", hint="install what it imports"
        ) from error
    except WRONG_IN_A_TASK as error:
        if told := explain(error, repo_id=f"datasets/{task}"):
            raise told from error
        if not is_task_file(task):  # lm-eval's own fault, which has no remedy here
            raise
        raise UsageError(
            f"lm-eval cannot use the task file {task!r}: {(str(error) or repr(error)).splitlines()[0]}",
            hint="compare its splits, columns and templates with the data that it names",
        ) from error


def _data_sets_of(name: str, manager: Any) -> list[str]:
    """The data set of a task, or those of a group's tasks."""
    settings = {entry: known.cfg or {} for entry, known in manager.task_index.items() if name in entry}
    paths = [settings.get(name, {}), *settings.values()]
    return list(dict.fromkeys(str(found["dataset_path"]) for found in paths if "dataset_path" in found))


def _check_data(name: str, manager: Any) -> None:
    """Refuse questions on the Hub whose card leads elsewhere; without the Hub they come from the cache."""
    for path in _data_sets_of(name, manager):
        if "/" in path and not Path(path).exists():  # else a format, a folder or a program
            with contextlib.suppress(LocalEntryNotFoundError, *UNREACHABLE):
                check_data_files(path, revision=None)


def _find_task(task: str) -> tuple[str, Any]:
    """The task's name and a manager that knows it; the default scan takes 18 s, so only if needed."""
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
        raise UsageError(f"lm-eval knows no task {task!r}", hint="`lm-eval ls tasks` prints them all")
    return task, manager


def _manager_of(found: TaskFile) -> Any:
    """A manager that knows a task file with what it names, and lm-eval's tasks where it names some.

    lm-eval takes a folder, and of two files in it that define one name the first; so it gets one that
    holds these files alone.
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
        if path.resolve() not in taken:  # passed over without a word
            raise UsageError(
                f"lm-eval does not take {str(path)!r} for a task",
                hint="compare its keys with lm-eval's guide",
            )
    for name in found.missing:
        if name not in manager.task_index:
            raise UsageError(
                f"{name!r}, of the group {found.name!r}, is neither in its folder nor one of lm-eval's tasks",
                hint="a group's tasks are looked for in its folder by their names",
            )
    return manager
