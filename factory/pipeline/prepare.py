"""Turn a request into a run: resolve the source, decide every setting, and check it all before the work."""

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from factory.artifacts import Build, Source, canonical_json, layer_ranges
from factory.builds.folder import check_out
from factory.builds.publish import check_publishable
from factory.builds.reproduce import (
    base_reference,
    check_same_source,
    check_same_texts,
    read_build,
    same_settings,
    source_reference,
)
from factory.config.criteria import CRITERIA
from factory.config.references import share_of
from factory.config.request import BuildRequest, PlanRequest, Request, SweepRequest
from factory.config.settings import BuildConfig, build_name, num_dropped, settle
from factory.config.tracking import Tracking, choose_tracker
from factory.config.unused_options import unread
from factory.errors import UsageError
from factory.evaluation.tasks import check_backend, check_tasks
from factory.hub.bucket import StageBucket
from factory.pipeline.build import pending, stages_of
from factory.pipeline.costs.budget import within_budget
from factory.pipeline.costs.pace import too_short
from factory.pipeline.costs.preview import Preview, preview
from factory.pipeline.run import Reporter, Run
from factory.pipeline.source import resolve_source
from factory.pipeline.texts import (
    check_kinds,
    check_rendering,
    check_texts,
    known_lengths,
    open_texts,
    reads_text,
)
from factory.pruning.sizes import find_goal
from factory.store.stage import HEAL, PRUNE, STAGES
from factory.store.store import Store, home_folder
from factory.text.text import Texts

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settled:
    """A request with every setting decided; no weights have been read."""

    request: BuildRequest
    source: Source
    config: BuildConfig
    out: Path
    push_to: str | None  # owner/name to publish as
    repeats: Build | None = None  # the finished build that is reproduced


@dataclass(frozen=True)
class Prepared:
    """A checked build, with what it will need."""

    settled: Settled
    run: Run
    pending: tuple[str, ...]  # stages still to run
    preview: Preview


def prepare(requests: Sequence[BuildRequest], reporter: Reporter, *, dry_run: bool = False) -> list[Prepared]:
    """Resolve, settle and check all requests before any build begins.

    Args:
        dry_run: Build nothing, create no bucket and fetch no stages.

    Raises:
        FactoryError: A request cannot be carried out; names its line if it comes from a build file.
    """
    settled = settle_all(requests, reporter)
    prepared = []
    for each in settled:
        with each.request.located():
            prepared.append(_checked(each, reporter, dry_run=dry_run))
    return prepared


def settle_all(requests: Sequence[BuildRequest], reporter: Reporter) -> list[Settled]:
    """Settle all requests, and check that no build overwrites another."""
    settled = []
    for request in requests:
        with request.located():
            settled.append(_settled(request, reporter))
    _check_apart(settled)
    return settled


def begin(
    request: PlanRequest | SweepRequest, reporter: Reporter, *, drop: float | None, measures: bool = True
) -> tuple[Source, Run]:
    """Return what `plan` and `sweep` begin with: the source, and a run with checked texts and tasks.

    Args:
        drop: Smallest fraction of the layers to drop; None: from the size that a plan's request names.
        measures: Whether text and weights are read at all.
    """
    source = resolve_source(request, reporter)
    goal = find_goal(request, source) if isinstance(request, PlanRequest) else None
    config = settle(request, source, drop=drop, goal=goal)
    check_runtimes(request, source, config, reporter)
    check_weights_load(source, config, ("prune", *(("measure",) if measures else ())))
    sweeps = isinstance(request, SweepRequest)
    if isinstance(request, SweepRequest):
        if config.heal_enabled and not source.remote_code:
            from factory.healing.lora import check_targets

            check_targets(source.config, config.heal.modules)
        check_backend(config.evaluate)
        check_tasks(config.evaluate, search=True, run_code=request.run_task_code)
        check_question_form(source, config)
    texts = open_texts(config, measures=measures, heals=sweeps, evaluates=sweeps)
    note = check_kinds(source, texts)
    remarks = (*unread(request, config), *texts.remarks, *check_texts(texts))
    for message in (*remarks, *([note] if note else [])):
        reporter.note(message)
    LOG.debug("settings: %s", config.model_dump_json())
    run = Run(config, Store(home_folder(request.home)), reporter, texts)
    if measures:
        from factory.parallel.launch import num_processes

        run.processes = num_processes(request.processes)
    return source, run


