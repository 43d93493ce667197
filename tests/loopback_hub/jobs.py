"""Routes of Jobs: hardware and its prices, submission, state, logs as they are written, cancellation."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse

from tests.loopback_hub.app import Application, Refusal, Request, route

OVER = ("COMPLETED", "CANCELED", "ERROR", "DELETED")
POLL_SECONDS = 0.02
HARDWARE = (  # name, title, GPU, its number, memory, disk, micro-dollars a minute
    ("cpu-basic", "CPU Basic", None, 0, "16 GB", "50 GB", 167),
    ("t4-small", "Nvidia T4 - small", "T4", 1, "16 GB", "50 GB", 6667),
    ("a100-large", "Nvidia A100 - large", "A100", 1, "80 GB", "1000 GB", 41667),
)


@dataclass
class Job:
    """What was asked for, and how it goes: a test writes the lines and ends it."""

    id: str
    owner: str
    spec: dict[str, Any]
    stage: str = "RUNNING"
    message: str | None = None
    lines: list[str] = field(default_factory=list)
    cut_after: list[int] = field(default_factory=list)  # see Storage.log_cuts

    def end(self, stage: str = "COMPLETED", message: str | None = None) -> None:
        """Let it run no further."""
        self.stage, self.message = stage, message

    def value(self) -> dict[str, Any]:
        """As the Hub tells it: names of secrets, never their values."""
        spec = self.spec
        return {
            "id": self.id,
            "createdAt": f"2026-01-01T00:00:{int(self.id[-2:], 16) % 60:02}.000Z",
            "dockerImage": spec["dockerImage"],
            "command": spec["command"],
            "arguments": spec["arguments"],
            "environment": spec["environment"],
            "secrets": dict.fromkeys(spec.get("secrets", {}), ""),
            "flavor": spec["flavor"],
            "labels": spec.get("labels"),
            "volumes": spec.get("volumes"),
            "status": {"stage": self.stage, "message": self.message},
            "durations": {"schedulingSecs": 1, "runningSecs": len(self.lines), "totalSecs": 9},
            "owner": {"id": "0", "name": self.owner, "type": "user"},
        }


@route("GET", "/api/jobs/hardware")
def hardware(app: Application, request: Request) -> Response:
    return JSONResponse([_flavor(*row) for row in HARDWARE])


def _flavor(
    name: str, title: str, gpu: str | None, number: int, memory: str, disk: str, price: int
) -> dict[str, Any]:
    accelerator = {
        "type": "gpu",
        "model": gpu,
        "quantity": str(number),
        "vram": memory,
        "manufacturer": "Nvidia",
    }
    return {
        "name": name,
        "prettyName": title,
        "cpu": "2 vCPU",
        "ram": "16 GB" if gpu is None else "142 GB",
        "ephemeralStorage": disk,
        "accelerator": accelerator if gpu else None,
        "unitCostMicroUSD": price,
        "unitCostUSD": price / 1e6,
        "unitLabel": "minute",
    }


def _own(app: Application, request: Request, owner: str) -> None:
    user = app.user(request)
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    if user != owner or user in app.storage.without_jobs:
        raise Refusal(403, "This token lacks the permission job.write")


def _job(app: Application, request: Request, owner: str, job: str) -> Job:
    _own(app, request, owner)
    if job not in app.storage.jobs:
        raise Refusal(404, "Job not found")
    found: Job = app.storage.jobs[job]
    return found


@route("POST", "/api/jobs/(?P<owner>[^/]+)")
def submit(app: Application, request: Request, owner: str) -> Response:
    _own(app, request, owner)
    spec = json.loads(request.body)
    if owner not in app.storage.paying:
        raise Refusal(402, "Pre-paid credit balance is insufficient")
    if spec["flavor"] not in [row[0] for row in HARDWARE]:
        raise Refusal(400, "unknown flavor")
    made = Job(f"6870{len(app.storage.jobs):020x}", owner, spec, cut_after=[*app.storage.log_cuts])
    app.storage.jobs[made.id] = made
    return JSONResponse(made.value())


@route("GET", "/api/jobs/(?P<owner>[^/]+)")
def list_jobs(app: Application, request: Request, owner: str) -> Response:
    _own(app, request, owner)
    key, _, value = request.query.get("label", "").partition("=")
    jobs: list[Job] = list(app.storage.jobs.values())
    return JSONResponse([j.value() for j in jobs if not key or j.spec.get("labels", {}).get(key) == value])


@route("GET", "/api/jobs/(?P<owner>[^/]+)/(?P<job>[^/]+)")
def inspect(app: Application, request: Request, owner: str, job: str) -> Response:
    return JSONResponse(_job(app, request, owner, job).value())


@route("POST", "/api/jobs/(?P<owner>[^/]+)/(?P<job>[^/]+)/cancel")
def cancel(app: Application, request: Request, owner: str, job: str) -> Response:
    found = _job(app, request, owner, job)
    if found.stage not in OVER:
        found.end("CANCELED")
    return JSONResponse(found.value())


@route("GET", "/api/jobs/(?P<owner>[^/]+)/(?P<job>[^/]+)/logs")
def logs(app: Application, request: Request, owner: str, job: str) -> Response:
    return StreamingResponse(_events(_job(app, request, owner, job)), media_type="text/event-stream")


async def _events(job: Job) -> AsyncIterator[bytes]:
    """Everything from the beginning, then what comes, until the job is over; cut where a test says so."""
    cut = job.cut_after.pop(0) if job.cut_after else None
    sent = 0
    while True:
        over = job.stage in OVER
        while sent < len(job.lines):
            if sent == cut:
                raise ConnectionAbortedError  # the server closes the connection in the middle of the answer
            moment = f"2026-01-01T00:00:{sent % 60:02}.{sent:06}Z"
            yield f"data: {json.dumps({'data': job.lines[sent], 'timestamp': moment})}\n\n".encode()
            sent += 1
        if over:
            return
        await asyncio.sleep(POLL_SECONDS)
