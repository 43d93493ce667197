"""lm-eval's tasks: found, loaded once for all models of a build, run in process, and scored."""

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from transformers import AutoConfig, set_seed

from factory import processes
from factory.artifacts import DataSource, PartScore, TaskScore
from factory.config import EvaluateSettings
from factory.errors import DataError, UsageError
from factory.hub_errors import CLIENT_ERRORS, explain
from factory.identity import EMBEDDED_TASKS, is_task_file, task_name
from factory.significance import Answers

TASK_BATCH_SIZE = 8
HARNESS_SEED = 1234  # of lm-eval's command line: examples shown are drawn with it
HARNESS_FOLDERS = {"mmlu": "mmlu/default", "boolq": "super_glue/boolq", "gsm8k": "gsm8k"}  # in lm-eval
COMMIT = re.compile(r"[0-9a-f]{40}")
BOOTSTRAP_ROUNDS = 1000  # for metrics whose standard error has no formula
WRONG_IN_A_TASK = (KeyError, ValueError, TypeError, TemplateError)  # a split, column or template it lacks
METRICS = ("acc_norm", "acc", "exact_match")  # the first that a task gives is shown


def score_task(
    model: Any,
    tokenizer: Any,
    task: str,
    *,
    settings: EvaluateSettings,
    progress: Callable[[int, int, str], None],
) -> tuple[TaskScore, Answers]:
    """Run one lm-eval task or group, given by name or as a YAML file.

    Returns:
        The score, and that of each question; no questions where the score is not their mean.
    """
    from lm_eval.evaluator import evaluate as run_harness

    name, loaded = load_task(task, shots=settings.num_fewshot.get(task))
    for part in loaded["tasks"].values():
        part.set_fewshot_seed(seed=HARNESS_SEED)
    set_seed(HARNESS_SEED)
    # Not `simple_evaluate`, which also surveys the machine and asks git about the folder it runs in.
    results = run_harness(
        lm=_harness_model(model, tokenizer, lambda done, total: progress(done, total, name)),
        task_dict=loaded,
        limit=settings.limit,
        bootstrap_iters=BOOTSTRAP_ROUNDS,
        log_samples=True,
    )
    scored = _task_score(name, results, data=_question_data(loaded["tasks"].values())) if results else None
    return processes.from_main(scored)  # type: ignore[return-value]  # other processes get no results


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
        UsageError: An unknown task, or a task file that does not fit its data.
    """
    for task in settings.tasks:
        load_task(task, shots=settings.num_fewshot.get(task))


@lru_cache
def load_task(task: str, *, shots: int | None) -> tuple[str, Any]:
    """The task's name, and lm-eval's task or tasks with their data; once for all models of a build.

    MMLU alone is 57 data sets, and asking whether each is up to date takes hundreds of requests.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about its command line
    name, manager = _find_task(task)
    try:
        loaded = manager.load([name])
    except (DatasetsError, *CLIENT_ERRORS) as error:
        # `datasets` also raises RuntimeError for a data set that is a program, which is no fault of the Hub.
        about_the_hub = not isinstance(error, RuntimeError)
        told = explain(error, repo_id=f"datasets/{_data_set_of(name, manager)}") if about_the_hub else None
        raise told or DataError(
            f"cannot load the questions of {task!r}: {(str(error) or repr(error)).splitlines()[0]}",
            hint="its data set must be there and within reach; --tasks can leave it out",
        ) from error
    except WRONG_IN_A_TASK as error:
        if not is_task_file(task):  # lm-eval's own fault, which nobody can mend here
            raise
        raise UsageError(
            f"lm-eval cannot use the task file {task!r}: {(str(error) or repr(error)).splitlines()[0]}",
            hint="compare its splits, columns and templates with the data that it names",
        ) from error
    for part in loaded["tasks"].values():
        if part.get_config("num_fewshot") != 0:  # 0 in the task's own file means: never any
            default = part.get_config("num_fewshot") or 0
            part.set_config(key="num_fewshot", value=default if shots is None else shots)
    return name, loaded


def _data_set_of(name: str, manager: Any) -> str:
    """The data set of a task, or of the first task of a group."""
    settings = {entry: known.cfg or {} for entry, known in manager.task_index.items() if name in entry}
    paths = [settings.get(name, {}), *settings.values()]
    return next((str(found["dataset_path"]) for found in paths if "dataset_path" in found), name)


