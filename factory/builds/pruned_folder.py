"""Write the output folder of `factory prune`, a complete model without some layers, atomically."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from factory import __version__
from factory.artifacts import Checkpoint, Pruning, PruningPlan, Source
from factory.builds.swap import begin, check_beside, discard, is_writable, swap
from factory.checkpoint.write import Progress
from factory.errors import StoreError
from factory.hub.pull import cache_demand
from factory.pruning.sizes import left_without
from factory.serving.runtimes import verdicts
from factory.store.capacity import check_room, demands
from factory.store.files import sync_files

if TYPE_CHECKING:
    from factory.pruning.prune import Thoroughness

LONGEST_NAME = 240  # bytes; file systems allow 255, and the partial folder's name is longer
SPARE_BYTES = 100_000_000  # for tokenizer and configuration


def find(source: Source, plan: PruningPlan, *, out: Path, logits: bool, force: bool) -> Pruning | None:
    """Return the result in `out` if it is exactly what is requested; None if it has to be made.

    Args:
        logits: Whether logits are to be compared; a result without that check is made again.
        force: Whether another result may be replaced.

    Raises:
        StoreError: `out` contains something else, or cannot be written.
    """
    out = out.resolve()
    too_long = len(os.fsencode(out.name)) > LONGEST_NAME
    if out == Path(out.anchor) or too_long or not is_writable(out):
        raise StoreError(f"cannot write a model to {out}", hint="choose another folder with `out`")
    if source.repo_id is None and source.folder:
        theirs, ours = source.folder.resolve(), out.resolve()
        if theirs == ours or theirs in ours.parents or ours in theirs.parents:
            raise StoreError(
                f"{out} and the source {source.folder} are inside each other",
                hint="choose another folder with `out`",
            )
    check_beside(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / Pruning.file_name).is_file():
        raise StoreError(
            f"{out} already exists and was not made by `factory prune`",
            hint="choose another folder with `out`, or move it away",
        )
    found = Pruning.read(out)
    if _is_same(found, source, plan) and _is_whole(found, out):
        return found if "logits" in found.verified or not logits else None
    if not force:
        raise StoreError(
            f"{out} contains another model: {found.source_name} without {len(found.dropped)} layers",
            hint="choose another folder with `out`, or add `force` to replace it",
        )
    return None


def _is_same(found: Pruning, source: Source, plan: PruningPlan) -> bool:
    return (found.commit, found.repo_id, found.dropped) == (source.commit, source.repo_id, plan.dropped)


def _is_whole(found: Pruning, out: Path) -> bool:
    """Return whether all weights exist in their full size; other files may be edited by hand."""
    paths = [out / name for name in found.files]
    return (out / "config.json").is_file() and (
        sum(path.stat().st_size for path in paths if path.is_file()) == found.result_bytes
    )


def check_disk(source: Source, plan: PruningPlan, *, out: Path) -> None:
    """Refuse, before any work, a result that does not fit on the disk.

    Raises:
        DiskSpaceError: There is too little space; says how much is needed and how much there is.
    """
    needed = left_without(source, plan.dropped)[1] + SPARE_BYTES
    check_room(demands([(out.resolve().parent, "`out`", needed), cache_demand(source)]))


def remove_layers(
    source: Source, plan: PruningPlan, *, out: Path, thoroughness: "Thoroughness", progress: Progress
) -> Pruning:
    """Write the source without the dropped layers, verify it, then replace `out` with it.

    An interrupted run leaves at most `.NAME.partial` beside `out`, which the next run removes.

    Args:
        source: Source whose weights are on this machine.
        progress: Callback that receives (bytes done, total bytes).

    Raises:
        FactoryError: Pruning failed, as `prune` describes; `out` is unchanged.
    """
    from factory.pruning.prune import prune

    out = out.resolve()
    partial = begin(out)
    try:
        made = prune(source, plan, folder=partial, thoroughness=thoroughness, progress=progress)
        pruning = _describe(source, plan, made)
        pruning.write(partial)
        sync_files(partial)
        swap(partial, out)
    finally:
        if partial.exists():
            discard(partial)
    return pruning


def _describe(source: Source, plan: PruningPlan, made: Checkpoint) -> Pruning:
    return Pruning(
        factory_version=__version__,
        source_name=source.name,
        repo_id=source.repo_id,
        commit=source.commit,
        lineage=source.lineage,
        license=source.license,
        num_layers=plan.num_layers,
        dropped=plan.dropped,
        source_parameters=source.num_parameters,
        result_parameters=made.num_parameters,
        source_bytes=source.size_bytes,
        result_bytes=made.size_bytes,
        files=made.files,
        verified=made.verified,
        runtimes=verdicts(source.config, plan.dropped, folder=made.folder),
    )
