"""Choose the experiment tracker that follows a build's healing, and name its run."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from factory.config.choices import Tracker
from factory.errors import UsageError


@dataclass(frozen=True)
class Tracking:
    """A run of a tracker; the result of a build does not depend on it.

    Args:
        tracker: Library that receives the losses.
        run_name: Name that is unique to the build and the same for every attempt at it.
        folder: Parent folder of TensorBoard's event files.
    """

    tracker: Tracker = "none"
    run_name: str = ""
    folder: Path = Path()


NO_TRACKING = Tracking()


def choose_tracker(requested: Tracker | None) -> Tracker:
    """Return the requested tracker; by default trackio, if it is installed.

    Raises:
        UsageError: The requested tracker is not installed.
    """
    if requested is None:
        return "trackio" if find_spec("trackio") else "none"
    if requested != "none" and find_spec(requested) is None:
        raise UsageError(
            f"`report_to={requested}`: {requested} is not installed", hint=f"pip install {requested}"
        )
    return requested
