"""Build files: the options of `factory build` in YAML, with errors that name file and line."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from factory.config.options import Reads, problem_of, shortened
from factory.config.references import nearest
from factory.config.request import BuildRequest, Origin
from factory.errors import UsageError

UNSET: Any = None  # a key that the file lacks; `null` is not a value of any option
MAX_BYTES = 1_000_000
MAX_LENGTH = 4096  # characters of a value: the limit of a path, and short enough for Python's int()
REPLACES = {"layers": ("drop", "criterion"), "drop": ("layers",), "criterion": ("layers",)}
Path_ = tuple[str | int, ...]


def _in_file(kind: Any) -> Any:
    """Return the type that a file may hold for an option; the request parses the value later."""
    return next((note.written for note in get_args(kind) if isinstance(note, Reads)), kind)


BuildOptions: type[BaseModel] = create_model(  # type: ignore[call-overload]
    "BuildOptions",
    __config__=ConfigDict(
        strict=True, frozen=True, extra="forbid", alias_generator=lambda name: name.replace("_", "-")
    ),
    __doc__="Options of `factory build`, by the names of the flags.",
    **{
        name: (_in_file(kind), Field(default=UNSET, description=f"{option.help}."))
        for name, (kind, option) in BuildRequest.options().items()
        if not option.of_run
    },
)


class BuildFile(BuildOptions):  # type: ignore[misc,valid-type]
    """One build or several; options beside `builds` apply to each of them."""

    builds: list[BuildOptions] = Field(default=UNSET, min_length=1)  # type: ignore[valid-type]


def replacing(values: Mapping[str, Any], by: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` without those that `by` overrides, directly or by an option that excludes them."""
    gone = {*by, *(other for key in by for other in REPLACES.get(key, ()))}
    return {key: value for key, value in values.items() if key not in gone}


def read(path: Path) -> list[tuple[dict[str, Any], Origin]]:
    """Read the builds of a file: the options of each, checked, and the lines they are on.

    Raises:
        UsageError: The file is not valid; the message names file, line and key of the first error.
    """
    name = str(path)
    value, lines = _parsed(path)
    try:
        found: Any = BuildFile.model_validate(value)
    except ValidationError as error:
        raise _explained(error, name, lines) from None
    common = _written(found)
    builds = []
    for index, build in enumerate(found.builds or [BuildOptions()]):
        own, place = _written(build), ("builds", index)
        values = replacing(common, own) | own
        at = {
            key: lines.get((*place, dashed)) or lines[dashed,]
            for key in values
            for dashed in [key.replace("_", "-")]
        }
        builds.append((values, Origin(name, lines.get(place, lines[()]), at)))
        if "model" not in values:
            raise UsageError(
                f"{name}, line {builds[-1][1].line}: model is missing",
                hint="model: mistral-7b, an owner/name, or a folder",
            )
    return builds


