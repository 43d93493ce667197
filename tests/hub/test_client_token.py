"""The token stays with the Hub, whichever addresses its answers name: the second origin sees none."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    close_session,
    constants,
    get_async_session,
    get_session,
    hf_hub_download,
)

import factory.hub.client  # guards the clients of this process
from factory.hub.client import is_hub
from tests.loopback_hub import Hub
from tests.loopback_hub.app import Request
from tests.loopback_hub.server import ALICE

BEARER = {"Authorization": f"Bearer {ALICE}"}


@pytest.fixture
def elsewhere(own_hub: Hub) -> Iterator[Callable[[], list[Request]]]:
    """What the second origin was asked; another port is another origin."""
    close_session()  # of an earlier test
    port = int(own_hub.cdn_url.rpartition(":")[2])
    yield lambda: [request for request in own_hub.requests if request.port == port]
    close_session()


def kept(requests: list[Request]) -> bool:
    """Whether there were any, none with the token in a header."""
    return bool(requests) and not any(ALICE in " ".join(r.headers.values()) for r in requests)


def test_the_hub_itself_gets_the_token(hub: Hub, elsewhere: Callable[[], list[Request]]) -> None:
    assert HfApi(token=ALICE).whoami()["name"] == "alice"
    assert elsewhere() == []


def test_a_large_file_goes_up_and_is_confirmed_without_the_token(
    hub: Hub, elsewhere: Callable[[], list[Request]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hub.app.next_url = hub.cdn_url
    api = HfApi(token=ALICE)
    api.create_repo("alice/large")
    api.create_commit("alice/large", [CommitOperationAdd("a.bin", b"x" * 100)], commit_message="x")
    assert [request.method for request in elsewhere()] == ["PUT", "POST"]
    assert kept(elsewhere())


def test_the_next_page_of_a_listing_is_asked_for_without_the_token(
    hub: Hub, elsewhere: Callable[[], list[Request]]
) -> None:
    hub.put_dataset("org/many", {f"{number:04d}.txt": b"x" for number in range(1001)})
    hub.app.next_url = hub.cdn_url
    assert len(list(HfApi(token=ALICE).list_repo_tree("org/many", repo_type="dataset"))) == 1002
    assert kept(elsewhere())


def test_a_download_takes_no_access_to_xet_from_elsewhere(
    hub: Hub, elsewhere: Callable[[], list[Request]], tmp_path: Path
) -> None:
    hub.storage.put("model", "alice/xet", {"a.bin": b"x" * 100})
    hub.storage.offer_over_xet()
    hub.app.next_url = hub.cdn_url
    path = hf_hub_download("alice/xet", "a.bin", token=ALICE, cache_dir=tmp_path)
    assert Path(path).read_bytes() == b"x" * 100
    assert not hub.count("GET", "/xet-read-token/")
    assert kept(elsewhere())


def test_neither_of_the_clients_forgets_it_after_a_lost_connection(
    hub: Hub, elsewhere: Callable[[], list[Request]]
) -> None:
    async def ask() -> None:
        async with get_async_session() as client:
            await client.get(f"{hub.cdn_url}/api/whoami-v2", headers=BEARER)

    get_session().get(f"{hub.cdn_url}/api/whoami-v2", headers=BEARER | {"Cookie": f"token={ALICE}"})
    close_session()  # as the client does when no connection can be made
    get_session().get(f"{hub.cdn_url}/api/whoami-v2", headers=BEARER)
    asyncio.run(ask())
    assert len(elsewhere()) == 3
    assert kept(elsewhere())


def test_a_client_that_replaces_another_is_bound_in_time_too(
    hub: Hub, elsewhere: Callable[[], list[Request]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factory.hub.client, "SILENCE_SECONDS", 0.05)
    hub.fail("GET", "/api/whoami-v2", delay_seconds=5.0)
    for _ in range(2):
        with pytest.raises(httpx2.ReadTimeout):
            HfApi(token=ALICE).whoami()
        close_session()


@pytest.mark.parametrize(
    ("url", "same"),
    [
        ("https://huggingface.co/api/models/a/b", True),
        ("https://huggingface.co:443/x", True),
        ("https://HuggingFace.co/x", True),
        ("http://huggingface.co/x", False),
        ("https://huggingface.co:8443/x", False),
        ("https://huggingface.co.example.com/x", False),
        ("https://huggingface.co@example.com/x", False),
        ("https://cdn.huggingface.co/x", False),
        ("/api/models/a/b", False),
    ],
)
def test_an_origin_is_scheme_host_and_port(monkeypatch: pytest.MonkeyPatch, url: str, same: bool) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    assert is_hub(httpx2.URL(url)) is same


@pytest.mark.parametrize(
    ("hub", "url", "same"),
    [
        ("http://hub.example", "https://hub.example/x", True),
        ("http://hub.example:80", "https://hub.example:443/x", True),
        ("http://hub.example", "https://hub.example:8443/x", False),
        ("http://hub.example:8080", "https://hub.example:8080/x", False),
        ("http://hub.example:8080", "https://hub.example/x", False),
        ("http://hub.example", "https://other.example/x", False),
        ("https://hub.example", "http://hub.example/x", False),
    ],
)
def test_the_token_may_step_up_to_https_and_never_down(
    monkeypatch: pytest.MonkeyPatch, hub: str, url: str, same: bool
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub)
    assert is_hub(httpx2.URL(url)) is same
