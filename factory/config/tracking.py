"""The experiment tracker that follows a build's healing, and the name of the run there."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from factory.config.choices import Tracker
from factory.errors import UsageError


def _ignore(_message: str) -> None: ...


@dataclass(frozen=True)
class Tracking:
    """A run of a tracker; nothing that a build makes depends on it.

    Args:
        tracker: The library that gets the losses.
        run_name: A name that no other build has, and that a second attempt at the same build has again.
        folder: The parent folder of TensorBoard's event files.
        warn: Gets one line if the tracker fails.
    """

    tracker: Tracker = "none"
    run_name: str = ""
    folder: Path = Path()
    warn: Callable[[str], None] = _ignore


NO_TRACKING = Tracking()


def choose_tracker(asked: Tracker | None) -> Tracker:
    """Return the tracker that was asked for; by default trackio, if it is installed.

    Raises:
        UsageError: The tracker that was asked for is not installed.
    """
    if asked is None:
        return "trackio" if find_spec("trackio") else "none"
    if asked != "none" and find_spec(asked) is None:
        raise UsageError(f"`report_to={asked}`: {asked} is not installed", hint=f"pip install {asked}")
    return asked