def _find_task(task: str) -> tuple[str, Any]:
    """The task's name and a manager that knows it; the default scan takes 18 s, so only if needed."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    if is_task_file(task):
        folder = str(Path(task).parent)
        return task_name(Path(task)), TaskManager(include_path=folder, include_defaults=False)
    if (EMBEDDED_TASKS / f"{task}.yaml").is_file():
        return task, TaskManager(include_path=str(EMBEDDED_TASKS), include_defaults=False)
    if task in HARNESS_FOLDERS:
        folder = str(Path(lm_eval.tasks.__file__).parent / HARNESS_FOLDERS[task])
        manager = TaskManager(include_path=folder, include_defaults=False)
        if task in manager.all_tasks:
            return task, manager
    manager = TaskManager()
    if task not in manager.all_tasks:
        raise UsageError(f"lm-eval knows no task {task!r}", hint="`lm-eval ls tasks` prints them all")
    return task, manager


def _question_data(parts: Iterable[Any]) -> tuple[DataSource, ...]:
    """Hub data sets of loaded tasks, at the commit that each was read at.

    lm-eval asks for no commit; `datasets` names the folder in its cache by the one it found.
    """
    found = set()
    for part in parts:
        split = part.config.test_split or part.config.validation_split
        for file in getattr((part.dataset or {}).get(split), "cache_files", ()):
            commit = Path(file["filename"]).parent.name
            if COMMIT.fullmatch(commit):
                found.add((part.config.dataset_path, split, commit))
    return tuple(
        DataSource(name=path, version=commit, hub_id=path, split=split)
        for path, split, commit in sorted(found)
    )


def _task_score(
    name: str, results: dict[str, Any], *, data: tuple[DataSource, ...]
) -> tuple[TaskScore, Answers]:
    values = results["results"].get(name) or results["groups"][name]
    keys = [key for key in values if "," in key and "_stderr," not in key]  # "acc,none": metric, filter
    known = (key for metric in METRICS for key in keys if key.startswith(f"{metric},"))
    key = next(known, keys[0])
    metric, _, answers = key.partition(",")
    stderr = values.get(f"{metric}_stderr,{answers}")
    # A task with several ways to find an answer logs each question once for each of them.
    # Several processes' rows stand one process after another.
    rows = {
        task: sorted((row for row in logged if row["filter"] == answers), key=lambda row: row["doc_id"])
        for task, logged in results["samples"].items()
    }
    shots = [shot for task, shot in results["n-shot"].items() if task in rows]
    samples = [row for task in rows.values() for row in task]
    score = TaskScore(
        task=name,
        label=values.get("alias", name).strip(" -"),
        metric=metric,
        value=float(values[key]),
        stderr=float(stderr) if isinstance(stderr, int | float) else None,
        num_fewshot=int(shots[0]) if shots else 0,
        num_samples=len(samples),
        chance=_chance(samples) if metric.startswith("acc") else None,
        version=str(results["versions"].get(name, "")),
        data=data,
        answers=None if answers == "none" else answers,
        parts=tuple(
            PartScore(
                label=results["results"][task]["alias"].strip(" -"),
                value=float(results["results"][task][key]),
                num_samples=len(logged),
            )
            for task, logged in rows.items()
            if len(rows) > 1 and key in results["results"].get(task, {})
        ),
    )
    return score, _answers(rows, metric=metric, value=score.value)


def _answers(rows: dict[str, list[dict[str, Any]]], *, metric: str, value: float) -> Answers:
    """The score of each question, where their mean is the score of the task."""
    found = [row.get(metric) for task in rows.values() for row in task]
    numbers = [float(item) for item in found if isinstance(item, int | float)]
    if not numbers or len(numbers) < len(found) or not math.isclose(math.fsum(numbers) / len(found), value):
        return {}
    return {task: [float(row[metric]) for row in logged] for task, logged in rows.items()}


def _chance(samples: list[dict[str, Any]]) -> float | None:
    """The score without a look at the question: of a random guess, or of always the commonest answer.

    The latter where all questions offer the same answers: 62 % of BoolQ's are "yes".
    """
    choices = [len(sample["filtered_resps"]) for sample in samples]
    if not choices or min(choices) < 2:
        return None
    guessing = sum(1 / count for count in choices) / len(choices)
    offered = {tuple(arguments[1] for arguments in sample["arguments"]) for sample in samples}
    if len(offered) > 1:
        return guessing
    commonest = max(Counter(str(sample["target"]) for sample in samples).values())
    return max(guessing, commonest / len(samples))
