"""Find the split and column of a Hub data set that hold text, and stream its rows, each once."""

import gzip
import lzma
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from factory.artifacts import DataSource
from factory.config.choices import Split
from factory.config.references import DATA_NOTATION, DEFAULT_COLUMN, HUB_DATA
from factory.errors import DataError, HubError
from factory.text.records import (
    CHAT,
    CHAT_COLUMNS,
    STRING,
    choices,
    choose_column,
    document_of,
    is_chat_type,
)

if TYPE_CHECKING:
    from datasets import IterableDatasetDict

# Before each attempt to resume a broken stream; with the Hub client's own waits, ten minutes without a row.
STREAM_WAITS_SECONDS = (5.0, 15.0, 60.0, 120.0, 240.0)
DAMAGED = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)
DAMAGED_HINT = "one of its files is damaged: use another revision (owner/name@revision) or data set"
READERS = ("datasets", "huggingface_hub", "pandas", "pyarrow")  # they can fail on settings in a card
SPLIT_NAMES = ("train", "validation", "test")  # often typed as a configuration
STRINGS = ("string", "large_string", "string_view")


def find_data_set(reference: str, *, split: Split) -> DataSource:
    """Find the data set at its commit, the split that serves as `split`, and the column to read.

    Without a validation split, the training split is used. The column is chosen by `choose_column`; any
    other than `text` becomes part of the name, `owner/name#column`, as does a split that would not have
    been chosen.

    Args:
        reference: `owner/name:config[split]#column@revision`; only the name is required.

    Raises:
        DataError: The data set, configuration, split or column does not exist; the hint lists the choices.
        HubError: The Hub cannot be reached.
    """
    from factory.hub.client import patiently
    from factory.text.hub_data_files import check_data_files

    repo_id, config, given, column, revision = _parts(reference)
    commit = _data_set_commit(repo_id, revision=revision)
    name = repo_id + (f":{config}" if config else "")
    with _read_errors(name, repo_id=repo_id, commit=commit, hint="use another data set, or a file"):
        patiently(lambda: check_data_files(repo_id, revision=commit))
        splits = _open(repo_id, config, commit=commit)
        found = _split(splits, split, given, name=name)
        if given and found != _usual_split(splits, split):
            name += f"[{found}]"
        kinds = _kinds(splits[found], column)
        column, is_chat = choose_column(kinds, column, name=f"data set {name!r}", reference=name)
    name += f"#{column}" if column != DEFAULT_COLUMN else ""
    return DataSource(name=name, version=commit, hub_id=repo_id, split=found, is_chat=is_chat)


def hub_rows(data: DataSource) -> Iterator[str | None]:
    """Yield the documents in the order of the data set; None for a row without one.

    Raises:
        DataError: A row lacks the column, or holds another kind of value.
    """
    _, config, _, column, _ = _parts(data.name)
    column = column or DEFAULT_COLUMN
    with _read_errors(data.name, repo_id=str(data.hub_id), commit=data.version, hint=DAMAGED_HINT):
        for number, row in enumerate(_rows(data, config=config), start=1):
            if column not in row:
                raise DataError(
                    f"data set {data.name!r} has no column {column!r}, only {', '.join(row)}",
                    hint=DAMAGED_HINT,
                )
            try:
                yield document_of(row[column], is_chat=data.is_chat)
            except ValueError as error:
                raise DataError(
                    f"data set {data.name!r}, row {number:,}: {column!r} {error}",
                    hint="use another column, revision (owner/name@revision) or data set",
                ) from error


def _parts(reference: str) -> tuple[str, str | None, str | None, str | None, str | None]:
    """Split a reference into repository, configuration, split, column and revision."""
    match = HUB_DATA.fullmatch(reference)
    if match is None:
        raise DataError(f"data {reference[:200]!r} does not exist", hint=f"give {DATA_NOTATION}")
    return match["repo"], match["config"] or None, match["split"], match["column"], match["revision"] or None


def _data_set_commit(repo_id: str, *, revision: str | None) -> str:
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionResolutionError

    from factory.hub.client import hub_api, patiently
    from factory.hub.errors import hub_errors

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


