"""Read from a GGUF's header, which may be hostile, which model on the Hub the file was made from."""

import re
import struct
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"
HEAD_BYTES = 2**16  # general facts come first
# GGUF's numbers of types → how struct reads them.
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_ITEMS = 1_000
# From what it was converted, or else what that derives from.
KEYS = ("general.source.repo_url", "general.source.huggingface.repository", "general.base_model.0.repo_url")
ON_THE_HUB = re.compile(r"(?:https://huggingface\.co/)?(?P<name>\w[\w.-]*/\w[\w.-]*)", re.ASCII)


def is_gguf(path: Path) -> bool:
    """Return whether a file is a GGUF, by its first bytes."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def made_from(path: Path) -> str | None:
    """Return the repository `owner/name` that a GGUF's header names as its origin; None without one."""
    with path.open("rb") as file:
        facts = _facts(file.read(HEAD_BYTES))
    matches = (ON_THE_HUB.fullmatch(str(facts.get(key))) for key in KEYS)
    return next((match["name"] for match in matches if match), None)


def _facts(head: bytes) -> dict[str, Any]:
    """Return the facts at the beginning of a header, as far as these bytes and the format go."""
    found: dict[str, Any] = {}
    try:
        _, _, count = struct.unpack_from("<IQQ", head, len(MAGIC))
        place = len(MAGIC) + struct.calcsize("<IQQ")
        for _ in range(min(count, MAX_ITEMS)):
            key, place = _read(head, place, STRING)
            kind, place = _read(head, place, 4)
            found[str(key)], place = _read(head, place, kind)
    except (struct.error, ValueError, KeyError):
        pass  # the end of what was read, or another format
    return found


def _read(head: bytes, place: int, kind: int) -> tuple[Any, int]:
    """Return a value and where the next one begins.

    Raises:
        ValueError: The value ends after these bytes, or is none of the format.
    """
    if kind == STRING:
        (size,) = struct.unpack_from("<Q", head, place)
        start = place + 8
        if size > len(head) - start:
            raise ValueError(size)
        return head[start : start + size].decode("utf-8"), start + size
    if kind == ARRAY:
        inner, count = struct.unpack_from("<IQ", head, place)
        if inner == ARRAY or count > MAX_ITEMS:
            raise ValueError(count)
        place += struct.calcsize("<IQ")
        for _ in range(count):
            _, place = _read(head, place, inner)
        return None, place
    form = f"<{FORMATS[kind]}"
    return struct.unpack_from(form, head, place)[0], place + struct.calcsize(form)
