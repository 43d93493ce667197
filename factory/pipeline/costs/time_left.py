"""Correct the estimate of a build by the time that its stages take."""

from collections.abc import Mapping

DOUBT = 10.0  # seconds of each stage that say nothing of the machine's pace: starting, loading


class TimeLeft:
    """The time left of a build, as its stages begin and end.

    Args:
        estimates: Seconds of each stage still to run, in their order.
    """

    def __init__(self, estimates: Mapping[str, float]) -> None:
        self.estimates = dict(estimates)
        self.spent = dict.fromkeys(estimates, 0.0)  # on the finished parts of each stage
        self.running = ""  # the stage that runs; those before it are finished

    def started(self, name: str) -> None:
        """Note that a stage, or a part of it as in "evaluate source", runs."""
        if (stage := name.split()[0]) in self.estimates:
            self.running = stage

    def finished(self, name: str, seconds: float) -> None:
        """Note the time that a stage or a part of it took."""
        if (stage := name.split()[0]) in self.estimates:
            self.spent[stage] += seconds

    def left(self, *, elapsed: float, remaining: float | None) -> float:
        """Return the seconds left of the whole build.

        Args:
            elapsed: Seconds since the part that runs began.
            remaining: Seconds that it still takes at its own pace; None if it does not tell.
        """
        order = list(self.estimates)
        place = order.index(self.running) if self.running else 0
        took = {stage: self.spent[stage] for stage in order[:place]}
        if self.running and remaining is not None and elapsed > DOUBT:
            took[self.running] = self.spent[self.running] + elapsed + remaining
        estimated = sum(self.estimates[stage] for stage in took)
        pace = (sum(took.values()) + DOUBT) / (estimated + DOUBT)
        here = pace * self.estimates.get(self.running, 0) - self.spent.get(self.running, 0) - elapsed
        later = order[place + bool(self.running) :]
        return max(here, remaining or 0) + pace * sum(self.estimates[stage] for stage in later)
