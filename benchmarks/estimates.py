"""Claim: the time that is shown before a build is between 0.67 and 1.5 times what the build takes.

    python benchmarks/estimates.py "demo --drop 0.4 --heal-steps 60" "MODEL --layers 10-18 --no-heal"

Each argument is a build, written as its command. It is made in an empty folder, and each stage's estimate is
shown beside the time that it took; the whole is without the start of the program.
"""

import argparse
import shlex
import tempfile
from pathlib import Path

from factory.api.functions import make
from factory.cli.build import build, read_requests
from factory.config.request import BuildRequest
from factory.pipeline.prepare import load_questions, prepare


class Silent:
    """A reporter that says nothing."""

    def started(self, stage: str) -> None: ...
    def progressed(self, stage: str, done: int, total: int, note: str) -> None: ...
    def finished(self, stage: str, summary: str, seconds: float, reused: bool) -> None: ...
    def waiting(self, stage: str) -> None: ...
    def damaged(self, stage: str, file: str) -> None: ...
    def stop(self) -> None: ...
    def note(self, message: str) -> None: ...


def request_of(command: str, scratch: Path) -> BuildRequest:
    """Return what the command line makes of a command."""
    words = [*shlex.split(command), "--home", str(scratch / "home"), "--out", str(scratch / "out")]
    with build.make_context("build", words) as context:
        own = {"dry_run", "print_config", "as_json"}
        values = {name: value for name, value in context.params.items() if name not in own}
        (request,) = read_requests(values.pop("model"), values)
    return request


def main() -> None:
    """Print a table for each build."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("builds", nargs="+")
    for command in parser.parse_args().builds:
        with tempfile.TemporaryDirectory() as scratch:
            (one,) = prepare([request_of(command, Path(scratch))], Silent())
            if "evaluate" in one.pending:
                load_questions(one.settled.request, one.settled.config, Silent())
            estimates = one.preview.stage_seconds
            make(one, Silent())
            took = dict.fromkeys(estimates, 0.0)
            for name, seconds in one.run.seconds.items():
                took[name.split()[0]] = took.get(name.split()[0], 0.0) + seconds
        print(f"\n{command} ({one.preview.device})\n")
        print("| stage | estimate, s | took, s | ratio |\n|---|--:|--:|--:|")
        rows = {stage: (estimate, took[stage]) for stage, estimate in estimates.items()}
        rows["whole"] = (sum(estimates.values()), sum(took.values()))
        for stage, (estimate, seconds) in rows.items():
            print(f"| {stage} | {estimate:.1f} | {seconds:.1f} | {estimate / max(seconds, 0.01):.2f} |")


if __name__ == "__main__":
    main()
