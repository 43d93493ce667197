"""`factory build --on` and `factory jobs`: submit, follow, list and cancel builds on rented hardware."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from factory.cli.click_options import CONTEXT, Group
from factory.cli.console import print_json, remark
from factory.config.request import BuildRequest
from factory.errors import DiskSpaceError, HubError, UsageError
from factory.jobs.uploads import carried

if TYPE_CHECKING:
    from huggingface_hub import JobInfo
    from rich.console import Console

    from factory.cli.console import StageLines
    from factory.jobs.hardware import Flavor
    from factory.pipeline.prepare import Settled
    from factory.pipeline.preview import Preview
    from factory.text.text import Texts

HOUR = 3600
NEEDS_GPU = "choose hardware with one, or remove the option"


def submit(requests: Sequence[BuildRequest], *, dry_run: bool, as_json: bool) -> None:
    """Submit the builds as one job, and follow it unless `detach` is set.

    Raises:
        UsageError: An option that a job cannot take, or the job is already running.
        HubError: No token, permission or credit; nothing was submitted.
        JobError: The job failed or was cancelled.
    """
    from factory.cli.build_file import text_of
    from factory.cli.console import StageLines, console
    from factory.jobs.hardware import flavor
    from factory.jobs.submit import STATE, Order, is_over, jobs_of, user_name
    from factory.jobs.submit import submit as jobs_submit

    reporter = StageLines(console(stderr=as_json))
    screen, first = reporter.out, requests[0]
    hardware, timeout = _check_submission(requests)
    owner = user_name()
    found = flavor(hardware)
    given, files = carried(requests, upload=first.upload, bucket=f"{owner}/{STATE}")
    settled, previews, build = _look(requests, found, reporter)
    earlier = jobs_of(owner, build=build)
    if running := next((job for job in earlier if not is_over(job)), None):
        raise UsageError(
            f"job {running.id} is already running this build",
            hint=f"factory jobs follow {running.id}, or factory jobs cancel {running.id}",
        )
    seconds = sum(shown.seconds for shown in previews)
    if timeout is None:
        timeout = HOUR * math.ceil(2 * seconds / HOUR)
    elif not earlier:
        _check_timeout(timeout, seconds, found)
    _show(screen, settled, previews, found, seconds=seconds, timeout=timeout, earlier=bool(earlier))
    uses_vllm = any(one.config.evaluate.backend == "vllm" for one in settled)
    if uses_vllm and not find_spec("vllm"):
        remark("vLLM is not installed here: the job uses the library versions it needs, not the local ones")
    if dry_run:
        return
    name = settled[0].out.name + (f"-and-{len(settled) - 1}-more" if len(settled) > 1 else "")
    order = Order(
        owner,
        name,
        build,
        text_of(given).encode(),
        files,
        first.rerun,
        trackers=tuple(sorted({r.report_to for r in requests if r.report_to not in (None, "none")})),
        uses_vllm=uses_vllm,
    )
    job = jobs_submit(order, hardware, timeout_seconds=timeout)
    screen.print(f"job {job.id} on {hardware}: {job.url}", soft_wrap=True)
    if first.detach:
        screen.print(f"  follow it   factory jobs follow {job.id}")
    else:
        job = _follow(owner, job.id, screen)
    if as_json:
        print_json(_values(job))


def _check_submission(requests: Sequence[BuildRequest]) -> tuple[str, int | None]:
    """Return hardware and timeout in seconds, which must be the same for all builds of a job."""
    from factory.jobs.hardware import parse_timeout

    first = requests[0]
    for request in requests:
        for name in ("on", "timeout"):
            value, earlier = getattr(request, name), getattr(first, name)
            if value != earlier:
                with request.located(name):
                    raise UsageError(
                        f"`{name}={value}` after {earlier}",
                        hint=f"all builds of a file run in one job: give {name} once, beside `builds`",
                    )
    assert first.on is not None
    with first.located("timeout"):
        return first.on, None if first.timeout is None else parse_timeout(first.timeout)


def _look(
    requests: Sequence[BuildRequest], found: "Flavor", reporter: "StageLines"
) -> tuple[list["Settled"], list["Preview"], str]:
    """Check the builds before anything is uploaded; return settings, previews and their common hash."""
    from factory.artifacts import canonical_json
    from factory.evaluation.tasks import check_tasks
    from factory.jobs.hardware import check_fits
    from factory.pipeline.build import STAGES
    from factory.pipeline.prepare import check_weights_load, settle_all
    from factory.pipeline.preview import preview
    from factory.pipeline.texts import check_texts, known_lengths, open_texts

    settled = settle_all(requests, reporter)
    previews, identities = [], []
    for one in settled:
        request, config = one.request, one.config
        with request.located(), _not_here():
            check_tasks(config.evaluate, search=False, run_code=request.run_task_code)
            if config.evaluate.backend == "vllm" and not found.has_gpu:
                raise UsageError(f"`eval_backend=vllm` on {found.name}, which has no GPU", hint=NEEDS_GPU)
            texts = open_texts(config)
            for message in (*texts.remarks, *check_texts(texts)):
                reporter.note(message)
            identities.append(_identity(one, texts))
            check_weights_load(one.source, config, STAGES)
            shown = preview(
                one.source,
                config,
                pending=STAGES,
                home=Path(found.name),
                machine=found.machine,
                **known_lengths(texts, STAGES),
            )
            check_fits(found, shown.memory_needed)
            previews.append(shown)
    build = hashlib.sha256(canonical_json(sorted(identities)).encode()).hexdigest()[:16]
    return settled, previews, build


def _identity(settled: "Settled", texts: "Texts") -> str:
    """Return a canonical description of a build and its destination, equal for equal requests."""
    from factory.artifacts import canonical_json
    from factory.evaluation.tasks import task_identity
    from factory.hub.push import full_name
    from factory.text.text import text_identity

    config, push_to = settled.config, settled.request.push_to
    used = [texts.calibration, *texts.evaluations, *([texts.healing] if config.has_adapter else [])]
    made_by = config.model_dump(
        mode="json", exclude={"reference", *(() if config.has_adapter else ("heal", "merge_base"))}
    )
    for part in ("measure", "heal", "evaluate"):
        made_by.get(part, {}).pop("data", None)
    made_by["evaluate"]["tasks"] = [task_identity(task) for task in config.evaluate.tasks]
    names = [text_identity(text.data) for text in used]
    return canonical_json([settled.source.commit, made_by, names, full_name(push_to) if push_to else None])


@contextmanager
def _not_here() -> Iterator[None]:
    """Replace hints about this machine's disk with one about the hardware."""
    try:
        yield
    except DiskSpaceError as error:
        raise DiskSpaceError(error.message, hint="choose hardware with more disk") from error


