"""`factory build`: a smaller model from a reference, published where asked."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from factory import references
from factory.commands.asked import Asked, ask, pull_source
from factory.commands.options import (
    CONTEXT,
    Fraction,
    Layers,
    heal_option,
    home_option,
    measuring_options,
    print_json,
    processes_option,
    trust_option,
)
from factory.commands.publishing import check_publishable, license_option, publish
from factory.errors import UsageError
from factory.references import CRITERIA

if TYPE_CHECKING:
    from rich.console import Console

    from factory.artifacts import Build
    from factory.config import BuildConfig
    from factory.run import Reporter, Run

# What a build can be given that repeats another: nothing that would make it another build.
WITH_REPRODUCE = {
    *("model", "reproduce", "calibration_data", "heal_data", "eval_data", "tasks", "out", "home"),
    *("processes", "push_to", "public", "accept_license", "trust_remote_code", "rerun", "dry_run", "as_json"),
}
RERUN_STAGES = ("measure", "plan", "search", "prune", "heal", "merge", "evaluate", "speed")


@click.command(context_settings=CONTEXT)
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
@click.option("--limit", type=click.IntRange(1), help="Samples a task, for a quick look.")
@click.option("--no-heal", "heal_enabled", flag_value=False, default=True, help="Leave the cut as it is.")
@heal_option
@click.option("--heal-steps", type=click.IntRange(1), help="Optimiser steps.")
@click.option("--heal-lr", type=click.FloatRange(0, min_open=True), help="Peak learning rate.")
@click.option("--heal-rank", type=click.IntRange(1), help="LoRA rank; alpha equals it.")
@click.option("--eval-documents", type=click.IntRange(2), help="Documents for the loss.")
@click.option("--out", type=click.Path(path_type=Path), help="Build folder.  [default: builds/NAME]")
@home_option
@processes_option
@trust_option
@click.option("--push-to", metavar="REPO", help="Publish on the Hub as owner/name when done.")
@click.option("--public", is_flag=True, help="With --push-to: a public repository, not a private one.")
@license_option
@click.option("--rerun", type=click.Choice(RERUN_STAGES), multiple=True, help="Make a stage again.")
@click.option("--dry-run", is_flag=True, help="Stop after saying what would happen.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, for programs.")
def build(model: str, **options: Any) -> None:
    """Build a smaller MODEL: an alias, a Hub repository owner/name[@revision], or a folder.

    DATA is a .jsonl, .jsonl.xz, .jsonl.gz, .txt or .parquet file, or a Hub data set
    owner/name[:config][@revision]. The same command again goes on where it was cut short, and
    reuses whatever is finished.

    With --reproduce, MODEL is a build's folder or a repository that one was published in: its build.json
    says what to repeat. A text that was a file is given again with its option.
    """
    references.check_model(model)
    _check_options(options)
    for data in ("calibration_data", "heal_data", "eval_data"):
        if options[data] is not None:
            references.check_data(options[data])
    _build(model, options)


def _build(model: str, options: dict[str, Any]) -> None:
    from factory import hub, pipeline
    from factory.layout import check_out
    from factory.preview import preview
    from factory.screen import StageLines, console, show_preview

    if options["push_to"]:
        hub.full_name(options["push_to"])  # nobody logged in: say so now, not after hours
    as_json = options["as_json"]
    screen = console(stderr=as_json)
    reporter = StageLines(screen)
    asked = ask(model, options)
    if options["push_to"]:
        check_publishable(asked.source, accepted=options["accept_license"])
    check_out(asked.out)
    run, pending = _prepare(asked, options, reporter)
    shown = preview(asked.source, asked.config, pending=pending, home=run.store.home, processes=run.processes)
    if not (as_json and options["dry_run"]):
        title = f"{asked.source.name} → {asked.out}"
        show_preview(screen, shown, title=title, lines=_preview_lines(asked.config))
    if options["dry_run"]:
        if as_json:
            print_json(vars(shown))
        return
    try:
        source = pull_source(asked.source, reporter) if pending else asked.source
        made = pipeline.build(run, source, out=asked.out)
    finally:
        reporter.stop()
    _finish(screen, made, asked, options)


def _prepare(asked: Asked, options: dict[str, Any], reporter: "Reporter") -> tuple["Run", tuple[str, ...]]:
    """The run and the stages that it still has to make, once everything that they need was looked at."""
    from factory import pipeline
    from factory.decoder import check_decoder
    from factory.identity import check_tasks
    from factory.reproduce import check_same_texts
    from factory.run import Run, check_texts, open_texts
    from factory.spread import num_processes
    from factory.store import Store, default_home

    config = asked.config
    store = Store((options["home"] or default_home()).absolute())
    check_tasks(config.evaluate, search=False)
    texts = open_texts(config)
    if asked.repeats:
        check_same_texts(asked.repeats, texts)
    run = Run(config, store, reporter, texts, rerun=frozenset(options["rerun"]))
    pending = pipeline.pending(run, asked.source)
    if "prune" in pending and not asked.source.remote_code:
        check_decoder(asked.source.config)
    check_tasks(config.evaluate, search="evaluate" in pending)
    if {"measure", "heal", "evaluate"} & set(pending):
        check_texts(texts)
    if pending or options["processes"]:
        run.processes = num_processes(options["processes"])
    return run, pending


def _finish(screen: "Console", made: "Build", asked: Asked, options: dict[str, Any]) -> None:
    """Publish where asked, and show what came of it."""
    from factory.reproduce import comparison
    from factory.screen import printable, show_result

    result, url = made.model_dump(mode="json"), None
    if options["push_to"]:
        message = f"Publish {made.name}"
        publication = publish(asked.out, options["push_to"], private=not options["public"], message=message)
        url = publication.url
        result["publication"] = publication.model_dump(mode="json")
    told = comparison(asked.repeats, made, reference=asked.reference) if asked.repeats else None
    if options["as_json"]:
        print_json(result | ({"reproduced": told} if told else {}))
        return
    show_result(screen, made, folder=asked.out, url=url)
    if told:
        screen.print(f"\n{printable(told)}", soft_wrap=True)


def _check_options(options: dict[str, Any]) -> None:
    """Refuse what click's types let through."""
    rate, repository, tasks = options["heal_lr"], options["push_to"], options["tasks"]
    if options["reproduce"]:
        context = click.get_current_context()
        typed = {
            name
            for name in context.params
            if context.get_parameter_source(name) == ParameterSource.COMMANDLINE
        }
        if others := sorted(typed - WITH_REPRODUCE):
            option = next(p for p in context.command.params if p.name == others[0]).opts[0]
            raise UsageError(
                f"{option} with --reproduce, which repeats a build as it was", hint="leave one of them out"
            )
    elif options["layers"] and (options["drop"] or options["criterion"]):
        other = "--drop" if options["drop"] else "--criterion"
        raise UsageError(f"--layers with {other}: each says which layers go", hint="leave one of them out")
    elif not options["layers"] and options["drop"] is None:
        raise UsageError(
            "--drop is missing", hint="--drop 0.3 drops three of ten layers, --layers 3,7 those two"
        )
    if rate is not None and not math.isfinite(rate):
        raise UsageError(f"--heal-lr {rate} is no learning rate", hint="--heal-lr 3e-4")
    if options["public"] and not repository:
        raise UsageError("--public without --push-to", hint="add --push-to owner/name")
    if repository is not None and not re.fullmatch(r"([\w.-]+/|~/)?[\w.-]+", repository):
        raise UsageError(f"--push-to {repository!r} is no repository name", hint="--push-to owner/name")
    if tasks is not None and not all(name.strip() for name in tasks.split(",")):
        raise UsageError(f"--tasks {tasks!r} has an empty name", hint="--tasks mmlu,boolq, or --tasks none")


def _preview_lines(config: "BuildConfig") -> list[tuple[str, str]]:
    heal, measure, evaluate = config.heal, config.measure, config.evaluate
    samples = measure.num_samples or f"until the choice is certain, at most {measure.max_samples:,}"
    tokens = heal.num_steps * heal.batch_size * heal.sequence_length
    healing = (
        f"{heal.num_steps:,} steps of {heal.batch_size} × {heal.sequence_length} tokens "
        f"({tokens / 1e6:.2f} M) of {heal.data}, NF4 + LoRA rank {heal.rank}, rate {heal.learning_rate:g}"
        if config.heal_enabled
        else "no"
    )
    tasks = ", ".join(evaluate.tasks) or "no tasks (--tasks mmlu,boolq adds some)"
    return [
        ("measure", f"{samples} documents of {measure.data}"),
        ("heal", healing),
        ("evaluate", f"loss on {evaluate.num_documents} documents of {evaluate.data}; {tasks}"),
    ]
