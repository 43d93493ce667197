"""Follow a build from elsewhere: its healing and its stages' times, told to an experiment tracker."""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

from factory.config.choices import Tracker
from factory.errors import UsageError

WHERE: tuple[Tracker, ...] = get_args(Tracker)
PROJECT = "hf-factory"
Log = Callable[[Mapping[str, float], int | None], None]


def _unheard(_told: str) -> None: ...


@dataclass(eq=False)
class Tracking:
    """Tracker to tell it, and as which run; nothing that a build makes depends on it.

    The processes of a stage get a copy each, which knows what has failed before.
    """

    where: Tracker = "none"
    name: str = ""  # of the build
    folder: Path = Path()  # for tensorboard's event files
    remark: Callable[[str], None] = _unheard  # told the first fault, after which nothing more is tried
    has_failed: bool = False

    @contextlib.contextmanager
    def run(self, part: str) -> Iterator[Log]:
        """Log in one part of a build, "heal" or "stages", until the end of the block.

        The part is a run of its own, which a second attempt goes on with.
        """
        begun: list[tuple[Log, Callable[[], None]]] = []
        if self.where != "none" and not self.has_failed:
            with self._apart():
                begun.append(_begin(self.where, f"{self.name}-{part}", self.folder))

        def log(values: Mapping[str, float], step: int | None) -> None:
            for tell, _ in begun:
                if not self.has_failed:
                    with self._apart():
                        tell(values, step)

        try:
            yield log
        finally:
            for _, finish in begun:
                with self._apart():
                    finish()

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Keep a tracker's faults from the build, and what it prints from the progress lines."""
        quiet = io.StringIO()
        try:
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                yield
        except Exception as error:  # noqa: BLE001  whatever it is, the build is worth no less
            if not self.has_failed:
                told = next(iter(str(error).splitlines()), repr(error))
                self.remark(f"{self.where} cannot follow this build, which goes on without: {told}")
            self.has_failed = True


NOWHERE = Tracking()


def _begin(where: Tracker, name: str, folder: Path) -> tuple[Log, Callable[[], None]]:
    """Begin a run, or go on with it: what logs in it, and what ends it."""
    if where == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / name))

        def log(values: Mapping[str, float], step: int | None) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)

        return log, writer.close
    if where == "trackio":
        import trackio as tracker

        tracker.init(project=PROJECT, name=name, resume="allow", embed=False)
    else:
        import wandb as tracker

        tracker.init(
            project=PROJECT,
            name=name,
            id=name,
            resume="allow",
            reinit="finish_previous",  # a run that a failed build has left open is not this one
            settings={"silent": True},
        )
    return lambda values, step: tracker.log(dict(values), step=step), tracker.finish


def choose(asked: Tracker | None) -> Tracker:
    """Tracker to log: as asked for; by default trackio, where that is installed.

    Raises:
        UsageError: What was asked for is not installed.
    """
    if asked is None:
        return "trackio" if find_spec("trackio") else "none"
    if asked != "none" and find_spec(asked) is None:
        raise UsageError(f"`report_to={asked}`: {asked} is not installed", hint=f"pip install {asked}")
    return asked
