"""From the command line to requests: what was typed, or what a build file holds."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from factory.config.request import BuildRequest
from factory.errors import UsageError


def read_requests(model: str, values: dict[str, Any]) -> list[BuildRequest]:
    """The builds that are asked for. An option beside a file holds for each of its builds.

    Raises:
        UsageError: A file that cannot be read, or options that make no sense together.
    """
    context = click.get_current_context()
    given = {name: value for name, value in values.items() if value is not None}
    if not model.endswith((".yaml", ".yml")):
        return [BuildRequest.read({"model": model, **given})]
    from factory.cli.build_file import read, replacing

    if given.get("reproduce"):
        raise UsageError(f"--reproduce with {model!r}, a build file", hint="give the build itself")
    rows = BuildRequest.options()
    typed = {
        name: value
        for name, value in given.items()
        if rows[name][1].of_run or context.get_parameter_source(name) == ParameterSource.COMMANDLINE
    }
    found = []
    for entry, origin in read(Path(model)):
        of_file = replacing(entry, typed)
        found.append(BuildRequest.read(of_file | typed, origin=origin))
    return found


def config_text(builds: list[dict[str, Any]]) -> str:
    """A build file that asks for these builds."""
    import yaml

    value = builds[0] if len(builds) == 1 else {"builds": builds}
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
