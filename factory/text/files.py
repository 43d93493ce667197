"""Read local data: files of records or of text, compressed or not, alone or many as one text."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import IO, Any

from factory.artifacts import DataSource
from factory.config.references import DEFAULT_COLUMN, check_files, contents_of, data_files, data_format
from factory.errors import DataError
from factory.store.files import sha256_of_file
from factory.text.records import CHAT, NAMES, NULL, STRING, choose_column, document_of, is_chat_type, kind_of

SEPARATOR = "<|endoftext|>"  # between the documents of a text file
BEGINNING = 2**20  # characters in which the separator must occur; otherwise blank lines separate
CHUNK = 2**20  # characters read at once
MAX_CELL = 2**31 - 1  # characters of a CSV cell; Python's own limit is 131,072
SHOWING = 100  # rows that show what a column holds, if the first ones hold nothing there
OTHER_SEPARATORS = frozenset(";\t|")  # of files that are called CSV nevertheless
ANSWER_HINT = 'an answer is a message with the role "assistant", or from "gpt"'
MISSING = object()
NUMBER = re.compile(r"[-+]?[\d.,]*\d[\d.,]*(e[-+]?\d+)?%?", re.IGNORECASE)
NUMBERS = "numbers"  # kind of a column
ROW_HINT = 'write one {"text": …} or {"messages": […]} per line'
Read = partial[Iterator[str | None]]  # pickled for other processes


def open_files(path: Path, column: str | None) -> tuple[DataSource, Read]:
    """Return the identity of a file, or of a folder or pattern of files, and the function that reads it.

    Args:
        path: File, folder or pattern.
        column: Column to read; None: chosen by `choose_column`.

    Raises:
        DataError: There is no such file or column, or a file is damaged.
    """
    files = data_files(path)
    check_files(path, files)
    tables = [file for file in files if _is_table(file)]
    is_chat = False
    if tables:
        kinds = next(filter(None, map(_kinds, tables)), {DEFAULT_COLUMN: STRING})
        column, is_chat = choose_column(kinds, column, name=str(path), reference=str(path))
    elif column is not None:
        raise DataError(f"{path} has no columns, so none is called {column!r}", hint=f"give {path}")
    column = column or DEFAULT_COLUMN
    data = DataSource(name=_name(path, column), version=_version(files), is_chat=is_chat)
    return data, partial(_read, path, column, is_chat)


def _name(path: Path, column: str) -> str:
    name = path.name
    if not path.is_file():  # a pattern's last part says little
        name = f"{path.resolve().name}/" if path.is_dir() else "/".join(path.parts[-2:])
    return name if column == DEFAULT_COLUMN else f"{name}#{column}"


def _version(files: Sequence[Path]) -> str:
    """Return the sha256 of a file's content; of several, or of a text with separators, of a list of these."""
    contents = [f"{data_format(file.name)} {sha256_of_file(file)} {_separator(file)}" for file in files]
    if len(files) == 1 and not _separator(files[0]):
        return sha256_of_file(files[0])
    return hashlib.sha256("\n".join(contents).encode()).hexdigest()


def _read(path: Path, column: str, is_chat: bool) -> Iterator[str | None]:
    """Yield the documents of all files in order; None for an empty row.

    Raises:
        DataError: A file is damaged or holds another kind of value; the message names the place. Or there
            is no document at all.
    """
    empty, number = True, 0
    for number, row in enumerate(_documents(data_files(path), column, is_chat), start=1):  # noqa: B007
        empty = empty and row is None
        yield row
    if empty and is_chat and number:
        raise DataError(f"{path} contains no answer in {number:,} conversations", hint=ANSWER_HINT)
    if empty and number:
        raise DataError(
            f"{path} contains no text: its {number:,} rows are empty",
            hint=f"column {column!r} is blank in every row: name another, {path}#COLUMN, or fill it",
        )
    if empty:
        file = data_files(path)[0]
        raise DataError(f"{path} contains no {'rows' if _is_table(file) else 'text'}", hint=contents_of(file))


def _documents(files: Sequence[Path], column: str, is_chat: bool) -> Iterator[str | None]:
    for path in files:
        with _read_errors(path):
            if not _is_table(path):
                yield from _texts(path)
                continue
            for place, value in _values(path, column):
                yield _document(value, column, is_chat=is_chat, place=f"{path}, {place}")


