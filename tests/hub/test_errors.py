"""Answers that are no Hub's, from a proxy's page to another service's JSON: one line and a hint each time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.builders.models import save_llama
from tests.loopback_hub import Hub
from tests.loopback_hub.client import Answer, Client
from tests.loopback_hub.server import ALICE

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
    "siblings with a number for a name": {
        "body": '{"id": "a/b", "sha": "0", "siblings": [{"rfilename": 5}]}',
        "headers": JSON,
    },
    "siblings of wrong sizes": {
        "body": '{"id": "a/b", "sha": "0", "siblings": [{"rfilename": "config.json", "size": "5"}]}',
        "headers": JSON,
    },
    "a list in a list, and so on": {"body": "[" * 100_000 + "]" * 100_000, "headers": JSON},
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


@pytest.mark.parametrize("how", ["siblings with a number for a name", "a list in a list, and so on"])
def test_names_that_are_none_and_lists_without_end_are_no_answer_of_a_hub(
    hub: Hub, client: Client, how: str
) -> None:
    hub.fail("GET", "/api/models/", status=200, **ANSWERS[how])
    assert "does not answer like a Hub" in client.call("resolve", "acme/model", token=ALICE).message


ROUTES = {
    "the model": ("GET", "^/api/models/[^/]+/[^/]+(/revision/[^/]+)?$"),
    "its tree": ("GET", "/tree/"),
    "paths": ("POST", "/paths-info/"),
    "a new repository": ("POST", "/api/repos/create"),
    "the card": ("POST", "/api/validate-yaml"),
    "what to upload": ("POST", "/preupload/"),
    "where to": ("POST", "/info/lfs/objects/batch"),
    "the upload": ("PUT", "/upload/"),
    "the commit": ("POST", "/commit/"),
    "a file": ("GET", "/resolve/"),
}
FEW = (
    "a list of numbers",
    "a text",
    "null",
    "an empty object",
    "an object of wrong types",
    "a page",
    "nothing",
)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_llama(tmp_path_factory.mktemp("build") / "model")
    (folder / "build.json").write_text('{"factory_version": "0"}')
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_one_answer_that_is_no_hub_s_ends_no_command_with_a_traceback(
    hub: Hub, client: Client, build: Path, route: tuple[str, str]
) -> None:
    commits = [hub.put_model("acme/model", build, **{f"notes-{n}": b"x"}) for n in range(len(FEW))]
    source = client.call("resolve", "acme/model", token=ALICE).value
    for number, how in enumerate(FEW):
        hub.app.faults.clear()
        hub.fail(*route, **{"status": 200} | ANSWERS[how])
        answers = [
            client.call("resolve", "acme/model", token=ALICE),
            client.call("pull", source | {"commit": commits[number]}, token=ALICE),
            client.call("push", str(build), repo_id=f"alice/m{number}", message="x", token=ALICE),
        ]
        for answer in answers:
            assert answer.error != "traceback", f"{how}: {answer.message}"
            assert "\n" not in answer.message
    hub.app.faults.clear()
    for commit in commits:  # and what was cached of them does no harm
        assert client.call("pull", source | {"commit": commit}, token=ALICE).error is None
