"""Builds on Hugging Face Jobs: submit, list, follow and cancel."""

import hashlib
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import JobInfo, Volume, constants, get_token
from huggingface_hub.errors import HfHubHTTPError

from factory.errors import HubError
from factory.hub.bucket import open_bucket
from factory.hub.client import account_name, hub_api, patiently
from factory.hub.errors import CLIENT_ERRORS, endpoint, hub_errors, not_logged_in
from factory.jobs.package import REQUIREMENTS, WHEEL, program
from factory.store.files import sha256_of_file

STATE = "hf-factory"  # name of the bucket, after its owner's
MOUNT = "/factory"  # folder of a job with the files uploaded for it
BUILD_FILE = "build.yaml"
LABEL = "hf-factory"  # label of a job with the hash of its build
SILENCE_SECONDS = 900.0  # without any answer from the Hub before following ends
WAIT_SECONDS = 2.0  # between requests
UNDER_WAY = ("SCHEDULING", "RUNNING")
FOR_TRACKERS = ("TRACKIO_SPACE_ID", "WANDB_ENTITY", "WANDB_PROJECT")


class JobError(HubError):
    """A job failed or was cancelled."""


def user_name() -> str:
    """Return the name of the logged-in account.

    Raises:
        HubError: No login, or a token that the Hub does not accept.
    """
    if not get_token():
        raise not_logged_in()
    with hub_errors("your account"):
        return account_name()


@dataclass(frozen=True)
class Order:
    """The specification of a job."""

    owner: str
    name: str  # of the build, for display
    build: str  # hash of the build, shared by its jobs
    build_file: bytes
    files: Mapping[str, Path | bytes]  # local files that the build reads: name below the mount → file
    rerun: tuple[str, ...]
    trackers: tuple[str, ...] = ()  # libraries of the experiment trackers
    uses_vllm: bool = False

    @property
    def bucket(self) -> str:
        """Return the bucket with the state of all builds of this owner."""
        return f"{self.owner}/{STATE}"

    def command(self) -> list[str]:
        """Return the command of the job: the uploaded program on the uploaded build file."""
        trackers = [word for tracker in self.trackers for word in ("--with", tracker)]
        again = [word for stage in self.rerun for word in ("--rerun", stage)]
        return [
            *("uv", "run", "--no-project", "--python", _python(), "--with", f"{MOUNT}/{WHEEL}", *trackers),
            *("--with-requirements", f"{MOUNT}/{REQUIREMENTS}", "factory", "build", f"{MOUNT}/{BUILD_FILE}"),
            *("--state", self.bucket, *again),
        ]


def submit(order: Order, hardware: str, *, timeout_seconds: int) -> JobInfo:
    """Upload the files that the job needs and the bucket lacks, and start it; the token is a secret of it.

    Raises:
        HubError: No permission, credit or connection; nothing was started.
    """
    contents: dict[str, bytes | Path] = {
        **program(with_vllm=order.uses_vllm),
        BUILD_FILE: order.build_file,
        **order.files,
    }
    place = f"jobs/{_digest(contents)}"
    with _nothing_submitted(), hub_errors(order.bucket, writing=True):
        open_bucket(order.bucket, remark=lambda _: None)
        api = hub_api()
        there = {item.path for item in api.list_bucket_tree(order.bucket, prefix=f"{place}/", recursive=True)}
        missing: list[tuple[str | Path | bytes, str]] = [
            (content, f"{place}/{name}")
            for name, content in contents.items()
            if f"{place}/{name}" not in there
        ]
        api.batch_bucket_files(order.bucket, add=missing)
    volume = Volume(type="bucket", source=order.bucket, mount_path=MOUNT, path=place, read_only=True)
    env = {"PYTHONUNBUFFERED": "1", "UV_NO_PROGRESS": "1"}
    env |= {name: os.environ[name] for name in FOR_TRACKERS if name in os.environ}
    secrets = {"HF_TOKEN": get_token()}
    if "wandb" in order.trackers and "WANDB_API_KEY" in os.environ:
        secrets["WANDB_API_KEY"] = os.environ["WANDB_API_KEY"]
    if constants.ENDPOINT != "https://huggingface.co":
        env["HF_ENDPOINT"] = constants.ENDPOINT
    with _jobs_errors(hardware):
        return api.run_job(
            image=f"ghcr.io/astral-sh/uv:python{_python()}-bookworm",
            command=order.command(),
            env=env,
            secrets=secrets,
            flavor=hardware,
            timeout=timeout_seconds,
            name=re.sub(r"[^\w-]", "-", order.name)[:100],
            labels={LABEL: order.build},
            volumes=[volume],
            namespace=order.owner,
        )


