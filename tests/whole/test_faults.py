"""Each fault of the Hub, of the way to it and of the disk: what is said, what is left, and that it passes.

Commands run in forks of one process and side by side, since most of their time is the client's waiting.
With FAULT_TABLE=<file> in the environment the outcomes are also written there, as tables in Markdown.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from factory.artifacts import Build
from factory.builds.integrity import take_sums
from factory.store.files import sha256_of_file
from tests.builders.commands import HEAVY, LIGHT, QUICK
from tests.builders.files import content_of
from tests.builders.models import save_llama
from tests.builders.texts import rhymes
from tests.forks import Ended, Forks, can_mount
from tests.loopback_hub import Hub
from tests.loopback_hub.server import ALICE

AT_ONCE = 24  # commands under way: most wait
UP = ("LFS", "xet")
NOBODY = "http://127.0.0.1:9"  # the port of a service that is run nowhere any more

# Requests of one case alone: {repo} is its repository, {sha} the sha256 of its last weight file.
INFO = ("GET", "^/api/models/{repo}(/revision/[^/]+)?$")
FILE = ("GET", "/blobs/{sha}")  # the first request for it reads its header
CREATE = ("POST", "/api/repos/create")
PREUPLOAD = ("POST", "/{repo}/preupload/")
BATCH = ("POST", "/{repo}.git/info/lfs/objects/batch")
PUT = ("PUT", "/upload/{sha}")
XET = ("GET", "/{repo}/xet-write-token/")
COMMIT = ("POST", "/{repo}/commit/")
TREE = ("GET", "/{repo}/tree/")
NOTHING = ("NONE", "")

HIDDEN = {"headers": {"X-Error-Code": "RepoNotFound"}}
SOON = {"headers": {"Retry-After": "1"}}
ONCE = {"times": 1}
LOADING = {"skip": 1}


@dataclass(frozen=True)
class Case:
    """One fault: which requests it strikes and how, and what the user is told; nothing if it is survived."""

    name: str
    requests: tuple[str, str]
    how: dict[str, Any] = field(default_factory=dict)
    says: tuple[str, ...] = ()
    way: str = "LFS"  # up; or "xet", or a process that is "offline", or one for whom the Hub is "down"
    file_bytes: int | None = None  # longest file that may be written


PULLS = [
    Case("401", INFO, {"status": 401}, ("no repository", "token")),
    Case("401, token refused", INFO, {"status": 401, "headers": {"X-Error-Message": "bad credentials"}},
         ("does not accept your token", "hf auth login")),
    Case("403", INFO, {"status": 403}, ("denies access", "token with read")),
    Case("403 for a file", FILE, {"status": 403, **LOADING}, ("denies access",)),
    Case("404", INFO, {"status": 404, **HIDDEN}, ("no repository", "check the name")),
    Case("404 for a file", FILE, {"status": 404, **LOADING}, ("(404)", "look at")),
    Case("409", INFO, {"status": 409}, ("(409)", "look at")),
    Case("412", INFO, {"status": 412}, ("(412)", "look at")),
    Case("429 with Retry-After, once", INFO, {"status": 429, **SOON, **ONCE}),
    Case("429 with Retry-After, for ever", INFO, {"status": 429, **SOON}, ("too many", "wait 1 s")),
    Case("429 for a file, once", FILE, {"status": 429, **SOON, **ONCE, **LOADING}),
    Case("500 once", INFO, {"status": 500, **ONCE}),
    Case("503 once", INFO, {"status": 503, **ONCE}),
    Case("503 for a file, once", FILE, {"status": 503, **ONCE, **LOADING}),
    Case("503 for ever", INFO, {"status": 503}, ("returned an error (503)", "later")),
    Case("503 for a file, for ever", FILE, {"status": 503, **LOADING}, ("returned an error (503)", "later")),
    Case("connection dropped once", INFO, {"drop": True, **ONCE}),
    Case("connection dropped for ever", FILE, {"drop": True, **LOADING}, ("no connection to", "network")),
    Case("file truncated once", FILE, {"truncate": True, **ONCE, **LOADING}),
    Case("file truncated for ever", FILE, {"truncate": True, **LOADING}, ("no connection to", "network")),
    Case("file too short", FILE, {"short": True, **LOADING}, ("cut short", "finished files are kept")),
    Case("the Hub is down", NOTHING, {}, ("no connection to", "network"), "down"),
    Case("HF_HUB_OFFLINE is set", NOTHING, {}, ("the cache does not hold all of", "unset it"), "offline"),
    Case("one bit of a file flipped", FILE, {"corrupt": True, **LOADING}, ("arrived damaged", "removed")),
    Case("no room for a file", NOTHING, {}, ("`ulimit -f` allows", "free some space"), file_bytes=4_000),
    Case("no room for the smaller model", NOTHING, {}, ("`ulimit -f` allows", ""), file_bytes=250_000),
]  # fmt: skip
PUSHES = [
    Case("401 at first", INFO, {"status": 401}, ("does not accept your token",)),
    Case("401 in preupload", PREUPLOAD, {"status": 401}, ("does not accept your token",)),
    Case("401 in upload", PUT, {"status": 401}, ("does not accept your token",)),
    Case("401 in upload", XET, {"status": 401}, ("does not accept your token",), "xet"),
    Case("403 in preupload", PREUPLOAD, {"status": 403}, ("may not write", "settings/tokens")),
    Case("403 in upload", PUT, {"status": 403}, ("may not write", "settings/tokens")),
    Case("403 in upload", XET, {"status": 403}, ("may not write", "settings/tokens"), "xet"),
    Case("403 in commit", COMMIT, {"status": 403}, ("may not write", "settings/tokens")),
    Case("404 in preupload", PREUPLOAD, {"status": 404, **HIDDEN}, ("no repository", "check the name")),
    Case("404 in commit", COMMIT, {"status": 404, **HIDDEN}, ("no repository", "check the name")),
    Case("409 in commit", COMMIT, {"status": 409}, ("another client is changing",)),
    Case("412 in commit", COMMIT, {"status": 412}, ("another commit", "look at")),
    Case("429 with Retry-After, once", PREUPLOAD, {"status": 429, **SOON, **ONCE}),
    Case("429 with Retry-After, for ever", PREUPLOAD, {"status": 429, **SOON}, ("too many", "wait 1 s")),
    Case("429 in commit", COMMIT, {"status": 429, **SOON}, ("too many", "wait 1 s")),
    Case("500 at first, once", INFO, {"status": 500, **ONCE}),
    Case("500 in preupload, once", PREUPLOAD, {"status": 500, **ONCE}),
    Case("503 in upload, once", PUT, {"status": 503, **ONCE}),
    Case("503 in commit, once", COMMIT, {"status": 503, **ONCE}, ("returned an error (503)", "later")),
    Case("503 in preupload, for ever", PREUPLOAD, {"status": 503}, ("returned an error (503)", "later")),
    Case("503 in upload, for ever", PUT, {"status": 503}, ("returned an error (503)", "later")),
    Case("503 in upload, for ever", XET, {"status": 503}, ("returned an error (503)", "later"), "xet"),
    Case("503 in commit, for ever", COMMIT, {"status": 503}, ("returned an error (503)", "later")),
    Case("504 in commit, which was made", COMMIT, {"status": 504, "after": True}),
    Case("connection dropped in preupload", PREUPLOAD, {"drop": True}, ("no connection to", "network")),
    Case("connection dropped before upload", BATCH, {"drop": True}, ("no connection to", "network")),
    Case("connection dropped in upload, once", PUT, {"drop": True, **ONCE}),
    Case("connection dropped in upload", PUT, {"drop": True}, ("no connection to", "network")),
    Case("connection dropped in upload", XET, {"drop": True}, ("transfer", "failed", "network"), "xet"),
    Case("connection dropped in commit", COMMIT, {"drop": True}, ("no connection to", "network")),
    Case("connection dropped in commit", COMMIT, {"drop": True}, ("no connection to", "network"), "xet"),
    Case("connection dropped after commit", COMMIT, {"drop": True, "after": True}),
    Case("connection dropped after commit", COMMIT, {"drop": True, "after": True}, (), "xet"),
    Case("the Hub is down", NOTHING, {}, ("no connection to", "nothing was published"), "down"),
    Case("HF_HUB_OFFLINE is set", NOTHING, {}, ("nothing can be published", "unset it"), "offline"),
    Case("no room for the card", NOTHING, {}, ("`ulimit -f` allows", "free some space"), file_bytes=1_000),
    Case("no room for what is under way", NOTHING, {}, ("`ulimit -f` allows", "free some space"), "xet",
         file_bytes=6_000),
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a command with a fault, and the same command without it, left."""

    first: Ended
    on_hub: dict[str, bytes]  # after the first; empty where there is nothing
    whole_files: set[str]  # sha256 of the weight files in the cache, after the first pull
    made_at_first: bool  # what the command was to make of a model that it pulls
    second: Ended
    on_hub_at_last: dict[str, bytes]
    num_commits: int  # beside the Hub's own first one
    local: dict[str, bytes]  # the build's model folder, at last
    loaded_again: set[str]  # sha256 of the weight files that the second pull asked for whole


