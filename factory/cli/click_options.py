"""Options on the command line: click options from the rows of a request, and shared helpers."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import click
from annotated_types import Ge, Gt, Le
from click.shell_completion import CompletionItem

from factory.cli.log import RunLog, verbose_option
from factory.config import options as kinds
from factory.config.options import GROUPS, Option
from factory.config.references import aliases
from factory.config.request import Request
from factory.errors import UsageError
from factory.store.stage import STAGES

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
F = TypeVar("F", bound=Callable[..., Any])


class Command(click.Command):
    """A command whose errors name it, which may be verbose, and whose help shows options in groups."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.params.append(verbose_option())

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, whose log lies in the home folder that it was given."""
        log = ctx.find_object(RunLog)
        if log and ctx.params.get("home"):
            log.home = ctx.params["home"]
        return super().invoke(ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; errors carry the context of this command."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their group headings."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                groups.setdefault(getattr(param, "group", "Options"), []).append(record)
        for group in (*GROUPS, "Options"):
            if group in groups:
                with formatter.section(group):
                    formatter.write_dl(groups[group])


class Group(Command, click.Group):
    """A command with sub-commands."""

    command_class = Command

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, then the sub-commands."""
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


class OptionInGroup(click.Option):
    """An option with a group heading."""

    def __init__(self, *args: Any, group: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.group = group


class Place(click.Path):
    """A file or folder that need not exist."""

    def __init__(self, *, file_okay: bool = True) -> None:
        super().__init__(path_type=Path, file_okay=file_okay)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse invalid paths; an empty one would mean the current directory."""
        option = param.opts[-1] if isinstance(param, click.Option) else "the path"
        if not os.fspath(value).strip():
            raise UsageError(f"{option} is empty", hint="give a path, or omit it")
        try:
            Path(value).stat()
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UsageError(f"{option} {str(value)[:100]!r}: {reason}", hint="give another path") from error
        return super().convert(value, param, ctx)


def request_options(request: type[Request]) -> Callable[[F], F]:
    """Return a decorator that gives a command the options of a request and the argument MODEL."""

    def decorate(command: F) -> F:
        for name, (kind, option) in reversed(request.options().items()):
            if name != "model":
                command = _option(request, name, kind, option)(command)
        return click.argument("model", shell_complete=_complete_model)(command)

    return decorate


def _complete_model(_context: click.Context, _param: click.Parameter, typed: str) -> list[CompletionItem]:
    """Return the aliases that begin with what was typed, and leave folders and files to the shell."""
    found = [CompletionItem(alias) for alias in aliases() if alias.startswith(typed)]
    return found or [CompletionItem(typed, type="file")]


home_option = click.option(
    "--home",
    type=Place(file_okay=False),
    metavar="FOLDER",
    envvar="FACTORY_HOME",
    help="Folder of finished stages, shared by all builds.  [default: user cache]",
)


def read_request(request: type[Request], values: dict[str, Any]) -> Any:
    """Return the request for the options that were typed, exported or have a default in click."""
    return request.read({name: value for name, value in values.items() if value is not None})


def _option(request: type[Request], name: str, kind: Any, option: Option) -> Callable[[Any], Any]:
    """Return the click option for one row."""
    help_text = f"{option.help}." + (f"  [default: {option.default}]" if option.default else "")
    settings: dict[str, Any] = {"cls": OptionInGroup, "group": option.group, "help": help_text}
    if kind is bool:
        settings["is_flag"] = True
        settings["default"] = None
    else:
        settings |= {"type": _type(kind), "metavar": option.metavar or _metavar(kind)}
        settings["required"] = request.requires(name)
    if option.bare is not None:
        settings |= {"is_flag": False, "flag_value": option.bare}
    if name == "rerun":
        stages = [stage.name for stage in STAGES.values() if stage.can_rerun]
        settings |= {"multiple": True, "type": click.Choice(stages)}
    if kind == kinds.References:
        settings |= {"multiple": True, "callback": lambda _context, _param, value: value or None}
    if name == "home":
        settings["envvar"] = "FACTORY_HOME"
    return click.option(f"--{name.replace('_', '-')}", name, **settings)


def _metavar(kind: Any) -> str | None:
    """Return a short metavar for a number; errors show its limits."""
    if kind == kinds.Fraction:
        return "FRACTION"
    base = (get_args(kind) or (kind,))[0]
    return {int: "N", float: "X"}.get(base) if base in (int, float) else None


def _type(kind: Any) -> Any:
    """Return the click type for the type of an option."""
    if kind in (kinds.Fraction, kinds.Parameters, kinds.Bytes, kinds.Duration):
        return str
    if kind == kinds.Location:
        return Place()
    if choices := _choices(kind):
        return click.Choice(choices)
    base, *limits = get_args(kind) or (kind,)
    if base is int:
        minimum: Any = next((limit.ge for limit in limits if isinstance(limit, Ge)), None)
        maximum: Any = next((limit.le for limit in limits if isinstance(limit, Le)), None)
        return Whole(minimum, maximum)
    if base is float:
        return Number(next((limit for limit in limits if isinstance(limit, Gt | Ge)), None))
    return str


def _choices(kind: Any) -> list[Any]:
    """Return the values of a Literal or a union of them; empty for any other type."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    parts = [_choices(part) for part in get_args(kind)] if get_args(kind) else [[]]
    return [value for part in parts for value in part] if all(parts) else []


class _Limited(click.ParamType):  # type: ignore[type-arg]
    """A number whose limits an error names, but not the help."""

    def _describe_range(self) -> str:
        return ""

    def fail(
        self, message: str, param: click.Parameter | None = None, ctx: click.Context | None = None
    ) -> NoReturn:
        """Name the limits that a number exceeds."""
        super().fail(_with_limits(message, self), param, ctx)


class Whole(_Limited, click.IntRange):
    """A whole number within limits."""


class Number(_Limited, click.FloatRange):
    """A number greater than, or at least, a limit."""

    def __init__(self, limit: Gt | Ge | None) -> None:
        minimum: Any = limit.gt if isinstance(limit, Gt) else limit.ge if limit else None
        super().__init__(minimum, min_open=isinstance(limit, Gt))


def _with_limits(message: str, kind: Any) -> str:
    """Return click's message about a number out of its range with the range in words."""
    number, outside, _ = message.partition(" is not in the range")
    if not outside:
        return message
    if kind.min_open:
        return f"{number} is not greater than {kind.min}"
    return (
        f"{number} is not {kind.min} or more"
        if kind.max is None
        else f"{number} is not from {kind.min} to {kind.max}"
    )