def _document(value: object, column: str, *, is_chat: bool, place: str) -> str | None:
    if value is MISSING:
        raise DataError(f'{place}: no "{column}" in the row', hint=ROW_HINT)
    try:
        return document_of(value, is_chat=is_chat)
    except ValueError as error:
        raise DataError(f'{place}: "{column}" {error}', hint=ROW_HINT) from error


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """Turn the errors of reading a file into one line about it."""
    from pyarrow import ArrowException

    try:
        yield
    except (
        OSError,
        EOFError,
        lzma.LZMAError,
        zlib.error,
        UnicodeDecodeError,
        csv.Error,
        ArrowException,
    ) as error:
        hint = "is it complete?"
        if _is_parquet(path):
            hint = "is it a parquet file?"
        elif isinstance(error, UnicodeDecodeError):
            hint = "save it as UTF-8; for one in Latin-1: iconv -f latin1 -t utf-8"
        problem = (str(error) or repr(error)).splitlines()[0]
        raise DataError(f"cannot read {path}: {problem}", hint=hint) from error


def _is_table(path: Path) -> bool:
    """Return whether a file has rows with columns."""
    return not data_format(path.name).startswith((".txt", ".md"))


def _is_parquet(path: Path) -> bool:
    return data_format(path.name) == ".parquet"


def _kinds(path: Path) -> dict[str, str]:
    """Return the columns of a file with their kinds, as it declares them or its first rows show."""
    with _read_errors(path):
        if _is_parquet(path):
            from pyarrow import parquet

            return {field.name: _kind_of_type(field.type) for field in parquet.ParquetFile(path).schema_arrow}
        kinds: dict[str, str] = {}
        rows = [row for _, row in islice(_rows(path), SHOWING)]
        for row in rows:
            kinds |= {name: kind_of(row[name]) for name in row if kinds.get(name, NULL) == NULL}
        if data_format(path.name).startswith(".csv"):  # whose cells are all texts
            kinds |= dict.fromkeys(filter(lambda name: _are_numbers(rows, name), kinds), NUMBERS)
    if kinds.get(DEFAULT_COLUMN) == NULL:
        kinds[DEFAULT_COLUMN] = STRING
    return kinds