@dataclass(frozen=True)
class Bench:
    """The Hub, a folder to work in, and the processes that run commands."""

    hub: Hub
    folder: Path
    processes: dict[str, Forks]  # a case's way → process


def numbered(model: Path, number: int) -> dict[str, str]:
    """Make the weight files in a folder unlike those of other cases; their names → sha256."""
    for path in model.glob("*.safetensors"):
        values = path.read_bytes()
        path.unlink()  # it may be a link
        path.write_bytes(values[:-2] + bytes([number]) + values[-1:])  # low bits of the last bf16
    return {path.name: sha256_of_file(path) for path in sorted(model.glob("*.safetensors"))}


def published(hub: Hub, repo: str) -> dict[str, bytes]:
    return hub.files(repo) if ("model", repo) in hub.storage.repositories else {}


def strike(bench: Bench, case: Case, *, repo: str, weights: Sequence[str], command: list[str]) -> Outcome:
    """Run a command with the fault, then again without it."""
    hub, process = bench.hub, bench.processes[case.way]
    mended = bench.processes[case.way if case.way in UP else "LFS"]
    method, path = case.requests
    fault = hub.fail(method, path.format(repo=repo, sha=weights[-1]), **case.how)
    made = bench.folder / "made" / repo.split("/")[1]
    first = process.run(*command, folder=bench.folder, file_bytes=case.file_bytes)
    fault.times = 0
    on_hub, made_at_first = published(hub, repo), made.exists()
    whole = {sha for sha in weights if list((bench.folder / "hf").rglob(sha))}
    start = len(hub.requests)
    second = mended.run(*command, folder=bench.folder)
    asked = [r.path for r in hub.requests[start:] if r.method == "GET" and "range" not in r.headers]
    pulling = command[0] == "prune"
    return Outcome(
        first,
        on_hub,
        whole,
        made_at_first,
        second,
        published(hub, repo),
        0 if pulling else len(hub.repository(repo).commits) - 1,
        content_of(Path(command[1]) / "model") if not pulling else {},
        {sha for sha in weights for path in asked if path.endswith(sha)},
    )


