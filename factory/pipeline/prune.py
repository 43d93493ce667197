"""Prune without measuring or healing: remove given layers and verify the result."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO

from factory.artifacts import Pruning, PruningPlan, Source
from factory.builds.garbage import register
from factory.builds.pruned_folder import check_disk, find, remove_layers
from factory.builds.swap import laying_out
from factory.config.request import PruneRequest
from factory.model.architecture import prune_config
from factory.pipeline.run import Reporter
from factory.pipeline.source import pull_and_trust, resolve_source
from factory.pruning.criteria import plan_without
from factory.store.store import home_folder
from factory.units import count


@dataclass(frozen=True)
class PreparedPrune:
    """A checked request to prune: what to remove, from which source, and where to write the result."""

    request: PruneRequest
    source: Source
    plan: PruningPlan
    logits: bool  # whether they are compared with the source's

    @property
    def out(self) -> Path:
        """Folder of the pruned model."""
        return self.request.out


def prepare_prune(request: PruneRequest, reporter: Reporter, *, dry_run: bool = False) -> PreparedPrune:
    """Resolve the model, and refuse impossible requests before anything is downloaded.

    If the model's own code must run to check it, that is downloaded first, except in a dry run.
    """
    with ThreadPoolExecutor(max_workers=1) as beside:
        # What takes seconds either way: loading torch, and reading a whole folder for its hash.
        loading = beside.submit(import_module, "torch")
        source = resolve_source(request, reporter)
        loading.result()
    from factory.pruning.prune import compares_logits

    plan = plan_without(request.layers, num_layers=source.num_layers)
    logits = compares_logits(source, thoroughness=request.verify)
    if find(source, plan, out=request.out, logits=logits, force=request.force) is None:
        from factory.model.completeness import check_source

        if source.remote_code and not dry_run:
            source = pull_and_trust(source, reporter, home=home_folder(request.home), in_use=[])
        check_source(source)
        if not (source.remote_code and dry_run):
            prune_config(source.config, kept=plan.kept)
        check_disk(source, plan, out=request.out)
    return PreparedPrune(request, source, plan, logits)


def make_pruned(prepared: PreparedPrune, reporter: Reporter) -> tuple[Pruning, bool]:
    """Write the pruned model, unless the folder already holds this very result.

    Returns:
        The record, and whether the result already existed.
    """
    request, plan = prepared.request, prepared.plan
    home = home_folder(request.home)
    with laying_out(request.out, on_wait=lambda: reporter.waiting("prune")):
        # Another run may have finished it in the meantime.
        found = find(prepared.source, plan, out=request.out, logits=prepared.logits, force=request.force)
        register(home, request.out, {})  # so that `factory gc` finds what a kill leaves
        return found or _made(prepared, reporter, home=home), found is not None


def _made(prepared: PreparedPrune, reporter: Reporter, *, home: Path) -> Pruning:
    """Download the source if need be, then write the pruned model."""
    in_use: list[IO[bytes] | None] = []  # closed, like any file, when nothing refers to it
    source = pull_and_trust(prepared.source, reporter, home=home, in_use=in_use)
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