def _are_numbers(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    cells = [row[column].strip() for row in rows if isinstance(row.get(column), str) and row[column].strip()]
    return bool(cells) and all(map(NUMBER.fullmatch, cells))


def _kind_of_type(kind: Any) -> str:
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        item = kind.value_type
        return CHAT if types.is_struct(item) and is_chat_type({f.name for f in item}) else str(kind)
    value = kind.value_type if types.is_dictionary(kind) else kind
    is_string = types.is_string(value) or types.is_large_string(value) or types.is_string_view(value)
    return STRING if is_string else str(kind)


def _values(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    """Yield the value of each row in a column with its place; `MISSING` where a row has no such column."""
    if not _is_parquet(path):
        yield from ((place, row.get(column, MISSING)) for place, row in _rows(path))
        return
    from pyarrow import parquet

    numbers = count(1)
    table = parquet.ParquetFile(path)
    if column not in table.schema_arrow.names:
        raise DataError(f"{path} has no column {column!r}", hint="give files with the same columns")
    for batch in table.iter_batches(columns=[column]):
        yield from ((f"row {next(numbers)}", value) for value in batch.column(0).to_pylist())


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a JSON or CSV file with their places."""
    kind = data_format(path.name)
    with _open(path) as file:
        if kind.startswith(".csv"):
            yield from _csv_rows(file, path)
            return
        first = next((line for line in file if line.strip()), "") if not kind.startswith(".jsonl") else ""
        if first.lstrip().startswith("{"):
            following = []
            for line in file:
                following.append(line)
                if line.strip():
                    break
            if not (following and following[-1].strip() and _is_json(first)):
                following += file
                _refuse_one_object("".join([first, *following]), path)
            yield from _lines(chain([first], following, file), path)
            return
        if first.lstrip().startswith("["):
            items = _parsed(first + file.read(), place=str(path))
            for number, item in enumerate(items, start=1):
                yield f"item {number}", _row(item, repr(item), place=f"{path}, item {number}")
            return
        yield from _lines(chain([first], file) if first else file, path)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_one_object(text: str, path: Path) -> None:
    """Refuse a file that is one JSON object, unless that is a row on a line of its own."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return  # the lines will say what is wrong
    lists = [key for key, part in value.items() if kind_of(part) == NAMES[list] and _is_rows(part)]
    if lists or "\n" in text.strip():
        hint = f"write only what is under {lists[0][:60]!r}" if lists else "write an array of objects"
        raise DataError(f"{path} holds one object, not rows", hint=f"{hint}: [{{…}}, {{…}}]")


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _csv_rows(file: IO[str], path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of a CSV file; a wrong separator or missing quotes would cut texts short, unseen."""
    csv.field_size_limit(MAX_CELL)
    rows = csv.DictReader(file, restkey="")
    header = rows.fieldnames or ()
    if len(header) == 1 and OTHER_SEPARATORS & set(header[0]):
        raise DataError(
            f"{path}: its header {header[0][:60]!r} has no commas", hint="separate cells by commas"
        )
    for row in rows:
        place = f"line {rows.line_num}"
        if isinstance(row.get(""), list):
            raise DataError(
                f"{path}, {place}: more cells than the {len(header)} of the header",
                hint="put cells that hold commas in double quotes",
            )
        yield place, row


def _lines(lines: Iterator[str], path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows of JSON lines, one line late: a truncated file raises before its half line is parsed."""
    line = ""
    for number, following in enumerate(chain(lines, [""])):
        if line.strip():
            place = f"line {number}"
            yield place, _row(_parsed(line, place=f"{path}, {place}"), line, place=f"{path}, {place}")
        line = following


def _parsed(text: str, *, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        broken = text.strip().endswith(("{", "[", ","))
        hint = f"an object must be on one line: {ROW_HINT}" if broken else ROW_HINT
        raise DataError(f"{place}: not JSON: {text.strip()[:60]!r}", hint=hint) from error


def _row(value: Any, written: str, *, place: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: no columns in {written.strip()[:60]!r}", hint=ROW_HINT)
    return value


def _texts(path: Path) -> Iterator[str]:
    """Yield the documents of a text file.

    They end at separators, if the file has any; otherwise a Markdown file is one document, and in any other
    the paragraphs between blank lines are documents.
    """
    with _open(path) as file:
        beginning = file.read(BEGINNING)
        if SEPARATOR in beginning:
            yield from _separated(beginning, file)
        elif data_format(path.name).startswith(".md"):
            if (whole := beginning + file.read()).strip():
                yield whole
        else:
            yield from _paragraphs(chain(io.StringIO(beginning + file.readline()), file))


def _separator(path: Path) -> str:
    """Return what separates the documents of a text file, besides the usual."""
    if _is_table(path):
        return ""
    with _read_errors(path), _open(path) as file:
        return SEPARATOR if SEPARATOR in file.read(BEGINNING) else ""


def _separated(beginning: str, file: IO[str]) -> Iterator[str]:
    text, chunk = "", beginning
    while chunk:
        *documents, text = (text + chunk).split(SEPARATOR)
        yield from (document.strip() for document in documents if document.strip())
        chunk = file.read(CHUNK)
    if text.strip():
        yield text.strip()


def _paragraphs(lines: Iterator[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in lines:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph)
            paragraph = []
    if paragraph:
        yield "".join(paragraph)


def _open(path: Path) -> IO[str]:
    ending = data_format(path.name).rpartition(".")[2]
    binary: Any = {"xz": lzma.open, "gz": gzip.open, "bz2": bz2.open, "zst": _open_zstandard}.get(
        ending, open
    )
    return io.TextIOWrapper(binary(path, "rb"), encoding="utf-8-sig", newline=_newline(path))


def _newline(path: Path) -> str | None:
    return "" if data_format(path.name).startswith(".csv") else None  # cells may hold line breaks


def _open_zstandard(path: Path, _mode: str) -> Any:
    from pyarrow import input_stream

    return input_stream(path, compression="zstd")
