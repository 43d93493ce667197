"""Recognise what the user types: aliases, folders, files and Hub names, with the standard library alone."""

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Self

from factory.config.choices import STANDARD_LIBRARY
from factory.errors import DataError, UnknownModelError, UsageError
from factory.resources import RECIPES

DATA_FORMATS = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".md")
COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst")
DATA_NOTATION = (
    f"a {', '.join(DATA_FORMATS[:-1])} or {DATA_FORMATS[-1]} file, also with {', '.join(COMPRESSIONS)}, a "
    "folder or pattern of files, or a Hub data set owner/name:config[split]#column@revision (all after the "
    "name is optional)"
)
DEFAULT_COLUMN = "text"
CONTENTS = {
    ".json": 'a .jsonl has one {"text": …} per line, a .json an array of them',
    ".csv": "a .csv has a header, which names the columns, and rows",
    ".parquet": "write one row for each document",
}
TEXTS = "a .txt or .md holds the text itself"
FROM_OTHER_FORMATS = {
    ".tsv": "save it as a .csv, with commas between the cells",
    ".zip": "unpack it, and give the folder",
    ".tar": "unpack it, and give the folder",
    ".pdf": "save its text as a .txt",
    ".docx": "save its text as a .txt",
}
WILD = frozenset("*?")  # what marks a pattern in a reference: a Hub data set may have [split]
GLOB = WILD | {"["}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)  # non-ASCII letters could imitate another name
HUB_DATA = re.compile(
    rf"(?P<repo>{HUB_NAME.pattern})(:(?P<config>[^#@\[]*))?(\[(?P<split>[\w.-]+)\])?"
    r"(#(?P<column>[^@]+))?(@(?P<revision>.*))?",
    re.ASCII,
)
OF_THE_HUB = re.compile(r"[:\[@]")  # what begins a configuration, split or revision
EMBEDDED = "demo"  # the only alias that is not a repository
NUMBER = re.compile(r"\s*[-+]?(\d+(\.\d*)?|\.\d+|inf|nan)\s*", re.IGNORECASE)
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


@dataclass(frozen=True)
class ModelReference:
    """A recognised reference to a model: its alias, its path, or its repository is set."""

    text: str
    alias: str | None = None
    path: Path | None = None  # a folder, or a file, which is refused where it is read
    repo_id: str | None = None
    revision: str | None = None

    @classmethod
    def read(cls, text: str) -> Self:
        """Recognise an alias, a folder or file that exists, or `owner/name[@revision]`.

        Raises:
            UnknownModelError: The text is none of them; the hint suggests the nearest alias.
        """
        if text in aliases():
            return cls(text, alias=text)
        if (path := local_path(text)).exists():
            return cls(text, path=path)
        repo_id, _, revision = text.partition("@")
        if not HUB_NAME.fullmatch(repo_id) or text.startswith("."):
            raise unknown_model(text)
        return cls(text, repo_id=repo_id, revision=revision or None)


def build_folder(folder: Path) -> Path:
    """Return a build folder, or refuse any other folder."""
    if not (folder / "build.json").is_file() or not (folder / "model").is_dir():
        raise UsageError(f"{str(folder)!r} is not a build folder", hint="give one that `factory build` made")
    return folder


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


def data_format(name: str) -> str:
    """Return the format of a file with its compression, in lower case: ".jsonl.gz"; empty if unknown."""
    name = name.lower()
    compression = next((each for each in COMPRESSIONS if name.endswith(each)), "")
    plain = name.removesuffix(compression)
    kind = next((each for each in DATA_FORMATS if plain.endswith(each)), "")
    return kind + compression if kind and not (kind == ".parquet" and compression) else ""


def local_data(reference: str) -> tuple[Path, str | None] | None:
    """Return the path or pattern of local data, and the column; None for anything else."""
    path, separator, column = reference.rpartition("#")
    if local_path(reference).exists() or not separator:
        path, column = reference, ""
    elif not (path and column):
        return None
    if local_path(path).exists() or WILD & set(path):
        return local_path(path), column or None
    return None


@dataclass(frozen=True)
class LocalFiles:
    """What a local name stands for: one path, or the files below a folder that match a pattern."""

    paths: tuple[Path, ...]
    root: Path  # the path itself, or the folder that the pattern searches
    pattern: str = ""

    @classmethod
    def find(cls, text: str) -> Self | None:
        """Return the path, or the files that match the pattern; None if there is nothing."""
        if (path := local_path(text)).exists():
            return cls((path,), path)
        parts = path.parts
        wild = next((index for index, part in enumerate(parts) if GLOB & set(part)), len(parts))
        root, pattern = Path(*parts[:wild]), "/".join(parts[wild:])
        if not pattern or not root.is_dir():
            return None
        # Unlike Path.glob, this skips hidden files.
        found = (root / name for name in glob(pattern, root_dir=root, recursive=True))  # noqa: PTH207
        paths = tuple(sorted(file for file in found if file.is_file()))
        return cls(paths, root, pattern) if paths else None


