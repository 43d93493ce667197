"""The whole way, as a user goes it: pull from a Hub in the real layout, build, publish, read back."""

import json
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from factory.artifacts import Build, Publication
from tests.builders.files import content_of
from tests.forks import Ended, fork_once
from tests.loopback_hub import Hub, running_hub
from tests.loopback_hub.app import Request
from tests.loopback_hub.reading import card_errors
from tests.production import (
    BOOLQ,
    C4,
    GSM8K,
    MMLU,
    MODEL,
    NUM_LAYERS,
    WIKIPEDIA,
    mmlu_questions,
    mmlu_subjects,
    stock,
)
from tests.waiting import HUNG_SECONDS

TOKEN = "hf_ThisTokenIsNowhereElse"
USER = "jane.doe"
REPOSITORY = "me/Mistral-7B-v0.1-drop30"
COMMAND = ("build", "mistral-7b", "--drop", "0.3", "--push-to", REPOSITORY)
# The recipe's 5,000 steps of 16 × 2048 tokens take hours; its rate moves nothing in one.
SHORTER = ("--heal-steps", "1", "--heal-lr", "0.03", "--sequence-length", "256", "--eval-documents", "100")
BUILD = Path("builds") / "Mistral-7B-v0.1-drop30"
INHERITED = ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG")
DEBUG = {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug", "HF_XET_LOG_LEVEL": "debug", "RUST_LOG": "debug"}
LFS = {"HF_HUB_DISABLE_XET": "1"}


@dataclass(frozen=True)
class Way:
    """One run of the command: over xet or over LFS, against a Hub of its own."""

    hub: Hub
    commits: dict[str, str]  # of what was stocked
    home: Path  # the user's: HF_HOME is `hf` and the build lies below `builds` in it
    variables: dict[str, str]
    done: Ended
    requests: tuple[Request, ...]  # of the command alone

    @property
    def build(self) -> Path:
        return self.home / BUILD

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.hub, self.home) | self.variables

    def run(self, *arguments: str, program: str | None = None, **more: str) -> Ended:
        """Run `factory`, or a program in Python, as this user."""
        return fork_once(self.environment | more, *arguments, folder=self.home, program=program)


def environment(hub: Hub, home: Path) -> dict[str, str]:
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
    own = {"HOME": str(home), "USER": USER, "LOGNAME": USER, "FACTORY_HOME": str(home.parent / "factory")}
    return inherited | own | hub.environment(home / "hf", token=TOKEN)


def started(variables: dict[str, str], *command: str, folder: Path) -> Ended:
    """Run a program from its start, as a user does."""
    done = subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, timeout=HUNG_SECONDS
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def travelled(home: Path, *arguments: str, over_xet: bool, **variables: str) -> Iterator[Way]:
    home.mkdir()
    with running_hub() as hub:
        hub.app.users = {TOKEN: ("me", True)}
        commits = stock(hub, home.parent / "mistral")
        if over_xet:
            hub.storage.offer_over_xet()
        own, command = environment(hub, home) | variables, (*COMMAND, *SHORTER, *arguments)
        if over_xet:
            done = started(own, sys.executable, "-m", "factory", *command, folder=home)
        else:
            done = fork_once(own, *command, folder=home)
        yield Way(hub, commits, home, variables, done, tuple(hub.requests))


@pytest.fixture(scope="module")
def xet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Way]:
    """The whole build, with everything logged that the client can log."""
    yield from travelled(tmp_path_factory.mktemp("users") / USER, over_xet=True, **DEBUG)


@pytest.fixture(scope="module")
def lfs(xet: Way) -> Iterator[Way]:
    """The same stages from the store, but pulled anew into an empty cache, and published anew."""
    home = xet.home.parent / f"{USER}.lfs"
    yield from travelled(home, "--rerun", "speed", over_xet=False, **LFS)


@pytest.fixture(params=["xet", "lfs"])
def way(request: pytest.FixtureRequest) -> Way:
    chosen: Way = request.getfixturevalue(request.param)
    return chosen


def front_matter(card: str) -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return value


# From pull to publication -----------------------------------------------------------------------


def test_the_command_runs_from_pull_to_publication(way: Way) -> None:
    assert way.done.code == 0, way.done.stderr[-3000:]
    (pulled,) = [line for line in way.done.stdout.splitlines() if line.startswith("✓ pull")]
    assert pulled.endswith(f"{MODEL} at {way.commits[MODEL][:12]}")
    assert f"dropping 3 of {NUM_LAYERS} layers (30%)" in way.done.stdout
    assert f"{way.hub.url}/{REPOSITORY}" in way.done.stdout
    assert way.hub.files(REPOSITORY) == content_of(way.build / "model")


