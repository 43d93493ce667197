"""Read a source's own card: its licences, languages and base models."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from factory.artifacts import Build, Source, check_size
from factory.config.references import HUB_NAME
from factory.errors import LicenseError
from factory.hub.front_matter import front_matter

# Identifiers: https://huggingface.co/docs/hub/repositories-licenses. In Creative Commons' names `nd` is
# "no derivatives" (they may be made, but not shared) and `nc` is "no commercial use"; its links end
# on by-nc-nd/4.0.
NO_DERIVATIVES = re.compile(r"(?<![a-z])by(-nc|-sa)*-nd(?![a-z])|(?<![a-z])no-?deriv")
NOT_COMMERCIAL = re.compile(r"(?<![a-z])by(-nd|-sa)*-nc(?![a-z])|(?<![a-z])non-?commercial")
RESEARCH_ONLY = {"apple-amlr", "intel-research"}
UNNAMED = {"", "unknown", "none"}
OWN_TERMS = "other"
README = "README.md"
SNAPSHOT = re.compile(r"models--.+--(?P<name>[^/]+)/snapshots/[0-9a-f]{40}")  # in the Hub's cache
CHECKPOINT = re.compile(r"checkpoint-\d+")  # of a trainer
BUILD_NAME = re.compile(r"\w[\w. +-]{0,199}")
MAX_CHARACTERS = 500  # of one text
MAX_LANGUAGES = 10_000
MAX_TEXTS = 100  # of one field
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _spelled(text: str) -> str:
    """Return a licence as the Hub spells it, with hyphens between words and dots only in versions."""
    words = re.sub(r"([^\w.]|_|\.(?!\d)|(?<!\d)\.)+", "-", text.lower()).strip("-")
    return re.sub(r"cc-?by((?:-?(?:nc|nd|sa))*)", _apart, words)


def _apart(found: re.Match[str]) -> str:
    """Put a hyphen before each term of Creative Commons: "ccbyncnd" → "cc-by-nc-nd"."""
    return "cc-by" + "".join(f"-{term}" for term in re.findall("nc|nd|sa", found[1]))


def _named(source: Source) -> list[str]:
    """Return the licences that the card names."""
    return [name for name in map(_spelled, source.licenses) if name not in UNNAMED]


def _all_terms(source: Source) -> Iterator[str]:
    """Yield the licences, and the name and link of one that the Hub has no identifier for."""
    yield from _named(source)
    if source.license_name:
        yield _spelled(source.license_name)
    if source.license_link and "creativecommons.org/" in source.license_link:
        yield source.license_link.lower()


def _forbidding(source: Source) -> str | None:
    return next((terms for terms in _all_terms(source) if NO_DERIVATIVES.search(terms)), None)


def forbids_sharing(source: Source) -> bool:
    """Return whether one of the licences forbids sharing derived models."""
    return _forbidding(source) is not None


def remark(source: Source) -> str | None:
    """Return one line to know before publishing a derived model; None if there is nothing."""
    named, name = _named(source), source.repo_id or source.name
    forbidding = _forbidding(source)
    if forbidding:
        return f"the licence of {name}, {forbidding}, forbids sharing derived models"
    own_terms = " ".join(filter(None, (source.license_name, source.license_link)))
    if not named and not own_terms:
        return f"{name} names no licence, so nothing permits publishing derived models; ask its owner"
    limits = [t for t in _all_terms(source) if t in RESEARCH_ONLY or NOT_COMMERCIAL.search(t)]
    if limits:
        return f"the licence of {name}, {limits[0]}, allows no commercial use, not even of derived models"
    if OWN_TERMS in named or not named:
        terms = own_terms or "not named on its card"
        return f"{name} has its own terms ({terms}), which also apply to derived models: read them first"
    return None


def check_license(source: Source, *, accepted: bool) -> None:
    """Refuse to publish a derived model if a licence of the source forbids it.

    Args:
        accepted: Whether the user says that they have permission.

    Raises:
        LicenseError: A licence allows no derivatives.
    """
    if forbids_sharing(source) and not accepted:
        raise LicenseError(
            f"{remark(source)}", hint="if its owner permits it, add `accept_license` to publish"
        )


def read_card(folder: Path) -> dict[str, Any]:
    """Return the front matter of a folder's README.md; empty if it is missing or cannot be read."""
    return _front_matter(folder)[0]


