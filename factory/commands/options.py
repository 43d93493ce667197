"""What several commands share: option types, common options, build folders, JSON for programs."""

from pathlib import Path
from typing import Any

import click

from factory.errors import UsageError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Fraction(click.ParamType[float]):
    """A number strictly between 0 and 1."""

    name = "fraction"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Refuse what is no fraction, with the value in the message."""
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not 0 < number < 1:
            raise UsageError(
                f"--drop {value} is not a fraction between 0 and 1",
                hint="--drop 0.3 drops three of ten layers",
            )
        return number


home_option = click.option(
    "--home",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="FACTORY_HOME",
    help="Where finished stages are kept, for reuse by all builds.  [default: user cache]",
)


def build_folder(folder: Path) -> Path:
    """The folder of a build, or an error that says what it is not."""
    if not (folder / "build.json").is_file() or not (folder / "model").is_dir():
        raise UsageError(f"{str(folder)!r} is no build folder", hint="give what `factory build` made")
    return folder


def print_json(value: Any) -> None:
    """Print a result for programs."""
    import json

    click.echo(json.dumps(value, indent=2))