def check_runtimes(
    request: BuildRequest | PlanRequest | SweepRequest,
    source: Source,
    config: BuildConfig,
    reporter: Reporter,
) -> None:
    """Refuse cuts that cannot run right where they must, by the sizes or the given layers alone.

    A runtime that may lack the source's tokenizer, of which only the files are looked at, is noted.
    """
    from factory.hub.pull import tokenizer_folder
    from factory.serving.runtimes import OWN_TOKENIZERS, limit, tokenizer_doubt

    if not config.plan.runtimes or source.remote_code:  # foreign code is not trusted yet
        return
    criterion = request.criterion or config.plan.criterion
    for drop in request.drop if isinstance(request, SweepRequest) else [config.drop]:
        layers = config.plan.layers or ()
        size = len(layers) or num_dropped(drop, source.num_layers)
        block = not layers and not (criterion in CRITERIA and CRITERIA[criterion].scattered)
        within = limit(
            source.config,
            runtimes=config.plan.runtimes,
            count=size,
            in_one_block=block,
            keeps_last=criterion != "loss",
        )
        if not within(layers):
            raise UsageError(
                f"without layers {layer_ranges(layers)} this model would be wrong in "
                f"{', '.join(config.plan.runtimes)}",
                hint="omit `layers`, or `for_runtimes`; `factory plan` says where the result runs right",
            )
    if not {OWN_TOKENIZERS, "all"} & {*config.plan.runtimes}:  # others read tokenizer.json
        return
    folder = tokenizer_folder(source)
    if folder and (doubt := tokenizer_doubt(source.config, config.plan.runtimes, folder)):
        reporter.note(doubt)


def check_question_form(source: Source, config: BuildConfig) -> None:
    """Refuse to ask tasks in a chat template that the source lacks."""
    if config.evaluate.apply_chat_template and not source.has_chat_template:
        raise UsageError(
            f"`apply_chat_template`: {source.name} has no chat template",
            hint="remove `apply_chat_template`, or give the chat version of the model",
        )


def _settled(request: BuildRequest, reporter: Reporter) -> Settled:
    from factory.hub.push import full_name
    from factory.pruning.criteria import plan_without

    _check_stages(request.rerun)
    push_to = full_name(request.push_to) if request.push_to else None  # without a login, fails now
    if request.reproduce:
        settled = _settled_again(request, reporter, push_to=push_to)
    else:
        source = resolve_source(request, reporter)
        drop = request.drop
        if request.layers:
            plan_without(request.layers, num_layers=source.num_layers)  # checks that the layers exist
            drop = len(request.layers) / source.num_layers
        goal = find_goal(request, source)
        config = settle(request, source, drop=drop, goal=goal)
        check_runtimes(request, source, config, reporter)
        out = request.out or Path("builds") / build_name(source.name, config.drop)
        settled = Settled(request, source, config, out, push_to)
    where = f"{request.origin.file}, line {request.origin.line}: " if request.origin else ""
    for message in (*unread(request, settled.config), *_not_redone(request, settled.config)):
        reporter.note(f"{where}{message}")
    if push_to and (note := check_publishable(settled.source, accepted=request.accept_license)):
        reporter.note(note)
    return settled


def _check_stages(names: Sequence[str]) -> None:
    known = [name for name, stage in STAGES.items() if stage.can_rerun]
    for name in names:
        if name not in known:
            raise UsageError(f"`rerun={name}` is not a stage", hint=f"stages: {', '.join(known)}")


def _not_redone(request: BuildRequest, config: BuildConfig) -> list[str]:
    """Return a line for each stage to redo that the build does not have."""
    stages = stages_of(config)
    return [
        f"`rerun={name}` has no effect: this build has no such stage"
        for name in request.rerun
        if name not in stages
    ]


def _settled_again(request: BuildRequest, reporter: Reporter, *, push_to: str | None) -> Settled:
    """Settle a request to reproduce a finished build."""
    found = read_build(request.reference)
    again = replace(request, model=source_reference(found))
    source = resolve_source(again, reporter, base=base_reference(found))
    check_same_source(found, source)
    files = {
        "measure": (request.calibration_data,) if request.calibration_data else (),
        "heal": tuple(share_of(data)[0] for data in request.heal_data or ()),  # the shares are the build's
        "evaluate": request.eval_data or (),
    }
    config = same_settings(found, files=files, tasks=request.tasks)
    out = request.out or Path("builds") / f"{build_name(source.name, config.drop)}-reproduced"
    return Settled(request, source, config, out, push_to, repeats=found)


def _check_apart(settled: Sequence[Settled]) -> None:
    """Refuse builds that would overwrite one another, however their paths are spelled."""
    taken: dict[tuple[str, str], int] = {}
    for one in settled:
        line = one.request.origin.line if one.request.origin else 0
        places = [("out", str(one.out), str(one.out.resolve()))]
        if one.push_to:
            places.append(("push_to", str(one.request.push_to), one.push_to.casefold()))
        for key, written, place in places:
            if (key, place) in taken:
                with one.request.located(key):
                    raise UsageError(
                        f"{written} is already used by the build in line {taken[key, place]}",
                        hint=f"give each build its own `{key}`",
                    )
            taken[key, place] = line


