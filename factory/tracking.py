"""Follow a build from elsewhere: its healing and its stages' times, told to an experiment tracker."""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from factory.errors import UsageError

Where = Literal["trackio", "wandb", "tensorboard", "none"]
WHERE: tuple[Where, ...] = get_args(Where)
PROJECT = "hf-factory"
Log = Callable[[Mapping[str, float], int | None], None]


@dataclass(frozen=True)
class Tracking:
    """Where to tell it, and as which run; nothing that a build makes depends on it."""

    where: Where = "none"
    name: str = ""  # of the build
    folder: Path = Path()  # for tensorboard's event files

    @contextlib.contextmanager
    def run(self, part: str) -> Iterator[Log]:
        """Log in one part of a build, "heal" or "stages", until the end of the block.

        The part is a run of its own, which a second attempt goes on with. What the libraries print is
        held back: it would break the progress lines.
        """
        name = f"{self.name}-{part}"
        if self.where == "none":
            yield lambda _values, _step: None
        elif self.where == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            with SummaryWriter(str(self.folder / name)) as writer:

                def log(values: Mapping[str, float], step: int | None) -> None:
                    for name, value in values.items():
                        writer.add_scalar(name, value, step)

                yield log
        else:
            tracker = _tracker(self.where, name)
            try:
                yield lambda values, step: tracker.log(dict(values), step=step)
            finally:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    tracker.finish()


NOWHERE = Tracking()


def _tracker(where: Where, name: str) -> Any:
    """The module of trackio or wandb, with a run begun: both have the same functions."""
    with contextlib.redirect_stdout(io.StringIO()):
        if where == "trackio":
            import trackio

            trackio.init(project=PROJECT, name=name, resume="allow", embed=False)
            return trackio
        import wandb

        try:
            wandb.init(project=PROJECT, name=name, id=name, resume="allow", settings={"silent": True})
        except wandb.errors.Error as error:
            line = str(error).splitlines()[0]
            raise UsageError(
                f"--report-to wandb: {line}", hint="`wandb login`, or WANDB_MODE=offline"
            ) from error
        return wandb


def choose(asked: Where | None) -> Where:
    """Where to log: as asked for; by default trackio, where that is installed.

    Raises:
        UsageError: What was asked for is not installed.
    """
    if asked is None:
        return "trackio" if find_spec("trackio") else "none"
    if asked != "none" and find_spec(asked) is None:
        raise UsageError(f"--report-to {asked}: {asked} is not installed", hint=f"pip install {asked}")
    return asked
