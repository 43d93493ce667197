"""`factory build`: a smaller model from a reference, published where asked."""

import hashlib
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from factory.cli.builds import license_option, publish
from factory.cli.options import (
    CONTEXT,
    Command,
    Count,
    Fraction,
    Layers,
    Place,
    backend_option,
    heal_option,
    home_option,
    measuring_options,
    on_option,
    print_json,
    processes_option,
    remark,
    report_option,
    state_option,
    task_code_option,
    trust_option,
)
from factory.cli.request import (
    Asked,
    config_text,
    flag_of,
    look_at_all,
    open_tasks,
    preview_lines,
    pull_source,
    requests,
)
from factory.config.criteria import CRITERIA
from factory.config.request import Request
from factory.errors import FactoryError
from factory.store.stage import STAGES

if TYPE_CHECKING:
    from rich.console import Console

    from factory.artifacts import Build
    from factory.cli.console import StageLines
    from factory.config.tracking import Tracking
    from factory.hub.bucket import StageBucket
    from factory.pipeline.preview import Preview
    from factory.pipeline.run import Reporter, Run

RERUN_STAGES = tuple(name for name, stage in STAGES.items() if stage.can_rerun)


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("model")
@click.option("--drop", type=Fraction(), help="Fraction of the decoder layers to drop.")
@click.option(
    "--layers", type=Layers(), metavar="3,7,21-24", help="Layers that go, counted from 0, instead of --drop."
)
@click.option("--reproduce", is_flag=True, help="MODEL is a build: make it again, and compare the weights.")
@measuring_options
@click.option(
    "--criterion", type=click.Choice(CRITERIA), help="How the layers are chosen.  [default: angular]"
)
@click.option("--heal-data", metavar="DATA", help="Text to heal on.")
@click.option("--eval-data", metavar="DATA", help="Text for the loss; keep it apart from the other two.")
@click.option("--tasks", metavar="A,B", help="lm-eval tasks or YAML files; 'none' for none.")
@task_code_option
@click.option("--limit", type=Count(1), help="Samples a task, for a quick look.")
@click.option("--no-heal", "heal_enabled", flag_value=False, default=True, help="Leave the cut as it is.")
@heal_option
@click.option("--heal-steps", type=Count(1), help="Optimiser steps.")
@click.option("--heal-lr", type=click.FloatRange(0, min_open=True), help="Peak learning rate.")
@click.option("--heal-rank", type=Count(1), help="LoRA rank; alpha equals it.")
@click.option("--heal-modules", type=click.Choice(["ffn", "all-linear"]), help="What gets an adapter.")
@click.option(
    "--heal-layers", type=click.Choice(["all", "seam"]), help="seam: only from the one before the cut on."
)
@click.option("--heal-bits", type=click.Choice((4, 16)), help="Of the weights under the adapter; 4 is NF4.")
@click.option(
    "--seam-weight", type=click.FloatRange(0), help="Of the states behind the cut, beside the distribution."
)
@click.option(
    "--merge-base",
    type=click.Choice(["auto", "bf16", "nf4"]),
    help="What the adapter is added to: the source's weights, NF4's, or what is better.  [default: auto]",
)
@click.option("--require-healing", is_flag=True, help="Fail where healing did not lower the held-back loss.")
@click.option("--eval-documents", type=Count(2), help="Documents for the loss.")
@backend_option
@click.option("--out", type=Place(), help="Build folder.  [default: builds/NAME]")
@home_option
@processes_option
@trust_option
@click.option("--push-to", metavar="REPO", help="Publish on the Hub as owner/name when done.")
@click.option("--public", is_flag=True, help="With --push-to: a public repository, not a private one.")
@license_option
@report_option
@on_option
@state_option
@click.option("--rerun", type=click.Choice(RERUN_STAGES), multiple=True, help="Make a stage again.")
@click.option("--dry-run", is_flag=True, help="Stop after saying what would happen.")
@click.option("--print-config", is_flag=True, help="Print a build file that asks for the same, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, for programs.")
def build(model: str, **options: Any) -> None:
    """Build a smaller MODEL: an alias, a Hub repository owner/name[@revision], a folder, or a build file.

    DATA is a .jsonl, .jsonl.xz, .jsonl.gz, .txt or .parquet file, or a Hub data set
    owner/name[:config][#column][@revision]. The same command again goes on where it was cut short, and
    reuses whatever is finished.

    A build file, build.yaml, holds these flags by their names, for one build or for several;
    --print-config writes one, and `factory schema` tells editors what it may hold.

    With --reproduce, MODEL is a build's folder or a repository that one was published in: its build.json
    says what to repeat. A text that was a file is given again with its option.
    """
    asked = requests(model, options)
    if options["print_config"]:
        click.echo(config_text([request.given for request in asked]), nl=False)
    elif any(request.options["on"] for request in asked):
        from factory.cli.jobs import submit

        submit(asked, options)
    else:
        _build(asked, options)


