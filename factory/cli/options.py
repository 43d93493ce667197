"""What several commands share: option types, common options, build folders, JSON for programs."""

import os
import re
from pathlib import Path
from typing import Any

import click

from factory.config.choices import MOST, TRACKERS
from factory.config.objectives import DEFAULT_OBJECTIVE, OBJECTIVES, summaries
from factory.errors import UsageError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
LAYERS_HINT = "--layers 3,7,21-24 drops six layers, counted from 0"


class Command(click.Command):
    """A command that refuses words by its own name: click's parser does not always say whose they are."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the words, or refuse them as those of this command."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise


class Group(Command, click.Group):
    """A command with commands of its own."""

    command_class = Command


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


class Fractions(click.ParamType[tuple[float, ...]]):
    """Fractions with commas between them, by rising size: 0.1,0.2,0.3."""

    name = "fractions"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """Refuse what holds something else, with that in the message."""
        parts = str(value).split(",")
        return tuple(sorted({Fraction().convert(part.strip(), param, ctx) for part in parts}))


class Layers(click.ParamType[tuple[int, ...]]):
    """Layer numbers and inclusive ranges of them: 3,7,21-24."""

    name = "layers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Refuse what names no layers, or one of them twice, with the part that does."""
        layers: list[int] = []
        for part in str(value).split(","):
            match = re.fullmatch(r"\s*([0-9]{1,5})(?:\s*[-–]\s*([0-9]{1,5}))?\s*", part)
            if match is None:
                raise UsageError(f"--layers {value}: {part!r} is no layer number", hint=LAYERS_HINT)
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                raise UsageError(f"--layers {value}: {part.strip()} runs backwards", hint=LAYERS_HINT)
            if twice := sorted({*layers} & {*range(first, last + 1)}):
                raise UsageError(f"--layers {value} names layer {twice[0]} twice", hint=LAYERS_HINT)
            layers += range(first, last + 1)
        return tuple(sorted(layers))


class Count(click.IntRange):
    """How many of something, at least so many."""

    def __init__(self, least: int) -> None:
        super().__init__(least, MOST)


class Place(click.Path):
    """A file or folder, whether it is there or not."""

    def __init__(self, *, file_okay: bool = True) -> None:
        super().__init__(path_type=Path, file_okay=file_okay)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse what can be no path: an empty one would be the folder that one is in."""
        option = param.opts[-1] if isinstance(param, click.Option) else "the path"
        if not os.fspath(value).strip():
            raise UsageError(f"{option} is empty", hint="give a path, or leave it out")
        try:
            Path(value).stat()
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UsageError(f"{option} {str(value)[:100]!r}: {reason}", hint="give another path") from error
        return super().convert(value, param, ctx)


def measuring_options(command: Any) -> Any:
    """Options of every command that measures."""
    for option in reversed(
        (
            click.option("--calibration-data", metavar="DATA", help="Text to measure on."),
            click.option(
                "--samples",
                type=Count(2),
                help="Documents to measure on.  [default: until the choice is certain]",
            ),
            click.option("--sequence-length", type=Count(8), help="Tokens a sequence, in all stages."),
            click.option(
                "--tokens",
                type=click.Choice(["last", "all"]),
                help="Whose states are compared; all: without the first.  [default: last]",
            ),
            click.option("--load-in-4bit", "four_bit", is_flag=True, help="Measure the model in NF4."),
            click.option("--plan-documents", type=Count(2), help="Documents for a choice by the loss."),
            click.option(
                "--seed",
                type=click.IntRange(0, 2**32 - 1),
                default=0,
                show_default=True,
                help="Of everything that is drawn.",
            ),
        )
    ):
        command = option(command)
    return command


heal_option = click.option(
    "--heal",
    "heal_objective",
    is_flag=False,
    flag_value=DEFAULT_OBJECTIVE.name,
    type=click.Choice(OBJECTIVES),
    help=f"{summaries()}.  [default: {DEFAULT_OBJECTIVE.name}]",
)
home_option = click.option(
    "--home",
    type=Place(file_okay=False),
    envvar="FACTORY_HOME",
    help="Where finished stages are kept, for reuse by all builds.  [default: user cache]",
)
backend_option = click.option(
    "--eval-backend",
    type=click.Choice(["hf", "vllm"]),
    help="What answers the tasks; vllm must be installed.  [default: hf]",
)
processes_option = click.option(
    "--processes",
    type=Count(1),
    help="Processes to measure, heal and evaluate with, one a GPU.  [default: one for each GPU]",
)
report_option = click.option(
    "--report-to",
    type=click.Choice(TRACKERS),
    help="Experiment tracker that follows the healing.  [default: trackio, if installed]",
)
state_option = click.option(
    "--state", metavar="BUCKET", help="Keep finished stages in this private bucket on the Hub as well."
)


def on_option(command: Any) -> Any:
    """Options of a build that runs on rented hardware."""
    for option in reversed(
        (
            click.option("--on", metavar="HARDWARE", help="Build on Hugging Face Jobs, as a100-large."),
            click.option(
                "--timeout", metavar="6h", help="With --on: how long at most.  [default: twice the estimate]"
            ),
            click.option("--detach", is_flag=True, help="With --on: submit, and do not follow."),
            click.option(
                "--upload", is_flag=True, help="With --on: upload local models and texts, privately, first."
            ),
        )
    ):
        command = option(command)
    return command


trust_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run code that comes with MODEL, which must then be owner/name@COMMIT or a folder.",
)
task_code_option = click.option(
    "--run-task-code", is_flag=True, help="Run the Python that task files in --tasks name."
)


def output_folder(folder: Path) -> Path:
    """A folder for results, made before the work that they take.

    Raises:
        UsageError: It cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot make the folder {str(folder)!r}: {error.strerror}", hint="give another one"
        ) from error
    if not os.access(folder, os.W_OK):
        raise UsageError(f"cannot write to the folder {str(folder)!r}", hint="give another one")
    return folder


def build_folder(folder: Path) -> Path:
    """The folder of a build, or an error that says what it is not."""
    if not (folder / "build.json").is_file() or not (folder / "model").is_dir():
        raise UsageError(f"{str(folder)!r} is no build folder", hint="give what `factory build` made")
    return folder


def remark(told: str) -> None:
    """Say on standard error what the user should know and nothing fails for."""
    from factory.cli.console import printable

    click.echo(f"note: {printable(told)}", err=True)


def print_json(value: Any) -> None:
    """Print a result for programs."""
    import json

    click.echo(json.dumps(value, indent=2))
