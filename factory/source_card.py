"""The front matter of a source's card: what it says of licence and languages, as short texts."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load

from factory.errors import ModelError

README = "README.md"
MOST_LETTERS = 500  # of one text
MOST_LANGUAGES = 10_000


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


def one_license(value: object) -> str | None:
    """One licence; a list of one, an old notation, is it too."""
    only = value[0] if isinstance(value, list) and len(value) == 1 else value
    return only if isinstance(only, str) else None


def languages_of(value: object) -> tuple[str, ...]:
    """The short texts in a field; YAML reads the code of Norwegian as false."""
    values = value if isinstance(value, list) else [value]
    texts = ["no" if value is False else value for value in values[:MOST_LANGUAGES]]
    return tuple(text for text in texts if isinstance(text, str) and len(text) <= MOST_LETTERS)
