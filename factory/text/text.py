"""Open the texts to measure, heal and evaluate on: a file, a Hub data set or Python's standard library."""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

from factory.artifacts import DataSource, Share
from factory.config.choices import Split
from factory.config.references import check_data, data_format, local_data, with_share
from factory.errors import DataError
from factory.text.files import open_files
from factory.text.hub_data import find_data_set, hub_rows
from factory.text.standard_library import Part, documents, fingerprint

SHUFFLE_BUFFER = 10_000  # documents held in memory
PASSAGE_CHARACTERS = 3000  # approximate length of the passages that source files are split into
PROSE_CHARACTERS = 1000  # the same of the prose, so that a second text adds little to the demo's time


OVER = object()  # no more rows


@dataclass(frozen=True)
class Text:
    """Documents with a name and a version; `documents()` yields them in the same order every time.

    A text from `open_text` can be pickled, so that another process reads the same documents.
    """

    data: DataSource
    rows: Callable[[], Iterator[str | None]]  # None: a row without text

    def documents(self) -> Iterator[str]:
        """Yield the documents; rows without text are skipped."""
        return (row for row in self.rows() if row is not None)

    def shuffled(self, seed: int) -> Iterator[str]:
        """Yield the documents through a shuffle buffer: same seed, same order; bounded memory."""
        generator = random.Random(seed)
        buffer: list[str] = []
        for document in self.documents():
            if len(buffer) < SHUFFLE_BUFFER:
                buffer.append(document)
                continue
            index = generator.randrange(SHUFFLE_BUFFER)
            yield buffer[index]
            buffer[index] = document
        generator.shuffle(buffer)
        yield from buffer


def open_text(reference: str, *, split: Split) -> Text:
    """Resolve a data reference, reading no more than its version takes.

    Args:
        reference: A file, folder or pattern, `path#column`, a Hub data set
            `owner/name:config[split]#column@revision`, `stdlib:train`, `stdlib:held-out` or `stdlib:prose`.
        split: Split of a Hub data set; the training split is used if this one does not exist.

    Raises:
        DataError: The file or data set does not exist, is empty or has an unsupported format.
        HubError: The Hub cannot be reached.
    """
    check_data(reference)
    if reference.startswith("stdlib:"):
        return _standard_library(reference)
    if local := local_data(reference):
        return Text(*open_files(*local))
    data = find_data_set(reference, split=split)
    return Text(data, partial(hub_rows, data))


def _standard_library(reference: str) -> Text:
    parts: dict[str, Part] = {"stdlib:train": "train", "stdlib:held-out": "held-out", "stdlib:prose": "prose"}
    split = parts[reference]
    data = DataSource(name=reference, version=fingerprint(split))
    return Text(data, partial(_standard_passages, split))


def _standard_passages(part: Part) -> Iterator[str]:
    length = PROSE_CHARACTERS if part == "prose" else PASSAGE_CHARACTERS
    return (passage for file in documents(part) for passage in _passages(file, length=length))


def _passages(source: str, *, length: int) -> Iterator[str]:
    passage = ""
    for paragraph in source.split("\n\n"):
        if passage and len(passage) + len(paragraph) > length:
            yield passage
            passage = ""
        passage += paragraph + "\n\n"
    if passage.strip():
        yield passage


def mixed(texts: Sequence[Text], shares: Sequence[float]) -> Text:
    """Return one text of several, with as many characters of each as its share.

    The next document is always one of the text that is furthest behind its share, so that every beginning of
    the mix holds the shares, too. A text that ends begins again until each has been read to its end.

    Raises:
        DataError: A text is given twice, or conversations and plain text are mixed.
    """
    names = [text.data.name for text in texts]
    if twice := next(
        (text for index, text in enumerate(texts) if text.data in [t.data for t in texts[:index]]), None
    ):
        raise DataError(
            f"`heal_data` names {twice.data.name} twice",
            hint="give each text once, with the sum of the shares",
        )
    kinds = {text.data.is_chat: text.data.name for text in texts}
    if len(kinds) > 1:
        raise DataError(
            f"`heal_data` mixes conversations ({kinds[True]}) and plain text ({kinds[False]})",
            hint="give texts of one kind",
        )
    parts = tuple(Share(data=text.data, share=share) for text, share in zip(texts, shares, strict=True))
    identities = [f"{text_identity(one.data)}*{one.share!r}" for one in parts]
    data = DataSource(
        name=" + ".join(with_share(name, share) for name, share in zip(names, shares, strict=True)),
        version=hashlib.sha256("\n".join(identities).encode()).hexdigest(),
        is_chat=texts[0].data.is_chat,
        mixed=parts,
    )
    return Text(data, partial(_mixed_rows, tuple(texts), tuple(shares)))


def _mixed_rows(texts: Sequence[Text], shares: Sequence[float]) -> Iterator[str | None]:
    rows = [text.rows() for text in texts]
    taken, given, ended = [0] * len(texts), [0] * len(texts), [False] * len(texts)
    while True:
        behind = min(range(len(texts)), key=lambda index: taken[index] / shares[index])
        row = next(rows[behind], OVER)
        if isinstance(row, str):
            taken[behind] += len(row)
            given[behind] += 1
        elif row is OVER:
            if not given[behind]:
                raise DataError(
                    f"{texts[behind].data.name} has no documents left to mix in",
                    hint="remove it from `heal_data`, or give more of it",
                )
            ended[behind] = True
            if all(ended):
                return
            rows[behind] = texts[behind].rows()
            continue
        yield row  # type: ignore[misc]  # not OVER


def text_identity(data: DataSource) -> str:
    """Return what identifies the documents, including a data set's split and a file's format."""
    if data.mixed:
        return f"mix@{data.version}"
    part = f", part {data.part}" if data.part else ""
    if data.is_chat:
        part += f", as trl {version('trl')} marks answers"
    if data.hub_id:
        return f"{data.name}:{data.split}@{data.version}{part}"
    if data.name.startswith("stdlib:"):
        return f"{data.name}@{data.version}{part}"
    column = column_in(data.name)
    kind = data_format(data.name.removesuffix(f"#{column}"))
    return f"{data.version}{kind}{f'#{column}' if column else ''}{part}"


def column_in(name: str) -> str:
    """Return the column in the name of a text; empty if it is the usual one, or the text has none."""
    return "" if data_format(name) or "#" not in name else name.rpartition("#")[2]


@dataclass(frozen=True)
class Texts:
    """The opened texts of a build, with known versions; no document serves two uses."""

    calibration: Text
    healing: Text
    evaluation: Text
    remarks: tuple[str, ...] = ()  # on documents that were in two of them
    whole: tuple[Text, ...] = ()  # all of them as opened, before they were separated
    also: tuple[Text, ...] = ()  # evaluated besides `evaluation`
    sources: tuple[Text, ...] = ()  # that `healing` is mixed of, if there are several

    @property
    def healings(self) -> tuple[Text, ...]:
        """Return the texts to heal on."""
        return self.sources or (self.healing,)

    @property
    def evaluations(self) -> tuple[Text, ...]:
        """Return every text to compute the loss on."""
        return (self.evaluation, *self.also)


NOTHING = Text(DataSource(name="nothing", version="0"), tuple[str, ...]().__iter__)
