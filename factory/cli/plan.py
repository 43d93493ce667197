"""`factory plan` and `factory sweep`: which layers could be dropped, and what that would cost."""

import shlex
import textwrap
from inspect import cleandoc
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from factory.cli.click_options import CONTEXT, Command, read_request, request_options
from factory.cli.console import print_json
from factory.config.criteria import CRITERIA, DEFAULT_CRITERION
from factory.config.request import BuildRequest, PlanRequest, SweepRequest

if TYPE_CHECKING:
    from factory.api.results import PlansResult
    from factory.cli.console import StageLines
    from factory.pipeline.sweep import PreparedSweep


@click.command(cls=Command, context_settings=CONTEXT)
@request_options(PlanRequest)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def plan(as_json: bool, **values: Any) -> None:
    """Show which layers of MODEL would be dropped.

    Nothing is cut. These are the criteria:
    """
    from factory.cli.console import StageLines, console

    request = read_request(PlanRequest, values)
    reporter = StageLines(console(stderr=as_json))
    with reporter.busy("prepare"):
        from factory.api.functions import plan as make
        from factory.cli.tables import show_plans
        from factory.report.figures import terminal_heatmap

        result = make(request, reporter=reporter)
    if as_json:
        print_json(result.plans.model_dump(mode="json"))
        return
    screen = reporter.out
    screen.print()
    heatmap = terminal_heatmap(result.profile, result.chosen, width=min(screen.width, 100))
    screen.print(heatmap, soft_wrap=True)
    show_plans(screen, result.plans, command=_build_command(result))


plan.help = f"{cleandoc(str(plan.help))}\n\n\b\n" + "\n".join(
    textwrap.fill(f"{criterion.name:<15}  {criterion.summary}", 76, subsequent_indent=" " * 17)
    for criterion in CRITERIA.values()
)


def _build_command(result: "PlansResult") -> str:
    """Return the command that builds the plan: the typed options, or the layers if a profile was read."""
    context = click.get_current_context()
    words = ["factory", "build", context.params["model"]]
    layers = context.params["profile"] is not None  # builds read no profile
    if layers:
        words += ["--layers", ",".join(map(str, result.chosen.dropped))]
    skipped = {"model", "criterion", *(["drop"] if layers else [])}
    for param in sorted(context.command.params, key=lambda param: param.name != "drop"):
        name = str(param.name)
        typed = context.get_parameter_source(name) == ParameterSource.COMMANDLINE
        if typed and name in BuildRequest.options() and name not in skipped:
            value = context.params[name]
            words += [param.opts[0], *([] if value is True else [str(value)])]
    if not layers and result.plans.chosen != DEFAULT_CRITERION.name:
        words += ["--criterion", result.plans.chosen]
    return shlex.join(words)


@click.command(cls=Command, context_settings=CONTEXT)
@request_options(SweepRequest)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def sweep(as_json: bool, **values: Any) -> None:
    """Measure quality against the fraction dropped.

    The sweep shows the plateau and the cliff of MODEL. Every cut is made on disk and evaluated as it would
    ship. Builds with the same settings reuse the stages of the sweep. Cuts are healed if --heal is given.
    """
    from factory.cli.console import StageLines, console

    request = read_request(SweepRequest, values)
    reporter = StageLines(console(stderr=as_json))
    with reporter.busy("prepare"):
        from factory.cli.tables import show_sweep
        from factory.pipeline.prepare import load_questions
        from factory.pipeline.sweep import prepare_sweep, run_sweep

        prepared = prepare_sweep(request, reporter)
    _preview(prepared, reporter)
    load_questions(request, prepared.run.config, reporter)
    try:
        found = run_sweep(prepared, reporter)
    finally:
        reporter.stop()
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        show_sweep(reporter.out, found, folder=prepared.out)


def _preview(prepared: "PreparedSweep", reporter: "StageLines") -> None:
    """Show the cuts and how much disk they can take."""
    from factory.hub.pull import cache_demand
    from factory.pruning.sizes import left_about
    from factory.store.capacity import demands
    from factory.store.locks import HOME
    from factory.units import size

    source, run = prepared.source, prepared.run
    cuts = sum(left_about(source, n)[1] for n in run.block_sizes)
    cuts *= 2 if run.config.heal_enabled else 1
    disk, *others = demands([(run.store.home, HOME, cuts), cache_demand(source)])
    listed = ", ".join(map(str, run.block_sizes))
    reporter.out.print(f"  cuts         {listed} of {source.num_layers} layers", soft_wrap=True)
    reporter.out.print(
        f"  disk         {size(disk.needed)} at most, {size(disk.free)} free; "
        "`factory gc` removes cuts that no build uses",
        soft_wrap=True,
    )
    for one in others:
        needed = f"{size(one.needed)} at {one.place}, {size(one.free)} free"
        reporter.out.print(f"  {'':<13}{needed}", soft_wrap=True)
    reporter.out.print()
