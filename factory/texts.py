"""Text to measure, heal and evaluate on: a file, a Hub data set or Python's standard library."""

import gzip
import json
import lzma
import random
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from factory.artifacts import DataSource, sha256_of_file
from factory.errors import DataError, HubError
from factory.references import DATA_NOTATION, check_data, local_path

if TYPE_CHECKING:
    from factory.demo import corpus

Split = Literal["train", "validation"]

SHUFFLE_BUFFER = 10_000  # documents held in memory
# Before reading on where a connection broke; with what the Hub's client waits by itself, ten minutes in
# all without a single row.
STREAM_WAITS_SECONDS = (5.0, 15.0, 60.0, 120.0, 240.0)
DAMAGED = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)
DAMAGED_HINT = "a file of it is damaged: take another revision (owner/name@revision) or another data set"
PASSAGE_CHARACTERS = 3000  # source files are cut at blank lines into passages of about this


@dataclass(frozen=True)
class Text:
    """Documents with a name and a version; `documents()` yields them anew in a fixed order.

    Those that `open_text` makes can be pickled, so that another process reads the same.
    """

    data: DataSource
    documents: Callable[[], Iterator[str]]

    def shuffled(self, seed: int) -> Iterator[str]:
        """Documents through a shuffle buffer: the same order for the same seed, bounded memory."""
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
    """Resolve a data reference; reads only what names its version.

    Args:
        reference: A file, a Hub data set `owner/name[:config][@revision]`, or `stdlib:train`,
            `stdlib:held-out`.
        split: Which split of a Hub data set.

    Raises:
        DataError: No such file or data set, an unknown format, no text in it.
        HubError: The Hub could not be reached.
    """
    check_data(reference)
    if reference.startswith("stdlib:"):
        return _standard_library(reference)
    path = local_path(reference)
    return _file(path) if path.is_file() else _hub_data_set(reference, split=split)


def keep_apart(evaluation: Text, others: tuple[Text, ...]) -> tuple[Text, tuple[Text, ...]]:
    """Divide a text that is evaluated on and used otherwise too: no document then serves both.

    A block chosen, or a model trained, on the very documents it is judged by looks better than it is.
    Which half a document belongs to is decided by its checksum, so equal documents stay together.
    """
    shared = [other.data == evaluation.data for other in others]
    if not any(shared):
        return evaluation, others
    divided = tuple(_half(other, 0) if same else other for other, same in zip(others, shared, strict=True))
    return _half(evaluation, 1), divided


def _half(text: Text, number: int) -> Text:
    data = text.data.model_copy(update={"part": f"{number + 1} of 2"})
    return Text(data, partial(_documents_of_half, text, number))


def _documents_of_half(text: Text, number: int) -> Iterator[str]:
    return (document for document in text.documents() if zlib.crc32(document.encode()) % 2 == number)


def check_text(text: Text) -> None:
    """Read a local file once from end to end, so that a fault in its last line shows before the work.

    Raises:
        DataError: An empty file, or a line without text (by its number).
    """
    if text.data.hub_id is None:
        for _ in text.documents():
            pass


# A file ---------------------------------------------------------------------------------------


def _file(path: Path) -> Text:
    data = DataSource(name=path.name, version=sha256_of_file(path))
    return Text(data, partial(_read_file, path))


def _read_file(path: Path) -> Iterator[str]:
    reader = {".parquet": _read_parquet, ".txt": _read_paragraphs}.get(path.suffix, _read_json_lines)
    return _not_empty(reader(path), name=str(path))


def _read_json_lines(path: Path) -> Iterator[str]:
    try:
        with _open(path) as file:
            # A line behind: of a file cut short, the damage shows rather than its half last line.
            place, line = "", ""
            for number, following in enumerate(file, start=1):
                if line.strip():
                    yield _text_of(line, place=place)
                place, line = f"{path}, line {number}", following
            if line.strip():
                yield _text_of(line, place=place)
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}", hint="is it whole, and UTF-8?") from error


def _text_of(line: str, *, place: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON: {line[:60]!r}", hint='one {"text": …} a line') from error
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise DataError(f'{place}: no "text" in {line.strip()[:60]!r}', hint='one {"text": …} a line')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise DataError(
            f"{place}: holds {half!r}, half of a character", hint="write the file again as UTF-8"
        ) from error
    return text


def _read_paragraphs(path: Path) -> Iterator[str]:
    """Paragraphs between blank lines are documents."""
    try:
        with _open(path) as file:
            yield from _paragraphs(file)
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}", hint="is it whole, and UTF-8?") from error


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


def _read_parquet(path: Path) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
        if "text" not in table.schema_arrow.names:
            names = ", ".join(table.schema_arrow.names)
            raise DataError(f'{path} has no column "text" but {names}', hint="rename the column to text")
        kind = table.schema_arrow.field("text").type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(f'{path}: column "text" is of type {kind}', hint="it must be of type string")
        for batch in table.iter_batches(columns=["text"]):
            yield from (text for text in batch.column(0).to_pylist() if text and text.strip())
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path}: {error}", hint="is it a parquet file?") from error


