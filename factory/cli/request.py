"""From the command line to requests: typed options and build files."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from factory.config.request import BuildRequest
from factory.errors import UsageError


def read_requests(model: str, values: dict[str, Any]) -> list[BuildRequest]:
    """Return the requested builds; an option given with a build file applies to all its builds.

    Raises:
        UsageError: The file cannot be read, or options exclude each other.
    """
    context = click.get_current_context()
    given = {name: value for name, value in values.items() if value is not None}
    exported = context.get_parameter_source("home") != ParameterSource.COMMANDLINE
    if not model.endswith((".yaml", ".yml")):
        return [BuildRequest.read(_without_home({"model": model, **given}, exported))]
    from factory.cli.build_file import read, replacing

    if given.get("reproduce"):
        raise UsageError(
            f"--reproduce with {model!r}, a build file", hint="give the build's folder or repository"
        )
    rows = BuildRequest.options()
    typed = {
        name: value
        for name, value in given.items()
        if rows[name][1].of_run or context.get_parameter_source(name) == ParameterSource.COMMANDLINE
    }
    found = []
    for entry, origin in read(Path(model)):
        of_file = replacing(entry, typed)
        found.append(BuildRequest.read(_without_home(of_file | typed, exported), origin=origin))
    return found


def _without_home(values: dict[str, Any], exported: bool) -> dict[str, Any]:
    """Drop `home` if it comes from FACTORY_HOME and the build is a job, which has its own store."""
    if exported and values.get("on") is not None:
        values.pop("home", None)
    return values


def config_text(builds: list[dict[str, Any]]) -> str:
    """Return the text of a build file for these builds."""
    import yaml

    value = builds[0] if len(builds) == 1 else {"builds": builds}
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
