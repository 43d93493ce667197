"""The front matter of a source's card: what it says of licence and languages, as short texts."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load

from factory.errors import ModelError

README = "README.md"
MOST_LETTERS = 500  # of one text
MOST_LANGUAGES = 10_000
MOST_TEXTS = 100  # of one field


def read_card(folder: Path) -> dict[str, Any]:
    """Front matter of a folder's README.md; nothing where there is none."""
    try:
        return (metadata_load(folder / README) if (folder / README).is_file() else None) or {}
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{folder / README}: {str(error).partition(chr(10))[0]}", hint="mend its front matter"
        ) from error


def short_text(value: object) -> str | None:
    """A short text; anything else may be as large as it likes once it is written out."""
    return str(value)[:MOST_LETTERS] if isinstance(value, str | int | float) else None


def texts_of(value: object) -> tuple[str, ...]:
    """The short texts in a field, each once: in a list or a mapping, however deep."""
    found: dict[str, None] = {}
    left: list[object] = [value]
    seen: set[int] = set()
    while left and len(found) < MOST_TEXTS:
        part = left.pop()
        if isinstance(part, list | dict) and id(part) not in seen:  # YAML's aliases can name themselves
            seen.add(id(part))
            left += reversed(list(part.values() if isinstance(part, dict) else part))
        text = None if isinstance(part, bool) else short_text(part)
        if text and text.strip():
            found[text.strip()] = None
    return tuple(found)


def licenses_of(value: object) -> str | tuple[str, ...] | None:
    """What a card has as licence: one, several, or none."""
    texts = texts_of(value)
    return texts if len(texts) > 1 else next(iter(texts), None)


def languages_of(value: object) -> tuple[str, ...]:
    """The short texts in a field; YAML reads the code of Norwegian as false."""
    values = value if isinstance(value, list) else [value]
    texts = ["no" if value is False else value for value in values[:MOST_LANGUAGES]]
    return tuple(text for text in texts if isinstance(text, str) and len(text) <= MOST_LETTERS)
