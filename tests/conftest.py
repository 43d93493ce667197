"""Fixtures that several test files share."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.hub import Hub, running_hub

settings.register_profile("untimed", deadline=None)  # a busy machine is no fault
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def served_hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def hub(served_hub: Hub) -> Hub:
    """An empty Hub on loopback, at the same address for the whole session."""
    served_hub.reset()
    return served_hub