def strike_pull(bench: Bench, case: Case, number: int) -> Outcome:
    repo = f"acme/pull-{number}"
    model = bench.folder / "sources" / str(number)
    shutil.copytree(bench.folder / "model", model)
    weights = numbered(model, number)
    bench.hub.put_model(repo, model)
    command = ["prune", repo, "--layers", "3,4", "--out", f"made/pull-{number}"]
    return strike(bench, case, repo=repo, weights=list(weights.values()), command=command)


def strike_push(bench: Bench, case: Case, number: int) -> Outcome:
    repo = f"alice/push-{number}"
    build = bench.folder / "pushed" / str(number)
    shutil.copytree(bench.folder / "builds" / "base-drop40", build)
    weights = numbered(build / "model", number)
    for path in (build / "build.json", build / "model" / "build.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"files": weights}))
    take_sums(Build.read(build), build)
    return strike(bench, case, repo=repo, weights=list(weights.values()), command=["push", str(build), repo])


@pytest.fixture(scope="module")
def bench(served_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A model in three weight files, texts, and a build to push."""
    served_hub.reset()
    folder = tmp_path_factory.mktemp("faults")
    model = AutoModelForCausalLM.from_pretrained(save_llama(folder / "model", num_layers=6))
    (folder / "model" / "model.safetensors").unlink()
    model.save_pretrained(folder / "model", max_shard_size="200KB")
    (folder / "model" / "README.md").write_text("---\nlicense: mit\n---\n")
    for name in ("measured", "healed", "evaluated"):
        lines = [json.dumps({"text": f"{name} {text}"}) for text in rhymes(8)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    served_hub.put_model("acme/base", folder / "model")
    own = {"FACTORY_HOME": str(folder / "home"), "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "0"}
    variables = served_hub.environment(folder / "hf") | own
    processes = {
        "LFS": Forks(variables | {"HF_HUB_DISABLE_XET": "1"}, modules=HEAVY),
        "xet": Forks(variables, modules=LIGHT),
        "down": Forks(variables | {"HF_ENDPOINT": NOBODY}, modules=LIGHT),
        "offline": Forks(variables | {"HF_HUB_OFFLINE": "1"}, modules=LIGHT),
    }
    built = processes["LFS"].run("build", "acme/base", *QUICK, folder=folder)
    assert built.code == 0, built.stderr
    yield Bench(served_hub, folder, processes)
    for process in processes.values():
        process.close()


@pytest.fixture(scope="module")
def outcomes(bench: Bench) -> dict[str, list[Outcome]]:
    """Every case, side by side; but a xet store of the loopback Hub takes one command at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool, ThreadPoolExecutor(1) as alone:
        pushes = [
            (alone if case.way == "xet" else pool).submit(strike_push, bench, case, number)
            for number, case in enumerate(PUSHES)
        ]
        pulls = [pool.submit(strike_pull, bench, case, number) for number, case in enumerate(PULLS)]
        found = {"pull": [f.result() for f in pulls], "push": [f.result() for f in pushes]}
    if table := os.environ.get("FAULT_TABLE"):
        Path(table).write_text(in_markdown(found, bench), encoding="utf-8")
    return found


def check_told(ended: Ended, case: Case) -> None:
    """One line and a hint with the words of the case and no token; silence where it is survived."""
    lines = ended.stderr.splitlines()
    assert ended.code == (1 if case.says else 0), ended.stderr
    assert len(lines) == (2 if case.says else 0), ended.stderr
    if case.says:
        assert lines[0].startswith("error: ")
        assert lines[1].startswith("hint: ")
    for word in case.says:
        assert word in ended.stderr
    assert ALICE not in ended.stderr + ended.stdout
    assert "signature" not in ended.stderr  # of an address that lets whoever has it write


@pytest.mark.parametrize("number", range(len(PULLS)), ids=[case.name for case in PULLS])
def test_a_pull_with_a_fault_is_survived_or_told_and_goes_on(
    number: int, outcomes: dict[str, list[Outcome]]
) -> None:
    outcome, case = outcomes["pull"][number], PULLS[number]
    check_told(outcome.first, case)
    assert outcome.made_at_first is not bool(case.says)
    assert outcome.second.code == 0, outcome.second.stderr
    assert not outcome.loaded_again & outcome.whole_files


@pytest.mark.parametrize("number", range(len(PUSHES)), ids=[f"{case.name}, {case.way}" for case in PUSHES])
def test_a_push_with_a_fault_publishes_everything_or_nothing_and_goes_on(
    number: int, outcomes: dict[str, list[Outcome]]
) -> None:
    outcome, case = outcomes["push"][number], PUSHES[number]
    check_told(outcome.first, case)
    assert outcome.on_hub == ({} if case.says else outcome.local)
    assert outcome.second.code == 0, outcome.second.stderr
    assert outcome.on_hub_at_last == outcome.local
    assert outcome.num_commits == 1


@pytest.mark.skipif(not can_mount(), reason="user namespaces are not allowed here")
def test_a_disk_that_fills_up_while_pulling_is_told_in_one_line(bench: Bench) -> None:
    small = bench.folder / "small"
    small.mkdir()
    variables = bench.hub.environment(small) | {"FACTORY_HOME": str(bench.folder / "unused")}
    # Its bytes are enough, so nothing can be told before; its files are too few.
    process = Forks(variables, modules=LIGHT, disk=(small, "size=1g,nr_inodes=20"))
    ended = process.run("build", "acme/base", *QUICK, folder=bench.folder)
    process.close()
    assert ended.code == 1, ended.stderr
    error, hint = ended.stderr.splitlines()
    assert error.startswith("error: the disk is full: ")
    assert hint == "hint: free some space and run the same command again"


# The table ----------------------------------------------------------------------------------------


def in_markdown(outcomes: dict[str, list[Outcome]], bench: Bench) -> str:
    """Two tables, with the Hub's address as users know it and without the folder of the test."""
    rows = ["| fault while pulling | what the user saw | exit code | on disk | the same command again |"]
    rows.append("|---|---|---|---|---|")
    for case, outcome in zip(PULLS, outcomes["pull"], strict=True):
        kept = f"nothing made; {len(outcome.whole_files)} of 3 weight files whole in the cache, kept"
        left = "the smaller model" if outcome.made_at_first else kept
        rows.append(_row(case.name, outcome, left))
    rows.append("")
    rows.append(
        "| fault while pushing | what the user saw | exit code | on the Hub | the same command again |"
    )
    rows.append("|---|---|---|---|---|")
    for case, outcome in zip(PUSHES, outcomes["push"], strict=True):
        left = (
            "everything" if outcome.on_hub == outcome.local else "nothing" if not outcome.on_hub else "PART"
        )
        rows.append(_row(f"{case.name} ({case.way})" if case.way in UP else case.name, outcome, left))
    text = "\n".join(rows).replace(f"{bench.folder}/", "")
    return re.sub(f"{bench.hub.url}|{NOBODY}", "https://huggingface.co", text) + "\n"


def _row(name: str, outcome: Outcome, left: str) -> str:
    seen = "<br>".join(outcome.first.stderr.splitlines()) or "nothing: survived"
    again = "succeeds" if outcome.second.code == 0 else "FAILS"
    return f"| {name} | {seen} | {outcome.first.code} | {left} | {again} |"
