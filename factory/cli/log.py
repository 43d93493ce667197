"""The log of a run: a file below the home folder, and with --verbose also standard error."""

import logging
import os
import platform
import re
import shlex
import sys
from collections import deque
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import click

from factory import __version__
from factory.store.stage import LOGS

SUFFIX = ".log"
MOST_FILES = 50  # of which the newest are kept
MOST_HELD = 1000  # lines kept in memory before the work begins
PACKAGE = "hf-factory"
WORK = {"is_work": True}  # `extra` of a record with which the work begins, and so the file
FULL = "%(seconds)9.2f %(levelname)-8s %(name)s: %(message)s"
QUIET = "error"
LIBRARIES = {  # with levels and handlers of their own → the variable that sets the level
    "transformers": "TRANSFORMERS_VERBOSITY",
    "datasets": "DATASETS_VERBOSITY",
    "huggingface_hub": "HF_HUB_VERBOSITY",
}
HIDDEN = "***"
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY|CREDENTIAL")
LEAST_SECRET = 6  # characters; shorter values, such as 1, occur everywhere
SECRETS = (
    (re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{6,}"), HIDDEN),
    (re.compile(r"(\w+://)[^\s/@]+@"), rf"\1{HIDDEN}@"),  # name and password of a URL
    (re.compile(r"(\w+://[^\s?\"'<>]+\?)[^\s\"'<>]+"), rf"\1{HIDDEN}"),  # signature of a URL
    (re.compile(r"(?i)(\bbearer )[\w.~+/=-]+"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)((?:token|secret|password|api_?key)[\"']?[=:] ?[\"']?)[^\s\"'&,]+"), rf"\1{HIDDEN}"),
)


def hush_libraries() -> None:
    """Silence what libraries print for programmers, unless the environment asks for it.

    Must be called before they are imported. Errors are still shown.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["MPLBACKEND"] = "agg"  # figures go to files; a notebook's backend may not exist here
    for variable in LIBRARIES.values():
        os.environ.setdefault(variable, QUIET)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # for child processes


def without_secrets(text: str) -> str:
    """Return a text without tokens, passwords, queries of URLs, and values of secret variables."""
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= LEAST_SECRET:
            text = text.replace(value, HIDDEN)
    for pattern, replacement in SECRETS:
        text = pattern.sub(replacement, text)
    return text


class Lines(logging.Formatter):
    """Records as text without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record, with the traceback of its error."""
        record.seconds = record.relativeCreated / 1000
        try:
            return without_secrets(super().format(record))
        except (TypeError, ValueError, LookupError):  # a library's arguments that do not fit its own message
            return without_secrets(f"{record.name}: {record.msg!r}")


class Screen(logging.Handler):
    """Records on standard error: errors of libraries, and with --verbose everything."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.setFormatter(Lines("%(message)s"))

    def be_verbose(self) -> None:
        """Show everything from now on, of libraries too."""
        logging.getLogger().setLevel(logging.INFO)
        self.setLevel(logging.DEBUG)
        self.setFormatter(Lines(FULL))

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record, unless it is an error of ours, which the command line prints itself."""
        if self.level == logging.DEBUG or record.name.partition(".")[0] != "factory":
            with suppress(OSError):
                sys.stderr.write(f"{self.format(record)}\n")  # not a stream kept since the start: a bar may
                sys.stderr.flush()  # have taken its place


class RunLog(logging.Handler):
    """A run's log file, which begins with the first record of its work; before that, nothing is on disk.

    A file that cannot be written ends the log, never the run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(Lines(FULL))
        self.home: Path | None = None  # None: the default
        self.path: Path | None = None  # of the file, once it exists
        self.screen = Screen()
        self._stream: TextIO | None = None
        self._held: deque[str] | None = deque(maxlen=MOST_HELD)  # None: the work has begun

    def start(self) -> None:
        """Receive what this program and its libraries log, and their warnings."""
        root = logging.getLogger()
        for earlier in [one for one in root.handlers if isinstance(one, RunLog | Screen)]:
            root.removeHandler(earlier)  # of another run in this process
        root.setLevel(logging.WARNING)
        logging.getLogger("factory").setLevel(logging.DEBUG)
        root.addHandler(self)
        root.addHandler(self.screen)
        logging.captureWarnings(capture=True)

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, or hold it until the work begins."""
        _adopt_libraries()
        line = self.format(record)
        if self._held is not None:
            self._held.append(line)
            if getattr(record, "is_work", False):
                self._open()
        elif self._stream:
            self._write(line)

    def _open(self) -> None:
        """Create the file, write what was held, and remove the oldest files."""
        from factory.store.store import home_folder

        held, self._held = self._held or (), None
        now = datetime.now(UTC)
        folder = home_folder(self.home) / LOGS
        path = folder / f"{now:%Y-%m-%dT%H-%M-%S.%f}{SUFFIX}"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("x", encoding="utf-8", errors="replace")
            self.path = path
            self._write("\n".join((without_secrets(_header()), "", *held)))
            for old in sorted(folder.glob(f"*{SUFFIX}"))[:-MOST_FILES]:
                old.unlink(missing_ok=True)

    def _write(self, line: str) -> None:
        assert self._stream
        try:
            self._stream.write(f"{line}\n")
            self._stream.flush()
        except OSError:  # a full disk, of which the run itself will tell
            self._stream = self.path = None


def _adopt_libraries() -> None:
    """Take over what imported libraries with handlers of their own log, unless the user set how much."""
    for library, variable in LIBRARIES.items():
        logger = logging.getLogger(library)
        if library in sys.modules and logger.handlers and os.environ.get(variable) == QUIET:
            for handler in list(logger.handlers):
                logger.removeHandler(handler)
            logger.propagate = True
            logger.setLevel(logging.NOTSET)  # that of all others


def _header() -> str:
    """Return what runs where: the command, its folder, and the versions of what it needs."""
    from importlib.metadata import PackageNotFoundError, requires, version

    lines = [
        shlex.join(sys.argv),
        f"in {Path.cwd()}",
        f"Python {platform.python_version()} on {platform.platform()}",
        f"factory {__version__}",
    ]
    with suppress(PackageNotFoundError):  # run from a folder of its code
        needed = [line for line in requires(PACKAGE) or () if "extra ==" not in line]
        for name in (re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in needed):
            with suppress(PackageNotFoundError):
                lines[-1] += f", {name} {version(name)}"
    return "\n".join(lines)


def installed() -> str:
    """Return the name and version of every installed package."""
    from importlib.metadata import distributions

    return ", ".join(sorted({f"{found.name} {found.version}" for found in distributions() if found.name}))


def verbose_option() -> click.Option:
    """Return the option that shows the log on standard error."""

    def show(context: click.Context, _param: click.Parameter, value: bool) -> None:
        log = context.find_object(RunLog)
        if value and log:
            log.screen.be_verbose()

    return click.Option(
        ["-v", "--verbose"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=show,
        help="Show the log, of libraries too, on standard error.",
    )