def unread_card(folder: Path) -> str | None:
    """Return one line on why a folder's README.md cannot be read; None if it can, or has no front matter."""
    return _front_matter(folder)[1]


def _front_matter(folder: Path) -> tuple[dict[str, Any], str | None]:
    path = folder / README
    return front_matter(_text(path.read_bytes())) if path.is_file() else ({}, None)


def _text(content: bytes) -> str:
    """Decode a text by its byte order mark, as UTF-8, or else as Latin-1, which accepts every byte."""
    try:
        text = content.decode("utf-16" if content.startswith(UTF_16) else "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def short_text(value: object) -> str | None:
    """Return a value as a text of bounded length; None if it is not a text or number, or not encodable."""
    if not isinstance(value, str | int | float):
        return None
    try:
        text = str(value)[:MAX_CHARACTERS]
        text.encode("utf-8")
    except ValueError:  # thousands of digits, or a lone surrogate
        return None
    return text


def texts_of(value: object) -> tuple[str, ...]:
    """Return the distinct texts in a field at any depth; of a mapping with a name, only the name."""
    found: dict[str, None] = {}
    left: list[object] = [value]
    seen: set[int] = set()
    while left and len(found) < MAX_TEXTS:
        part = left.pop()
        if isinstance(part, list | dict) and id(part) not in seen:  # YAML aliases can be recursive
            seen.add(id(part))
            inner = part.values() if isinstance(part, dict) else part
            left += [part["name"]] if isinstance(part, dict) and "name" in part else reversed(list(inner))
        text = None if isinstance(part, bool) else short_text(part)
        if text and text.strip():
            found[text.strip()] = None
    return tuple(found)


def licenses_of(value: object) -> str | tuple[str, ...] | None:
    """Return a card's licence: one, several, or None."""
    texts = texts_of(value)
    return texts if len(texts) > 1 else next(iter(texts), None)


def languages_of(value: object) -> tuple[str, ...]:
    """Return the language codes in a field; YAML reads Norwegian's, "no", as false."""
    values = value if isinstance(value, list) else [value]
    texts = ["no" if value is False else value for value in values[:MAX_LANGUAGES]]
    return tuple(text for text in texts if isinstance(text, str) and text == short_text(text))


def base_models_of(value: object) -> tuple[str, ...]:
    """Return the Hub repositories in a field, which may also hold paths on its author's machine."""
    return tuple(text for text in texts_of(value) if HUB_NAME.fullmatch(text) and text[0] != ".")


def folder_name(folder: Path) -> str:
    """Return the name of the model in a folder: the folder's, or its parent's if that says more."""
    place = folder.resolve()
    snapshot = SNAPSHOT.fullmatch("/".join(place.parts[-3:]))
    if snapshot:
        name = snapshot["name"]
    elif CHECKPOINT.fullmatch(place.name):
        name = f"{place.parent.name}-{place.name}"
    else:
        name = (_build_in(place) if place.name == "model" else None) or place.name
    return "".join(letter for letter in name if letter.isprintable()) or "model"


def _build_in(folder: Path) -> str | None:
    """Return the name of the build whose model a folder holds; another version may have written it."""
    path = folder / Build.file_name
    try:
        check_size(path.stat().st_size)
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    name = value.get("name") if isinstance(value, dict) and "factory_version" in value else None
    return name if isinstance(name, str) and BUILD_NAME.fullmatch(name) else None
