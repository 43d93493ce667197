"""Use Python's standard library as text: code to train on, code held out, and the manual's prose."""

import ast
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

from factory.errors import DataError

Part = Literal["train", "held-out", "prose"]
TOPICS = (
    "pydoc_data/topics.py"  # chapters of the reference manual, for `help()`; its folder is not trained on
)
# Single files in every Python from 3.11 to 3.14, without near copies elsewhere in the library.
HELD_OUT = (
    "calendar",
    "cmd",
    "colorsys",
    "configparser",
    "csv",
    "difflib",
    "filecmp",
    "fileinput",
    "fractions",
    "ftplib",
    "getopt",
    "gettext",
    "graphlib",
    "heapq",
    "mailbox",
    "netrc",
    "plistlib",
    "pprint",
    "pstats",
    "queue",
    "reprlib",
    "sched",
    "shelve",
    "statistics",
    "textwrap",
    "timeit",
    "trace",
    "zipapp",
)
# Folders with third-party or generated code.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "pydoc_data", "encodings", "__phello__"}
SKIPPED_FILES = {"html/entities.py", "stringprep.py"}  # generated tables
TEST_FOLDERS = {"test", "tests", "idle_test"}
MAX_BYTES = 400_000  # larger files are generated


def documents(split: Part, *, root: Path | None = None, include_tests: bool = False) -> Iterator[str]:
    """Yield the source files of one split, whole, in the order of their paths.

    Args:
        split: "held-out" is `HELD_OUT`; "prose" the manual's paragraphs without code and grammar, by topic;
            "train" is everything else.
        root: Folder of a standard library; None: that of the running interpreter.
        include_tests: Add the library's own tests to "train", except those of held-out modules. Not every
            interpreter has them, so without them the text is the same on more machines.

    Raises:
        DataError: The interpreter comes without readable source files.
    """
    for _, content in _contents(split, root=root, include_tests=include_tests):
        if split == "prose":
            yield from _prose(content)
            continue
        with suppress(UnicodeDecodeError):  # a few tests use other encodings on purpose
            text = content.decode("utf-8").replace("\r\n", "\n")
            if text.strip():
                yield text


def _prose(module: bytes) -> Iterator[str]:
    """Yield the prose of each topic: paragraphs that are not indented, as code and grammar are."""
    assignments = (
        node.value for node in ast.parse(module).body if isinstance(node, ast.Assign | ast.AnnAssign)
    )
    for topics in (ast.literal_eval(value) for value in assignments if isinstance(value, ast.Dict)):
        for _, topic in sorted(topics.items()):
            paragraphs = [part for part in topic.split("\n\n") if not part.startswith((" ", "\t"))]
            if text := "\n\n".join(paragraphs).strip():
                yield text + "\n"


def fingerprint(split: Part, *, root: Path | None = None) -> str:
    """Return the hex sha256 of the paths and contents of the files that `documents` reads by default.

    Raises:
        DataError: As for `documents`.
    """
    digest = hashlib.sha256()
    for name, content in _contents(split, root=root, include_tests=False):
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def modules(*, root: Path | None = None) -> dict[str, str]:
    """Return the held-out modules by name, in the order of `HELD_OUT`.

    Raises:
        DataError: As for `documents`.
    """
    files = _contents("held-out", root=root, include_tests=False)
    return {name.removesuffix(".py"): content.decode("utf-8") for name, content in files}


def _contents(split: Part, *, root: Path | None, include_tests: bool) -> Iterator[tuple[str, bytes]]:
    """Yield the relative path, with forward slashes, and the bytes of each file, ordered by path."""
    library = root or Path(sysconfig.get_path("stdlib"))
    if split == "prose":
        found = [TOPICS] if (library / TOPICS).is_file() else []
    else:
        found = _held_out(library) if split == "held-out" else sorted(_train(library, include_tests))
    if not found:
        raise DataError(
            f"no source files of the standard library in {library}",
            hint="use an interpreter that comes with them, or another text",
        )
    for name in found:
        yield name, (library / name).read_bytes()


def _held_out(library: Path) -> list[str]:
    return [f"{name}.py" for name in HELD_OUT if (library / f"{name}.py").is_file()]


def _train(library: Path, include_tests: bool) -> Iterator[str]:
    for folder, subfolders, files in os.walk(library):
        inside = Path(folder).relative_to(library)
        skipped = SKIPPED_FOLDERS if include_tests else SKIPPED_FOLDERS | TEST_FOLDERS
        subfolders[:] = [
            name for name in subfolders if name not in skipped and not name.startswith("config-")
        ]
        for file in files:
            name = (inside / file).as_posix()
            if file.endswith(".py") and _is_train(name) and (library / name).stat().st_size <= MAX_BYTES:
                yield name


def _is_train(name: str) -> bool:
    parts = {part.removeprefix("test_") for part in name.removesuffix(".py").split("/")}
    generated = name in SKIPPED_FILES or name.startswith("_sysconfigdata_")
    return parts.isdisjoint(HELD_OUT) and not generated