def test_each_way_moves_the_weights_as_its_name_says(xet: Way, lfs: Way) -> None:
    def count(way: Way, method: str, pattern: str) -> int:
        return sum(r.method == method and bool(re.search(pattern, r.path)) for r in way.requests)

    whole = [r for r in xet.requests if r.path.startswith("/blobs/") and "range" not in r.headers]
    assert not [r for r in whole if r.path.removeprefix("/blobs/") in weights(xet)]
    assert count(xet, "GET", f"/models/{MODEL}/xet-read-token/")
    assert count(xet, "GET", f"/models/{REPOSITORY}/xet-write-token/") == 1
    assert not count(xet, "PUT", "")
    assert not count(lfs, "GET", "xet-")
    assert count(lfs, "PUT", "^/upload/") == 3  # weights and two figures
    assert {r.path.removeprefix("/blobs/") for r in lfs.requests} >= weights(lfs)


def weights(way: Way) -> set[str]:
    """sha256 of the source's weight files."""
    files = way.hub.repository(MODEL).commits[way.commits[MODEL]].files
    return {file.sha256 for name, file in files.items() if name.endswith(".safetensors")}


def test_only_what_is_needed_is_pulled(way: Way) -> None:
    asked = [r.path for r in way.requests if r.path.startswith(f"/{MODEL}/resolve/")]
    assert asked
    assert not [path for path in asked if path.endswith(".bin")]
    assert {path.split("/")[4] for path in asked} == {way.commits[MODEL]}


def test_the_bare_command_distils_and_sft_means_the_papers_recipe(xet: Way) -> None:
    assert "distill, LoRA rank 256" in xet.done.stdout
    before = len(xet.hub.requests)
    done = xet.run(*COMMAND, "--heal", "sft", "--dry-run")
    assert done.code == 0, done.stderr[-3000:]
    assert "5,000 steps of 16 × 2048 tokens (163.84 M) of allenai/c4:en" in done.stdout
    assert "sft, LoRA rank 4 over 4-bit weights, learning rate 3e-06" in done.stdout
    assert "mmlu, boolq, gsm8k" in done.stdout
    assert all(r.method in ("GET", "HEAD") for r in xet.hub.requests[before:])


def test_a_short_healing_reads_one_of_the_thousand_shards_of_c4(xet: Way) -> None:
    read = {r.path.rsplit("/")[-1] for r in xet.requests if r.method == "GET" and "/en/c4-train" in r.path}
    assert read == {"c4-train.00000-of-01024.json.gz"}
    assert not [r for r in xet.requests if "en.noclean" in r.path]


def test_lm_evals_own_tasks_run_on_their_own_data_sets(xet: Way) -> None:
    mmlu, boolq, gsm8k = Build.read(xet.build).evaluations["healed"].tasks
    letters = Counter(q["answer"] for subject in mmlu_subjects() for q in mmlu_questions(subject, "test", 2))
    commonest = max(letters.values()) / (2 * 57)
    assert commonest > 0.25
    assert (mmlu.task, mmlu.num_samples, mmlu.num_fewshot, mmlu.chance) == ("mmlu", 2 * 57, 5, commonest)
    assert (boolq.task, boolq.num_samples, boolq.num_fewshot, boolq.chance) == ("boolq", 12, 0, 0.75)
    assert (gsm8k.task, gsm8k.num_samples, gsm8k.num_fewshot, gsm8k.chance) == ("gsm8k", 2, 5, None)
    assert (gsm8k.metric, gsm8k.answers) == ("exact_match", "strict-match")
    assert len(mmlu_subjects()) == 57
    assert [part.num_samples for part in mmlu.parts] == [2] * 57


def test_each_model_is_compared_with_the_source_on_the_same_answers(xet: Way) -> None:
    build = Build.read(xet.build)
    assert set(build.comparisons) == {"pruned", "healed"}
    for name, comparisons in build.comparisons.items():
        before, after = build.evaluations["source"], build.evaluations[name]
        assert [c.measure for c in comparisons] == ["loss", "loss", "mmlu", "boolq", "gsm8k"]
        assert [c.num_items for c in comparisons[2:]] == [2 * 57, 12, 2]
        for comparison, one, other in zip(comparisons[:2], before.losses, after.losses, strict=True):
            assert comparison.num_items == one.num_documents
            assert comparison.difference == pytest.approx(other.nats - one.nats)
        for comparison, old, new in zip(comparisons[2:], before.tasks, after.tasks, strict=True):
            assert comparison.difference == pytest.approx(new.value - old.value)


def test_the_three_models_share_the_questions_of_a_task(xet: Way) -> None:
    looks = [r for r in xet.requests if r.method == "HEAD" and f"{MMLU}/resolve/main/README.md" in r.path]
    assert len(looks) == 57 + 1  # and one look at what the card names


