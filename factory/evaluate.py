"""Evaluate: token loss, lm-eval tasks and speed of checkpoints, loaded from disk as a user would."""

import json
import logging
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets.exceptions import DatasetsError
from transformers import set_seed

from factory.artifacts import DataSource, Evaluation, Speed, SpeedComparison, TaskScore, TokenLoss
from factory.config import EvaluateSettings
from factory.errors import DataError, UsageError
from factory.hub_errors import CLIENT_ERRORS, explain
from factory.identity import EMBEDDED_TASKS, is_task_file, task_name
from factory.models import best_device, compute_dtype, device_name, load_model, load_tokenizer, pad_batch
from factory.texts import Text, windows

LOSS_BATCH_SIZE = 4
TASK_BATCH_SIZE = 8
HARNESS_SEED = 1234  # of lm-eval's command line: examples shown are drawn with it
HARNESS_FOLDERS = {"mmlu": "mmlu/default", "boolq": "super_glue/boolq", "gsm8k": "gsm8k"}  # in lm-eval
COMMIT = re.compile(r"[0-9a-f]{40}")
BOOTSTRAP_ROUNDS = 1000  # for metrics whose standard error has no formula
METRICS = ("acc_norm", "acc", "exact_match")  # the first that a task gives is shown
ORDER = 0  # the same for every model and build: only then can losses be compared
LOSSES = "losses.json"  # [tokens, nats] a document, for paired comparisons


def evaluate(
    folder: Path,
    text: Text,
    *,
    settings: EvaluateSettings,
    into: Path,
    progress: Callable[[int, int, str], None],
) -> Evaluation:
    """Loss and task scores of the checkpoint in `folder`; losses by document go to `into`.

    Raises:
        DataError: Too little text, or a task's questions that cannot be read.
        HubError: The questions could not be had from the Hub.
        UsageError: An unknown task.
    """
    for task in settings.tasks:  # what can fail for want of a connection comes before the work
        _load_task(task, shots=settings.num_fewshot.get(task))
    model = load_model(folder)
    tokenizer = load_tokenizer(folder)
    loss = token_loss(model, tokenizer, text, settings=settings, into=into, progress=progress)
    tasks = [_score(model, tokenizer, task, settings=settings, progress=progress) for task in settings.tasks]
    return Evaluation(
        loss=loss,
        tasks=tuple(tasks),
        dtype=str(compute_dtype(model.device)).removeprefix("torch."),
        harness=f"lm-eval {version('lm_eval')}",
    )


# Token loss -------------------------------------------------------------------------------------


@torch.inference_mode()
def token_loss(
    model: Any,
    tokenizer: Any,
    text: Text,
    *,
    settings: EvaluateSettings,
    into: Path,
    progress: Callable[[int, int, str], None],
) -> TokenLoss:
    """Mean next-token loss in nats over fixed windows of the first documents in a fixed shuffled order.

    The standard error is that of a ratio over documents, since tokens of one document are not
    independent.
    """
    losses: list[tuple[int, float]] = []  # predicted tokens and summed nats, a document
    documents = _first(text.shuffled(ORDER), settings.num_documents)
    for index, document in enumerate(documents):
        pieces = list(windows(tokenizer(document).input_ids, length=settings.sequence_length))
        if pieces:
            losses.append(_document_loss(model, pieces, pad_token_id=tokenizer.pad_token_id))
        progress(index + 1, settings.num_documents, "loss")
    if len(losses) < 2:
        raise DataError(
            f"{text.data.name} holds {len(losses)} usable documents; the loss needs at least 2",
            hint="give more text with --eval-data",
        )
    (into / LOSSES).write_text(json.dumps(losses), encoding="utf-8")
    tokens = sum(count for count, _ in losses)
    nats = sum(total for _, total in losses) / tokens
    residual = sum((total - nats * count) ** 2 for count, total in losses)
    n = len(losses)
    return TokenLoss(
        nats=nats,
        stderr=math.sqrt(residual * n / (n - 1)) / tokens,
        normalized=nats / math.log(model.config.get_text_config().vocab_size),
        num_tokens=tokens,
        num_documents=n,
        sequence_length=settings.sequence_length,
        data=text.data,
    )