def schema() -> dict[str, Any]:
    """Return the JSON schema of build files."""
    made: dict[str, Any] = BuildFile.model_json_schema(mode="validation")
    made["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    for part in (made, made["$defs"]["BuildOptions"]):
        for field in part["properties"].values():
            del field["title"], field["default"]
    return made


def _written(options: BaseModel) -> dict[str, Any]:
    """Return the options that a file sets, by name."""
    return {name: getattr(options, name) for name in options.model_fields_set if name != "builds"}


def _parsed(path: Path) -> tuple[Any, dict[Path_, int]]:
    """Return the value of a YAML file, and the line of every key and list entry in it."""
    name = str(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{name} is larger than 1 MB", hint="a build file holds options, not data")
        content = path.read_bytes()
        node = yaml.compose(content.decode("utf-8"), Loader=_Loader)
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror}", hint="give an existing file") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{name}, line {line}: not UTF-8", hint="save it as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UsageError(f"{name}, line {line}: {error.problem or error.context}", hint=YAML_HINT) from error
    except yaml.reader.ReaderError as error:
        line = content.decode("utf-8").count("\n", 0, error.position) + 1
        raise UsageError(f"{name}, line {line}: invalid character", hint=YAML_HINT) from error
    except RecursionError as error:
        raise UsageError(f"{name}, line 1: nested too deeply", hint=YAML_HINT) from error
    lines: dict[Path_, int] = {(): 1}
    return _value(node, (), lines, name) if node else {}, lines


YAML_HINT = "write one `key: value` per line, as in: drop: 0.3"


class _Loader(yaml.SafeLoader):
    """A YAML loader with the scalars of version 1.2 (`on` is a string, 3e-4 a number), no aliases or tags."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  as its base declares it

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or (getattr(event, "tag", None) not in (None, "!")):
            raise yaml.MarkedYAMLError(
                problem="aliases and tags are not supported", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)


for _tag, _pattern in (
    ("bool", r"true|True|TRUE|false|False|FALSE"),
    ("int", r"[-+]?[0-9]+"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
    ("null", r"~|null|Null|NULL|"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), None)


def _value(node: yaml.Node, place: Path_, lines: dict[Path_, int], name: str) -> Any:
    """Return the value of a node, and record the lines of its parts in `lines`."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[*place, index] = item.start_mark.line + 1
        return [_value(item, (*place, index), lines, name) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        found = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise UsageError(f"{name}, line {line}: a key must be a single word", hint=YAML_HINT)
            key = _text(key_node, name)
            if key in found:
                before = lines[*place, key]
                raise UsageError(
                    f"{name}, line {line}: duplicate key {key!r}, first in line {before}",
                    hint="remove one of them",
                )
            lines[*place, key] = line
            found[key] = _value(value_node, (*place, key), lines, name)
        return found
    return _scalar(node, name)


def _text(node: yaml.Node, name: str) -> str:
    """Return the text of a scalar; quotation marks allow what no path, name or number can hold."""
    text: str = node.value
    line = node.start_mark.line + 1
    if not text.isprintable():
        raise UsageError(f"{name}, line {line}: {ascii(text)[:60]} is not plain text", hint=YAML_HINT)
    if len(text) > MAX_LENGTH:
        message = f"{name}, line {line}: {text[:40]}… has {len(text):,} characters"
        raise UsageError(message, hint=f"no option takes more than {MAX_LENGTH:,}")
    return text


def _scalar(node: yaml.Node, name: str) -> str | float | bool | None:
    text = _text(node, name)
    match node.tag.rsplit(":", 1)[-1]:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text)
        case "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _explained(error: ValidationError, name: str, lines: Mapping[Path_, int]) -> UsageError:
    """Return an error for the first problem in the file, with its line, key and value."""
    placed = [(_place(problem["loc"], lines), problem) for problem in error.errors()]
    place, problem = min(placed, key=lambda pair: lines[pair[0]])
    where = f"{name}, line {lines[place]}"
    key = next((str(part) for part in reversed(place) if isinstance(part, str)), "the file")
    if problem["type"] == "extra_forbidden":
        known = [str(field.alias) for field in BuildOptions.model_fields.values()]
        near = nearest(key.replace("_", "-"), [*known, "builds"])
        hint = f"did you mean {near!r}? " if near else ""
        return UsageError(f"{where}: unknown key {key!r}", hint=f"{hint}known: {', '.join(known)}, builds")
    if problem["type"] == "model_type":
        return UsageError(
            f"{where}: {key} is {shortened(problem['input'])}, not a list of options", hint=YAML_HINT
        )
    hint = "`factory build --help` explains each option"
    return UsageError(f"{where}: {key}: {problem_of(problem)}", hint=hint)


def _place(loc: Path_, lines: Mapping[Path_, int]) -> Path_:
    """Return the longest prefix of an error's location that is in the file."""
    return next(loc[:n] for n in range(len(loc), -1, -1) if loc[:n] in lines)
