"""`factory build`: a smaller model from a reference, published where asked."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from factory import references
from factory.commands.asked import pull_source, resolve_model, settle_options
from factory.commands.options import CONTEXT, Fraction, home_option, measuring_options, print_json
from factory.errors import UsageError
from factory.references import CRITERIA

if TYPE_CHECKING:
    from factory.config import BuildConfig

RERUN_STAGES = ("measure", "plan", "search", "prune", "heal", "merge", "evaluate", "speed")


@click.command(context_settings=CONTEXT)
@click.argument("model")
@click.option("--drop", type=Fraction(), required=True, help="Fraction of the decoder layers to drop.")
@measuring_options
@click.option(
    "--criterion", type=click.Choice(CRITERIA), help="How the layers are chosen.  [default: angular]"
)
@click.option("--heal-data", metavar="DATA", help="Text to heal on.")
@click.option("--eval-data", metavar="DATA", help="Text for the loss; keep it apart from the other two.")
@click.option("--tasks", metavar="A,B", help="lm-eval tasks or YAML files; 'none' for none.")
@click.option("--limit", type=click.IntRange(1), help="Samples a task, for a quick look.")
@click.option("--heal/--no-heal", "heal_enabled", default=True, help="Heal the cut, or leave it.")
@click.option("--heal-steps", type=click.IntRange(1), help="Optimiser steps.")
@click.option("--heal-lr", type=click.FloatRange(0, min_open=True), help="Peak learning rate.")
@click.option("--heal-rank", type=click.IntRange(1), help="LoRA rank; alpha equals it.")
@click.option("--eval-documents", type=click.IntRange(2), help="Documents for the loss.")
@click.option("--out", type=click.Path(path_type=Path), help="Build folder.  [default: builds/NAME]")
@home_option
@click.option("--push-to", metavar="REPO", help="Publish on the Hub as owner/name when done.")
@click.option("--public", is_flag=True, help="With --push-to: a public repository, not a private one.")
@click.option("--rerun", type=click.Choice(RERUN_STAGES), multiple=True, help="Make a stage again.")
@click.option("--dry-run", is_flag=True, help="Stop after saying what would happen.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, for programs.")
def build(model: str, drop: float, **options: Any) -> None:
    """Build a smaller MODEL: an alias, a Hub repository owner/name[@revision], or a folder.

    DATA is a .jsonl, .jsonl.xz, .jsonl.gz, .txt or .parquet file, or a Hub data set
    owner/name[:config][@revision]. The same command again goes on where it was cut short, and
    reuses whatever is finished.
    """
    references.check_model(model)
    _check_options(options)
    for data in ("calibration_data", "heal_data", "eval_data"):
        if options[data] is not None:
            references.check_data(options[data])
    _build(model, drop, options)


def _build(model: str, drop: float, options: dict[str, Any]) -> None:
    from factory import hub, pipeline
    from factory.config import build_name, load_recipe
    from factory.decoder import check_decoder
    from factory.identity import check_tasks
    from factory.layout import check_out
    from factory.preview import preview
    from factory.run import Run, check_texts, open_texts
    from factory.screen import StageLines, console, show_preview, show_result
    from factory.store import Store, default_home

    if options["push_to"]:
        hub.full_name(options["push_to"])  # nobody logged in: say so now, not after hours
    as_json = options["as_json"]
    screen = console(stderr=as_json)
    reporter = StageLines(screen)
    recipe = load_recipe(model) if model in references.aliases() else None
    source = resolve_model(model, recipe)
    config = settle_options(model, drop, recipe, source, options)
    out = options["out"] or Path("builds") / build_name(source.name, drop)
    store = Store((options["home"] or default_home()).absolute())
    check_tasks(config.evaluate, search=False)
    check_out(out)
    texts = open_texts(config)
    run = Run(config, store, reporter, texts, rerun=frozenset(options["rerun"]))
    pending = pipeline.pending(run, source)
    if "prune" in pending:
        check_decoder(source.config)
    check_tasks(config.evaluate, search="evaluate" in pending)
    if {"measure", "heal", "evaluate"} & set(pending):
        check_texts(texts)
    shown = preview(source, config, pending=pending, home=store.home)
    if not (as_json and options["dry_run"]):
        show_preview(screen, shown, title=f"{source.name} → {out}", lines=_preview_lines(config))
    if options["dry_run"]:
        if as_json:
            print_json(vars(shown))
        return
    try:
        if pending:
            source = pull_source(source, reporter)
        made = pipeline.build(run, source, out=out)
    finally:
        reporter.stop()
    url, publication = None, None
    if options["push_to"]:
        message = f"Publish {made.name}"
        publication = pipeline.publish(
            out, options["push_to"], private=not options["public"], message=message
        )
        url = publication.url
    if as_json:
        published = {"publication": publication.model_dump(mode="json")} if publication else {}
        print_json(made.model_dump(mode="json") | published)
    else:
        show_result(screen, made, folder=out, url=url)


def _check_options(options: dict[str, Any]) -> None:
    """Refuse what click's types let through."""
    rate, repository, tasks = options["heal_lr"], options["push_to"], options["tasks"]
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
