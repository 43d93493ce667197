"""Answers that are no Hub's, from a proxy's page to another service's JSON: one line and a hint each time."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.hub import Hub
from tests.hub.client import Answer, Client
from tests.hub.server import ALICE

JSON = {"content-type": "application/json"}
HTML = "<html><title>Sign in to this network</title></html>"
ANSWERS: dict[str, dict[str, Any]] = {
    "a list": {"body": "[]", "headers": JSON},
    "a list of numbers": {"body": "[1]", "headers": JSON},
    "a text": {"body": '"ok"', "headers": JSON},
    "null": {"body": "null", "headers": JSON},
    "a number": {"body": "3", "headers": JSON},
    "an empty object": {"body": "{}", "headers": JSON},
    "an object of wrong types": {"body": '{"name": 3, "id": 3, "sha": [], "siblings": 3}', "headers": JSON},
    "no date": {"body": '{"id": "a/b", "sha": "0", "lastModified": "soon"}', "headers": JSON},
    "siblings of numbers": {"body": '{"id": "a/b", "sha": "0", "siblings": [1]}', "headers": JSON},
    "half an object": {"body": '{"id": ', "headers": JSON},
    "a page": {"body": HTML, "headers": {"content-type": "text/html"}},
    "nothing": {"body": ""},
    "a page in no charset": {"body": HTML, "headers": {"content-type": "text/html; charset=x-none"}},
    "what is not packed": {"body": "{}", "headers": JSON | {"content-encoding": "gzip"}},
    "another size": {"body": "{}", "headers": JSON | {"content-length": "1"}},
    "a page for an error": {"status": 404, "body": HTML},
    "a list for an error": {"status": 404, "body": "[]", "headers": JSON},
    "null for an error": {"status": 400, "body": "null", "headers": JSON},
    "numbers for an error": {"status": 400, "body": '{"error": 3}', "headers": JSON},
    "a redirect in a circle": {"status": 302, "headers": {"location": "/api/whoami-v2"}},
    "a redirect nowhere": {"status": 302},
    "a redirect to no address": {"status": 302, "headers": {"location": "http://["}},
    "a redirect to a port that is none": {"status": 302, "headers": {"location": "http://127.0.0.1:x/"}},
    "a redirect to another protocol": {"status": 302, "headers": {"location": "ftp://127.0.0.1/"}},
    "not modified": {"status": 304},
}  # fmt: skip


@pytest.fixture(scope="module")
def client(served_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(served_hub, tmp_path_factory.mktemp("home"), HURRY="1", HF_HUB_DISABLE_XET="1")
    yield client
    client.close()


def told(answer: Answer) -> None:
    if answer.error is None:  # a list without entries is one of a Hub
        assert not answer.value
        return
    assert answer.error in ("HubError", "DataError", "CheckpointError"), answer.message
    assert answer.message
    assert "\n" not in answer.message
    assert answer.hint


@pytest.mark.parametrize("how", ANSWERS.values(), ids=ANSWERS)
def test_wherever_an_answer_is_no_hub_s_it_is_told_in_one_line(
    hub: Hub, client: Client, how: dict[str, Any]
) -> None:
    hub.fail(".*", ".*", **{"status": 200} | how)
    told(client.call("resolve", "acme/model", token=ALICE))
    told(client.call("read_text", "acme/text", token=ALICE))
    told(client.call("user_name", token=ALICE))
    told(client.call("jobs_of", "alice", token=ALICE))
    told(client.call("flavor", "a100-large", token=ALICE))
    told(client.call("fetch", "alice/state", token=ALICE))