@dataclass(frozen=True)
class Ready:
    """A build of which everything was looked at before the work."""

    request: Request
    asked: Asked
    run: "Run"
    pending: tuple[str, ...]
    preview: "Preview"


def _build(requests: list[Request], options: dict[str, Any]) -> None:
    from factory.cli.console import StageLines, console
    from factory.cli.tables import show_preview

    as_json = options["as_json"]
    reporter = StageLines(console(stderr=as_json))
    asked = look_at_all(requests)
    ready = []
    for request, each in zip(requests, asked, strict=True):
        with request.located():
            ready.append(_ready(request, each, reporter))
    for one in ready:
        if not (as_json and options["dry_run"]):
            title = f"{one.asked.source.name} → {one.asked.out}"
            show_preview(reporter.out, one.preview, title=title, lines=preview_lines(one.asked.config))
    if options["dry_run"]:
        if as_json:
            shown = [asdict(one.preview) for one in ready]
            print_json(shown[0] if len(shown) == 1 else shown)
        return
    for one in ready:
        with one.request.located("tasks"):
            if "evaluate" in one.pending:
                open_tasks(one.asked.config.evaluate, reporter)
    if len(ready) == 1:
        _, result = _make(ready[0], reporter)
        if as_json:
            print_json(result)
    else:
        _make_all(ready, reporter, as_json=as_json)


def _ready(request: Request, asked: Asked, reporter: "Reporter") -> Ready:
    """Look at everything else that one build needs; no weight is read."""
    from factory.builds.folder import check_out
    from factory.pipeline.preview import preview
    from factory.pipeline.texts import known_lengths

    check_out(asked.out)
    run, pending = _prepare(asked, request.options, reporter)
    shown = preview(
        asked.source,
        asked.config,
        pending=pending,
        home=run.store.home,
        out=asked.out,
        processes=run.processes,
        **known_lengths(run.texts, pending),
    )
    return Ready(request, asked, run, pending, shown)


def _make(ready: Ready, reporter: "StageLines") -> tuple["Build", dict[str, Any]]:
    """Make one build, publish it where asked, and show what came of it: also as JSON values."""
    from factory.builds.folder import kept_aside
    from factory.pipeline.build import build as pipeline_build
    from factory.pipeline.texts import check_tokens

    required = ready.request.options["require_healing"]
    kept = kept_aside(ready.asked.out)
    try:
        source = ready.asked.source
        if ready.pending:
            source = pull_source(source, reporter)
            check_tokens(source, ready.run.texts)
        made = pipeline_build(ready.run, source, out=ready.asked.out, require_healing=required)
    finally:
        ready.run.release()
        reporter.stop()
    for name in sorted(kept_aside(ready.asked.out) - kept):
        remark(f"what you had edited in the build that lay there is kept as {ready.asked.out / name}")
    return made, _finish(reporter.out, made, ready.asked, ready.request.options)


def _make_all(ready: list[Ready], reporter: "StageLines", *, as_json: bool) -> None:
    """One build after another; one that fails does not stop those after it.

    Raises:
        FactoryError: Some failed; told once all are through.
    """
    from factory.cli.console import printable
    from factory.cli.tables import show_summary

    rows: list[tuple[Path, Build | FactoryError]] = []
    results = []
    for number, one in enumerate(ready, 1):
        reporter.out.print(f"\nbuild {number} of {len(ready)}: {one.asked.out}", soft_wrap=True)
        try:
            made, result = _make(one, reporter)
            rows.append((one.asked.out, made))
        except FactoryError as error:
            reporter.out.print(f"failed: {printable(error.message)}", soft_wrap=True)
            result = {"error": error.message, "hint": error.hint}
            rows.append((one.asked.out, error))
        results.append(result)
    if as_json:
        print_json(results)
    else:
        show_summary(reporter.out, rows)
    failed = [(out, told) for out, told in rows if isinstance(told, FactoryError)]
    if failed:
        out, first = failed[0]
        others = f" ({len(failed)} of {len(ready)} builds failed)" if len(failed) > 1 else ""
        raise type(first)(f"{out}: {first.message}{others}", hint=first.hint)


