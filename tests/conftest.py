"""Fixtures that several test files share."""

import signal
from collections.abc import Iterator

import pytest
from huggingface_hub import constants
from hypothesis import settings

from tests.hub import Hub, running_hub

# A file is one worker's, so the files that take minutes come first: the others fill what is left of the time.
LONGEST_FIRST = (
    "test_kills", "test_build", "test_production", "test_spread", "test_faults", "test_jobs", "test_heal",
    "test_preview", "test_space_browser", "test_reproduce", "test_evaluate", "test_space", "test_sweep",
)  # fmt: skip

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job of a shell ignores it, and so do children
settings.register_profile("untimed", deadline=None)  # a busy machine is no fault
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files for `-n 2 --dist loadfile --no-loadscope-reorder`."""
    place = {name: index for index, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


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
