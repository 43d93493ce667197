"""The builds that a command line asks for: one from its flags, or those of a build file, flags over them."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from factory import references
from factory.commands.options import CONTEXT, Command, print_json
from factory.errors import UsageError

if TYPE_CHECKING:
    from factory.buildfile import Entry

# What a build can be given that repeats another: nothing that would make it another build.
WITH_REPRODUCE = {
    *("model", "reproduce", "calibration_data", "heal_data", "eval_data", "tasks", "out", "home"),
    *(
        "processes",
        "state",
        "push_to",
        "public",
        "accept_license",
        "trust_remote_code",
        "run_task_code",
        "rerun",
        "dry_run",
        "as_json",
    ),
}
ONCE = (
    "reproduce",
    "home",
    "rerun",
    "dry-run",
    "json",
    "print-config",
    "detach",
    "upload",
)  # of a run, not of a build


WITHOUT = "leave one of them out"


@dataclass(frozen=True)
class Request:
    """One build that is asked for."""

    model: str
    options: dict[str, Any]  # complete, by the names of click's parameters
    given: dict[str, Any]  # what was typed or stands in the file, by the names of the flags
    entry: "Entry | None"  # in a file

    @contextmanager
    def located(self, key: str = "model") -> Iterator[None]:
        """Put the line before an error, where there is one."""
        if self.entry is None:
            yield
        else:
            with self.entry.located(key):
                yield


def requests(model: str, options: dict[str, Any]) -> list[Request]:
    """What to build. A flag beside a file holds for each of its builds.

    Raises:
        UsageError: A file that cannot be read or says what no flag could.
    """
    context = click.get_current_context()
    flags = {flag_of(param): param for param in context.command.params if param.name in options}
    typed = {
        flag: _written(param, options[str(param.name)])
        for flag, param in flags.items()
        if context.get_parameter_source(str(param.name)) == ParameterSource.COMMANDLINE and flag not in ONCE
    }
    if not model.endswith((".yaml", ".yml")):
        one = Request(model, options, {"model": model} | typed, None)
        _check(one, context)
        return [one]
    from factory import buildfile

    if options["reproduce"]:
        raise UsageError(f"--reproduce with {model!r}, a build file", hint="give the build itself")
    found = []
    for entry in buildfile.read(Path(model)):
        kept = buildfile.replacing(entry.values, typed)
        complete = dict(options)
        for flag, value in kept.items():
            if flag != "model":
                with entry.located(flag):
                    complete[str(flags[flag].name)] = _meant(flags[flag], value, context)
        found.append(Request(str(kept["model"]), complete, kept | typed, entry))
        _check(found[-1], context)
    return found


def _check(request: Request, context: click.Context) -> None:
    """Refuse what click's types let through: from the standard library alone."""
    with request.located():
        references.check_model(request.model)
        _check_options(request.options, context)
        _check_place(request.options, context)
        for name in ("timeout", "detach", "upload"):
            if request.options[name] and not request.options["on"]:
                raise UsageError(f"--{name} without --on", hint="add --on HARDWARE, as in --on a100-large")
    read = ("calibration_data", *(("heal_data",) if request.options["heal_enabled"] else ()), "eval_data")
    for data in read:
        if request.options[data] is not None:
            with request.located(data.replace("_", "-")):
                references.check_data(request.options[data])


def _check_options(options: dict[str, Any], context: click.Context) -> None:
    rate, repository, tasks = options["heal_lr"], options["push_to"], options["tasks"]
    if options["reproduce"]:
        typed = {
            name
            for name in context.params
            if context.get_parameter_source(name) == ParameterSource.COMMANDLINE
        }
        if others := sorted(typed - WITH_REPRODUCE):
            option = next(p for p in context.command.params if p.name == others[0]).opts[0]
            raise UsageError(
                f"{option} with --reproduce, which repeats a build as it was", hint="leave one of them out"
            )
    elif options["layers"] and (options["drop"] or options["criterion"]):
        other = "--drop" if options["drop"] else "--criterion"
        raise UsageError(f"--layers with {other}: each says which layers go", hint="leave one of them out")
    elif not options["layers"] and options["drop"] is None:
        raise UsageError(
            "--drop is missing", hint="--drop 0.3 drops three of ten layers, --layers 3,7 those two"
        )
    if rate is not None and not math.isfinite(rate):
        raise UsageError(f"--heal-lr {rate} is no learning rate", hint="--heal-lr 3e-4")
    if options["seam_weight"] is not None and not math.isfinite(options["seam_weight"]):
        raise UsageError(f"--seam-weight {options['seam_weight']} is no weight", hint="--seam-weight 0.1")
    if options["public"] and not repository:
        raise UsageError("--public without --push-to", hint="add --push-to owner/name")
    if repository is not None and not re.fullmatch(r"([\w.-]+/|~/)?[\w.-]+", repository):
        raise UsageError(f"--push-to {repository!r} is no repository name", hint="--push-to owner/name")
    if tasks is not None and not all(name.strip() for name in tasks.split(",")):
        raise UsageError(f"--tasks {tasks!r} has an empty name", hint="--tasks mmlu,boolq, or --tasks none")


def _check_place(options: dict[str, Any], context: click.Context) -> None:
    """Refuse a name that is empty, and what a job has for itself: neither may be passed over in silence."""
    for name, value in options.items():
        if isinstance(value, str) and not value.strip():
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} is empty", hint=f"give --{flag} a value, or leave it out")
    if options["on"] is None:
        return
    if options["state"] is not None:
        raise UsageError("--state with --on: a job keeps its stages in a bucket of its own", hint=WITHOUT)
    if context.get_parameter_source("home") == ParameterSource.COMMANDLINE:
        raise UsageError("--home with --on: a job does not see folders of this machine", hint=WITHOUT)


def flag_of(param: click.Parameter) -> str:
    """A parameter's name on the command line and in a file: "load-in-4bit"."""
    return max(param.opts, key=len).removeprefix("--")


def _meant(param: click.Parameter, value: Any, context: click.Context) -> Any:
    """What the flag would give the command for a value of a file."""
    if isinstance(param, click.Option) and param.is_flag:
        return bool(value) != (param.flag_value is False)
    return param.type_cast_value(context, value)


def _written(param: click.Parameter, value: Any) -> Any:
    """A flag's value as a file writes it."""
    if isinstance(param, click.Option) and param.is_flag:
        return True
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def config_text(given: list[dict[str, Any]]) -> str:
    """A build file that asks for this."""
    import yaml

    value = given[0] if len(given) == 1 else {"builds": given}
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


@click.command(cls=Command, context_settings=CONTEXT)
def schema() -> None:
    """Print the JSON schema of a build file, for editors.

    With this as its first line, an editor completes and checks what follows:
    # yaml-language-server: $schema=build.schema.json
    """
    from factory.buildfile import schema as json_schema
    from factory.commands.build import build

    helps = {flag_of(p): p.help or "" for p in build.params if isinstance(p, click.Option)}
    print_json(json_schema(helps))