def _prepare(asked: Asked, options: dict[str, Any], reporter: "Reporter") -> tuple["Run", tuple[str, ...]]:
    """The run and the stages that it still has to make, once everything that they need was looked at."""
    from factory.builds.reproduce import check_same_texts
    from factory.evaluation.tasks import check_backend, check_tasks
    from factory.pipeline.build import pending as pipeline_pending
    from factory.pipeline.run import Run
    from factory.pipeline.texts import check_texts, open_texts, reads_text
    from factory.store.store import Store, default_home

    config = asked.config
    store = Store((options["home"] or default_home()).absolute(), _bucket(options))
    check_backend(config.evaluate)
    run_code = options["run_task_code"]
    check_tasks(config.evaluate, search=False, run_code=run_code)
    texts = open_texts(config)
    if asked.repeats:
        check_same_texts(asked.repeats, texts)
    for message in texts.remarks:
        remark(message)
    run = Run(config, store, reporter, texts, rerun=frozenset(options["rerun"]))
    run.tracking = _tracking(asked, options)
    pending = pipeline_pending(run, asked.source)
    if "prune" in pending:
        from factory.model.completeness import check_source

        check_source(asked.source)
    if any(stage.loads_source for name, stage in STAGES.items() if name in pending):
        from factory.model.quantization import check_loads

        check_loads(asked.source.config, four_bit=config.measure.four_bit)
    check_tasks(config.evaluate, search="evaluate" in pending, run_code=run_code)
    if reads_text(pending):
        for message in check_texts(texts):
            remark(message)
    if pending or options["processes"]:
        from factory.parallel.launch import num_processes

        run.processes = num_processes(options["processes"])
    return run, pending


def _tracking(asked: Asked, options: dict[str, Any]) -> "Tracking":
    """Return how healing is tracked; the run's name is unique, though folders may have the same name."""
    from factory.artifacts import canonical_json
    from factory.config.tracking import Tracking, choose_tracker

    out = asked.out.absolute()
    decides = [str(out), asked.source.commit, asked.config.model_dump(mode="json")]
    suffix = hashlib.sha256(canonical_json(decides).encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.-]", "-", f"{out.name}-{suffix}")
    return Tracking(choose_tracker(options["report_to"]), name, out.parent / "runs", remark)


def _bucket(options: dict[str, Any]) -> "StageBucket | None":
    """Where stages are kept besides this machine; told on standard error is what could not be.

    A dry run neither makes the bucket nor brings stages here.
    """
    if options["state"] is None:
        return None
    from factory.hub.bucket import look_at_bucket, open_bucket
    from factory.hub.push import full_name

    name = full_name(options["state"])
    if not options["dry_run"]:
        return open_bucket(name, remark=remark)
    look_at_bucket(name)
    remark(f"what {name} holds already is not counted in a dry run")
    return None


def _finish(screen: "Console", made: "Build", asked: Asked, options: dict[str, Any]) -> dict[str, Any]:
    """Publish where asked, and show what came of it, unless it is asked for as JSON."""
    from factory.builds.reproduce import comparison
    from factory.cli.console import printable
    from factory.cli.tables import show_result

    result, url = made.model_dump(mode="json"), None
    if options["push_to"]:
        message = f"Publish {made.name}"
        publication = publish(asked.out, options["push_to"], private=not options["public"], message=message)
        url = publication.url
        result["publication"] = publication.model_dump(mode="json")
    told = comparison(asked.repeats, made, reference=asked.reference) if asked.repeats else None
    if told:
        result["reproduced"] = told
    if not options["as_json"]:
        show_result(screen, made, folder=asked.out, url=url)
        if told:
            screen.print(f"\n{printable(told)}", soft_wrap=True)
    return result


@click.command(cls=Command, context_settings=CONTEXT)
def schema() -> None:
    """Print the JSON schema of a build file, for editors.

    With this as its first line, an editor completes and checks what follows:
    # yaml-language-server: $schema=build.schema.json
    """
    from factory.cli.build_file import schema as json_schema

    helps = {flag_of(p): p.help or "" for p in build.params if isinstance(p, click.Option)}
    print_json(json_schema(helps))
