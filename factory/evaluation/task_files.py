"""Inspect lm-eval task files without running them: what they name, and which Python they would run."""

import os.path
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from factory.config.references import LocalFiles
from factory.errors import UsageError
from factory.hub.front_matter import NOT_YAML, BoundedLoader

TASK_SUFFIXES = (".yaml", ".yml")
OF_THE_LIBRARIES = ("lm_eval", "factory")  # packages whose Python runs anyway
TASK_LINE = "an lm-eval YAML has a line `task: NAME`"


def is_task_file(task: str) -> bool:
    """Return whether a task is given as a file, not by name."""
    return Path(task).suffix in TASK_SUFFIXES


class _Function(str):
    """The value after `!function`: a module and a name in it."""

    __slots__ = ()


class _Lenient(BoundedLoader):
    """YAML loader for lm-eval's files that keeps their tags (`!function`) as text."""


def _any_tag(_loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> str:
    return _Function(node.value) if tag == "function" else str(node.value)


_Lenient.add_multi_constructor("!", _any_tag)


# Errors of reading such a file: PyYAML takes `2020-99-99` for a date, `!!bool x` for a key, and so on.
UNREADABLE = (*NOT_YAML, OSError)


@dataclass(frozen=True)
class _Definition:
    """A YAML file with the files it includes, each before the one that overrides it."""

    path: Path
    chain: tuple[tuple[Path, dict[str, Any]], ...]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Keys of the file, merged over those of its includes."""
        merged: dict[str, Any] = {}
        for _, value in self.chain:
            merged |= value
        return merged

    @property
    def name(self) -> str | None:
        """Name of the task or group that the file defines."""
        keys = ("task",) if "class" in self.settings else ("group", "task")
        names = [self.settings.get(key) for key in keys]
        return next((name for name in names if isinstance(name, str) and name), None)

    @property
    def tags(self) -> list[Any]:
        tags = self.settings.get("tag")
        return tags if isinstance(tags, list) else [tags]

    @property
    def members(self) -> dict[str, bool]:
        """Tasks, groups and tags that a group names → whether it only names them."""
        is_group = "group" in self.settings and "class" not in self.settings
        return dict(_members(self.settings.get("task"))) if is_group else {}


def _members(listed: Any) -> Iterator[tuple[str, bool]]:
    for item in listed if isinstance(listed, list) else []:
        if isinstance(item, str):
            yield item, True
        elif isinstance(item, dict):
            name = item.get("group", item.get("task"))
            if isinstance(name, str):
                yield name, False
            if "group" in item:
                yield from _members(item.get("task"))


@dataclass(frozen=True)
class TaskFile:
    """A task file and everything that it names."""

    name: str  # of the task or group
    definitions: tuple[Path, ...]  # the file, and for a group those of its members
    parts: tuple[Path, ...]  # definitions, their includes, and the Python files that they name
    data: Mapping[Path, Mapping[str, LocalFiles]]  # definition or include → name in it → local questions
    code: tuple[str, ...]  # Python that they run: "doc_to_text: words.shown (mine/words.py)"
    missing: tuple[str, ...]  # members of a group that no file in its folder defines


def task_files(tasks: Iterable[str]) -> dict[str, TaskFile]:
    """Read the task files among tasks; see `read_task_file`."""
    return {task: read_task_file(Path(task)) for task in tasks if is_task_file(task)}


def read_task_file(path: Path) -> TaskFile:
    """Read an lm-eval YAML file without running any of it.

    Members of a group are looked up by name in the YAML files of its folder, as lm-eval does.

    Raises:
        UsageError: The file is missing, is not YAML or names no task, or two files define one member.
    """
    definition = _defined(path)
    if definition.name is None:
        raise UsageError(f"task file {str(path)!r} names no task", hint=TASK_LINE)
    definitions, missing = _with_members(definition)
    chains = {part: value for one in definitions for part, value in one.chain}
    functions = list(
        dict.fromkeys(
            (key, *_located(function, part))
            for part, value in chains.items()
            for key, function in _functions(value)
        )
    )
    python = [where for _, _, where in functions if isinstance(where, Path)]
    foreign = [f"{key}: {name} ({where})" for key, name, where in functions if not _of_a_library(where)]
    return TaskFile(
        definition.name,
        tuple(one.path for one in definitions),
        tuple(dict.fromkeys([*chains, *python])),
        {part: found for part, value in chains.items() if (found := _data(value))},
        tuple(
            dict.fromkeys(
                [*foreign, *(metric for one in definitions for metric in _fetched_metrics(one.settings))]
            )
        ),
        tuple(missing),
    )


def _defined(path: Path) -> _Definition:
    return _Definition(path, tuple(_chain(path, (), by="")))


def _chain(path: Path, seen: tuple[Path, ...], *, by: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the files that one includes, then the file itself; cycles, which lm-eval refuses, are cut."""
    if not os.path.isfile(path):  # noqa: PTH113  # unlike Path.is_file, takes any name
        raise UsageError(
            f"task file {by}{str(path)[:200]!r} does not exist", hint="pass a task name or a YAML file"
        )
    try:
        value: Any = yaml.load(path.read_text(encoding="utf-8"), Loader=_Lenient)
    except UNREADABLE as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"task file {by}{str(path)!r} is not YAML: {reason}", hint="fix it") from error
    value = value if isinstance(value, dict) else {}
    named = value.get("include", [])
    for name in named if isinstance(named, list) else [named]:
        included = path.parent / str(name)
        if included not in (*seen, path):
            yield from _chain(included, (*seen, path), by=f"{str(path)!r} includes ")
    yield path, value