@contextmanager
def _nothing_submitted() -> Iterator[None]:
    """Make the hint of a failed upload speak of submitting instead of publishing."""
    try:
        yield
    except HubError as error:
        hint = error.hint.replace("nothing was published", "nothing was submitted")
        raise HubError(error.message, hint=hint) from error


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _digest(contents: Mapping[str, bytes | Path]) -> str:
    """Return the first 16 hex digits of a hash of names and contents."""
    found = hashlib.sha256()
    for name in sorted(contents):
        content = contents[name]
        sha256 = (
            hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256_of_file(content)
        )
        found.update(f"{name}\0{sha256}\n".encode())
    return found.hexdigest()[:16]


def jobs_of(owner: str, *, build: str | None = None) -> list[JobInfo]:
    """Return the jobs that the factory started, newest first, of one build or of all."""
    with _jobs_errors():
        found = patiently(
            lambda: list(hub_api().list_jobs(namespace=owner, labels={LABEL: build} if build else None))
        )
    return sorted(filter(is_ours, found), key=lambda job: str(job.created_at), reverse=True)


def is_ours(job: JobInfo) -> bool:
    """Return whether the factory submitted a job."""
    return LABEL in (job.labels or {})


def is_over(job: JobInfo) -> bool:
    """Return whether a job has ended."""
    return job.status.stage not in UNDER_WAY


def inspect(owner: str, job_id: str) -> JobInfo:
    """Return the current state of a job."""
    with _jobs_errors(job_id=job_id):
        return patiently(lambda: hub_api().inspect_job(job_id=job_id, namespace=owner))


def cancel(owner: str, job_id: str) -> None:
    """Cancel a job; the stages that it finished stay in the bucket."""
    with _jobs_errors(job_id=job_id):
        hub_api().cancel_job(job_id=job_id, namespace=owner)


def log(owner: str, job_id: str) -> Iterator[str]:
    """Yield each log line of a job once, until the job ends, even across lost connections.

    The client reconnects a few times by itself. After that the log is requested again for up to
    SILENCE_SECONDS, and lines already seen are skipped. Once the job has ended, the log is requested without
    following: if the connection broke at the end, the client only asks for the state and misses lines.

    Raises:
        HubError: No such job, or the Hub could not be reached for too long.
    """
    seen, last = 0, time.monotonic()
    while True:
        try:
            for follow in (True, False):
                lines = hub_api().fetch_job_logs(job_id=job_id, namespace=owner, follow=follow)
                for number, line in enumerate(lines):
                    last = time.monotonic()
                    if number >= seen:
                        seen += 1
                        yield line
            return
        except CLIENT_ERRORS as error:
            if _is_final(error) or time.monotonic() - last > SILENCE_SECONDS:
                with _jobs_errors(job_id=job_id):
                    raise
        time.sleep(WAIT_SECONDS)


def _is_final(error: BaseException) -> bool:
    return (
        isinstance(error, HfHubHTTPError)
        and error.response.status_code < 500
        and error.response.status_code != 429
    )


def check_ended_well(job: JobInfo) -> None:
    """Raise an error unless a job completed.

    Raises:
        JobError: The job failed, timed out or was cancelled.
    """
    stage = getattr(job.status.stage, "value", str(job.status.stage))
    if stage == "COMPLETED":
        return
    reason = f": {job.status.message}" if job.status.message else ""
    if stage == "CANCELED":
        raise JobError(f"job {job.id} was cancelled", hint="the same command resumes from what it finished")
    if re.search(r"time[d\s-]*out|deadline", job.status.message or "", re.IGNORECASE):
        hint = "the same command resumes from what it finished; --timeout gives it longer"
    else:
        hint = f"its log says why: factory jobs follow {job.id}; then the same command resumes from there"
    raise JobError(f"job {job.id} ended with {stage}{reason}", hint=hint)


@contextmanager
def _jobs_errors(hardware: str | None = None, *, job_id: str | None = None) -> Iterator[None]:
    """Explain the Hub's refusals that concern Jobs."""
    with hub_errors(f"job {job_id}" if job_id else "Jobs"):
        try:
            yield
        except HfHubHTTPError as error:
            refused = _refusal(error, hardware, job_id)
            if refused is None:
                raise
            raise refused from error


def _refusal(error: HfHubHTTPError, hardware: str | None, job_id: str | None) -> HubError | None:
    reason = f": {error.server_message}" if error.server_message else ""
    nothing = "nothing was submitted; " if hardware else ""
    match error.response.status_code:
        case 402:
            return HubError(
                f"your account cannot pay for {hardware or 'Jobs'} (402){reason}",
                hint=f"{nothing}add credit at {endpoint()}/settings/billing",
            )
        case 403:
            return HubError(
                f"your token may not use Jobs (403){reason}",
                hint=f"{nothing}make one with that permission at {endpoint()}/settings/tokens",
            )
        case 404 if job_id:
            return HubError(f"no such job: {job_id}", hint="`factory jobs` lists yours")
    return None
