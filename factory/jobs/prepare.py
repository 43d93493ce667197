"""Turn requests into a job: settle and check its builds, estimate them, and collect what it uploads."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from factory.artifacts import canonical_json
from factory.config.request import BuildRequest, file_text
from factory.errors import DiskSpaceError, UsageError
from factory.evaluation.tasks import task_identity
from factory.jobs.hardware import OF_PEAK, Flavor, check_fits, flavor, parse_timeout
from factory.jobs.submit import STATE, Order, is_over, jobs_of, user_name
from factory.jobs.uploads import carried
from factory.pipeline.build import stages_of
from factory.pipeline.costs.preview import Preview, preview
from factory.pipeline.prepare import Settled, check_weights_load, open_inputs, settle_all
from factory.pipeline.run import Reporter
from factory.pipeline.texts import check_rendering, check_texts, known_lengths
from factory.text.text import Texts, text_identity
from factory.units import duration

HOUR = 3600
NEEDS_GPU = "choose hardware with one, or remove the option"


@dataclass(frozen=True)
class PreparedJob:
    """A checked job that is not submitted, with what it will need."""

    order: Order
    hardware: Flavor
    settled: Sequence[Settled]
    previews: Sequence[Preview]
    seconds: float  # estimate for all stages of all builds
    timeout: int  # seconds
    resumes: bool  # an earlier job may have finished some stages


def prepare_job(requests: Sequence[BuildRequest], reporter: Reporter) -> PreparedJob:
    """Resolve, settle and check the builds of a job; nothing is uploaded.

    Raises:
        UsageError: An option that a job cannot take, or the job is already running.
        HubError: No token, or no such job hardware.
    """
    name, timeout = _check_submission(requests)
    owner = user_name()
    hardware = flavor(name)
    given, files = carried(requests, upload=requests[0].upload, bucket=f"{owner}/{STATE}")
    settled, previews, build = _checked(requests, hardware, reporter)
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
        _check_timeout(timeout, seconds, hardware)
    order = Order(
        owner,
        settled[0].out.name + (f"-and-{len(settled) - 1}-more" if len(settled) > 1 else ""),
        build,
        file_text(given).encode(),
        files,
        requests[0].rerun,
        trackers=tuple(sorted({r.report_to for r in requests if r.report_to not in (None, "none")})),
        uses_vllm=any(one.config.evaluate.backend == "vllm" for one in settled),
    )
    return PreparedJob(order, hardware, settled, previews, seconds, timeout, bool(earlier))


def _check_submission(requests: Sequence[BuildRequest]) -> tuple[str, int | None]:
    """Return hardware and timeout in seconds, which must be the same for all builds of a job."""
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


def _checked(
    requests: Sequence[BuildRequest], found: Flavor, reporter: Reporter
) -> tuple[list[Settled], list[Preview], str]:
    """Check the builds before anything is uploaded; return settings, previews and their common hash."""
    settled = settle_all(requests, reporter)
    previews, identities = [], []
    for one in settled:
        request, config = one.request, one.config
        with request.located(), _not_here():
            texts, note = open_inputs(one)
            if config.evaluate.backend == "vllm" and not found.has_gpu:
                raise UsageError(f"`eval_backend=vllm` on {found.name}, which has no GPU", hint=NEEDS_GPU)
            if (parts := one.source.unmerged) and parts.base.repo_id is None:
                raise UsageError(
                    f"the base of the adapter {one.source.name} is a folder on this machine, where no job "
                    "can read it",
                    hint="let the adapter name a base on the Hub, or build without `on`",
                )
            for message in (*texts.remarks, *check_texts(texts), *([note] if note else [])):
                reporter.note(message)
            check_rendering(one.source, texts)
            identities.append(_identity(one, texts))
            stages = stages_of(config)
            check_weights_load(one.source, config, stages)
            shown = preview(
                one.source,
                config,
                pending=stages,
                home=Path(found.name),
                machine=found.machine,
                **known_lengths(texts, stages),
            )
            check_fits(found, shown.memory_needed)
            previews.append(shown)
    build = hashlib.sha256(canonical_json(sorted(identities)).encode()).hexdigest()[:16]
    return settled, previews, build


def _identity(settled: Settled, texts: Texts) -> str:
    """Return a canonical description of a build and its destination, equal for equal requests."""
    config = settled.config
    used = [texts.calibration, *texts.evaluations, *([texts.healing] if config.has_adapter else [])]
    made_by = config.model_dump(
        mode="json",
        exclude={"reference", "size", "budget", *(() if config.has_adapter else ("heal", "merge_base"))},
    )
    for part in ("measure", "heal", "evaluate"):
        made_by.get(part, {}).pop("data", None)
    made_by["evaluate"]["tasks"] = [task_identity(task) for task in config.evaluate.tasks]
    names = [text_identity(text.data) for text in used]
    return canonical_json([settled.source.commit, made_by, names, settled.push_to])


@contextmanager
def _not_here() -> Iterator[None]:
    """Replace hints about this machine's disk with one about the hardware."""
    try:
        yield
    except DiskSpaceError as error:
        raise DiskSpaceError(error.message, hint="choose hardware with more disk") from error


def _check_timeout(timeout: int, seconds: float, found: Flavor) -> None:
    """Refuse a timeout that would be too short even at the hardware's peak speed."""
    if found.peak_flops and timeout < seconds * OF_PEAK:
        raise UsageError(
            f"`timeout` of {duration(timeout)} is too short: even at peak speed, {found.name} needs "
            f"{duration(seconds * OF_PEAK)}",
            hint=f"it may well take {duration(seconds)}: `timeout={math.ceil(2 * seconds / HOUR)}h`",
        )
