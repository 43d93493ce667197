"""`factory plan` and `factory sweep`: what could be dropped, and what it would cost, before healing."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from factory.cli.options import (
    CONTEXT,
    Command,
    Count,
    Fraction,
    Fractions,
    Place,
    backend_option,
    heal_option,
    home_option,
    measuring_options,
    output_folder,
    print_json,
    processes_option,
    remark,
    task_code_option,
    trust_option,
)
from factory.cli.request import open_tasks, pull_source, resolve_model, settle_options
from factory.config import references
from factory.config.criteria import CRITERIA, DEFAULT_CRITERION
from factory.errors import UsageError

if TYPE_CHECKING:
    from factory.artifacts import PruningPlan, Source
    from factory.cli.console import StageLines
    from factory.pipeline.run import Run


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("model")
@click.option("--drop", type=Fraction(), required=True, help="Fraction of the decoder layers to drop.")
@click.option(
    "--criterion",
    type=click.Choice([*CRITERIA, "all"]),
    default=DEFAULT_CRITERION.name,
    show_default=True,
    help="How layers are chosen; all: side by side, with the loss of each cut.",
)
@click.option(
    "--profile",
    type=Place(),
    help="Distances measured elsewhere: a profile.json, or a CSV of PruneMe.",
)
@measuring_options
@home_option
@processes_option
@trust_option
@click.option("--save", type=Place(file_okay=False), help="Folder for plans and figure.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, for programs.")
def plan(model: str, drop: float, **options: Any) -> None:
    """Show which layers of MODEL could go, before anything is cut."""
    from factory.cli.tables import show_plans
    from factory.pipeline.plans import make_plans
    from factory.pipeline.texts import check_tokens
    from factory.pruning.profile_files import read_profile
    from factory.report.figures import distance_figure, terminal_heatmap

    asked = options.pop("criterion")
    from_profile = asked in CRITERIA and not CRITERIA[asked].searches
    measures = not (options["profile"] and from_profile)  # else neither text nor weights are read
    source, run, reporter = _start(model, drop, options, measures=measures)
    profile = read_profile(options["profile"], source=source) if options["profile"] else None
    criteria = tuple(name for name in CRITERIA if asked in ("all", name))
    if asked == "all" and profile and profile.influence is None:
        criteria = tuple(name for name in criteria if not CRITERIA[name].needs_influence)
    if options["save"]:
        output_folder(options["save"])
    if measures:
        source = pull_source(source, reporter)
        check_tokens(source, run.texts)
    try:
        profile, plans = make_plans(run, source, criteria, profile=profile)
    finally:
        reporter.stop()
    chosen = next(plan for plan in plans.plans if plan.criterion == plans.chosen)
    if options["save"]:
        profile.write(options["save"])
        plans.write(options["save"])
        distance_figure(profile, chosen, path_stem=options["save"] / "angular-distance")
    if options["as_json"]:
        print_json(plans.model_dump(mode="json"))
        return
    screen = reporter.out
    screen.print()
    screen.print(terminal_heatmap(profile, chosen, width=min(screen.width, 100)), soft_wrap=True)
    show_plans(screen, plans, command=_build_command(chosen))


plan.help = f"{plan.help}\n\n\b\n" + "\n".join(
    f"{criterion.name:<15}  {criterion.summary}" for criterion in CRITERIA.values()
)


def _build_command(chosen: "PruningPlan") -> str:
    """What builds the plan: the options that were typed; the layers where a profile led to them."""
    import shlex

    context = click.get_current_context()
    words = ["factory", "build", context.params["model"]]
    layers = context.params["profile"] is not None  # which a build does not read
    if layers:
        words += ["--layers", ",".join(map(str, chosen.dropped))]
    not_of_build = {"model", "criterion", "profile", "save", "as_json", *(["drop"] if layers else [])}
    for option in context.command.params:
        name, value = str(option.name), context.params.get(str(option.name))
        typed = context.get_parameter_source(name) == ParameterSource.COMMANDLINE
        if typed and name not in not_of_build:
            words += [option.opts[0], *([] if value is True else [str(value)])]
    if not layers and chosen.criterion != DEFAULT_CRITERION.name:
        words += ["--criterion", chosen.criterion]
    return shlex.join(words)


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("model")
@click.option(
    "--drop",
    "drops",
    type=Fractions(),
    default="0.1,0.2,0.3,0.4,0.5,0.6",
    show_default=True,
    help="Fractions of the decoder layers to drop, each in turn.",
)
@click.option("--criterion", type=click.Choice(CRITERIA), help="[default: angular]")
@measuring_options
@click.option("--eval-data", metavar="DATA", help="Text for the loss; keep it apart from the others.")
@click.option("--eval-documents", type=Count(2), help="Documents for the loss.")
@backend_option
@click.option("--tasks", metavar="A,B", help="lm-eval tasks or YAML files; 'none' for none.")
@task_code_option
@click.option(
    "--limit",
    type=Count(1),
    default=100,
    show_default=True,
    help="Samples a task, for a quick look.",
)
@heal_option
@click.option("--heal-data", metavar="DATA", help="Text to heal on.")
@click.option("--heal-steps", type=Count(1), help="Optimiser steps.")
@home_option
@processes_option
@trust_option
@click.option("--out", type=Place(file_okay=False), help="[default: sweeps/NAME]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, for programs.")
def sweep(model: str, drops: tuple[float, ...], **options: Any) -> None:
    """Show the plateau and the cliff of MODEL: quality against the fraction of layers dropped.

    Every cut is made on disk and measured as it would ship; a build with the same settings reuses
    what it shares with them.
    """
    from factory.cli.tables import show_sweep
    from factory.config.settings import num_dropped
    from factory.pipeline.sweep import sweep as pipeline_sweep
    from factory.pipeline.texts import check_tokens
    from factory.report.figures import sweep_figure

    options["heal_enabled"] = options["heal_objective"] is not None
    for name in ("heal_data", "heal_steps"):
        if options[name] is not None and not options["heal_enabled"]:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} without --heal: no cut is healed", hint="add --heal, or leave it out")
    source, run, reporter = _start(model, drops[0], options)
    by_size = {num_dropped(drop, source.num_layers): drop for drop in reversed(drops)}
    out = output_folder(options["out"] or Path("sweeps") / source.name)
    _preview_sweep(source, sorted(by_size), run, reporter)
    open_tasks(run.config.evaluate, reporter)
    source = pull_source(source, reporter)
    check_tokens(source, run.texts)
    try:
        found = pipeline_sweep(run, source, [by_size[size] for size in sorted(by_size)])
    finally:
        reporter.stop()
    found.write(out)
    sweep_figure(found, path_stem=out / "sweep")
    if options["as_json"]:
        print_json(found.model_dump(mode="json"))
    else:
        show_sweep(reporter.out, found, folder=out)


def _preview_sweep(source: "Source", sizes: list[int], run: "Run", reporter: "StageLines") -> None:
    """Say what will be cut, and how much disk that can take."""
    from factory.hub.pull import cache_demand
    from factory.store.capacity import demands
    from factory.store.locks import HOME
    from factory.units import size

    layer = sum(source.layer_bytes) / source.num_layers
    cuts = sum(source.size_bytes - int(n * layer) for n in sizes) * (2 if run.config.heal_enabled else 1)
    disk, *others = demands([(run.store.home, HOME, cuts), cache_demand(source)])
    listed = ", ".join(map(str, sizes))
    reporter.out.print(f"  cuts         {listed} of {source.num_layers} layers", soft_wrap=True)
    reporter.out.print(
        f"  disk         {size(disk.needed)} at most, {size(disk.free)} free; "
        "`factory gc` removes cuts of no build",
        soft_wrap=True,
    )
    for one in others:
        told = f"{size(one.needed)} at {one.place}, {size(one.free)} free"
        reporter.out.print(f"  {'':<13}{told}", soft_wrap=True)
    reporter.out.print()


def _start(
    model: str, drop: float, options: dict[str, Any], *, measures: bool = True
) -> "tuple[Source, Run, StageLines]":
    """What both commands begin with: the source, a run for it, and who is told."""
    from factory.cli.console import StageLines, console
    from factory.config.settings import load_recipe
    from factory.evaluation.tasks import check_backend, check_tasks
    from factory.healing.lora import check_targets
    from factory.model.completeness import check_source
    from factory.model.quantization import check_loads
    from factory.pipeline.run import Run
    from factory.pipeline.texts import check_texts, open_texts
    from factory.store.store import Store, default_home

    references.check_model(model)
    heals = options.get("heal_enabled")
    for data in ("calibration_data", *(("heal_data",) if heals else ()), "eval_data"):
        if options.get(data) is not None:
            references.check_data(options[data])
    recipe = load_recipe(model) if model in references.aliases() else None
    source = resolve_model(model, recipe, trust_remote_code=options["trust_remote_code"])
    config = settle_options(model, drop, recipe, source, options)
    check_source(source)
    if measures:
        check_loads(source.config, four_bit=config.measure.four_bit)
    sweeps = "tasks" in options
    if sweeps and config.heal_enabled and not source.remote_code:
        check_targets(source.config, config.heal.modules)
    if sweeps:
        check_backend(config.evaluate)
        check_tasks(config.evaluate, search=True, run_code=options["run_task_code"])
    texts = open_texts(config, measures=measures, heals=sweeps, evaluates=sweeps)
    for message in (*texts.remarks, *check_texts(texts)):
        remark(message)
    store = Store((options["home"] or default_home()).absolute())
    reporter = StageLines(console(stderr=options["as_json"]))
    run = Run(config, store, reporter, texts)
    if measures:
        from factory.parallel.launch import num_processes

        run.processes = num_processes(options["processes"])
    return source, run, reporter