def _open(path: Path) -> IO[str]:
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    stream: IO[str] = opener(path, "rt", encoding="utf-8-sig")  # type: ignore[operator]
    return stream


def _not_empty(documents: Iterator[str], *, name: str) -> Iterator[str]:
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty:
        raise DataError(f"{name} holds no text", hint=f"give {DATA_NOTATION}")


# A Hub data set ---------------------------------------------------------------------------------


def _hub_data_set(reference: str, *, split: Split) -> Text:
    name, _, revision = reference.partition("@")
    repo_id, _, config = name.partition(":")
    commit = _data_set_commit(repo_id, revision=revision or None)
    data = DataSource(name=name, version=commit, hub_id=repo_id, split=split)
    return Text(data, partial(_stream, data, config=config or None))


def _data_set_commit(repo_id: str, *, revision: str | None) -> str:
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionResolutionError

    from factory.hub_errors import hub_api, hub_errors, patiently

    try:
        with hub_errors(repo_id, revision=revision):
            api = hub_api()
            return patiently(
                lambda: api.resolve_revision(repo_id, repo_type="dataset", revision=revision).resolved
            )
    except HubError as error:
        cause = error.__cause__
        if isinstance(cause, RevisionResolutionError):
            cause = cause.__cause__ or cause
        if not isinstance(cause, RepositoryNotFoundError | HFValidationError):
            raise
        raise DataError(
            f"there is no data set {repo_id!r} on the Hub", hint=f"give {DATA_NOTATION}"
        ) from error


def _stream(data: DataSource, *, config: str | None) -> Iterator[str]:
    """Texts in the order of the data set; rows without one are passed over."""
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    from factory.hub_errors import hub_errors

    hint = "name a configuration (owner/name:config) that has this split"
    try:
        with hub_errors(str(data.hub_id), revision=data.version):
            for row in _rows(data, config=config):
                if "text" not in row:
                    raise DataError(
                        f'data set {data.name!r} has no column "text"', hint=f"it has {', '.join(row)}"
                    )
                hint = DAMAGED_HINT
                if isinstance(row["text"], str) and row["text"].strip():
                    yield row["text"]
    except (ValueError, OSError, DatasetsError, ArrowException, *DAMAGED) as error:
        raise DataError(
            f"cannot read data set {data.name!r}: {(str(error) or repr(error)).splitlines()[0]}",
            hint=DAMAGED_HINT if isinstance(error, DAMAGED) else hint,
        ) from error


def _rows(data: DataSource, *, config: str | None) -> Iterator[dict[str, Any]]:
    """Rows of a Hub data set, each once and in order, through whatever may pass on the way.

    After a fault the shard is read anew up to the row that came last. `datasets` would rather repeat the
    read that failed, and of a compressed file loses what that read had unpacked before: documents that
    are missing without a word, or lines cut in two.
    """
    from datasets import config as settings
    from datasets import load_dataset

    from factory.data_files import check_data_files
    from factory.hub_errors import CLIENT_ERRORS, patiently, wait_after

    repo_id = str(data.hub_id)
    patiently(lambda: check_data_files(repo_id, revision=data.version))
    settings.STREAMING_READ_MAX_RETRIES = settings.STREAMING_OPEN_MAX_RETRIES = 1
    revision = data.version
    rows = patiently(
        lambda: load_dataset(data.hub_id, config, split=data.split, revision=revision, streaming=True)
    )
    if rows.features:
        rows = rows.decode(False)  # or pictures and sounds are had from wherever a row says they are
    reached: dict[str, Any] | None = None
    waits: Iterator[float] = iter(())
    while True:
        try:
            yield from rows
            return
        except CLIENT_ERRORS as error:
            if rows.state_dict() != reached:
                reached, waits = rows.state_dict(), iter(STREAM_WAITS_SECONDS)
            wait = next(waits, None)
            seconds = None if wait is None else wait_after(error, wait, unanswered=True)
            if seconds is None or seconds > STREAM_WAITS_SECONDS[-1]:
                raise
        time.sleep(seconds)
        rows.load_state_dict(reached)


# Python's standard library ----------------------------------------------------------------------


def _standard_library(reference: str) -> Text:
    from factory.demo import corpus

    split: corpus.Split = "train" if reference == "stdlib:train" else "held-out"
    data = DataSource(name=reference, version=corpus.fingerprint(split))
    return Text(data, partial(_standard_passages, split))


def _standard_passages(split: "corpus.Split") -> Iterator[str]:
    from factory.demo import corpus

    return (passage for file in corpus.documents(split) for passage in _passages(file))


def _passages(source: str) -> Iterator[str]:
    passage = ""
    for paragraph in source.split("\n\n"):
        if passage and len(passage) + len(paragraph) > PASSAGE_CHARACTERS:
            yield passage
            passage = ""
        passage += paragraph + "\n\n"
    if passage.strip():
        yield passage
