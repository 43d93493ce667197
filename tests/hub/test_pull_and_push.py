"""The Hub, both ways: the real client in its own process, against a Hub on loopback."""

import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from factory.hub.client import SILENCE_SECONDS
from tests.builders.files import content_of
from tests.forks import fork_once
from tests.loopback_hub import Hub
from tests.loopback_hub.client import Answer, Client
from tests.loopback_hub.server import ALICE, BOB

README = "---\nlicense: apache-2.0\nlanguage: [en, de]\nbase_model: org/model\n---\n# A model\n"
WEIGHTS_INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with 4 layers in 3 shards, with a card and a tokenizer's settings."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="10KB")
    (folder / "README.md").write_text(README)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder


@pytest.fixture
def build(model: Path, tmp_path: Path) -> Path:
    """A folder as a build leaves it for publishing."""
    folder = tmp_path / "build"
    shutil.copytree(model, folder)
    (folder / "build.json").write_text('{"factory_version": "0"}')
    (folder / "figures").mkdir()
    (folder / "figures" / "loss.png").write_bytes(b"\x89PNG" + bytes(500))
    return folder


@pytest.fixture(scope="module")
def xet(served_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(served_hub, tmp_path_factory.mktemp("home"))
    yield client
    client.close()


@pytest.fixture(scope="module")
def lfs(served_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(served_hub, tmp_path_factory.mktemp("home"), HF_HUB_DISABLE_XET="1")
    yield client
    client.close()


@pytest.fixture(params=["xet", "lfs"])
def client(request: pytest.FixtureRequest) -> Client:
    """Both ways up."""
    chosen: Client = request.getfixturevalue(request.param)
    return chosen


def refused(answer: Answer, *words: str, error: str = "HubError") -> None:
    """A deliberate error that says these words, in one line, with a hint and without a token."""
    assert answer.error == error, answer.message
    told = f"{answer.message} | {answer.hint}"
    for word in words:
        assert word in told
    assert "\n" not in told
    assert answer.hint
    assert ALICE not in told
    assert BOB not in told


def pulled(client: Client, reference: str, *, token: str | None = ALICE) -> Answer:
    source = client.call("resolve", reference, token=token)
    assert source.error is None, source.message
    return client.call("pull", source.value, token=token)


# Resolve -------------------------------------------------------------------------------------------


def test_a_repository_is_described_from_its_headers_alone(hub: Hub, xet: Client, model: Path) -> None:
    commit = hub.put_model("org/facts", model)
    source = xet.call("resolve", "org/facts", token=None).value
    layer = 2 * 16 * 16 + 2 * 16 * 16 + 3 * 16 * 32 + 2 * 16  # q and o, k and v (full width here), FFN, norms
    assert source["commit"] == commit
    assert source["name"] == "facts"
    assert source["num_layers"] == 4
    assert source["layer_parameters"] == [layer] * 4
    assert source["layer_bytes"] == [2 * layer] * 4
    assert source["num_parameters"] == 4 * layer + 2 * 64 * 16 + 16
    assert source["size_bytes"] == sum(p.stat().st_size for p in model.glob("*.safetensors"))
    assert source["vocab_size"] == 64
    assert source["dtype"] == "bfloat16"
    assert source["architecture"] == "LlamaForCausalLM"
    assert source["license"] == "apache-2.0"
    assert source["languages"] == ["en", "de"]
    assert source["has_chat_template"] is True
    reads = [r for r in hub.requests if r.method == "GET" and r.path.endswith(".safetensors")]
    assert len(reads) == 3
    assert all("range" in r.headers for r in reads)


def test_a_folder_and_a_repository_of_the_same_files_agree(hub: Hub, xet: Client, model: Path) -> None:
    hub.put_model("org/tiny", model)
    from_hub = xet.call("resolve", "org/tiny", token=None).value
    from_folder = xet.call("resolve", str(model), token=None).value
    assert from_folder["commit"] != from_hub["commit"]
    same = from_hub.keys() - {"commit", "repo_id"}
    assert {k: from_folder[k] for k in same} == {k: from_hub[k] for k in same}


def test_the_commit_of_a_folder_follows_its_weights_and_not_its_card(xet: Client, build: Path) -> None:
    before = xet.call("resolve", str(build), token=None).value["commit"]
    (build / "README.md").write_text("another card")
    assert xet.call("resolve", str(build), token=None).value["commit"] == before
    weights = next(build.glob("*-00001-*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert xet.call("resolve", str(build), token=None).value["commit"] != before


def test_a_revision_is_pinned(hub: Hub, xet: Client, model: Path) -> None:
    first = hub.put_model("org/pinned", model)
    second = hub.put_model("org/pinned", model, NOTICE=b"new")
    assert xet.call("resolve", "org/pinned", token=None).value["commit"] == second
    assert xet.call("resolve", f"org/pinned@{first}", token=None).value["commit"] == first


def test_what_is_no_reference_is_a_usage_error(hub: Hub, xet: Client) -> None:
    refused(xet.call("resolve", "./nowhere", token=None), "./nowhere", error="UnknownModelError")
    refused(xet.call("resolve", "some model", token=None), "some model", error="UnknownModelError")


def test_a_missing_repository_is_told_with_and_without_a_login(hub: Hub, xet: Client) -> None:
    refused(xet.call("resolve", "org/missing", token=None), "org/missing", "hf auth login")
    refused(xet.call("resolve", "org/missing", token=ALICE), "org/missing", "token")


def test_a_private_repository_opens_for_its_owner_alone(hub: Hub, xet: Client, model: Path) -> None:
    hub.put_model("alice/private", model)
    hub.repository("alice/private").private = True
    assert pulled(xet, "alice/private").error is None
    refused(xet.call("resolve", "alice/private", token=BOB), "alice/private", "private")
    refused(xet.call("resolve", "alice/private", token=None), "alice/private", "hf auth login")


def test_a_gated_repository_names_the_page_with_its_terms(hub: Hub, xet: Client, model: Path) -> None:
    hub.put_model("org/gated", model)
    hub.repository("org/gated").gated_to = {"alice"}
    for token in (BOB, None):
        refused(
            xet.call("resolve", "org/gated", token=token), "gated", f"{hub.url}/org/gated", "hf auth login"
        )
    assert pulled(xet, "org/gated").error is None


def test_a_wrong_token_and_a_wrong_revision_are_told_apart(hub: Hub, xet: Client, model: Path) -> None:
    hub.put_model("org/tiny", model)
    refused(xet.call("resolve", "org/tiny", token="hf_stale"), "does not accept your token")
    refused(xet.call("resolve", "org/tiny@v9", token=None), "no revision 'v9'")
    refused(xet.call("resolve", f"org/tiny@{'0' * 40}", token=None), "no revision '000")


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({"pytorch_model.bin": b"x", "config.json": b"{}"}, "pytorch_model.bin"),
        ({"tiny.Q4_K_M.gguf": b"x"}, "GGUF"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, "adapter"),
        (
            {"adapter_config.json": b"{}", "config.json": b"{}", "model.safetensors": b"x"},
            "an adapter (adapter_config.json) beside its weights",
        ),
        ({"model.safetensors": b"x"}, "no config.json"),
        ({"README.md": b"# nothing"}, "neither model.safetensors nor"),
        ({"model.safetensors": b"\0" * 4, "config.json": b'{"model_type": "llama"}'}, "only 4 bytes long"),
    ],
)
def test_unusable_weights_are_refused_by_name(
    hub: Hub, xet: Client, tmp_path: Path, files: dict[str, bytes], word: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    hub.put_model("org/unusable", tmp_path)
    refused(xet.call("resolve", "org/unusable", token=None), word, error="CheckpointError")
    if word != "only 4 bytes long":
        refused(xet.call("resolve", str(tmp_path), token=None), word, error="CheckpointError")


@pytest.mark.parametrize("name", ["/abs.safetensors", "..\\x.safetensors", "../x.safetensors", 3])
def test_an_index_that_leads_out_of_its_repository_is_refused_by_name(
    hub: Hub, xet: Client, model: Path, name: str | int
) -> None:
    index = json.dumps({"weight_map": {"a": name}}).encode()
    hub.put_model("org/leads", model, **{WEIGHTS_INDEX: index, str(name): b"x"})
    refused(
        xet.call("resolve", "org/leads", token=None), "safetensors", str(name)[-13:], error="CheckpointError"
    )


@pytest.mark.parametrize("token", ["hf_é", "hf_naïve\x07", "hf_“quoted”"])
def test_a_token_that_cannot_be_sent_is_told_and_not_shown(
    hub: Hub, xet: Client, build: Path, token: str
) -> None:
    for answer in (xet.call("resolve", "org/tiny", token=token), push(xet, build, "alice/x", token=token)):
        refused(answer, "your token", "HF_TOKEN")
        assert token[3:] not in answer.message + answer.hint


def test_a_password_in_the_address_of_the_hub_is_not_shown(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.put_model("org/tiny", model)
    client = Client(hub, tmp_path, HF_ENDPOINT=hub.url.replace("//", "//me:s3cret@"))
    for how in ({"status": 412}, {"status": 200, "body": "no"}, {"drop": True}, {"delay_seconds": 4}):
        if "delay_seconds" in how:
            client.call("bear_silence", 0.5, token=None)
        fault = hub.fail("GET", "/api/models/org/tiny", **how)
        answer = client.call("resolve", "org/tiny", token=None)
        refused(answer, hub.url)
        assert "s3cret" not in answer.message + answer.hint
        fault.times = 0
    client.close()


def test_foreign_code_is_refused_by_name(hub: Hub, xet: Client, model: Path) -> None:
    config = {"model_type": "homemade", "auto_map": {"AutoConfig": "configuration_homemade.Homemade"}}
    hub.put_model("org/code", model, **{"config.json": json.dumps(config).encode()})
    answer = xet.call("resolve", "org/code", token=None)
    refused(answer, "homemade", "its own code", error="UnsupportedArchitectureError")


@pytest.mark.parametrize(
    ("status", "word"),
    [(429, "too many requests"), (503, "returned an error"), (403, "denies"), (200, "not answer like a Hub")],
)
def test_a_refusal_while_reading_is_told_in_words(
    hub: Hub, xet: Client, model: Path, status: int, word: str
) -> None:
    hub.put_model("org/tiny", model)
    hub.fail("GET", "/api/models/org/tiny", status=status, body=f"no, {ALICE}")
    refused(xet.call("resolve", "org/tiny", token=ALICE), word)


def test_a_silent_server_is_not_waited_for_for_ever(hub: Hub, xet: Client, model: Path) -> None:
    hub.put_model("org/slow", model)
    hub.fail("GET", "/api/models/org/slow", delay_seconds=4)
    xet.call("bear_silence", 0.5, token=None)
    refused(xet.call("resolve", "org/slow", token=None), "did not answer in time")
    xet.call("bear_silence", SILENCE_SECONDS, token=None)


# Pull ----------------------------------------------------------------------------------------------


def test_pull_brings_what_a_build_needs_and_nothing_else(hub: Hub, client: Client, model: Path) -> None:
    extra = {
        "pytorch_model.bin": b"pickle",
        "tiny.gguf": b"gguf",
        "consolidated.safetensors": b"a second copy",
        "original/params.json": b"{}",
        "modeling_tiny.py": b"raise SystemExit",
        "LICENSE": b"Apache",
        "MODEL LICENSE AGREEMENT.txt": b"terms",
        "licenses/MIT.txt": b"MIT",
        "tokenizer.json": b"{}",
    }
    hub.put_model("org/much", model, **extra)
    answer = pulled(client, "org/much", token=None)
    wanted = content_of(model) | {
        name: extra[name]
        for name in ("LICENSE", "MODEL LICENSE AGREEMENT.txt", "licenses/MIT.txt", "tokenizer.json")
    }
    assert content_of(Path(answer.value["folder"])) == wanted
    total = sum(map(len, wanted.values()))
    assert answer.value["progress"][-1] == [total, total]


def test_a_second_pull_downloads_nothing_and_removes_what_killed_ones_left(
    hub: Hub, xet: Client, model: Path
) -> None:
    hub.put_model("org/twice", model)
    first = pulled(xet, "org/twice", token=None)
    downloads = hub.count("GET", "/resolve/")
    source = xet.call("resolve", "org/twice", token=None).value
    headers = hub.count("GET", "/resolve/")
    folder = Path(first.value["folder"])
    blob = (folder / "model-00001-of-00003.safetensors").resolve()
    killed, under_way = (blob.with_name(f"{name}.0123abcd.incomplete") for name in (blob.name, "f" * 64))
    killed.write_bytes(b"half")
    under_way.write_bytes(b"half")
    second = xet.call("pull", source, token=None)
    assert second.value["folder"] == first.value["folder"]
    assert (killed.exists(), under_way.exists()) == (False, True)
    assert hub.count("GET", "/resolve/") == headers
    assert headers - downloads == 3  # the headers of the three shards


def test_what_an_interrupted_pull_left_whole_is_not_counted_again(
    hub: Hub, model: Path, tmp_path: Path
) -> None:
    hub.put_model("org/part", model)
    program = """
from pathlib import Path
from huggingface_hub import hf_hub_download
from factory.hub.resolve import resolve
before = resolve("org/part")
shard = Path(hf_hub_download("org/part", "model-00002-of-00003.safetensors")).stat().st_size
after = resolve("org/part")
print(before.download_bytes == before.size_bytes > shard, after.download_bytes == before.size_bytes - shard)
"""
    done = fork_once(os.environ | hub.environment(tmp_path), folder=tmp_path, program=program)
    assert done.stdout == "True True\n", done.stderr


def test_without_a_connection_what_is_cached_serves_and_the_rest_is_told(
    hub: Hub, served_hub: Hub, model: Path, tmp_path: Path
) -> None:
    hub.put_model("org/cached", model)
    hub.put_model("org/half", model)
    online = Client(hub, tmp_path)
    source = online.call("resolve", "org/cached", token=None).value
    folder = online.call("pull", source, token=None).value["folder"]
    online.call("resolve", "org/half", token=None)  # leaves its configuration in the cache
    online.close()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for words, variables in (
            (["HF_HUB_OFFLINE is set"], {"HF_HUB_OFFLINE": "1"}),
            (["no connection to", nobody], {"HF_ENDPOINT": nobody}),
        ):
            offline = Client(hub, tmp_path, **variables)
            assert offline.call("resolve", "org/cached", token=None).value == source
            assert offline.call("pull", source, token=None).value["folder"] == folder
            for reference in ("org/half", "org/never"):
                refused(offline.call("resolve", reference, token=None), *words)
            offline.close()


# Texts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [{"drop": True}, {"truncate": True}, {"status": 503}, {"status": 429, "headers": {"Retry-After": "1"}}],
)
def test_a_text_whose_connection_breaks_in_between_is_read_on(
    hub: Hub, xet: Client, how: dict[str, object]
) -> None:
    name = f"acme/text-{how.get('status') or next(iter(how))}"
    rows = [f"row {number} " + "x" * 2000 for number in range(3000)]  # more than one block of 5 MB
    hub.put_dataset(name, {"train.jsonl": "\n".join(json.dumps({"text": row}) for row in rows).encode()})
    fault = hub.fail("GET", f"/datasets/{name}/resolve/", **how, skip=1, times=1)
    answer = xet.call("read_text", name, token=None)
    assert answer.value == rows, answer.message
    assert fault.times == 0


# Push ----------------------------------------------------------------------------------------------


def push(
    client: Client, folder: Path, repo_id: str, *, token: str | None = ALICE, **options: object
) -> Answer:
    options = {"message": "Publish", **options}
    return client.call("push", str(folder), repo_id=repo_id, token=token, **options)


def num_commits(hub: Hub, repo_id: str) -> int:
    """Commits beside the Hub's own first one."""
    return len(hub.repository(repo_id).commits) - 1


def test_a_push_is_one_commit_that_comes_back_byte_for_byte(hub: Hub, client: Client, build: Path) -> None:
    answer = push(client, build, "alice/whole")
    assert answer.error is None, answer.message
    assert num_commits(hub, "alice/whole") == 1
    assert hub.files("alice/whole") == content_of(build)
    assert hub.repository("alice/whole").private is True
    assert answer.value["commit"] == hub.repository("alice/whole").refs["main"]
    assert answer.value["files"].keys() == content_of(build).keys()
    folder = Path(pulled(client, "alice/whole").value["folder"])
    assert content_of(folder).items() <= content_of(build).items()
    assert len(list(folder.glob("*.safetensors"))) == 3


def test_a_second_push_commits_nothing_and_a_change_commits_once(
    hub: Hub, client: Client, build: Path
) -> None:
    first = push(client, build, "alice/again")
    assert push(client, build, "alice/again").value == first.value
    assert num_commits(hub, "alice/again") == 1
    (build / "README.md").write_text(README + "more\n")
    assert push(client, build, "alice/again").value["commit"] != first.value["commit"]
    assert num_commits(hub, "alice/again") == 2
    assert hub.files("alice/again") == content_of(build)


def test_weights_of_an_earlier_build_do_not_stay_behind(hub: Hub, xet: Client, build: Path) -> None:
    push(xet, build, "alice/stale")
    for old in (*build.glob("*.safetensors"), build / WEIGHTS_INDEX):
        old.unlink()
    (build / "model.safetensors").write_bytes(b"another build")
    assert push(xet, build, "alice/stale").error is None
    assert hub.files("alice/stale") == content_of(build)
    assert num_commits(hub, "alice/stale") == 2


def test_a_bare_name_belongs_to_whoever_is_logged_in(hub: Hub, xet: Client, build: Path) -> None:
    assert push(xet, build, "bare", private=False).value["repo_id"] == "alice/bare"
    assert push(xet, build, "~/home").value["repo_id"] == "alice/home"
    assert hub.repository("alice/bare").private is False


def test_somebody_elses_content_is_not_overwritten_unasked(hub: Hub, xet: Client, build: Path) -> None:
    hub.storage.put("model", "alice/thesis", {"thesis.txt": b"years of work"})
    before = hub.files("alice/thesis")
    for branch in (None, "v2"):
        refused(push(xet, build, "alice/thesis", revision=branch), "thesis.txt", "nothing was published")
    assert hub.files("alice/thesis") == before
    assert hub.repository("alice/thesis").refs.keys() == {"main"}
    refused(push(xet, build, "alice/thesis", create_pr=True), "public", "proposed", "`public`")
    assert hub.count("POST", "/preupload/") == 0
    proposal = push(xet, build, "alice/thesis", create_pr=True, private=False)
    assert hub.files("alice/thesis") == before
    assert hub.files("alice/thesis", revision=proposal.value["commit"]) == before | content_of(build)
    assert proposal.value["url"] == f"{hub.url}/alice/thesis/discussions/1"
    refused(push(xet, build, "alice/thesis", force=True), "public", "`public`", "nothing was published")
    assert push(xet, build, "alice/thesis", force=True, private=False).error is None
    assert hub.files("alice/thesis") == before | content_of(build)


def test_somebody_elses_weights_are_never_deleted(hub: Hub, xet: Client, build: Path) -> None:
    theirs = {"theirs.safetensors": b"weeks", "build.json": b"[]", "README.md": b"theirs"}
    hub.storage.put("model", "alice/theirs", theirs)
    for text in (README, README + "newer\n"):  # the second time there is a build.json of ours beside them
        (build / "README.md").write_text(text)
        proposal = push(xet, build, "alice/theirs", create_pr=True, private=False)
        assert hub.files("alice/theirs", revision=proposal.value["commit"]) == theirs | content_of(build)
    assert push(xet, build, "alice/theirs", force=True, private=False).error is None
    assert hub.files("alice/theirs") == theirs | content_of(build)


def test_a_second_proposal_goes_into_the_pull_request_that_is_open(
    hub: Hub, xet: Client, build: Path
) -> None:
    push(xet, build, "alice/pr")
    repository = hub.repository("alice/pr")

    def propose(text: str, **options: object) -> tuple[int, str]:
        (build / "README.md").write_text(README + text)
        value = push(xet, build, "alice/pr", create_pr=True, **options).value
        assert value["url"] == f"{hub.url}/alice/pr/discussions/{value['pull_request']}"
        assert hub.files("alice/pr", revision=f"refs/pr/{value['pull_request']}") == content_of(build)
        return value["pull_request"], value["commit"]

    first = propose("one\n")
    assert propose("one\n") == first  # nothing to add
    assert propose("two\n")[0] == 1
    assert propose("three\n", message="Another title", pull_request=1)[0] == 1  # as recorded
    assert propose("four\n", message="Another title")[0] == 2  # of that title there is none
    repository.pull_requests[2].author = "bob"
    assert propose("five\n", message="Another title", pull_request=2)[0] == 3  # not the account's own
    for number, status in ((1, "merged"), (3, "closed")):
        repository.pull_requests[number].status = status
    assert propose("six\n", message="Another title", pull_request=3)[0] == 4
    assert propose("seven\n", message="Publish a", named="a")[0] == 5
    assert propose("eight\n", message="Publish b", named="b")[0] == 6  # of another build
    assert propose("nine\n", message="Publish a", named="a")[0] == 5
    assert propose("ten\n", message="Another title", named="a")[0] == 7  # nothing says whose that title is
    assert hub.files("alice/pr")["README.md"] == README.encode()


def test_whose_repository_it_is_does_not_matter_to_a_proposal(hub: Hub, xet: Client, build: Path) -> None:
    hub.storage.put("model", "org/theirs", {"README.md": b"theirs"})
    for text in ("one\n", "two\n"):
        (build / "README.md").write_text(README + text)
        assert push(xet, build, "org/theirs", create_pr=True, private=False).value["pull_request"] == 1
    assert hub.files("org/theirs", revision="refs/pr/1") == content_of(build)


def test_weights_that_would_be_loaded_in_place_of_the_builds_stop_a_push(
    hub: Hub, xet: Client, build: Path
) -> None:
    theirs = {"model.safetensors": b"weeks"}
    hub.storage.put("model", "alice/whole", theirs)
    for create_pr in (True, False):
        answer = push(xet, build, "alice/whole", create_pr=create_pr, force=not create_pr, private=False)
        refused(answer, "model.safetensors", "nothing was published")
    assert hub.files("alice/whole") == theirs


def test_a_branch_is_made_and_main_left_alone(hub: Hub, xet: Client, build: Path) -> None:
    assert push(xet, build, "alice/branch", revision="v2").error is None
    assert hub.files("alice/branch", revision="v2") == content_of(build)
    assert hub.files("alice/branch") == {}


def test_a_bad_card_is_refused_before_anything_goes_up(hub: Hub, xet: Client, build: Path) -> None:
    (build / "README.md").write_text(README.replace("org/model", "/home/me/model"))
    refused(push(xet, build, "alice/card"), "base_model", "nothing was published")
    (build / "README.md").write_text("---\nlicense: [\n---\n")
    refused(push(xet, build, "alice/card"), "card", "nothing was published")
    assert hub.storage.repositories == {}


def test_who_may_not_write_is_told(hub: Hub, xet: Client, build: Path) -> None:
    refused(push(xet, build, "alice/no", token=None), "not logged in", "hf auth login")
    refused(push(xet, build, "bob/no", token=BOB), "may not write to bob/no", "/settings/tokens")
    refused(push(xet, build, "org/no"), "may not write to org/no", "namespace org")
    refused(push(xet, build, "no", token="hf_stale"), "does not accept your token")
    assert hub.storage.repositories == {}


@pytest.mark.parametrize(
    ("status", "word"),
    [
        (401, "does not accept your token"),
        (402, "no room"),
        (403, "may not write"),
        (409, "another client is changing"),
        (412, "another commit"),
        (413, "no room"),
        (429, "too many requests"),
        (503, "returned an error"),
    ],
)
def test_a_refused_commit_publishes_nothing_and_the_same_command_goes_on(
    hub: Hub, client: Client, build: Path, status: int, word: str
) -> None:
    body = json.dumps({"error": f"no, {ALICE}\nreally"})
    fault = hub.fail("POST", "/commit/", status=status, body=body, headers={"Retry-After": "7"})
    refused(push(client, build, "alice/refused"), word, "nothing was published")
    assert hub.files("alice/refused") == {}
    fault.times = 0
    assert push(client, build, "alice/refused").error is None
    assert num_commits(hub, "alice/refused") == 1


@pytest.mark.parametrize(("status", "word"), [(402, "no room"), (409, "another client is changing")])
def test_a_refused_repository_is_told(hub: Hub, xet: Client, build: Path, status: int, word: str) -> None:
    hub.fail("POST", "/api/repos/create", status=status, body="{}")
    refused(push(xet, build, "alice/refused"), word, "nothing was published")
    assert hub.storage.repositories == {}


def test_a_pull_request_to_a_branch_is_a_usage_error(xet: Client, build: Path) -> None:
    answer = push(xet, build, "alice/both", create_pr=True, revision="v2")
    refused(answer, "'v2'", "`create_pr`", error="UsageError")


def test_a_file_that_lfs_refuses_is_told(hub: Hub, lfs: Client, build: Path) -> None:
    error = {"code": 413, "message": "object too large"}
    objects = [{"oid": "0" * 64, "size": 1, "error": error}]
    hub.fail("POST", "/objects/batch", status=200, body=json.dumps({"objects": objects}))
    refused(push(lfs, build, "alice/large"), "object too large", "nothing was published")


def test_where_the_hub_is_gone_for_good_nothing_is_claimed(hub: Hub, xet: Client, build: Path) -> None:
    gone = hub.fail("GET", "/api/models/alice/gone", drop=True, times=0)

    def vanish() -> None:
        gone.times = 9

    hub.fail("POST", "/commit/", drop=True, after=True, times=1, meanwhile=vanish)
    refused(push(xet, build, "alice/gone"), "unknown", "same command")
    gone.times = 0
    assert push(xet, build, "alice/gone").error is None
    assert num_commits(hub, "alice/gone") == 1


def test_a_lost_pull_request_is_not_made_twice_unasked(hub: Hub, xet: Client, build: Path) -> None:
    push(xet, build, "alice/pr")
    (build / "README.md").write_text(README + "newer\n")
    lost = hub.fail("POST", "/commit/", drop=True, after=True)
    refused(push(xet, build, "alice/pr", create_pr=True), "pull request", f"{hub.url}/alice/pr/discussions")
    assert num_commits(hub, "alice/pr") == 2
    lost.times = 0
    assert push(xet, build, "alice/pr", create_pr=True).value["pull_request"] == 1
    assert num_commits(hub, "alice/pr") == 2


def test_somebody_elses_commit_in_between_is_not_overwritten(hub: Hub, xet: Client, build: Path) -> None:
    push(xet, build, "alice/race")
    (build / "README.md").write_text(README + "newer\n")
    theirs = {"theirs.txt": b"theirs"}
    hub.fail("POST", "/preupload/", times=1, meanwhile=lambda: hub.storage.put("model", "alice/race", theirs))
    before = content_of(build) | theirs | {"README.md": README.encode()}
    refused(push(xet, build, "alice/race"), "another commit", "nothing was published")
    assert hub.files("alice/race") == before


def test_what_was_published_is_compared_with_what_was_sent(hub: Hub, lfs: Client, build: Path) -> None:
    def tamper() -> None:
        repository = hub.repository("alice/compared")
        files = repository.commits[repository.refs["main"]].files
        if "config.json" in files:
            files["config.json"] = files["README.md"]

    hub.fail("GET", "/tree/", meanwhile=tamper)
    refused(push(lfs, build, "alice/compared"), "config.json on alice/compared", "not what was uploaded")
