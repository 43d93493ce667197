"""Evaluate checkpoints by token loss and lm-eval tasks, loaded from disk as a user would."""

import gc
import math
from collections.abc import Callable
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from factory.artifacts import Evaluation, TaskScore, TokenLoss
from factory.config.settings import EvaluateSettings
from factory.errors import DataError
from factory.evaluation.answers import read_answers, read_losses, write_answers, write_losses
from factory.evaluation.harness import load_tasks, score_task, vllm_model
from factory.evaluation.passes import num_rows, pass_tokens
from factory.model.devices import compute_dtype
from factory.model.loading import load_model
from factory.model.losses import answers_in, pad_batch, row_losses
from factory.model.tokenizer import Encoder, load_encoder
from factory.parallel import processes
from factory.text.text import Text

ORDER = 0  # seed, fixed for every model and build so that losses are comparable
KEPT_EVERY, KEPT_EVERY_ON_GPU = 32, 256  # documents per process between saves


def evaluate(
    folder: Path,
    text: Text,
    *,
    settings: EvaluateSettings,
    into: Path,
    progress: Callable[[int, int, str], None],
) -> Evaluation:
    """Measure loss and task scores of the checkpoint in `folder`.

    Losses by document and each task's answers are written to `into`; finished parts are not repeated.
    Several processes share the documents and the questions; the main one writes.

    Raises:
        DataError: There is too little text, or the questions of a task cannot be read.
        HubError: The questions cannot be downloaded from the Hub.
        UsageError: A task is unknown.
    """
    with processes.main_first():
        load_tasks(settings)  # needs the network, so it comes before the work
    model = load_model(folder)
    encoder = load_encoder(folder)
    loss = token_loss(model, encoder, text, settings=settings, into=into, progress=progress)
    scores: list[TaskScore] = []
    if settings.backend == "vllm" and any(read_answers(into, n) is None for n in range(len(settings.tasks))):
        model = None
        gc.collect()
        torch.cuda.empty_cache()  # vLLM takes nearly all of a GPU
        model = vllm_model(folder, num_gpus=torch.cuda.device_count())
    for number, task in enumerate(settings.tasks):
        answered = read_answers(into, number)
        if answered is None:
            answered = score_task(model, encoder.open_ended, task, settings=settings, progress=progress)
            if processes.is_main():
                write_answers(into, number, answered)
        scores += [score for score, _ in answered]
    return Evaluation(
        loss=loss,
        tasks=tuple(scores),
        dtype=str(compute_dtype(model.device)).removeprefix("torch."),
        harness=f"lm-eval {version('lm_eval')}"
        + (f", vLLM {version('vllm')}" if settings.backend == "vllm" else ""),
    )


@torch.inference_mode()
def token_loss(
    model: Any,
    encoder: Encoder,
    text: Text,
    *,
    settings: EvaluateSettings,
    into: Path,
    progress: Callable[[int, int, str], None],
) -> TokenLoss:
    """Measure mean next-token loss in nats over fixed windows of the first documents in a fixed order.

    Each window begins with the tokenizer's prefix, which is not predicted. Of a conversation, as much as
    fits into one window is read, and the tokens of the answers are predicted. The standard error is that of a
    ratio over documents, since tokens of one document are not independent.
    """
    kept = read_losses(into)  # of an interrupted run; a document too short for a loss counts as 0, 0
    most = pass_tokens(model)
    texts = islice(text.shuffled(ORDER), len(kept), settings.num_documents)
    every = (KEPT_EVERY if most is None else KEPT_EVERY_ON_GPU) * processes.count()
    while some := list(islice(texts, every)):

        def report(share: float, before: int = len(kept), read: int = len(some)) -> None:
            progress(before + int(share * read), settings.num_documents, "loss")

        def losses_of(mine: list[str], report: Callable[[float], None] = report) -> list[tuple[int, float]]:
            windows = [
                list(encoder.windows(ids, length=settings.sequence_length)) for ids in encoder.encode(mine)
            ]
            return _document_losses(model, windows, encoder, most=most, report=report)

        kept += processes.divide(some, losses_of, cost=len)
        if processes.is_main():
            write_losses(into, kept)
    losses = [(count, nats) for count, nats in kept if count]  # predicted tokens and nats per document
    if len(losses) < 2:
        raise DataError(
            f"{text.data.name} has {len(losses)} usable documents; the loss needs at least 2",
            hint="provide more text with `eval_data`",
        )
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


def _document_losses(
    model: Any,
    documents: list[list[list[int]]],
    encoder: Encoder,
    *,
    most: int | None,
    report: Callable[[float], None],
) -> list[tuple[int, float]]:
    """Return each document's number of predicted tokens and summed loss in nats, from its windows.

    Windows of all documents are read together by length, as many as a pass of `most` tokens holds.
    """
    waiting = sorted(
        (
            (piece, (number, place))
            for number, pieces in enumerate(documents)
            for place, piece in enumerate(pieces)
        ),
        key=lambda window: -len(window[0]),
    )
    total, found = len(waiting), dict[tuple[int, int], tuple[int, float]]()
    while waiting:
        size = num_rows(len(waiting[0][0]), most)
        rows, waiting = waiting[:size], waiting[size:]
        some = [piece for piece, _ in rows]
        batch = pad_batch(some, pad_token_id=encoder.pad_token_id)
        ids, mask = (tensor.to(model.device) for tensor in batch)
        counts, nats = row_losses(model, ids, mask, num_given=encoder.num_given, answers=answers_in(some))
        places = (place for _, place in rows)
        found.update(zip(places, zip(counts.int().tolist(), nats.tolist(), strict=True), strict=True))
        report(len(found) / total)
    of = [[found[number, place] for place in range(len(pieces))] for number, pieces in enumerate(documents)]
    return [(sum(count for count, _ in losses), math.fsum(nats for _, nats in losses)) for losses in of]
