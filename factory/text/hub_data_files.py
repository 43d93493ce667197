"""Check the files that a Hub data set's card names: only its own may be read."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import RemoteEntryNotFoundError

from factory.errors import UNTRUSTED, DataError
from factory.hub.client import hub_api
from factory.hub.front_matter import NOT_YAML, front_matter, load

CARDS = ("README.md", ".huggingface.yaml")  # where `datasets` looks for configurations


def check_data_files(repo_id: str, *, revision: str | None) -> None:
    """Refuse a data set whose card points to a URL, a local file or another repository.

    `datasets` would request any URL from this machine, which may be in a network that the card's author
    cannot reach, and read local files.

    Raises:
        DataError: The card names such a file, or cannot be read.
    """
    own = re.compile(
        rf"hf://datasets/{re.escape(repo_id)}[@/]"
        rf"|{re.escape(constants.ENDPOINT)}/datasets/{re.escape(repo_id)}/resolve/"
    )
    for name in CARDS:
        for pattern in _patterns(repo_id, name, revision=revision):
            path = pattern[found.end() :] if (found := own.match(pattern)) else pattern
            if re.search(r"^/|\\|::|://|^\w+:|(^|/)\.\.(/|$)", path):
                raise DataError(
                    f"the card of data set {repo_id!r} names {pattern[:200]!r}, not one of its own files",
                    hint=UNTRUSTED.replace("model", "data set"),
                )


def _patterns(repo_id: str, name: str, *, revision: str | None) -> Iterator[str]:
    """Yield the files and folders of a card's configurations."""
    try:
        path = hub_api().hf_hub_download(repo_id, name, repo_type="dataset", revision=revision)
    except RemoteEntryNotFoundError:
        return
    try:
        text = Path(path).read_bytes().decode("utf-8")  # as `datasets` reads it
        card = _fields(text) if path.endswith(".md") else _settings(text)
    except NOT_YAML as error:
        raise DataError(
            f"{name} of data set {repo_id!r} cannot be read: {(str(error) or repr(error)).splitlines()[0]}",
            hint="use another revision (owner/name@revision) or data set",
        ) from error
    configurations = card.get("configs")
    for one in configurations if isinstance(configurations, list) else ():
        if isinstance(one, dict):
            yield from _texts([one.get("data_files"), one.get("data_dir")])


def _fields(text: str) -> dict[str, Any]:
    fields, unread = front_matter(text)
    if unread:
        raise ValueError(unread)
    return fields


def _settings(text: str) -> dict[str, Any]:
    values = load(text) or {}
    if not isinstance(values, dict):
        raise ValueError(f"it is of type {type(values).__name__}, not a mapping")
    return values


def _texts(value: object) -> Iterator[str]:
    """Yield every text in nested lists and mappings, which YAML aliases may make recursive."""
    left, seen = [value], set[int]()
    while left:
        item = left.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict | list) and id(item) not in seen:
            seen.add(id(item))
            left += item.values() if isinstance(item, dict) else item
