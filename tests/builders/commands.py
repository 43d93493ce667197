"""Arguments of commands, what they ask for, and the modules that a process for them has ready."""

from factory.cli.build import build, read_requests
from factory.config.request import BuildRequest

LIGHT = ("factory.hub.pull", "factory.report.card")
HEAVY = (
    *LIGHT,
    "transformers.models.llama.modeling_llama",
    "factory.pruning.measure",
    "factory.pruning.prune",
    "factory.evaluation.evaluate",
    "tests.builders.brief_speed",
    "factory.report.figures",
)
BRIEF = {"rounds": 2, "prompt_tokens": 16, "new_tokens": 2}  # of `compare_speed`; one round has no spread
SHORT = "--drop 0.4 --no-heal --tasks none --samples 2 --eval-documents 2 --sequence-length 16"
TEXTS = "--calibration-data measured.jsonl --eval-data evaluated.jsonl"
QUICK = [*SHORT.split(), *TEXTS.split()]


def asked(*arguments: str) -> list[BuildRequest]:
    """The requests of a command line."""
    with build.make_context("build", list(arguments)) as context:
        names = BuildRequest.options()
        values = {name: value for name, value in context.params.items() if name in names}
        return read_requests(values.pop("model"), values)
