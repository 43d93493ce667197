"""Tokenise the healing text into training sequences and a held-out set that shows whether healing helped."""

import shutil
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from datasets import Dataset, Features, List, Value, disable_progress_bars
from datasets.exceptions import DatasetGenerationError

from factory.config.settings import HealSettings
from factory.errors import DataError
from factory.model.tokenizer import Encoder, as_row
from factory.parallel import processes
from factory.text.text import Text

disable_progress_bars()
GUARD_SEQUENCES = 64  # held out of the healing text
GUARD_SHARE = 0.05  # maximum share of the training tokens, since the held-out set is read a dozen times
DOCUMENTS = 64  # tokenised at once


def data_sets(
    text: Text, encoder: Encoder, *, settings: HealSettings, seed: int, folder: Path
) -> tuple[Dataset, Dataset]:
    """Return held-out and training sequences, tokenised; training takes no more text than its token budget.

    Args:
        folder: Folder in whose `tokens` the training sequences are stored; all processes read them there.

    Raises:
        DataError: There is too little text.
    """
    guard, sequences = divide(text, encoder, settings=settings, seed=seed)
    scratch = folder / "tokens"
    if processes.is_main():
        shutil.rmtree(scratch, ignore_errors=True)  # of an interrupted attempt: made again from the same text
    train = _on_disk(_until(sequences, num_tokens=_budget(settings)), scratch, name=f"heal-{seed}")
    return Dataset.from_list([as_row(sequence) for sequence in guard]), train


def divide(
    text: Text, encoder: Encoder, *, settings: HealSettings, seed: int
) -> tuple[list[list[int]], Iterator[list[int]]]:
    """Return the held-out sequences, and all others one after another, as many as there are.

    Raises:
        DataError: Nothing is left beside the held-out sequences.
    """
    length = settings.sequence_length
    documents = _documents(text, encoder, length=length, seed=seed)
    guard_tokens = min(GUARD_SEQUENCES * length, int(GUARD_SHARE * _budget(settings)))
    guard = take_guard(documents, num_tokens=guard_tokens)
    sequences = chain.from_iterable(not_in(guard, documents))
    first = next(sequences, None)
    if first is None:
        raise DataError(
            f"{text.data.name} has too little text to heal on",
            hint="provide more with `heal_data`, or build without healing: `no_heal`",
        )
    return guard, chain([first], sequences)


def _budget(settings: HealSettings) -> int:
    """Return the number of training tokens."""
    return settings.num_steps * settings.batch_size * settings.sequence_length


def _on_disk(sequences: Iterator[list[int]], folder: Path, *, name: str) -> Dataset:
    first = next(sequences)
    columns = {"input_ids": List(Value("int32")), "assistant_masks": List(Value("int8"))}
    try:
        return Dataset.from_generator(
            lambda: map(as_row, chain([first], sequences)),
            features=Features({name: columns[name] for name in as_row(first)}),
            cache_dir=str(folder),
            fingerprint=name,
        )
    except DatasetGenerationError as error:  # wraps the error that the text raised
        raise error.__cause__ or error from None


def take_guard(documents: Iterator[list[list[int]]], *, num_tokens: int) -> list[list[int]]:
    """Return sequences of the first documents; the rest of the last of these is not used at all.

    No document is split between held-out set and training text: its pieces are too similar for one to
    show whether training on another helped.
    """
    guard: list[list[int]] = []
    for document in documents:
        for sequence in document:
            guard.append(sequence)
            if sum(map(len, guard)) >= num_tokens:
                return guard
    return guard


def not_in(guard: list[list[int]], documents: Iterator[list[list[int]]]) -> Iterator[list[list[int]]]:
    """Yield documents that do not begin like a held-out one, since a text may contain duplicates."""
    held_back = {tuple(sequence) for sequence in guard}
    return (document for document in documents if not document or tuple(document[0]) not in held_back)


def _documents(text: Text, encoder: Encoder, *, length: int, seed: int) -> Iterator[list[list[int]]]:
    """Yield the sequences of each document, with one end token after the last."""
    documents = text.shuffled(seed)
    while some := list(islice(documents, DOCUMENTS)):
        for tokens in encoder.encode(some):
            pieces = encoder.windows(encoder.ended(tokens), length=length)
            yield [piece for piece in pieces if piece != [*encoder.prefix, *encoder.end]]


def _until(sequences: Iterator[list[int]], *, num_tokens: int) -> Iterator[list[int]]:
    taken = 0
    for sequence in sequences:
        yield sequence
        taken += len(sequence)
        if taken >= num_tokens:
            return
