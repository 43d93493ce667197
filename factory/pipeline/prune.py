"""Pruning alone: chosen layers removed, the result verified, nothing measured or healed."""

import time
from dataclasses import dataclass
from pathlib import Path

from factory.artifacts import Pruning, PruningPlan, Source
from factory.builds.garbage import register
from factory.builds.pruned_folder import check_disk, find, remove_layers
from factory.builds.swap import laying_out
from factory.config.request import PruneRequest
from factory.model.architecture import prune_config
from factory.pipeline.prepare import pull_and_trust, resolve_source
from factory.pipeline.run import Reporter
from factory.pruning.criteria import plan_without
from factory.store.store import default_home
from factory.units import count


@dataclass(frozen=True)
class PreparedPrune:
    """What will be removed, of what, and where the result goes."""

    request: PruneRequest
    source: Source
    plan: PruningPlan
    logits: bool  # compared with the source's

    @property
    def out(self) -> Path:
        """Folder of the smaller model."""
        return self.request.out


def prepare_prune(request: PruneRequest, reporter: Reporter, *, dry_run: bool = False) -> PreparedPrune:
    """Resolve the model, and refuse what cannot be right or does not fit before it is downloaded.

    Code that must be run to check a model is downloaded first, unless this is a dry run.
    """
    from factory.pruning.prune import compares_logits

    source = resolve_source(request, reporter)
    plan = plan_without(request.layers, num_layers=source.num_layers)
    logits = compares_logits(source, thoroughness=request.verify)
    if find(source, plan, out=request.out, logits=logits, force=request.force) is None:
        from factory.model.completeness import check_source

        if source.remote_code and not dry_run:
            source = pull_and_trust(source, reporter)
        check_source(source)
        if not (source.remote_code and dry_run):
            prune_config(source.config, kept=plan.kept)
        check_disk(source, plan, out=request.out)
    return PreparedPrune(request, source, plan, logits)


def make_pruned(prepared: PreparedPrune, reporter: Reporter) -> tuple[Pruning, bool]:
    """Make the folder, unless it holds this very result.

    Returns:
        The record, and whether it was there already.
    """
    request, plan = prepared.request, prepared.plan
    home = (request.home or default_home()).absolute()
    with laying_out(request.out, on_wait=lambda: reporter.waiting("prune")):
        # Another run may have made it meanwhile.
        found = find(prepared.source, plan, out=request.out, logits=prepared.logits, force=request.force)
        register(home, request.out, {})  # what a kill leaves beside it is found by `factory gc`
        return found or _made(prepared, reporter), found is not None


def _made(prepared: PreparedPrune, reporter: Reporter) -> Pruning:
    """Download what is on the Hub, then make the folder."""
    source = pull_and_trust(prepared.source, reporter)
    start = time.monotonic()
    reporter.started("prune")
    pruning = remove_layers(
        source,
        prepared.plan,
        out=prepared.out,
        thoroughness=prepared.request.verify,
        progress=lambda done, total: reporter.progressed("prune", done, total, ""),
    )
    summary = f"{count(pruning.source_parameters)} → {count(pruning.result_parameters)} parameters"
    reporter.finished("prune", summary, time.monotonic() - start, False)
    return pruning
