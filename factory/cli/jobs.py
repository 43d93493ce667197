"""`factory build --on` and `factory jobs`: builds on rented hardware, submitted, followed, listed, ended."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from factory.cli.console import print_json, remark
from factory.cli.options import CONTEXT, Group
from factory.cli.request import config_text
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
NEEDS_GPU = "take hardware with one, or leave the option out"


def submit(requests: Sequence[BuildRequest], *, dry_run: bool, as_json: bool) -> None:
    """Submit the builds as one job, and follow it unless that is not wanted.

    Raises:
        UsageError: Something that a job cannot be given.
        HubError: No token, no permission, no credit. Nothing was submitted then.
        JobError: The job did not end well.
    """
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
            f"job {running.id} makes this build already",
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
        remark("vLLM is not installed here: the job takes the library versions that it needs, not those here")
    if dry_run:
        return
    name = settled[0].out.name + (f"-and-{len(settled) - 1}-more" if len(settled) > 1 else "")
    order = Order(
        owner,
        name,
        build,
        config_text(given).encode(),
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
    """Hardware and timeout in seconds, the same for all builds: they run in one job."""
    from factory.jobs.hardware import parse_timeout

    first = requests[0]
    for request in requests:
        for name in ("on", "timeout"):
            value, earlier = getattr(request, name), getattr(first, name)
            if value != earlier:
                with request.located(name):
                    raise UsageError(
                        f"`{name}={value}` after {earlier}",
                        hint=f"builds of a file run in one job: give {name} once, beside `builds`",
                    )
    assert first.on is not None
    with first.located("timeout"):
        return first.on, None if first.timeout is None else parse_timeout(first.timeout)


def _look(
    requests: Sequence[BuildRequest], found: "Flavor", reporter: "StageLines"
) -> tuple[list["Settled"], list["Preview"], str]:
    """Check all that can be wrong with the builds, before anything goes up; also returns their hash."""
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
    """What a build makes and where it goes: equal however it was asked for."""
    from factory.artifacts import canonical_json
    from factory.evaluation.tasks import task_identity
    from factory.hub.push import full_name
    from factory.text.text import text_identity

    config, push_to = settled.config, settled.request.push_to
    used = [texts.calibration, texts.evaluation, *([texts.healing] if config.heal_enabled else [])]
    made_by = config.model_dump(
        mode="json", exclude={"reference", *(() if config.heal_enabled else ("heal", "merge_base"))}
    )
    for part in ("measure", "heal", "evaluate"):
        made_by.get(part, {}).pop("data", None)
    made_by["evaluate"]["tasks"] = [task_identity(task) for task in config.evaluate.tasks]
    names = [text_identity(text.data) for text in used]
    return canonical_json([settled.source.commit, made_by, names, full_name(push_to) if push_to else None])


@contextmanager
def _not_here() -> Iterator[None]:
    """What is true of another machine's disk, without advice for this one's."""
    try:
        yield
    except DiskSpaceError as error:
        raise DiskSpaceError(error.message, hint="take hardware with more disk") from error


def _check_timeout(timeout: int, seconds: float, found: "Flavor") -> None:
    """Refuse a time in which even a machine at its peak could not finish."""
    from factory.jobs.hardware import OF_PEAK
    from factory.units import duration

    if found.peak_flops and timeout < seconds * OF_PEAK:
        raise UsageError(
            f"`timeout` of {duration(timeout)} cannot suffice: even at its peak, {found.name} needs "
            f"{duration(seconds * OF_PEAK)}",
            hint=f"about {duration(seconds)} are likely: `timeout={math.ceil(2 * seconds / HOUR)}h`",
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
    """What will happen, and what it may cost."""
    from factory.cli.tables import show_preview
    from factory.units import duration

    for one, shown in zip(settled, previews, strict=True):
        show_preview(screen, shown, one.config, title=f"{one.source.name} → {one.out.name}")
    less = ", less what earlier jobs have finished" if earlier else ""
    screen.print(
        f"  {'on':<12}{found.title}, {found.name}\n"
        f"  {'price':<12}about {found.price(seconds)} for {duration(seconds)}{less}; "
        f"at most {found.price(timeout)} for {duration(timeout)}\n",
        soft_wrap=True,
    )


def _follow(owner: str, job_id: str, screen: "Console") -> "JobInfo":
    """Show a job's lines until it is over.

    Raises:
        JobError: It did not end well.
    """
    from factory.cli.console import printable
    from factory.jobs.submit import check_ended_well, inspect, log

    try:
        for line in log(owner, job_id):
            screen.print(printable(line), soft_wrap=True)
    except KeyboardInterrupt:
        click.echo(
            f"the job goes on: factory jobs follow {job_id}, or factory jobs cancel {job_id}", err=True
        )
        raise
    job = inspect(owner, job_id)
    check_ended_well(job)
    return job


def _values(job: "JobInfo") -> dict[str, Any]:
    """A job for programs."""
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
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON, for programs.")
@click.pass_context
def jobs_group(context: click.Context, as_json: bool) -> None:
    """List, follow and cancel builds on Hugging Face Jobs, which `factory build --on` submits."""
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
    """Show what a job says, from its beginning until it is over."""
    from factory.cli.console import console
    from factory.jobs.submit import user_name

    _check_id(job)
    _follow(user_name(), job, console())


@jobs_group.command(context_settings=CONTEXT)
@click.argument("job")
def cancel(job: str) -> None:
    """End a job; the same build goes on from what it had finished."""
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
        raise HubError(f"job {job} is over already: {found.status.stage}", hint="`factory jobs` lists yours")
    jobs_cancel(owner, job)
    click.echo(f"job {job} is cancelled")


def _check_id(job: str) -> None:
    if not job.isalnum():
        raise UsageError(f"{job!r} is no job", hint="`factory jobs` lists yours")