def _checked(settled: Settled, reporter: Reporter, *, dry_run: bool) -> Prepared:
    """Check everything that a build needs: texts, tasks, tensors, disk, memory."""
    request, source, config = settled.request, settled.source, settled.config
    check_out(settled.out)
    home = home_folder(request.home)
    store = Store(home, _bucket(request, reporter, dry_run=dry_run))
    check_backend(config.evaluate)
    texts, note = open_inputs(settled)
    if request.budget:
        stages = stages_of(config)
        config = within_budget(
            request,
            source,
            config,
            stages=stages,
            known=known_lengths(texts, stages),
            home=home,
            reporter=reporter,
            dry_run=dry_run,
        )
        settled = replace(settled, config=config)
    for message in texts.remarks:
        reporter.note(message)
    LOG.debug("settings: %s", config.model_dump_json())
    run = Run(config, store, reporter, texts, rerun=frozenset(request.rerun))
    run.tracking = _tracking(settled)
    left = pending(run, source)
    check_weights_load(source, config, left)
    check_tasks(config.evaluate, search="evaluate" in left, run_code=request.run_task_code)
    if reads_text(left):
        for message in check_texts(texts):
            reporter.note(message)
        check_rendering(source, texts)
    if note and HEAL.name in left:
        reporter.note(note)
    if left or request.processes:
        from factory.model.devices import unused_gpu
        from factory.parallel.launch import num_processes

        run.processes = num_processes(request.processes)
        if unused := unused_gpu():
            reporter.note(unused)
    shown = preview(
        source,
        config,
        pending=left,
        home=home,
        out=settled.out,
        processes=run.processes,
        **known_lengths(texts, left),
    )
    if request.processes is None:
        run.undivided = too_short(config, shown.stage_seconds, processes=run.processes)
    return Prepared(settled, run, left, shown)


def open_inputs(settled: Settled) -> tuple[Texts, str | None]:
    """Check tasks, and open and check the texts, without a look at the machine that will run them.

    Returns:
        The texts, and a note if healing will read another kind of text than the source was made for.
    """
    request, source, config = settled.request, settled.source, settled.config
    check_tasks(config.evaluate, search=False, run_code=request.run_task_code)
    check_question_form(source, config)
    texts = open_texts(config)
    note = check_kinds(source, texts)
    if settled.repeats:
        check_same_texts(settled.repeats, texts)
    return texts, note


def check_weights_load(source: Source, config: BuildConfig, stages: Sequence[str]) -> None:
    """Check, from headers alone, that the weights are complete and that transformers can load them here."""
    if PRUNE.name in stages:
        from factory.model.completeness import check_source

        check_source(source)
    if any(stage.loads_source for name, stage in STAGES.items() if name in stages):
        from factory.model.quantization import check_loads

        check_loads(source.config, four_bit=config.measure.four_bit)


def _bucket(request: BuildRequest, reporter: Reporter, *, dry_run: bool) -> StageBucket | None:
    """Open the bucket in which stages are kept besides this machine."""
    if request.state is None:
        return None
    from factory.hub.bucket import look_at_bucket, open_bucket
    from factory.hub.push import full_name

    name = full_name(request.state)
    if not dry_run:
        return open_bucket(name, remark=reporter.note)
    look_at_bucket(name)
    reporter.note(f"a dry run ignores the stages already in {name}")
    return None


def _tracking(settled: Settled) -> Tracking:
    """Return where the build is tracked, under a unique name, since folder names may repeat."""
    out = settled.out.absolute()
    decides = [
        str(out),
        settled.source.commit,
        settled.config.model_dump(mode="json", exclude={"size", "budget"}),
    ]
    suffix = hashlib.sha256(canonical_json(decides).encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.-]", "-", f"{out.name}-{suffix}")
    return Tracking(choose_tracker(settled.request.report_to), name, out.parent / "runs")


def load_questions(request: Request, config: BuildConfig, reporter: Reporter) -> None:
    """Load the questions of the tasks now: it is too late hours later to find that they are gone."""
    if not config.evaluate.tasks:
        return
    from factory.evaluation.harness import load_tasks

    reporter.started("questions")
    try:
        with request.located("tasks"):
            remarks = load_tasks(config.evaluate)
    finally:
        reporter.stop()
    for message in remarks:
        reporter.note(message)
