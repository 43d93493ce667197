"""The command line: its commands, and the one place where errors become lines and exit codes."""

import logging
import os
import re
import sys
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import click

from factory import __version__
from factory.cli.build import build, schema
from factory.cli.builds import card, chat, collect_garbage, export, list_stages, push, show, space, verify
from factory.cli.click_options import CONTEXT, Group
from factory.cli.console import as_flags, finish, go_on, settle
from factory.cli.installation.completion import completion
from factory.cli.installation.doctor import doctor
from factory.cli.installation.extension import extension
from factory.cli.jobs import jobs_group
from factory.cli.log import WORK, RunLog, hush_libraries, installed
from factory.cli.plan import plan, sweep
from factory.cli.prune import prune
from factory.errors import FactoryError, UsageError
from factory.store.capacity import READ_ONLY, no_memory, no_room

LOG = logging.getLogger(__name__)
ONLY_PRINT = (
    "plan",
    "show",
    "ls",
    "doctor",
    "schema",
    "jobs",
    "completion",
)  # commands without another result
LONG = re.compile(r"\S{400,}")  # longer than any word of our own
FAULT = 70  # exit code of an error that nobody foresaw, as EX_SOFTWARE of sysexits.h


@click.group(cls=Group, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="factory")
@click.pass_context
def cli(context: click.Context) -> None:
    """Make a language model smaller: drop the layers it needs least, heal the cut, measure, publish.

    \b
    factory build demo --drop 0.3          the demo: minutes on a CPU, offline
    factory build mistral-7b --drop 0.3    a model from the Hub
    """
    if context.invoked_subcommand not in ONLY_PRINT:
        go_on()
    _check_environment()


COMMANDS = (
    *(build, plan, sweep, prune, push, export, show, verify, card, chat, space),
    *(list_stages, collect_garbage, doctor, jobs_group, schema, extension, completion),
)


for command in COMMANDS:
    cli.add_command(command)


def main() -> None:
    """Run the command line; the one place where errors become lines and exit codes."""
    hush_libraries()
    settle()
    log = RunLog()
    log.start()
    try:
        _refuse_launcher()
        cli.main(prog_name=_typed_as(), standalone_mode=False, obj=log)
        sys.stdout.flush()  # inside `try`, so that a failure becomes an error line
        LOG.debug("done")
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.UsageError as error:
        _refuse(error)
    except FactoryError as error:
        LOG.error("%s", error.message, exc_info=error)
        _fail(as_flags(error.message), as_flags(error.hint), code=error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", "the same command resumes from here", code=130)
    except Exception as error:
        LOG.error("%s", error, exc_info=error)
        if full := no_memory(error):
            _fail(full, "free some memory; the same command resumes from here", code=1)
        if isinstance(error, OSError) and error.errno in READ_ONLY and error.filename:
            place = os.fsdecode(error.filename)
            _fail(f"{place}: {error.strerror}", "make it readable and writable, or give another path", code=1)
        if (reason := no_room(error)) is None:
            _fail_unforeseen(error, log)
        _fail(f"{reason}: {str(error).splitlines()[0]}", "free some space and repeat the command", code=1)


def _fail_unforeseen(error: Exception, log: RunLog) -> NoReturn:
    """Report an error of the program itself in two lines, and where its traceback is kept."""
    LOG.critical("a fault of the program; installed: %s", installed(), extra=WORK)
    if log.path is None:  # no folder to write it to
        raise error from None
    what = " ".join(str(error).split())[:300]
    _fail(
        f"a fault of the program: {type(error).__name__}{f': {what}' if what else ''}",
        f"the same command resumes from here; if it fails again, report it with {log.path}",
        code=FAULT,
    )


def _refuse(error: click.UsageError) -> None:
    """Report a usage error; a group without a command prints its help, as with --help."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        _end(f"{error.format_message()}\n", code=error.exit_code)
    command = error.ctx.command_path if error.ctx else "factory"
    _fail(error.format_message(), f"{command} --help", code=error.exit_code)


def _check_environment() -> None:
    """Refuse a deleted current directory, and variables that would break importing huggingface_hub."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise UsageError("the current directory no longer exists", hint="`cd` to another one") from error
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        value = os.environ.get(name)
        try:
            int(value or "0")
        except ValueError as error:
            message = f"the environment variable {name} is {value!r}, not a whole number of seconds"
            raise UsageError(message, hint=f"`export {name}=10`, or `unset {name}`") from error


def _refuse_launcher() -> None:
    """Refuse to run under `accelerate launch`: the stages start the processes they need."""
    rank, size = os.environ.get("LOCAL_RANK"), os.environ.get("WORLD_SIZE", "1")
    if rank is None or size == "1":
        return
    if rank != "0":
        sys.exit(0)  # only one process prints the error
    raise UsageError(
        f"factory under `accelerate launch` with {size} processes: it starts them itself",
        hint=f"run `factory build … --processes {size}`, without `accelerate launch`",
    )


def _typed_as() -> str:
    """Return the name of the program as it was typed: `factory`, or `hf factory` for the extension."""
    return "hf factory" if Path(sys.argv[0]).stem == "hf-factory" else "factory"


def _fail(message: str, hint: str, *, code: int) -> NoReturn:
    """Print one line with the error and one with the hint, and exit."""
    red, dim, end = ("\033[31m", "\033[2m", "\033[0m") if sys.stderr.isatty() else ("", "", "")
    error, advice = _broken("error: ", _printable(message)), _broken("hint: ", _printable(hint))
    _end(f"{red}error:{end} {error}\n{dim}hint:{end} {advice}\n", code=code)


def _broken(label: str, text: str) -> str:
    """Return the text that follows a label, on a terminal broken between words."""
    if not sys.stderr.isatty():
        return text
    width = max(os.get_terminal_size(sys.stderr.fileno()).columns, 20)
    return textwrap.fill(label + text, width, break_long_words=False, break_on_hyphens=False)[len(label) :]


def _end(text: str, *, code: int) -> NoReturn:
    """Print to standard error and exit with the code, whether or not anyone reads the text."""
    LOG.debug("exit code %d", code)
    go_on()
    with suppress(OSError):
        sys.stderr.write(text)
    finish()
    sys.exit(code)


def _printable(text: str) -> str:
    """Strip control characters, and shorten long words."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    return LONG.sub(lambda word: f"{word[0][:60]}… ({len(word[0]):,} characters)", plain)