def data_files(path: Path) -> list[Path]:
    """Return the file, the data files anywhere in a folder, or the files that match a pattern; sorted."""
    if path.is_file():
        return [path]
    if path.is_dir():
        found = (file for file in path.rglob("*") if data_format(file.name) and file.is_file())
        return sorted(file for file in found if not _is_hidden(file.relative_to(path)))
    matches = glob(str(path), recursive=True)  # noqa: PTH207  # Path.glob takes no absolute pattern
    return sorted(file for name in matches if (file := Path(name)).is_file())


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def check_files(path: Path, files: Sequence[Path]) -> None:
    """Refuse local data without files, of unknown formats, or without content.

    Raises:
        DataError: The message names the path or the file.
    """
    if not files:
        problem = "is a folder without data files" if path.is_dir() else "matches no file"
        raise DataError(f"data {str(path)!r} {problem}", hint=f"give {DATA_NOTATION}")
    for file in files:
        if not data_format(file.name):
            hint = FROM_OTHER_FORMATS.get(file.suffix.lower(), f"give {DATA_NOTATION}")
            raise DataError(f"data {str(file)!r} has an unsupported format", hint=hint)
    if not any(file.stat().st_size for file in files):
        raise DataError(f"data {str(path)!r} is empty", hint=contents_of(files[0]))


def contents_of(file: Path) -> str:
    """Return a hint that says what a data file of this format holds."""
    kind = data_format(file.name)
    return next((hint for start, hint in CONTENTS.items() if kind.startswith(start)), TEXTS)


def share_of(reference: str) -> tuple[str, float]:
    """Return a reference to a text without its share of a mix, and the share: "a.jsonl*2" → ("a.jsonl", 2).

    Raises:
        DataError: The share is not a positive number.
    """
    data, star, written = reference.rpartition("*")
    if not (star and data) or local_path(reference).exists():
        return reference, 1.0
    if NUMBER.fullmatch(written):
        share = float(written)
    elif not written or not _has_share(reference, data) or data_files(local_path(reference)):
        return reference, 1.0  # a pattern of files
    else:
        share = math.nan
    if not 0 < share < math.inf:
        raise DataError(
            f"data {reference[:200]!r}: the share {written[:60]!r} is not a positive number",
            hint="`heal_data=a.jsonl*2` with `heal_data=b.jsonl` takes two parts of a and one of b: give it "
            "once for each text",
        )
    return data, share


def _has_share(reference: str, data: str) -> bool:
    """Return whether what is before the last star looks like a text, and not like a pattern's beginning."""
    if data_format(data.rpartition("#")[0] or data) or data in STANDARD_LIBRARY:
        return True
    return bool(HUB_DATA.fullmatch(data)) and not data_format(reference)


def with_share(data: str, share: float) -> str:
    """Return a reference as `share_of` reads it."""
    return data if share == 1 else f"{data}*{share:g}"


def check_data(reference: str, *, several: str = "") -> None:
    """Accept local data that exists and is not empty, `stdlib:…`, or the name of a Hub data set.

    Args:
        several: Advice on how to give several texts, for a reference that reads like a list.

    Raises:
        DataError: The reference is none of them.
    """
    if local := local_data(reference):
        path, _ = local
        check_files(path, data_files(path))
        return
    if reference in STANDARD_LIBRARY:
        return
    file = OF_THE_HUB.split(reference)[0]
    if file != reference and local_path(file).is_file():
        raise DataError(
            f"data {reference[:200]!r}: a local file has no configuration, split or revision",
            hint=f"give {file} or {file}#column",
        )
    if (
        data_format(reference)
        or data_format(reference.rpartition("#")[0])
        or not HUB_DATA.fullmatch(reference)
    ):
        hint = several if several and "," in reference else _near(reference) or f"give {DATA_NOTATION}"
        raise DataError(f"data {reference[:200]!r} does not exist", hint=hint)


def _near(reference: str) -> str:
    """Return a hint at the file that a missing one is most like, or at its folder; empty without either."""
    name = reference.rpartition("#")[0] or reference
    path = local_path(name)
    if not ({"#", "/"} & {*reference} or path.suffix):
        return "give the path of a file or folder, or a data set on the Hub with its owner: owner/name"
    if not (data_format(name) if "/" in name else path.suffix):  # rather a data set
        return ""
    if not path.parent.is_dir():
        return f"there is no folder {str(path.parent)[:200]!r}"
    # Unlike Path.glob, this skips hidden files, and folders that cannot be read.
    found = sorted(glob("*", root_dir=path.parent))  # noqa: PTH207
    stems = {each.partition(".")[0].lower(): path.parent / each for each in found}
    near = difflib.get_close_matches(path.name.partition(".")[0].lower(), stems, n=1, cutoff=0.7)
    return f"did you mean {str(stems[near[0]])!r}?" if near else ""
