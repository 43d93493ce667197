"""`factory prune`: remove layers that somebody chose, and do nothing else."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from factory.cli.options import CONTEXT, Command, Layers, Place, home_option, print_json, trust_option
from factory.cli.request import pull_source, resolve_model
from factory.config import references

if TYPE_CHECKING:
    from rich.console import Console

    from factory.artifacts import Pruning, PruningPlan, Source
    from factory.pruning.prune import Thoroughness


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("model")
@click.option(
    "--layers", type=Layers(), required=True, metavar="3,7,21-24", help="Layers that go, counted from 0."
)
@click.option("--out", type=Place(), required=True, help="Folder of the smaller model.")
@click.option(
    "--verify",
    "thoroughness",
    type=click.Choice(["auto", "full"]),
    default="auto",
    show_default=True,
    help="full: compare logits with the source whatever its size; auto: of small models only.",
)
@click.option("--force", is_flag=True, help="Replace the whole folder --out, if `factory prune` wrote it.")
@home_option
@trust_option
@click.option("--dry-run", is_flag=True, help="Stop after saying what would happen.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, for programs.")
def prune(model: str, layers: tuple[int, ...], out: Path, **options: Any) -> None:
    """Remove chosen layers of MODEL: an alias, a Hub repository owner/name[@revision], or a folder.

    Layers are copied on disk, byte for byte, without loading the model. The result is checked: names
    and shapes against the architecture; logits against the source with these layers skipped, if the
    model is small or --verify full is given; values of a few layers against the source otherwise.
    Nothing is measured, healed or evaluated: `factory build` does that.
    """
    from factory.builds.garbage import register
    from factory.builds.pruned_folder import find
    from factory.builds.swap import laying_out
    from factory.cli.console import StageLines, console
    from factory.config.settings import load_recipe
    from factory.pruning.criteria import plan_without
    from factory.pruning.prune import compares_logits
    from factory.store.store import Store, default_home

    references.check_model(model)
    recipe = load_recipe(model) if model in references.aliases() else None
    source = resolve_model(model, recipe, trust_remote_code=options["trust_remote_code"])
    plan = plan_without(layers, num_layers=source.num_layers)
    logits = compares_logits(source, thoroughness=options["thoroughness"])
    screen = console(stderr=options["as_json"])
    if find(source, plan, out=out, logits=logits, force=options["force"]) is None:
        source = _checked(source, plan, out, screen, dry_run=options["dry_run"])
    expected = _expected(source, plan, logits=logits)
    for name, value in _lines(expected, plan):
        screen.print(f"{name:<11} {value}", soft_wrap=True)
    if options["dry_run"]:
        if options["as_json"]:
            print_json(expected)
        return
    store = Store((options["home"] or default_home()).absolute())
    with laying_out(out, on_wait=lambda: StageLines(screen).waiting("prune")):
        # Another run may have made it meanwhile.
        found = find(source, plan, out=out, logits=logits, force=options["force"])
        register(store.home, out, {})  # what a kill leaves beside it is found by `factory gc`
        pruning = found or _made(source, plan, out, screen, options["thoroughness"])
    if options["as_json"]:
        print_json(pruning.model_dump(mode="json") | {"kept": plan.kept, "reused": found is not None})
    else:
        state = "is there already" if found else "written"
        screen.print(f"{out} {state}, verified: {', '.join(pruning.verified)}", soft_wrap=True)


def _checked(
    source: "Source", plan: "PruningPlan", out: Path, screen: "Console", *, dry_run: bool
) -> "Source":
    """Refuse what cannot be right or does not fit before the pull, unless code that is pulled must tell."""
    from factory.builds.pruned_folder import check_disk
    from factory.cli.console import StageLines
    from factory.model.architecture import prune_config
    from factory.model.completeness import check_source

    if source.remote_code and not dry_run:
        source = pull_source(source, StageLines(screen))
    check_source(source)
    if not (source.remote_code and dry_run):
        prune_config(source.config, kept=plan.kept)
    check_disk(source, plan, out=out)
    return source


def _made(
    source: "Source", plan: "PruningPlan", out: Path, screen: "Console", thoroughness: "Thoroughness"
) -> "Pruning":
    """Pull what is on the Hub, then make the folder."""
    from factory.builds.pruned_folder import remove_layers
    from factory.cli.console import StageLines
    from factory.units import count

    reporter = StageLines(screen)
    try:
        source = pull_source(source, reporter)
        start = time.monotonic()
        reporter.started("prune")
        pruning = remove_layers(
            source,
            plan,
            out=out,
            thoroughness=thoroughness,
            progress=lambda done, total: reporter.progressed("prune", done, total, ""),
        )
        summary = f"{count(pruning.source_parameters)} → {count(pruning.result_parameters)} parameters"
        reporter.finished("prune", summary, time.monotonic() - start, False)
    finally:
        reporter.stop()
    return pruning


def _expected(source: "Source", plan: "PruningPlan", *, logits: bool) -> dict[str, Any]:
    """What will be, in numbers."""
    return {
        "source": source.repo_id or source.name,
        "commit": source.commit,
        "num_layers": plan.num_layers,
        "dropped": plan.dropped,
        "kept": plan.kept,
        "parameters_before": source.num_parameters,
        "parameters_after": source.num_parameters - sum(source.layer_parameters[i] for i in plan.dropped),
        "bytes_before": source.size_bytes,
        "bytes_after": source.size_bytes - sum(source.layer_bytes[i] for i in plan.dropped),
        "verifies": ["names and shapes", "logits" if logits else "values"],
    }


def _lines(expected: dict[str, Any], plan: "PruningPlan") -> list[tuple[str, str]]:
    from factory.artifacts import layer_ranges
    from factory.units import count, size

    before, after = expected["parameters_before"], expected["parameters_after"]
    return [
        ("source", f"{expected['source']} at {expected['commit'][:12]}"),
        ("dropping", f"{len(plan.dropped)} of {plan.num_layers} layers: {layer_ranges(plan.dropped)}"),
        ("keeping", f"{len(plan.kept)}: {layer_ranges(plan.kept)}"),
        ("parameters", f"{count(before)} → {count(after)} ({after / before - 1:+.1%})"),
        ("weights", f"{size(expected['bytes_before'])} → {size(expected['bytes_after'])}"),
        (
            "verifying",
            "names and shapes against the architecture"
            + (
                ", logits against the source with these layers skipped"
                if "logits" in expected["verifies"]
                else ", values of a few layers; --verify full compares logits"
            ),
        ),
    ]
