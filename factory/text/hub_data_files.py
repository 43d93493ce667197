"""The files that a Hub data set's card names: none but its own are read."""

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
    """Refuse a data set whose card leads to an address, a file of this machine or another repository.

    `datasets` would ask any address in the name of this machine, which may stand in a network that the
    card's author cannot reach, and read local files.

    Raises:
        DataError: It does, or it cannot be read.
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
                    f"the card of data set {repo_id!r} names {pattern[:200]!r}, which is no file of its own",
                    hint=UNTRUSTED.replace("model", "data set"),
                )


def _patterns(repo_id: str, name: str, *, revision: str | None) -> Iterator[str]:
    """Whatever one of the cards gives as files or folders of its configurations."""
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
            hint="take another revision (owner/name@revision) or another data set",
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
        raise ValueError(f"it is of type {type(values).__name__}, no names with values")
    return values


def _texts(value: object) -> Iterator[str]:
    """Every text in lists and names with values, each of which an alias may hold again, also in itself."""
    left, seen = [value], set[int]()
    while left:
        item = left.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict | list) and id(item) not in seen:
            seen.add(id(item))
            left += item.values() if isinstance(item, dict) else item
