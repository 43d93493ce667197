"""Open the texts to measure, heal and evaluate on: a file, a Hub data set or Python's standard library."""

import gzip
import json
import lzma
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from factory.artifacts import DataSource
from factory.config.choices import Split
from factory.config.references import DATA_NOTATION, DATA_SUFFIXES, check_data, local_path
from factory.errors import DataError
from factory.store.files import sha256_of_file
from factory.text.hub_data import find_data_set, hub_rows
from factory.text.standard_library import Part, documents, fingerprint

SHUFFLE_BUFFER = 10_000  # documents held in memory
MISSING = object()
PASSAGE_CHARACTERS = 3000  # approximate length of the passages that source files are split into
PROSE_CHARACTERS = 1000  # the same of the prose, so that a second text adds little to the demo's time


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
        reference: A file, a Hub data set `owner/name[:config][#column][@revision]`, `stdlib:train`,
            `stdlib:held-out` or `stdlib:prose`.
        split: Split of a Hub data set; the training split is used if this one does not exist.

    Raises:
        DataError: The file or data set does not exist, is empty or has an unsupported format.
        HubError: The Hub cannot be reached.
    """
    check_data(reference)
    if reference.startswith("stdlib:"):
        return _standard_library(reference)
    path = local_path(reference)
    if path.is_file():
        return _file(path)
    data = find_data_set(reference, split=split)
    return Text(data, partial(hub_rows, data))


def _file(path: Path) -> Text:
    data = DataSource(name=path.name, version=sha256_of_file(path))
    return Text(data, partial(_read_file, path))


def _read_file(path: Path) -> Iterator[str | None]:
    reader = {".parquet": _read_parquet, ".txt": _read_paragraphs}.get(path.suffix, _read_json_lines)
    return _not_empty(reader(path), name=str(path))


def _read_json_lines(path: Path) -> Iterator[str | None]:
    try:
        with _open(path) as file:
            # One line behind, so that a truncated file raises before its half last line is parsed.
            place, line = "", ""
            for number, following in enumerate(file, start=1):
                if line.strip():
                    yield _text_of(line, place=place)
                place, line = f"{path}, line {number}", following
            if line.strip():
                yield _text_of(line, place=place)
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}", hint="is it complete, and UTF-8?") from error


def _text_of(line: str, *, place: str) -> str | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON: {line[:60]!r}", hint='write one {"text": …} per line') from error
    text = value.get("text", MISSING) if isinstance(value, dict) else MISSING
    if text is None:
        return None
    if not isinstance(text, str):
        raise DataError(f'{place}: no "text" in {line.strip()[:60]!r}', hint='write one {"text": …} per line')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise DataError(
            f"{place}: contains {half!r}, half of a character", hint="write the file again as UTF-8"
        ) from error
    return text if text.strip() else None


def _read_paragraphs(path: Path) -> Iterator[str]:
    """Yield paragraphs between blank lines as documents."""
    try:
        with _open(path) as file:
            yield from _paragraphs(file)
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}", hint="is it complete, and UTF-8?") from error


def _paragraphs(lines: IO[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in lines:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph)
            paragraph = []
    if paragraph:
        yield "".join(paragraph)


def _read_parquet(path: Path) -> Iterator[str | None]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
        if "text" not in table.schema_arrow.names:
            names = ", ".join(table.schema_arrow.names)
            raise DataError(f'{path} has no column "text", only {names}', hint="rename the column to text")
        kind = table.schema_arrow.field("text").type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(f'{path}: column "text" is of type {kind}', hint="convert it to type string")
        for batch in table.iter_batches(columns=["text"]):
            yield from (text if text and text.strip() else None for text in batch.column(0).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path}: {error}", hint="is it a parquet file?") from error


def _open(path: Path) -> IO[str]:
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    stream: IO[str] = opener(path, "rt", encoding="utf-8-sig")  # type: ignore[operator]
    return stream


def _not_empty(rows: Iterator[str | None], *, name: str) -> Iterator[str | None]:
    empty, number = True, 0
    for number, row in enumerate(rows, start=1):  # noqa: B007
        empty = empty and row is None
        yield row
    if empty:
        rows_without = f": its {number:,} rows are empty" if number else ""
        raise DataError(f"{name} contains no text{rows_without}", hint=f"give {DATA_NOTATION}")


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


def text_identity(data: DataSource) -> str:
    """Return what identifies the documents, including a data set's split and a file's format."""
    part = f", part {data.part}" if data.part else ""
    if data.hub_id:
        return f"{data.name}:{data.split}@{data.version}{part}"
    if data.name.startswith("stdlib:"):
        return f"{data.name}@{data.version}{part}"
    suffix = max((s for s in DATA_SUFFIXES if data.name.endswith(s)), key=len, default="")
    return f"{data.version}{suffix}{part}"


@dataclass(frozen=True)
class Texts:
    """The opened texts of a build, with known versions; no document serves two uses."""

    calibration: Text
    healing: Text
    evaluation: Text
    remarks: tuple[str, ...] = ()  # on documents that were in two of them
    whole: tuple[Text, ...] = ()  # all of them as opened, before they were separated
    also: tuple[Text, ...] = ()  # evaluated besides `evaluation`

    @property
    def evaluations(self) -> tuple[Text, ...]:
        """Return every text to compute the loss on."""
        return (self.evaluation, *self.also)


NOTHING = Text(DataSource(name="nothing", version="0"), tuple[str, ...]().__iter__)