def _with_members(definition: _Definition) -> tuple[list[_Definition], list[str]]:
    """Return a definition with those of all members of its groups, and the names that no file defines."""
    if not definition.members:
        return [definition], []
    beside = [one for one in _beside(definition.path) if one.name]
    found, missing, wanted = [definition], [], dict(definition.members)
    done = {definition.name}
    while wanted:
        name, bare = wanted.popitem()
        if name in done:
            continue
        done.add(name)
        named = [one for one in beside if one.name == name]
        if len(named) > 1:
            paths = " and ".join(repr(str(one.path)) for one in named[:2])
            raise UsageError(
                f"{name!r}, of the group {definition.name!r}, is defined by both {paths}",
                hint="keep one of them in that folder",
            )
        named = named or [one for one in beside if name in one.tags]
        for one in named:
            found.append(one)
            wanted |= one.members
        if not named and bare:
            missing.append(name)
    return list({one.path: one for one in found}.values()), sorted(missing)


def _beside(path: Path) -> Iterator[_Definition]:
    """Yield the definitions in the other YAML files of a folder, skipping unreadable ones."""
    for other in sorted(path.parent.rglob("*")):
        if other.suffix in TASK_SUFFIXES and other.is_file() and other != path:
            try:
                yield _defined(other)
            except UsageError:
                continue


def _functions(value: dict[str, Any]) -> Iterator[tuple[str, _Function]]:
    """Yield each `!function` of a file, with the last key above it."""
    for key, part in _leaves(value):
        if isinstance(part, _Function):
            yield key, part


def _located(function: _Function, part: Path) -> tuple[str, Path | str]:
    """Return a function, and the file, or else the module, that lm-eval takes it from."""
    module = function.rpartition(".")[0]
    beside = part.parent / f"{module.replace('.', '/')}.py"
    return str(function), beside if beside.is_file() else f"module {module}"


def _of_a_library(where: Path | str) -> bool:
    if isinstance(where, str):
        return where.removeprefix("module ").split(".")[0] in OF_THE_LIBRARIES
    specs = [find_spec(library) for library in OF_THE_LIBRARIES]
    folders = [folder for spec in specs if spec for folder in spec.submodule_search_locations or ()]
    return any(where.resolve().is_relative_to(Path(folder).resolve()) for folder in folders)


def _fetched_metrics(settings: dict[str, Any]) -> Iterator[str]:
    """Yield metrics that lm-eval lacks, for which the library `evaluate` downloads and runs a program."""
    listed = settings.get("metric_list")
    if settings.get("process_results") is not None or not isinstance(listed, list):
        return
    from lm_eval.api import metrics  # noqa: F401  fills the registry
    from lm_eval.api.registry import metric_registry

    for entry in listed:
        name = entry.get("metric") if isinstance(entry, dict) else None
        if not isinstance(name, str) or isinstance(name, _Function):
            continue
        if entry.get("hf_evaluate") is True or name not in metric_registry:
            yield f"metric: {name} (fetched by the library evaluate)"


def _data(value: Mapping[str, Any]) -> dict[str, LocalFiles]:
    """Return the local paths and patterns from which an lm-eval file takes questions, by their text in it."""
    options = value.get("dataset_kwargs")
    named = [options.get(key) for key in ("data_files", "data_dir")] if isinstance(options, dict) else []
    if "/" in str(value.get("dataset_path", "")):  # without a slash it is a format: json
        named.append(value["dataset_path"])
    if ".yaml:" in str(value.get("use_prompt", "")):
        named.append(str(value["use_prompt"]).rpartition(":")[0])
    texts = (text for _, text in _leaves(named) if isinstance(text, str))
    return {text: found for text in texts if (found := LocalFiles.find(text))}


def _leaves(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield values other than lists and mappings with the last key above them; safe for cycles."""
    left, seen = [("", value)], set()
    while left:
        name, part = left.pop(0)
        if not isinstance(part, dict | list):
            yield name, part
        elif id(part) not in seen:
            seen.add(id(part))
            inside = part.items() if isinstance(part, dict) else ((name, item) for item in part)
            left += [(str(inner), item) for inner, item in inside]