def _document_loss(model: Any, pieces: list[list[int]], *, pad_token_id: int) -> tuple[int, float]:
    total, count = 0.0, 0
    for start in range(0, len(pieces), LOSS_BATCH_SIZE):
        ids, mask = pad_batch(pieces[start : start + LOSS_BATCH_SIZE], pad_token_id=pad_token_id)
        ids, mask = ids.to(model.device), mask.to(model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # [b, s, v]
        targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        for row, target in zip(logits[:, :-1], targets, strict=True):  # a row at a time: fp32 is large
            total += float(torch.nn.functional.cross_entropy(row.float(), target, reduction="sum"))
            count += int((target != -100).sum())
    return count, total


def _first(documents: Iterator[str], count: int) -> Iterator[str]:
    for document, _ in zip(documents, range(count), strict=False):
        yield document


# lm-eval ----------------------------------------------------------------------------------------


def _score(
    model: Any,
    tokenizer: Any,
    task: str,
    *,
    settings: EvaluateSettings,
    progress: Callable[[int, int, str], None],
) -> TaskScore:
    """One lm-eval task or group, given by name or as a YAML file."""
    from lm_eval.evaluator import evaluate as run_harness

    name, loaded = _load_task(task, shots=settings.num_fewshot.get(task))
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
    return _task_score(name, results, data=_question_data(loaded["tasks"].values()))


def _harness_model(model: Any, tokenizer: Any, report: Callable[[int, int], None]) -> Any:
    """lm-eval's own model class, but for its progress bars: rows done are reported instead."""
    from lm_eval.models.huggingface import HFLM

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

    return Reporting(pretrained=model, tokenizer=tokenizer, batch_size=TASK_BATCH_SIZE)


@lru_cache
def _load_task(task: str, *, shots: int | None) -> tuple[str, Any]:
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


def _task_score(name: str, results: dict[str, Any], *, data: tuple[DataSource, ...]) -> TaskScore:
    values = results["results"].get(name) or results["groups"][name]
    metrics = {key.partition(",")[0]: key for key in values if "," in key and "_stderr" not in key}
    metric = next((m for m in METRICS if m in metrics), next(iter(metrics)))
    key = metrics[metric]
    stderr = values.get(key.replace(metric, f"{metric}_stderr", 1))
    samples = [sample for task in results["samples"].values() for sample in task]
    shots = [shot for task, shot in results["n-shot"].items() if task in results["samples"]]
    return TaskScore(
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
    )


def _chance(samples: list[dict[str, Any]]) -> float | None:
    """The score of a random guess: the mean of 1 / number of choices."""
    choices = [len(sample["filtered_resps"]) for sample in samples]
    if not choices or min(choices) < 2:
        return None
    return sum(1 / count for count in choices) / len(choices)


# Speed ------------------------------------------------------------------------------------------


def compare_speed(
    source: Path,
    result: Path,
    *,
    rounds: int = 5,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    progress: Callable[[int, int, str], None],
) -> SpeedComparison:
    """Prefill and decode rate of two checkpoints, measured in turns at batch size 1, after a warm-up."""
    models = {"source": load_model(source), "result": load_model(result)}
    config = models["result"].config.get_text_config()
    vocabulary = config.vocab_size
    longest = getattr(config, "max_position_embeddings", None) or prompt_tokens + new_tokens
    prompt_tokens = min(prompt_tokens, longest - new_tokens)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, vocabulary, (1, prompt_tokens), generator=generator).to(best_device())
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds + 1):
        for name, model in models.items():
            prefill, decode = _time_once(model, prompt, new_tokens=new_tokens)
            if number > 0:  # the first round warms up
                seconds.setdefault((name, "prefill"), []).append(prefill)
                seconds.setdefault((name, "decode"), []).append(decode)
        progress(number, rounds, "speed")
    speeds = {
        name: _speed(seconds[name, "prefill"], seconds[name, "decode"], prompt_tokens, new_tokens)
        for name in models
    }
    return SpeedComparison(
        device=device_name(best_device()),
        rounds=rounds,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=1,
        source=speeds["source"],
        result=speeds["result"],
    )


@torch.inference_mode()
def _time_once(model: Any, prompt: torch.Tensor, *, new_tokens: int) -> tuple[float, float]:
    """Seconds for one prefill of the prompt, and for `new_tokens` single-token steps after it."""
    start = _now()
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    prefilled = _now()
    token = output.logits[:, -1:].argmax(dim=-1)
    for _ in range(new_tokens):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(dim=-1)
    return prefilled - start, _now() - prefilled


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _speed(prefill: list[float], decode: list[float], prompt_tokens: int, new_tokens: int) -> Speed:
    return Speed(
        prefill_tokens_per_second=prompt_tokens / statistics.median(prefill),
        prefill_spread=_spread(prefill),
        decode_tokens_per_second=new_tokens / statistics.median(decode),
        decode_spread=_spread(decode),
    )


def _spread(seconds: list[float]) -> float:
    """Half the interquartile range over the median."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / 2 / middle
