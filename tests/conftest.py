"""Fixtures that several test files share."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from hypothesis import settings

from tests.loopback_hub import Hub, running_hub

# A file is one worker's, so the files that take minutes come first: the others fill what is left of the time.
LONGEST_FIRST = (
    "whole/test_build", "whole/test_production", "whole/test_hostile", "whole/test_kills",
    "parallel/test_launch", "whole/test_faults", "jobs/test_jobs", "spaces/test_browser",
    "healing/test_heal", "pipeline/test_preview", "spaces/test_space", "builds/test_reproduce",
    "builds/test_publish", "hub/test_remote_code", "hub/test_pull_and_push", "pipeline/test_sweep",
    "builds/test_pruned_folder", "cli/test_main", "cli/test_streams", "whole/test_families",
    "report/test_card", "healing/test_distill", "healing/test_trainers", "healing/test_seam",
    "serving/test_runtimes", "model/test_architecture", "evaluation/test_evaluate", "pruning/test_search",
    "pruning/test_measure",
)  # fmt: skip

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job of a shell ignores it, and so do children
settings.register_profile("untimed", deadline=None)  # a busy machine is no fault
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files for `-n 2 --dist loadfile --no-loadscope-reorder`."""
    place = {Path(__file__).parent / f"{name}.py": index for index, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(scope="session")
def served_hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def hub(served_hub: Hub) -> Hub:
    """An empty Hub on loopback, at the same address for the whole session."""
    served_hub.reset()
    return served_hub


@pytest.fixture
def own_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The same as the Hub of this process' client, so that tokens go to it."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return hub
