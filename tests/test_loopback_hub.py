"""The Hub of the tests answers the real client as the real Hub does, and fails as it is told to."""

from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from tests.loopback_hub import Hub
from tests.loopback_hub.server import ALICE, BOB
from tests.waiting import HUNG_SECONDS

pytestmark = pytest.mark.usefixtures("own_hub")


@pytest.fixture
def alice(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.url, token=ALICE)


@pytest.fixture
def bob(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.url, token=BOB)


def status(call: Callable[[], Any]) -> int:
    """How the Hub refuses a call."""
    with pytest.raises(HfHubHTTPError) as refusal:
        call()
    return int(refusal.value.response.status_code)


# Repositories -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["model", "dataset", "space"])
def test_a_repository_of_each_kind_is_made_filled_listed_and_read(hub: Hub, alice: HfApi, kind: str) -> None:
    sdk = {"space_sdk": "static"} if kind == "space" else {}
    url = alice.create_repo("alice/thing", repo_type=kind, private=True, **sdk)  # type: ignore[arg-type]
    assert (url.repo_id, url.repo_type) == ("alice/thing", kind)
    files = [CommitOperationAdd("folder/a.txt", b"one"), CommitOperationAdd("b.txt", b"two")]
    made = alice.create_commit("alice/thing", files, commit_message="two files", repo_type=kind)
    assert alice.repo_info("alice/thing", repo_type=kind).sha == made.oid
    assert set(alice.list_repo_files("alice/thing", repo_type=kind)) == {
        ".gitattributes",
        "b.txt",
        "folder/a.txt",
    }
    (found,) = alice.get_paths_info("alice/thing", ["folder/a.txt"], repo_type=kind)
    assert getattr(found, "size", None) == 3
    assert hub.files("alice/thing", kind=kind) == {"folder/a.txt": b"one", "b.txt": b"two"}


def test_a_folder_of_more_than_a_thousand_files_comes_in_pages(hub: Hub, alice: HfApi) -> None:
    hub.put_dataset("org/many", {f"part/{number:04d}.txt": b"x" for number in range(2300)})
    entries = list(alice.list_repo_tree("org/many", "part", repo_type="dataset"))
    assert [entry.path for entry in entries] == [f"part/{number:04d}.txt" for number in range(2300)]
    assert hub.count("GET", "/tree/main/part") == 3


def test_a_pull_request_changes_nothing_but_itself(hub: Hub, alice: HfApi) -> None:
    head = hub.storage.put("model", "org/model", {"a.txt": b"old"})
    hub.app.users[BOB] = ("bob", True)
    change = [CommitOperationAdd("a.txt", b"new")]
    proposal = HfApi(endpoint=hub.url, token=BOB).create_commit(
        "org/model", change, commit_message="better", create_pr=True
    )
    hub.app.users[BOB] = ("bob", False)
    assert proposal.pr_revision == "refs/pr/1"
    assert hub.files("org/model") == {"a.txt": b"old"}
    assert hub.files("org/model", revision="refs/pr/1") == {"a.txt": b"new"}
    refs = alice.list_repo_refs("org/model", include_pull_requests=True)
    assert [(ref.name, ref.target_commit) for ref in refs.branches] == [("main", head)]
    assert [(ref.ref, ref.target_commit) for ref in refs.pull_requests or []] == [("refs/pr/1", proposal.oid)]


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_private_is_unseen_and_gated_is_seen_but_not_read(hub: Hub, bob: HfApi, kind: str) -> None:
    for name in ("private", "gated"):
        hub.storage.put(kind, f"alice/{name}", {"a.txt": b"secret"})
    hub.repository("alice/private", kind=kind).private = True
    hub.repository("alice/gated", kind=kind).gated_to = {"alice"}
    with pytest.raises(RepositoryNotFoundError):
        bob.repo_info("alice/private", repo_type=kind)
    assert bob.repo_info("alice/gated", repo_type=kind).gated == "auto"
    with pytest.raises(GatedRepoError):
        bob.hf_hub_download("alice/gated", "a.txt", repo_type=kind)


