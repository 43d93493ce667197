"""`factory build --on` and `factory jobs`: submit, follow, list and cancel builds on rented hardware."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from factory.cli.click_options import CONTEXT, Group
from factory.cli.console import print_json, remark
from factory.config.request import BuildRequest
from factory.errors import HubError, UsageError

if TYPE_CHECKING:
    from huggingface_hub import JobInfo
    from rich.console import Console

    from factory.jobs.prepare import PreparedJob


def submit(requests: Sequence[BuildRequest], *, dry_run: bool, as_json: bool) -> None:
    """Submit the builds as one job, and follow it unless `detach` is set.

    Raises:
        UsageError: An option that a job cannot take, or the job is already running.
        HubError: No token, permission or credit; nothing was submitted.
        JobError: The job failed or was cancelled.
    """
    from factory.cli.console import StageLines, console
    from factory.jobs.prepare import prepare_job
    from factory.jobs.submit import submit as jobs_submit

    reporter = StageLines(console(stderr=as_json))
    screen = reporter.out
    prepared = prepare_job(requests, reporter)
    order, hardware = prepared.order, prepared.hardware
    _show(screen, prepared)
    if order.uses_vllm and not find_spec("vllm"):
        remark("vLLM is not installed here: the job uses the library versions it needs, not the local ones")
    if dry_run:
        return
    job = jobs_submit(order, hardware.name, timeout_seconds=prepared.timeout)
    screen.print(f"job {job.id} on {hardware.name}: {job.url}", soft_wrap=True)
    if requests[0].detach:
        screen.print(f"  follow it   factory jobs follow {job.id}")
    else:
        job = _follow(order.owner, job.id, screen)
    if as_json:
        print_json(_values(job))


def _show(screen: "Console", job: "PreparedJob") -> None:
    """Show the previews, and what the job may cost."""
    from factory.cli.tables import show_preview
    from factory.units import duration

    for one, shown in zip(job.settled, job.previews, strict=True):
        show_preview(screen, shown, one.config, title=f"{one.source.name} → {one.out.name}")
    less = ", less what earlier jobs finished" if job.resumes else ""
    price = job.hardware.price
    screen.print(
        f"  {'on':<12}{job.hardware.title}, {job.hardware.name}\n"
        f"  {'price':<12}about {price(job.seconds)} for {duration(job.seconds)}{less}; "
        f"at most {price(job.timeout)} for {duration(job.timeout)}\n",
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


def show_jobs(out: "Console", jobs: Sequence[dict[str, Any]]) -> None:
    """Show one line per job."""
    from factory.cli.tables import new_table
    from factory.units import duration

    *left, last = ("job", "build", "hardware", "stage", "submitted", "ran")
    table = new_table((*left, last), left=left)
    for job in jobs:
        ran = "" if job["seconds"] is None else duration(job["seconds"])
        submitted = (job["created_at"] or "")[:16].replace("T", " ")
        table.add_row(job["id"], job["name"] or "", str(job["hardware"]), job["stage"], submitted, ran)
    out.print(table if jobs else "no jobs; `factory build MODEL --on HARDWARE` submits one")