# What was published -----------------------------------------------------------------------------

READ_BACK = """
import sys, torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = snapshot_download(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
prompt = tokenizer("The council repairs", return_tensors="pt")
start = prompt.input_ids.shape[1]
print(model.config.num_hidden_layers, model.num_parameters(), model.dtype)
model.float()  # in 16 bits the two differ by more than many a token is ahead of the next
settings = dict(max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True)
written = model.generate(**prompt, use_cache=True, **settings)
uncached = model(written.sequences[:, :-1], use_cache=False).logits[:, start - 1 :]
torch.testing.assert_close(torch.stack(written.logits, dim=1), uncached, rtol=0, atol=1e-4)
assert prompt.input_ids[0, 0] == 1 and tokenizer.decode(prompt.input_ids[0, 1:]) == "The council repairs"
print(folder)
"""


def test_a_stranger_to_the_factory_can_read_and_run_what_was_published(xet: Way) -> None:
    done = xet.run(REPOSITORY, program=READ_BACK, HF_HOME=str(xet.home / "another cache"))
    assert done.code == 0, done.stderr[-3000:]
    *_, facts, folder = done.stdout.splitlines()
    build = Build.read(xet.build)
    assert facts == f"{NUM_LAYERS - 3} {build.result_parameters} torch.bfloat16"
    came_back = content_of(Path(folder))
    came_back.pop(".gitattributes")
    assert came_back == content_of(xet.build / "model")


def hf(way: Way, *arguments: str) -> str:
    own = {"HF_DEBUG": "0", "HF_HOME": str(way.home / "another cache")}
    program = str(Path(sys.executable).with_name("hf"))
    done = started(way.environment | own, program, *arguments, folder=way.home)
    assert done.code == 0, done.stderr[-3000:]
    return done.stdout


def test_the_hubs_own_program_reads_the_repository(lfs: Way, tmp_path: Path) -> None:
    hf(lfs, "download", REPOSITORY, "--local-dir", str(tmp_path))
    names = content_of(tmp_path)
    local = content_of(lfs.build / "model")
    assert {name: names[name] for name in local} == local
    info = json.loads(hf(lfs, "models", "info", REPOSITORY, "--json"))
    assert info["sha"] == Publication.read(lfs.build).commit
    assert info["private"] is True
    assert info["card_data"]["base_model"] == MODEL


def test_card_and_build_name_the_source_and_the_data_with_their_commits(way: Way) -> None:
    build = Build.read(way.build / "model")
    tasks = {data.hub_id: data.version for score in build.evaluations["source"].tasks for data in score.data}
    assert (build.source.repo_id, build.source.commit) == (MODEL, way.commits[MODEL])
    assert (build.calibration.hub_id, build.calibration.version) == (C4, way.commits[C4])
    assert build.adapter
    assert build.adapter.data.version == way.commits[C4]
    assert tasks == {name: way.commits[name] for name in (MMLU, BOOLQ, GSM8K)}
    card = (way.build / "model" / "README.md").read_text()
    matter = front_matter(card)
    assert matter["base_model"] == MODEL
    assert matter["base_model_relation"] == "finetune"
    assert matter["license"] == "apache-2.0"
    assert matter["datasets"] == [C4]
    named = [result["dataset"] for result in matter["model-index"][0]["results"]]
    revisions = {data["type"]: data["revision"] for data in named}
    assert revisions == {name: way.commits[name] for name in (C4, WIKIPEDIA, MMLU, BOOLQ, GSM8K)}
    for commit in way.commits.values():
        assert f"`{commit}`" in card


def test_the_hub_accepts_the_card(way: Way) -> None:
    checks = [r for r in way.requests if r.path == "/api/validate-yaml"]
    card = (way.build / "model" / "README.md").read_text()
    assert checks
    assert front_matter(json.loads(checks[0].body)["content"]) == front_matter(card)
    assert card_errors(card) == []


def test_nothing_that_was_published_names_a_place_a_user_or_a_machine(way: Way) -> None:
    private = [
        str(way.home),
        str(way.home.parent),
        USER,
        way.hub.url,
        way.hub.cdn_url,
        str(Path.cwd()),
        TOKEN,
    ]
    private += [platform.node()] * (len(platform.node()) > 8)  # shorter ones occur in any text
    for name, content in way.hub.files(REPOSITORY).items():
        for word in private:
            assert word.encode() not in content, f"{name} contains {word}"


