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
from factory.config.references import DATA_NOTATION, HUB_DATA
from factory.errors import DataError, HubError

if TYPE_CHECKING:
    from datasets import IterableDatasetDict

# Before each attempt to resume a broken stream; with the Hub client's own waits, ten minutes without a row.
STREAM_WAITS_SECONDS = (5.0, 15.0, 60.0, 120.0, 240.0)
DAMAGED = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)
DAMAGED_HINT = "one of its files is damaged: use another revision (owner/name@revision) or data set"
READERS = ("datasets", "huggingface_hub", "pandas", "pyarrow")  # they can fail on settings in a card
DEFAULT_COLUMN = "text"
STRINGS = ("string", "large_string", "string_view")


def find_data_set(reference: str, *, split: Split) -> DataSource:
    """Find the data set at its commit, the split that serves as `split`, and the column that holds text.

    Without a validation split, the training split is used. The column is `text`, or the only one of
    strings; any other than `text` becomes part of the name, `owner/name#column`.

    Args:
        reference: `owner/name[:config][#column][@revision]`.

    Raises:
        DataError: The data set, configuration, split or column does not exist; the hint lists the choices.
        HubError: The Hub cannot be reached.
    """
    from factory.hub.client import patiently
    from factory.text.hub_data_files import check_data_files

    repo_id, config, column, revision = _parts(reference)
    commit = _data_set_commit(repo_id, revision=revision)
    name = reference.partition("@")[0]
    with _read_errors(name, repo_id=repo_id, commit=commit, hint="use another data set, or a file"):
        patiently(lambda: check_data_files(repo_id, revision=commit))
        splits = _open(repo_id, config, commit=commit)
        found = _split(splits, split, name=name)
        column = _column(splits[found].features, column, name=name)
    name = name.partition("#")[0] + (f"#{column}" if column != DEFAULT_COLUMN else "")
    return DataSource(name=name, version=commit, hub_id=repo_id, split=found)


def hub_rows(data: DataSource) -> Iterator[str | None]:
    """Yield texts in the order of the data set; None for a row without text."""
    _, config, column, _ = _parts(data.name)
    column = column or DEFAULT_COLUMN
    with _read_errors(data.name, repo_id=str(data.hub_id), commit=data.version, hint=DAMAGED_HINT):
        for row in _rows(data, config=config):
            if column not in row:
                raise DataError(
                    f"data set {data.name!r} has no column {column!r}, only {', '.join(row)}",
                    hint=DAMAGED_HINT,
                )
            value = row[column]
            yield value if isinstance(value, str) and value.strip() else None


def _parts(reference: str) -> tuple[str, str | None, str | None, str | None]:
    """Split a reference into repository, configuration, column and revision."""
    match = HUB_DATA.fullmatch(reference)
    if match is None:
        raise DataError(f"data {reference[:200]!r} does not exist", hint=f"give {DATA_NOTATION}")
    return match["repo"], match["config"] or None, match["column"], match["revision"] or None


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
        raise DataError(
            f"data set {repo_id!r} {problem}", hint=_choices([f"{repo_id}:{each}" for each in names])
        ) from error
    except RuntimeError as error:
        if not str(error).startswith("Dataset scripts"):
            raise
        raise DataError(
            f"data set {repo_id!r} is a script, which is not run",
            hint=f"use another data set, or {repo_id}@refs/convert/parquet if the Hub has converted it",
        ) from error


def _split(splits: Mapping[str, Any], wanted: Split, *, name: str) -> str:
    """Return the wanted split, or the training split if there is no validation split."""
    for each in (wanted, "train"):
        if each in splits:
            return each
    raise DataError(
        f"data set {name!r} has no split train{'' if wanted == 'train' else ' or validation'}, only "
        f"{', '.join(splits)}",
        hint="use another data set, or download the split that you want and give it as a file",
    )


def _column(features: Mapping[str, Any] | None, wanted: str | None, *, name: str) -> str:
    """Return the column that holds the text.

    Args:
        features: Columns with their types; None if the data set does not declare them.
    """
    column = wanted or DEFAULT_COLUMN
    if features is None:
        return column
    strings = [each for each, kind in features.items() if getattr(kind, "dtype", None) in STRINGS]
    if column in strings:
        return column
    if (
        wanted is None
        and column not in features
        and len(strings) == 1
        and HUB_DATA.fullmatch(f"a/b#{strings[0]}")
    ):
        return strings[0]
    kind = getattr(features[column], "dtype", "another type") if column in features else None
    problem = f"holds {kind} in column {column!r}" if kind else f"has no column {column!r}"
    base = name.partition("#")[0]
    raise DataError(
        f"data set {name!r} {problem}; it has {', '.join(features)}",
        hint=_choices([f"{base}#{each}" for each in strings])
        if strings
        else "use another data set: none of its columns holds strings",
    )


def _choices(names: list[str], maximum: int = 8) -> str:
    more = f" and {len(names) - maximum} more" if len(names) > maximum else ""
    return f"give {' or '.join(names[:maximum])}{more}"


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
