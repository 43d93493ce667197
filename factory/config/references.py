"""Recognise what the user types: aliases, folders, files and Hub names, with the standard library alone."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

from factory.config.choices import STANDARD_LIBRARY
from factory.errors import DataError, UnknownModelError
from factory.resources import RECIPES

DATA_SUFFIXES = (".jsonl", ".jsonl.xz", ".jsonl.gz", ".txt", ".parquet")
DATA_NOTATION = (
    f"a {', '.join(DATA_SUFFIXES)} file, or a Hub data set owner/name[:config][#column][@revision]"
)
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)  # non-ASCII letters could imitate another name
HUB_DATA = re.compile(
    rf"(?P<repo>{HUB_NAME.pattern})(:(?P<config>[^#@]*))?(#(?P<column>[^@]+))?(@(?P<revision>.*))?", re.ASCII
)
NOWHERE = Path("/dev/null/nowhere")  # below a file, so it never exists


def aliases() -> list[str]:
    """Return the names of the known models, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def local_path(reference: str) -> Path:
    """Return a reference as a path; `NOWHERE` for unknown users, as in `~user/x`, and overlong names."""
    try:
        path = Path(reference).expanduser()
        path.exists()
    except (RuntimeError, OSError, ValueError):
        return NOWHERE
    return path


def check_model(reference: str) -> None:
    """Accept an alias, a folder that exists, or `owner/name[@revision]`.

    Raises:
        UnknownModelError: The reference is none of them; the hint suggests the nearest alias.
    """
    if reference in aliases() or local_path(reference).is_dir():
        return
    if not HUB_NAME.fullmatch(reference.partition("@")[0]) or reference.startswith("."):
        raise unknown_model(reference)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that a mistyped one is most like, if any is like it at all."""
    return next(iter(difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)), None)


def unknown_model(reference: str) -> UnknownModelError:
    """Return the error for a reference that is not an alias, a folder or a repository name."""
    near = nearest(reference, aliases())
    hint = f"did you mean {near!r}? " if near else ""
    return UnknownModelError(
        f"{reference[:200]!r} is not a known model, a folder or a Hub repository name",
        hint=f"{hint}known: {', '.join(aliases())}; or give owner/name or ./folder",
    )


def check_data(reference: str, *, several: str = "") -> None:
    """Accept a data file that exists and is not empty, `stdlib:…`, or the name of a Hub data set.

    Args:
        several: Advice on how to give several texts, for a reference that reads like a list.

    Raises:
        DataError: The reference is none of them.
    """
    path = local_path(reference)
    if path.is_file():
        if not path.name.endswith(DATA_SUFFIXES):
            raise DataError(f"data {reference!r} has an unsupported format", hint=f"give {DATA_NOTATION}")
        if path.stat().st_size == 0:
            raise DataError(f"data {reference!r} is empty", hint='a .jsonl has one {"text": …} per line')
        return
    if reference in STANDARD_LIBRARY:
        return
    if path.exists() or reference.endswith(DATA_SUFFIXES) or not HUB_DATA.fullmatch(reference):
        problem = "is a folder" if path.is_dir() else "does not exist"
        hint = several if several and "," in reference else f"give {DATA_NOTATION}"
        raise DataError(f"data {reference[:200]!r} {problem}", hint=hint)