def _check_timeout(timeout: int, seconds: float, found: "Flavor") -> None:
    """Refuse a timeout that would be too short even at the hardware's peak speed."""
    from factory.jobs.hardware import OF_PEAK
    from factory.units import duration

    if found.peak_flops and timeout < seconds * OF_PEAK:
        raise UsageError(
            f"`timeout` of {duration(timeout)} is too short: even at peak speed, {found.name} needs "
            f"{duration(seconds * OF_PEAK)}",
            hint=f"it may well take {duration(seconds)}: `timeout={math.ceil(2 * seconds / HOUR)}h`",
        )


def _show(
    screen: "Console",
    settled: list["Settled"],
    previews: list["Preview"],
    found: "Flavor",
    *,
    seconds: float,
    timeout: int,
    earlier: bool,
) -> None:
    """Show the previews, and what the job may cost."""
    from factory.cli.tables import show_preview
    from factory.units import duration

    for one, shown in zip(settled, previews, strict=True):
        show_preview(screen, shown, one.config, title=f"{one.source.name} → {one.out.name}")
    less = ", less what earlier jobs finished" if earlier else ""
    screen.print(
        f"  {'on':<12}{found.title}, {found.name}\n"
        f"  {'price':<12}about {found.price(seconds)} for {duration(seconds)}{less}; "
        f"at most {found.price(timeout)} for {duration(timeout)}\n",
        soft_wrap=True,
    )


def _follow(owner: str, job_id: str, screen: "Console") -> "JobInfo":
    """Show a job's log until the job ends.

    Raises:
        JobError: The job failed or was cancelled.
    """
    from factory.cli.console import printable
    from factory.jobs.submit import check_ended_well, inspect, log

    try:
        for line in log(owner, job_id):
            screen.print(printable(line), soft_wrap=True)
    except KeyboardInterrupt:
        click.echo(
            f"the job keeps running: factory jobs follow {job_id}, or factory jobs cancel {job_id}", err=True
        )
        raise
    job = inspect(owner, job_id)
    check_ended_well(job)
    return job


def _values(job: "JobInfo") -> dict[str, Any]:
    """Return a job as JSON values."""
    return {
        "id": job.id,
        "url": job.url,
        "name": (job.labels or {}).get("name"),
        "hardware": job.flavor,
        "stage": job.status.stage,
        "message": job.status.message,
        "created_at": job.created_at.isoformat() if job.created_at else None,
        "seconds": job.durations.running_secs if job.durations else None,
    }


@click.group("jobs", cls=Group, context_settings=CONTEXT, invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
@click.pass_context
def jobs_group(context: click.Context, as_json: bool) -> None:
    """List, follow and cancel rented builds.

    These are the builds that `factory build --on` submitted to Hugging Face Jobs.
    """
    if context.invoked_subcommand:
        return
    from factory.cli.console import console
    from factory.cli.tables import show_jobs
    from factory.jobs.submit import jobs_of, user_name

    found = jobs_of(user_name())
    if as_json:
        print_json([_values(job) for job in found])
    else:
        show_jobs(console(), [_values(job) for job in found])


@jobs_group.command(context_settings=CONTEXT)
@click.argument("job")
def follow(job: str) -> None:
    """Show a job's log, from its start to its end."""
    from factory.cli.console import console
    from factory.jobs.submit import user_name

    _check_id(job)
    _follow(user_name(), job, console())


@jobs_group.command(context_settings=CONTEXT)
@click.argument("job")
def cancel(job: str) -> None:
    """Cancel a job.

    Running the same build again resumes from the stages that the job finished.
    """
    from factory.jobs.submit import cancel as jobs_cancel
    from factory.jobs.submit import inspect, is_ours, is_over, user_name

    _check_id(job)
    owner = user_name()
    found = inspect(owner, job)
    if not is_ours(found):
        raise UsageError(
            f"job {job} was not submitted by `factory build --on`",
            hint=f"`factory jobs` lists those that were; `hf jobs cancel {job}` ends any other",
        )
    if is_over(found):
        raise HubError(f"job {job} already ended: {found.status.stage}", hint="`factory jobs` lists yours")
    jobs_cancel(owner, job)
    click.echo(f"job {job} is cancelled")


def _check_id(job: str) -> None:
    if not job.isalnum():
        raise UsageError(f"{job!r} is not a job id", hint="`factory jobs` lists yours")