def test_pushing_again_uploads_nothing(way: Way) -> None:
    publication = way.build / "publication.json"
    before, commits = publication.read_bytes(), len(way.hub.repository(REPOSITORY).commits)
    push = ("push", str(BUILD), REPOSITORY)
    for command, forgotten in ((push, False), (push, True), ((*COMMAND, *SHORTER), False)):
        if forgotten:
            publication.unlink()
        seen = len(way.hub.requests)
        done = way.run(*command)
        assert done.code == 0, done.stderr[-3000:]
        changing = [r for r in way.hub.requests[seen:] if r.method not in ("GET", "HEAD")]
        assert [r.path for r in changing] == ["/api/validate-yaml"]
        assert publication.read_bytes() == before
    assert len(way.hub.repository(REPOSITORY).commits) == commits


def test_after_a_change_to_the_card_the_card_alone_goes_up(way: Way) -> None:
    card = way.build / "model" / "README.md"
    text = card.read_text()
    card.write_text(f"{text}\nMore about it.\n")
    seen = len(way.hub.requests)
    done = way.run("push", str(BUILD), REPOSITORY)
    assert done.code == 0, done.stderr[-3000:]
    requests = way.hub.requests[seen:]
    (commit,) = [r for r in requests if "/commit/" in r.path]
    changes = [line for line in map(json.loads, commit.body.splitlines()) if line["key"] != "header"]
    assert [(change["key"], change["value"]["path"]) for change in changes] == [("file", "README.md")]
    assert not [r for r in requests if r.method == "PUT" or "xet-write" in r.path or "/info/lfs" in r.path]
    assert way.hub.files(REPOSITORY) == content_of(way.build / "model")
    card.write_text(text)


# The token --------------------------------------------------------------------------------------


def test_the_token_goes_to_the_hub_itself_in_the_authorization_header_alone(way: Way) -> None:
    hub_port = int(way.hub.url.rsplit(":")[-1])
    seen_at = set()
    for request in way.hub.requests:
        headers = {**request.headers}
        authorization = headers.pop("authorization", None)
        if authorization is not None:
            assert authorization == f"Bearer {TOKEN}", request.path
            seen_at.add(request.port)
        elsewhere = f"{request.path} {request.query} {headers}".encode() + request.body
        assert TOKEN.encode() not in elsewhere, request.path
    assert seen_at == {hub_port}
    assert {request.port for request in way.hub.requests} > seen_at  # the second origin was asked too


def test_no_file_that_a_run_leaves_holds_the_token(xet: Way, lfs: Way) -> None:
    files = [path for path in xet.home.parent.rglob("*") if path.is_file()]
    assert {"stages", "hf", "builds", "xet"} <= {part for path in files for part in path.parts}
    for path in files:
        assert TOKEN.encode() not in path.read_bytes(), path


def test_nothing_that_a_run_prints_holds_the_token(xet: Way, lfs: Way) -> None:
    assert "curl -X" in xet.done.stderr  # the client did log its requests
    assert "[Task: " not in xet.done.stderr  # lm-eval's remarks
    for way in (xet, lfs):
        assert TOKEN not in way.done.stdout + way.done.stderr


ECHO = f"no: {TOKEN} is not allowed"


def refusal(hub: Hub, method: str, path: str) -> None:
    headers = {"X-Error-Message": ECHO, "Content-Type": "application/json"}
    hub.fail(method, path, status=403, body=json.dumps({"error": ECHO}), headers=headers)


@pytest.mark.parametrize("path", ["/api/repos/create", "/preupload/", "/commit/"])
def test_a_refusal_that_repeats_the_token_is_printed_without_it(lfs: Way, path: str) -> None:
    refusal(lfs.hub, "POST", path)
    done = lfs.run("push", str(BUILD), "me/another", **DEBUG)
    lfs.hub.app.faults.clear()
    assert done.code == 1
    assert "error: your token may not write to me/another" in done.stderr
    assert "not allowed" in done.stderr
    assert TOKEN not in done.stdout + done.stderr


def test_questions_that_cannot_be_had_are_told_in_one_line_before_the_model_is_pulled(xet: Way) -> None:
    refusal(xet.hub, "GET", f"/api/datasets/{BOOLQ}/tree/")
    command = (*COMMAND[:4], *SHORTER, "--tasks", "boolq", "--limit", "3", "--out", "elsewhere")
    own = {"HF_HOME": str(xet.home / "third cache"), "FACTORY_HOME": str(xet.home / "third home")}
    done = xet.run(*command, HF_DEBUG="0", HF_HUB_VERBOSITY="error", **own)
    xet.hub.app.faults.clear()
    assert done.code == 1
    assert "time" in done.stdout  # what will happen was shown, and nothing of it has
    assert not {"✓", "="} & set(done.stdout)
    assert not (xet.home / "third home" / "stages").exists()
    assert done.stderr.splitlines() == [
        f"error: the Hub denies access to datasets/{BOOLQ}: no: … is not allowed",
        "hint: use a token with read access",
    ]
