"""A build hands its stages to several processes, whatever reports their progress."""

from pathlib import Path

import pytest

from factory.api.functions import make
from factory.cli.console import StageLines, console
from factory.config.request import BuildRequest
from factory.pipeline.prepare import prepare
from factory.pipeline.run import Run


class Stop(Exception): ...  # noqa: N818


class HealingInTwo(StageLines):
    """The terminal's reporter, which allows healing two processes, and ends the build after it."""

    run: Run

    def started(self, stage: str) -> None:
        self.run.processes = 2 if stage == "heal" else 1
        if stage == "merge":
            raise Stop
        super().started(stage)


def test_the_terminal_follows_healing_in_two_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter = HealingInTwo(console())
    request = BuildRequest.read(
        {
            "model": "demo",
            "drop": 0.4,
            "samples": 4,
            "heal_steps": 2,
            "sequence_length": 64,
            "tasks": "none",
            "report_to": "none",
            "home": str(tmp_path / "home"),
            "out": str(tmp_path / "out"),
        }
    )
    (one,) = prepare([request], reporter)
    reporter.run = one.run
    with pytest.raises(Stop):
        make(one, reporter)
    assert "✓ heal" in capsys.readouterr().out