# Spaces -----------------------------------------------------------------------------------------


def test_a_program_costs_a_subscription_but_two_on_zero_gpu_are_free(hub: Hub, alice: HfApi) -> None:
    def create(name: str, **how: Any) -> object:
        return alice.create_repo(f"alice/{name}", repo_type="space", space_sdk="gradio", **how)

    assert status(lambda: create("cpu")) == 402
    create("one", space_hardware="zero-a10g")
    create("two", space_hardware="zero-a10g")
    assert status(lambda: create("three", space_hardware="zero-a10g")) == 402
    hub.storage.paying.add("alice")
    create("cpu")
    assert alice.get_space_runtime("alice/cpu").hardware == "cpu-basic"
    assert alice.request_space_hardware("alice/cpu", "t4-small").hardware == "t4-small"  # type: ignore[arg-type]


def test_a_spaces_variables_can_be_read_and_its_secrets_cannot(hub: Hub, alice: HfApi, bob: HfApi) -> None:
    given = [{"key": "SOURCE", "value": "org/model"}]
    alice.create_repo("alice/page", repo_type="space", space_sdk="static", space_variables=given)
    alice.add_space_variable("alice/page", "RESULT", "alice/smaller", description="the model shown")
    alice.add_space_secret("alice/page", "HF_TOKEN", "hf_private")
    read = alice.get_space_variables("alice/page")
    assert {key: variable.value for key, variable in read.items()} == {
        "SOURCE": "org/model",
        "RESULT": "alice/smaller",
    }
    assert alice.delete_space_variable("alice/page", "SOURCE").keys() == {"RESULT"}
    assert list(alice.get_space_secrets("alice/page")) == ["HF_TOKEN"]
    assert status(lambda: bob.get_space_variables("alice/page")) == 403
    (posted,) = [r for r in hub.requests if r.method == "POST" and r.path.endswith("/secrets")]
    assert b"hf_private" in posted.body


# Faults -----------------------------------------------------------------------------------------


def fetch(hub: Hub, *, timeout: float = HUNG_SECONDS) -> httpx2.Response:
    return httpx2.get(f"{hub.url}/org/model/resolve/main/a.txt", timeout=timeout)


@pytest.fixture
def filled(hub: Hub) -> Hub:
    hub.storage.put("model", "org/model", {"a.txt": b"0123456789"})
    return hub


def test_the_next_requests_fail_with_a_status_and_then_all_is_well(filled: Hub) -> None:
    filled.fail("GET", "a.txt", status=503, times=2)
    assert [fetch(filled).status_code for _ in range(3)] == [503, 503, 200]


@pytest.mark.parametrize("how", ["drop", "truncate"])
def test_a_broken_connection_is_an_error_of_transport(filled: Hub, how: str) -> None:
    filled.fail("GET", "a.txt", times=1, **{how: True})
    with pytest.raises(httpx2.TransportError):
        fetch(filled)
    assert fetch(filled).content == b"0123456789"


def test_a_damaged_body_has_the_same_length_and_a_short_one_seems_whole(filled: Hub) -> None:
    filled.fail("GET", "a.txt", corrupt=True, times=1)
    filled.fail("GET", "a.txt", short=True, times=1)
    damaged, short = fetch(filled), fetch(filled)
    assert sum(a != b for a, b in zip(damaged.content, b"0123456789", strict=True)) == 1
    assert (short.content, short.headers["content-length"]) == (b"01234", "5")


def test_an_answer_can_be_late(filled: Hub) -> None:
    filled.fail("GET", "a.txt", delay_seconds=5.0, times=1)
    with pytest.raises(httpx2.ReadTimeout):
        fetch(filled, timeout=0.1)
    assert fetch(filled).content == b"0123456789"


def test_every_request_is_in_the_log_with_its_headers_and_body(filled: Hub, alice: HfApi) -> None:
    assert alice.whoami()["name"] == "alice"
    logged = filled.requests[-1]
    assert (logged.method, logged.path, logged.token) == ("GET", "/api/whoami-v2", ALICE)