@contextmanager
def _read_errors(name: str, *, repo_id: str, commit: str, hint: str) -> Iterator[None]:
    """Turn the errors of reading a data set into one line about it."""
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    from factory.hub.errors import STUMBLES, hub_errors, stumbled_in

    try:
        with hub_errors(repo_id, revision=commit):
            yield
    except (ValueError, OSError, DatasetsError, ArrowException, *DAMAGED, *STUMBLES) as error:
        if isinstance(error, STUMBLES) and stumbled_in(error, READERS).startswith("factory"):
            raise
        raise DataError(
            f"cannot read data set {name!r}: {(str(error) or repr(error)).splitlines()[0]}",
            hint=DAMAGED_HINT if isinstance(error, DAMAGED) else hint,
        ) from error


def _open(repo_id: str, config: str | None, *, commit: str) -> "IterableDatasetDict":
    """Open all splits of one configuration, reading only the columns.

    Raises:
        DataError: The configuration does not exist, or there are several and none is named; or the data
            set is a script.
    """
    from datasets import get_dataset_config_names, load_dataset

    from factory.hub.client import patiently

    try:
        return patiently(lambda: load_dataset(repo_id, config, revision=commit, streaming=True))
    except ValueError as error:
        if not str(error).startswith(("BuilderConfig ", "Config name is missing")):
            raise
        names = patiently(lambda: get_dataset_config_names(repo_id, revision=commit))
        problem = "has several configurations" if config is None else f"has no configuration {config!r}"
        hint = choices([f"{repo_id}:{each}" for each in names])
        if config in SPLIT_NAMES:
            hint += f"; a split is written {repo_id}[{config}]"
        raise DataError(f"data set {repo_id!r} {problem}", hint=hint) from error
    except RuntimeError as error:
        if not str(error).startswith("Dataset scripts"):
            raise
        raise DataError(
            f"data set {repo_id!r} is a script, which is not run",
            hint=f"use another data set, or {repo_id}@refs/convert/parquet if the Hub has converted it",
        ) from error


def _usual_split(splits: Mapping[str, Any], wanted: Split) -> str | None:
    """Return the wanted split, or the training split if there is no validation split."""
    return next((each for each in (wanted, "train") if each in splits), None)


def _split(splits: Mapping[str, Any], wanted: Split, given: str | None, *, name: str) -> str:
    """Return the split that the user gave, or the usual one."""
    if found := (given if given in splits else None) if given else _usual_split(splits, wanted):
        return found
    lacks = given or f"train{'' if wanted == 'train' else ' or validation'}"
    raise DataError(
        f"data set {name!r} has no split {lacks}, only {', '.join(splits)}",
        hint=choices([f"{name}[{each}]" for each in splits]),
    )


def _kinds(split: Any, wanted: str | None) -> dict[str, str]:
    """Return the columns of a split with their kinds; if it does not declare them, the wanted one."""
    if split.features is None:
        column = wanted or DEFAULT_COLUMN
        return {column: CHAT if column in CHAT_COLUMNS else STRING}
    return {column: _kind(column, feature) for column, feature in split.features.items()}


def _kind(column: str, feature: Any) -> str:
    from datasets import Json, LargeList, List

    if getattr(feature, "dtype", None) in STRINGS:
        return STRING
    item = feature.feature if isinstance(feature, List | LargeList) else None
    if (isinstance(item, Mapping) and is_chat_type(item.keys())) or (
        isinstance(item, Json) and column in CHAT_COLUMNS
    ):
        return CHAT
    return str(getattr(feature, "dtype", None) or "another type")


def _rows(data: DataSource, *, config: str | None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Hub data set, each once and in order, despite temporary faults.

    After a fault the shard is read again up to the last row. The retry of `datasets` itself repeats only
    the failed read and loses what a compressed file had unpacked before: documents would be missing
    silently, or lines cut in two.
    """
    from datasets import config as settings
    from datasets import load_dataset

    from factory.hub.client import patiently, wait_after
    from factory.hub.errors import CLIENT_ERRORS

    settings.STREAMING_READ_MAX_RETRIES = settings.STREAMING_OPEN_MAX_RETRIES = 1
    revision = data.version
    rows = patiently(
        lambda: load_dataset(data.hub_id, config, split=data.split, revision=revision, streaming=True)
    )
    if rows.features:
        rows = rows.decode(False)  # otherwise images and audio are fetched from any URL that a row names
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
