"""`factory prune`: remove chosen layers and do nothing else."""

from typing import TYPE_CHECKING, Any

import click

from factory.cli.click_options import CONTEXT, Command, read_request, request_options
from factory.cli.console import print_json
from factory.config.request import PruneRequest

if TYPE_CHECKING:
    from factory.pipeline.prune import PreparedPrune


@click.command(cls=Command, context_settings=CONTEXT)
@request_options(PruneRequest)
@click.option("--dry-run", is_flag=True, help="Show what would happen and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def prune(dry_run: bool, as_json: bool, **values: Any) -> None:
    """Remove chosen layers and do nothing else.

    MODEL is an alias, a Hub repository owner/name[@revision], or a folder. The kept layers are copied on
    disk, byte for byte, without loading the model. The result is verified: names and shapes against the
    architecture, then logits against the source with these layers skipped (small models and --verify full)
    or the values of a few layers (other models). `factory build` also measures, heals and evaluates.
    """
    from factory.cli.console import StageLines, console

    reporter = StageLines(console(stderr=as_json))
    with reporter.busy("prepare"):
        from factory.cli.tables import show_runtimes
        from factory.pipeline.prune import make_pruned, prepare_prune

        prepared = prepare_prune(read_request(PruneRequest, values), reporter, dry_run=dry_run)
    expected = _expected(prepared)
    for name, value in _lines(expected, prepared):
        reporter.out.print(f"{name:<11} {value}", soft_wrap=True)
    if dry_run:
        if as_json:
            print_json(expected)
        return
    try:
        pruning, reused = make_pruned(prepared, reporter)
    finally:
        reporter.stop()
    if as_json:
        print_json(pruning.model_dump(mode="json") | {"kept": prepared.plan.kept, "reused": reused})
    else:
        state = "already exists" if reused else "written"
        verified = ", ".join(pruning.verified)
        reporter.out.print(f"{prepared.out} {state}, verified: {verified}", soft_wrap=True)
        show_runtimes(reporter.out, pruning.runtimes)


def _expected(prepared: "PreparedPrune") -> dict[str, Any]:
    """Return the expected result in numbers."""
    from factory.pruning.sizes import left_without

    source, plan = prepared.source, prepared.plan
    parameters, num_bytes = left_without(source, plan.dropped)
    return {
        "source": source.repo_id or source.name,
        "commit": source.commit,
        **({"lineage": source.lineage.model_dump()} if source.lineage else {}),
        "num_layers": plan.num_layers,
        "dropped": plan.dropped,
        "kept": plan.kept,
        "parameters_before": source.num_parameters,
        "parameters_after": parameters,
        "bytes_before": source.size_bytes,
        "bytes_after": num_bytes,
        "verifies": ["names and shapes", "logits" if prepared.logits else "values"],
    }


def _lines(expected: dict[str, Any], prepared: "PreparedPrune") -> list[tuple[str, str]]:
    from factory.artifacts import layer_ranges
    from factory.units import count, size

    plan = prepared.plan
    before, after = expected["parameters_before"], expected["parameters_after"]
    checks = (
        ", logits against the source with these layers skipped"
        if prepared.logits
        else ", values of a few layers; --verify full compares logits"
    )
    return [
        ("source", f"{expected['source']} at {expected['commit'][:12]}"),
        ("dropping", f"{len(plan.dropped)} of {plan.num_layers} layers: {layer_ranges(plan.dropped)}"),
        ("keeping", f"{len(plan.kept)}: {layer_ranges(plan.kept)}"),
        ("parameters", f"{count(before)} → {count(after)} ({after / before - 1:+.1%})"),
        ("weights", f"{size(expected['bytes_before'])} → {size(expected['bytes_after'])}"),
        ("verifying", f"names and shapes against the architecture{checks}"),
    ]
