"""Builds on Jobs through the real client: submitted, followed, cut off, cancelled, timed out and resumed.

The submitted command is run here as a job would run it, with its variables and what was uploaded for it;
only `uv` is replaced, by a program that unpacks the wheel and leaves out the installation of the rest.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

import pytest
import yaml

from factory.config.request import BuildRequest
from factory.jobs.submit import MOUNT
from factory.jobs.uploads import carried
from tests.builders.models import save_llama
from tests.builders.texts import rhymes
from tests.forks import Ended, Forks
from tests.loopback_hub import Hub
from tests.loopback_hub.buckets import Bucket
from tests.loopback_hub.jobs import Job
from tests.loopback_hub.server import ALICE, BOB
from tests.waiting import HUNG_SECONDS, until

LIGHT = (
    "factory.hub.pull",
    "factory.jobs.submit",
    "factory.model.architecture",
    "transformers.models.llama.modeling_llama",
)
TINY = "--drop 0.4 --tasks none --samples 2 --eval-documents 2 --sequence-length 32 --heal-steps 20"
TEXTS = "--calibration-data measured.jsonl --heal-data healed.jsonl --eval-data evaluated.jsonl"
BUILD = ["build", "acme/tiny", *TINY.split(), *TEXTS.split()]
ON = ["--on", "cpu-basic", "--upload", "--detach"]
BUCKET = "alice/hf-factory"
SOMETHING_ELSE = {
    "dockerImage": "python:3.12",
    "command": ["python", "train.py"],
    "arguments": [],
    "environment": {},
    "flavor": "cpu-basic",
    "labels": {"project": "mine"},
}
UV = """#!{python}
import os, sys, tempfile, zipfile
assert sys.argv[1:5] == ["run", "--no-project", "--python", "{version}"], sys.argv
assert (sys.argv[5], sys.argv[7], sys.argv[9]) == ("--with", "--with-requirements", "factory"), sys.argv
assert "-c constraints.txt" in open(sys.argv[8]).read()
installed = tempfile.mkdtemp(dir=os.environ["HOME"])
zipfile.ZipFile(sys.argv[6]).extractall(installed)
os.environ["PYTHONPATH"] = installed
os.execv("{python}", ["{python}", "-m", *sys.argv[9:]])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the user works: three texts, and the source of the model on the Hub."""
    made = tmp_path_factory.mktemp("jobs")
    save_llama(made / "tiny", num_layers=6)
    for name in ("measured", "healed", "evaluated"):
        lines = [json.dumps({"text": f"{name} {text}"}) for text in rhymes(24)]
        (made / f"{name}.jsonl").write_text("\n".join(lines))
    return made


@pytest.fixture(scope="module")
def commands(served_hub: Hub, folder: Path) -> Iterator[Forks]:
    variables = served_hub.environment(folder / "hf") | {"FACTORY_HOME": str(folder / "home")}
    process = Forks(variables, modules=LIGHT)
    yield process
    process.close()


@pytest.fixture
def rich(hub: Hub, folder: Path) -> Hub:
    """A Hub with the model, where alice has credit."""
    hub.put_model("acme/tiny", folder / "tiny")
    hub.storage.paying.add("alice")
    return hub


def submitted(commands: Forks, folder: Path, *more: str) -> Ended:
    done = commands.run(*BUILD, *ON, *more, folder=folder)
    assert done.code == 0, done.stderr
    return done


def test_a_pattern_of_files_a_column_and_a_share_go_with_the_job(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv", "c.txt"):
        (tmp_path / name).write_text("body,title\nx,y\n")
    request = BuildRequest.read(
        {
            "model": "acme/tiny",
            "drop": 0.4,
            "heal_data": [f"{tmp_path}/*.csv#body*2", "acme/chats*0.5"],
            "eval_data": [f"{tmp_path}/a.csv#title", "acme/text[test]#body"],
        }
    )
    (build,), files = carried([request], upload=True, bucket=BUCKET)
    mine, theirs = build["heal-data"]
    assert theirs == "acme/chats*0.5"
    folder = mine.removeprefix(f"{MOUNT}/").removesuffix("/*.csv#body*2")
    assert {f"{folder}/a.csv", f"{folder}/b.csv"} < set(files)
    (alone,) = set(files) - {f"{folder}/a.csv", f"{folder}/b.csv"}
    assert build["eval-data"] == [f"{MOUNT}/{alone}#title", "acme/text[test]#body"]
    assert alone.endswith("/a.csv")


def refused(commands: Forks, hub: Hub, folder: Path, *arguments: str, token: str = ALICE) -> str:
    """Message and hint of an error after which nothing was submitted."""
    login = f"import os; os.environ['HF_TOKEN'] = {token!r}"
    done = commands.run(*arguments, folder=folder, before=login)
    assert done.code in (1, 2), done.stdout
    lines = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 2, done.stderr
    assert lines[1].startswith("hint: ")
    assert not hub.storage.jobs
    return done.stderr


def started(hub: Hub, folder: Path) -> subprocess.Popen[str]:
    """What the Hub would run for the last job, begun: its log goes to the Hub line by line."""
    job = hub.job()
    (folder / "bin").mkdir(parents=True)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"python{version}" in job.spec["dockerImage"]
    uv = folder / "bin" / "uv"
    uv.write_text(UV.format(python=sys.executable, version=version))
    uv.chmod(0o755)
    (volume,) = job.spec["volumes"]
    assert (volume["mountPath"], volume["readOnly"]) == (MOUNT, True)
    mount = folder / "mount"
    for path, content in hub.bucket(volume["source"]).items():
        if path.startswith(volume["path"] + "/"):
            file = mount / path.removeprefix(volume["path"] + "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content.replace(f"{MOUNT}/".encode(), f"{mount}/".encode()))
    machine = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [word.replace(MOUNT, str(mount)) for word in job.spec["command"]],
        cwd=folder,
        env=machine | job.spec["environment"] | job.spec["secrets"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    threading.Thread(target=_pass_on, args=(process, job), daemon=True).start()
    return process


def _pass_on(process: subprocess.Popen[str], job: Job) -> None:
    assert process.stdout
    for line in process.stdout:
        job.lines.append(line.rstrip("\n"))
    if process.wait() == 0:
        job.end()
    elif job.stage == "RUNNING":
        job.end("ERROR", f"exit code {process.returncode}")


def copies(hub: Hub) -> list[set[int]]:
    """Of each copy of the unfinished healing that went up: the steps of its checkpoints."""
    found = []
    for batch in hub.storage.buckets[BUCKET].batches:
        states = [re.match(r"addFile partial/heal/.*/checkpoint-(\d+)/trainer_state.json", o) for o in batch]
        if steps := {int(match[1]) for match in states if match}:
            found.append(steps)
    return found


def test_a_job_that_runs_out_of_time_is_resumed_by_the_next_one_and_publishes(
    rich: Hub, commands: Forks, folder: Path, tmp_path: Path
) -> None:
    push = ("--push-to", "alice/smaller", "--timeout", "1h")
    submitted(commands, folder, *push)
    first = started(rich, tmp_path / "first")
    until(lambda: len(copies(rich)) >= 3 or first.poll() is not None)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    until(lambda: rich.job().stage != "RUNNING")
    rich.job().end("ERROR", "Job timeout")
    assert "✓ prune" in "\n".join(rich.job().lines)
    before = copies(rich)
    assert first.returncode == -signal.SIGKILL
    told = commands.run("jobs", "follow", rich.job().id, folder=folder)
    assert told.code == 1
    assert "Job timeout" in told.stderr
    assert "the same command resumes" in told.stderr

    done = submitted(commands, folder, *push)
    assert "less what earlier jobs finished" in done.stdout
    assert started(rich, tmp_path / "second").wait(timeout=HUNG_SECONDS) == 0, rich.job().lines
    until(lambda: rich.job().stage == "COMPLETED")
    log = "\n".join(rich.job().lines)
    for stage in ("measure", "plan", "prune"):
        assert f"= {stage}" in log
    assert "✓ heal" in log
    # The last one need not have gone up whole; from the start, the first copy would be of step 5 alone.
    # There is none where what was left took less time than lies between two copies.
    assert all(max(steps) >= max(before[-2]) > 5 for steps in copies(rich)[len(before) :])
    assert "config.json" in rich.files("alice/smaller")
    assert rich.repository("alice/smaller").private

    followed = commands.run("jobs", "follow", rich.job().id, folder=folder)
    assert followed.code == 0, followed.stderr
    assert followed.stdout == log + "\n"
    nowhere = [rich.job(0).spec["command"], rich.job(0).spec["environment"], rich.job().lines, done.stdout]
    assert ALICE not in json.dumps(nowhere)
    assert not any(ALICE.encode() in content for content in rich.bucket(BUCKET).values())
    assert rich.storage.buckets[BUCKET].private
    assert not any(path.startswith("partial/heal") for path in rich.bucket(BUCKET))


def test_submitting_says_what_it_will_cost_and_goes_up_once(rich: Hub, commands: Forks, folder: Path) -> None:
    done = submitted(commands, folder, "--timeout", "2h")
    assert "at most $0.02 for 2 h\n" in done.stdout
    assert f"factory jobs follow {rich.job().id}" in done.stdout
    assert rich.job().spec["timeoutSeconds"] == 7200
    files = set(rich.bucket(BUCKET))
    rich.job().end()
    batches = len(rich.storage.buckets[BUCKET].batches)
    submitted(commands, folder, "--timeout", "2h")
    assert set(rich.bucket(BUCKET)) == files
    assert len(rich.storage.buckets[BUCKET].batches) == batches


def test_a_dry_run_submits_and_uploads_nothing(rich: Hub, commands: Forks, folder: Path) -> None:
    done = submitted(commands, folder, "--dry-run")
    assert "price" in done.stdout
    assert not rich.storage.jobs
    assert not rich.storage.buckets


def test_a_dry_run_makes_no_bucket(rich: Hub, commands: Forks, folder: Path) -> None:
    dry = (*BUILD, "--state", "alice/stages", "--dry-run")
    done = commands.run(*dry, folder=folder)
    assert (done.code, done.stdout.count("(measure → card)")) == (0, 1), done.stderr
    assert done.stderr == "note: a dry run ignores the stages already in alice/stages\n"
    assert not rich.storage.buckets
    rich.storage.buckets["alice/stages"] = Bucket(private=False)
    assert "the bucket alice/stages is public" in commands.run(*dry, folder=folder).stderr
    assert not (folder / "home").exists()


def test_a_build_is_followed_line_by_line_across_lost_connections(
    rich: Hub, commands: Forks, folder: Path
) -> None:
    lines = [f"✓ stage {number}" for number in range(8)]

    def job() -> None:
        until(lambda: rich.storage.jobs)
        for line in lines:
            rich.job().lines.append(line)
            time.sleep(0.05)
        rich.job().end()

    rich.storage.log_cuts += [2, 5]
    writer = threading.Thread(target=job)
    writer.start()
    rich.fail("GET", "/api/jobs/alice/[^/]+$", status=503, times=1)  # on top of it, the client gives up once
    done = commands.run(*BUILD, "--on", "cpu-basic", "--upload", folder=folder)
    writer.join()
    assert done.code == 0, done.stderr
    assert done.stdout.splitlines()[-8:] == lines, done.stdout
    assert rich.count("GET", "/logs") >= 3


def test_a_job_that_fails_says_why(rich: Hub, commands: Forks, folder: Path) -> None:
    submitted(commands, folder)
    rich.job().lines += ["error: no space", "\x1b[31mhint: \x07red"]
    rich.job().end("ERROR", "Job failed with exit code: 1")
    done = commands.run("jobs", "follow", rich.job().id, folder=folder)
    assert done.code == 1
    assert done.stdout == "error: no space\n[31mhint: red\n"
    assert f"job {rich.job().id} ended with ERROR: Job failed with exit code: 1" in done.stderr


def test_jobs_are_listed_and_cancelled(rich: Hub, commands: Forks, folder: Path) -> None:
    assert "no jobs" in commands.run("jobs", folder=folder).stdout
    submitted(commands, folder)
    job = rich.job()
    listed = commands.run("jobs", folder=folder).stdout.splitlines()
    assert listed[1].split()[:4] == [job.id, "tiny-drop40", "cpu-basic", "RUNNING"]
    assert commands.run("jobs", "cancel", job.id, folder=folder).stdout == f"job {job.id} is cancelled\n"
    assert job.stage == "CANCELED"
    (told,) = json.loads(commands.run("jobs", "--json", folder=folder).stdout)
    assert (told["id"], told["stage"]) == (job.id, "CANCELED")
    again = commands.run("jobs", "cancel", job.id, folder=folder)
    assert (again.code, "already ended" in again.stderr) == (1, True)
    followed = commands.run("jobs", "follow", job.id, folder=folder)
    assert (followed.code, "was cancelled" in followed.stderr) == (1, True)
    unknown = commands.run("jobs", "follow", "6870", folder=folder)
    assert (unknown.code, "no such job: 6870" in unknown.stderr) == (1, True)


def test_a_job_of_something_else_is_not_cancelled(rich: Hub, commands: Forks, folder: Path) -> None:
    rich.storage.jobs["6870f"] = other = Job("6870f", "alice", SOMETHING_ELSE)
    assert "no jobs" in commands.run("jobs", folder=folder).stdout
    done = commands.run("jobs", "cancel", "6870f", folder=folder)
    assert done.code == 2
    assert done.stderr.splitlines() == [
        "error: job 6870f was not submitted by `factory build --on`",
        "hint: `factory jobs` lists those that were; `hf jobs cancel 6870f` ends any other",
    ]
    assert other.stage == "RUNNING"


def test_one_build_is_made_by_one_job_at_a_time(rich: Hub, commands: Forks, folder: Path) -> None:
    submitted(commands, folder)
    done = commands.run(*BUILD, *ON, folder=folder)
    assert done.code == 2
    assert f"job {rich.job().id} is already running this build" in done.stderr
    again = [word.replace("measured.jsonl", "./measured.jsonl") for word in TEXTS.split()]
    given = [*again, "--seed", "0", *TINY.replace("0.4", "0.40").split(), "--heal", "distill"]
    assert "is already running this build" in commands.run(*BUILD[:2], *given, *ON, folder=folder).stderr
    assert len(rich.storage.jobs) == 1
    submitted(commands, folder, "--seed", "1")


def test_a_build_is_the_same_by_its_alias_and_by_its_full_name(
    rich: Hub, commands: Forks, folder: Path
) -> None:
    rich.put_model("HuggingFaceTB/SmolLM2-135M", folder / "tiny")
    more = (*TEXTS.split(), *TINY.split(), "--no-heal", *ON)
    assert commands.run("build", "smollm2-135m", *more, folder=folder).code == 0
    full = ("build", "HuggingFaceTB/SmolLM2-135M")
    assert "is already running this build" in commands.run(*full, *more, folder=folder).stderr
    assert commands.run(*full, *more, "--push-to", "mine", folder=folder).code == 0  # elsewhere: another
    same = commands.run(*full, *more, "--push-to", "alice/mine", folder=folder)
    assert f"job {rich.job().id} is already running this build" in same.stderr


def test_a_task_file_goes_up_with_its_questions_and_what_it_includes(
    rich: Hub, commands: Forks, folder: Path
) -> None:
    mine = folder / "mine"
    (mine / "data").mkdir(parents=True)
    (folder / "both").mkdir()
    questions = b'{"q": "one and", "choices": ["one", "two"], "answer": 0}\n'
    (mine / "data" / "q.jsonl").write_bytes(questions)
    (folder / "both" / "common.yaml").write_text(
        "dataset_path: json\ndataset_kwargs: {data_files: mine/data/q.jsonl}\n"
    )
    (mine / "words.py").write_text("def shown(row):\n    return row['q']\n")
    named = "task: mine\ninclude: ../both/common.yaml\ndoc_to_text: !function words.shown\n"
    (mine / "mine.yaml").write_text(named)
    (mine / "other.yaml").write_text("task: mine\n")
    (mine / "secret.json").write_text("{}")
    tasks = ["--tasks", "next_line, mine/mine.yaml", "--on", "cpu-basic"]
    told = refused(commands, rich, folder, *BUILD, *tasks)
    assert "'measured.jsonl' is on this machine" in told
    told = refused(commands, rich, folder, *BUILD, *tasks, "--upload")
    assert "runs Python: doc_to_text: words.shown (mine/words.py)" in told
    submitted(commands, folder, *tasks, "--run-task-code")
    (volume,) = rich.job().spec["volumes"]
    up = {
        path.removeprefix(volume["path"] + "/"): content
        for path, content in rich.bucket(BUCKET).items()
        if path.startswith(volume["path"])
    }
    asked = yaml.safe_load(up["build.yaml"])
    next_line, task = asked["tasks"]
    assert asked["run-task-code"] is True
    assert next_line == "next_line"
    place = PurePosixPath(task.removeprefix(f"{MOUNT}/")).parent.parent
    there = {path.removeprefix(f"{place}/") for path in up if path.startswith(f"{place}/")}
    assert there == {"mine/mine.yaml", "both/common.yaml", "mine/words.py"}
    assert up[f"{place}/mine/mine.yaml"] == (mine / "mine.yaml").read_bytes()
    data = yaml.safe_load(up[f"{place}/both/common.yaml"])["dataset_kwargs"]["data_files"]
    assert data.startswith(f"{MOUNT}/local/")
    assert up[data.removeprefix(f"{MOUNT}/")] == questions
    told = commands.run(*BUILD, "--tasks", "none.yaml", *ON, folder=folder).stderr
    assert "task file 'none.yaml' does not exist" in told


def test_a_job_that_answers_with_vllm_installs_it(rich: Hub, commands: Forks, folder: Path) -> None:
    vllm = ("--eval-backend", "vllm")
    assert "vllm on cpu-basic, which has no GPU" in refused(commands, rich, folder, *BUILD, *ON, *vllm)
    done = submitted(commands, folder, *vllm, "--on", "t4-small")
    (volume,) = rich.job().spec["volumes"]
    requirements = rich.bucket(BUCKET)[f"{volume['path']}/requirements.txt"].decode()
    if find_spec("vllm"):
        assert requirements == "-c constraints.txt\nvllm\n"
    else:
        assert requirements.startswith("vllm>=")
        assert "vLLM is not installed here: the job uses the library versions" in done.stderr


def test_what_cannot_work_is_refused_before_anything_is_submitted(
    rich: Hub, commands: Forks, folder: Path
) -> None:
    told = refused(commands, rich, folder, *BUILD, *ON, token="")
    assert "hf auth login" in told
    told = refused(commands, rich, folder, *BUILD, "--on", "a1000-large", "--upload")
    assert "'a1000-large'" in told
    for name in ("cpu-basic ($0.01/h)", "t4-small ($0.40/h)", "a100-large ($2.50/h)"):
        assert name in told
    told = refused(commands, rich, folder, *BUILD, "--on", "cpu-basic")
    assert "'measured.jsonl' is on this machine" in told
    assert f"--upload puts it into your private bucket {BUCKET}" in told
    told = refused(commands, rich, folder, "build", "./tiny", "--drop", "0.4", "--on", "cpu-basic")
    assert "'tiny' is on this machine" in told
    told = refused(commands, rich, folder, *BUILD, *ON, "--timeout", "2s")
    assert "--timeout of 2.0 s is too short" in told
    for wrong in ("0", "soon", "-1h"):
        assert f"--timeout {wrong} is not a duration" in refused(
            commands, rich, folder, *BUILD, *ON, "--timeout", wrong
        )
    for alone in (["--detach"], ["--upload"], ["--timeout", "1h"]):
        assert f"{alone[0]} without --on" in refused(commands, rich, folder, *BUILD, *alone)
    told = refused(commands, rich, folder, "build", "acme/tiny", "--reproduce", "--on", "cpu-basic")
    assert "--on with --reproduce" in told
    told = refused(commands, rich, folder, *BUILD, *ON, "--apply-chat-template")
    assert "--apply-chat-template: tiny has no chat template" in told
    assert not rich.storage.buckets


def test_no_permission_no_credit_and_a_public_bucket_are_told(
    rich: Hub, commands: Forks, folder: Path
) -> None:
    rich.storage.paying.clear()
    told = refused(commands, rich, folder, *BUILD, *ON)
    assert "cannot pay for cpu-basic (402): Pre-paid credit balance is insufficient" in told
    assert "nothing was submitted" in told
    rich.storage.without_jobs.add("alice")
    told = refused(commands, rich, folder, *BUILD, *ON)
    assert "your token may not use Jobs (403): This token lacks the permission job.write" in told
    rich.storage.without_jobs.clear()
    rich.storage.buckets[BUCKET].private = False
    assert "is public" in refused(commands, rich, folder, *BUILD, *ON)
    assert "may not write" in refused(commands, rich, folder, *BUILD, *ON, token=BOB)


def test_builds_of_a_file_run_in_one_job(rich: Hub, commands: Forks, folder: Path) -> None:
    printed = commands.run(*BUILD, "--print-config", folder=folder).stdout
    builds = "builds: [{report-to: wandb}, {drop: 0.2, report-to: trackio}, {drop: 0.5, report-to: none}]\n"
    (folder / "build.yaml").write_text(f"{printed}on: cpu-basic\n{builds}")
    done = commands.run("build", "build.yaml", "--upload", "--detach", folder=folder)
    assert done.code == 0, done.stderr
    (path,) = [path for path in rich.bucket(BUCKET) if path.endswith("/build.yaml")]
    carried = rich.bucket(BUCKET)[path].decode()
    assert carried.count("model: acme/tiny") == 3
    assert "--with trackio --with wandb --with-requirements" in shlex.join(rich.job().spec["command"])
    assert "on:" not in carried
    assert f"{MOUNT}/local/" in carried
    (folder / "build.yaml").write_text(f"{printed}builds: [{{on: cpu-basic}}, {{on: t4-small, drop: 0.2}}]\n")
    done = commands.run("build", "build.yaml", "--upload", folder=folder)
    assert (done.code, "--on t4-small after cpu-basic" in done.stderr) == (2, True)


def test_the_command_has_no_shell_in_it(rich: Hub, commands: Forks, folder: Path) -> None:
    submitted(commands, folder, "--rerun", "heal")
    command = rich.job().spec["command"]
    assert command[0] == "uv"
    assert command[-4:] == ["--state", BUCKET, "--rerun", "heal"]
    assert shlex.split(shlex.join(command)) == command
