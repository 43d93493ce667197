"""A process that runs the factory's Hub functions with the real client against the loopback Hub.

The client reads its endpoint, its home and the choice of xet at import, so it needs a process of its own;
one that stays and takes calls as JSON lines costs one import instead of one a test.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.loopback_hub.server import Hub
from tests.waiting import HUNG_SECONDS

SCRIPT = """
import json, os, sys, time, traceback
from pathlib import Path
import factory.hub.pull, factory.hub.push, factory.hub.resolve
from factory.hub import client
from factory.artifacts import Source
from factory.errors import FactoryError

if "HURRY" in os.environ:  # every wait, also the client's own, is over at once
    wait = time.sleep
    time.sleep = lambda seconds: wait(min(seconds, 0.01))

client.WAITS_SECONDS = (0.05, 0.05, 0.05)

def bear_silence(seconds):
    client.SILENCE_SECONDS = seconds

def pull(source):
    seen = []
    source = Source.model_validate(source)
    pulled = factory.hub.pull.pull(source, progress=lambda done, total: seen.append((done, total)))
    return {"folder": str(pulled.folder), "progress": seen}

def parts_of_adapter(reference):
    source = factory.hub.pull.pull(factory.hub.resolve.resolve(reference))
    parts = source.unmerged
    return {
        "lineage": source.lineage.model_dump(),
        "repo_id": source.repo_id,
        "license": source.license,
        "base_models": source.base_models,
        "commit": source.commit,
        "folders": [str(parts.folder), str(parts.base.folder)],
    }

def resolve(reference, **options):
    source = factory.hub.resolve.resolve(reference, **options)
    return json.loads(source.model_dump_json()) | {"tensors": source.tensors}

def read_text(reference):
    from factory.text.text import open_text

    return list(open_text(reference, split="train").documents())

def load_task(task):
    from factory.evaluation.harness import load_task

    return load_task(task, shots=None)[0]

def user_name():
    from factory.jobs.submit import user_name

    return user_name()

def jobs_of(owner):
    from factory.jobs.submit import jobs_of

    return [job.id for job in jobs_of(owner)]

def flavor(name):
    from factory.jobs.hardware import flavor

    return flavor(name).title

def fetch(bucket):
    from factory.hub.bucket import look_at_bucket, StageBucket

    look_at_bucket(bucket)
    StageBucket(bucket, print).fetch("measure", "0", Path("nowhere"))
def open_text(reference, split):
    from factory.text.text import open_text

    text = open_text(reference, split=split)
    return {**text.data.model_dump(), "documents": list(text.documents())}

def push(folder, **options):
    return json.loads(factory.hub.push.push(Path(folder), **options).model_dump_json())

for line in sys.stdin:
    call = json.loads(line)
    token = call["token"]
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    try:
        answer = {"value": globals()[call["function"]](*call["arguments"], **call["options"])}
    except FactoryError as error:
        answer = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    except Exception:
        answer = {"error": "traceback", "message": traceback.format_exc(), "hint": ""}
    print(json.dumps(answer), flush=True)
"""


@dataclass(frozen=True)
class Answer:
    """What a call gave: a value, or the name of an error with its message and hint."""

    value: Any = None
    error: str | None = None
    message: str = ""
    hint: str = ""


class Client:
    """The process."""

    def __init__(self, hub: Hub, home: Path, **variables: str) -> None:
        import os

        self._process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, **hub.environment(home, token=None), **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def call(self, function: str, *arguments: Any, token: str | None, **options: Any) -> Answer:
        """Run one function of the script above."""
        call = {"function": function, "arguments": arguments, "options": options, "token": token}
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        return Answer(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=HUNG_SECONDS)
