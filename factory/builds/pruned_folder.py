"""`factory prune`: a complete model folder without some layers, there whole or not at all."""

import os
from pathlib import Path

from factory import __version__
from factory.artifacts import Checkpoint, Pruning, PruningPlan, Source
from factory.builds.swap import begin, check_beside, discard, is_writable, swap
from factory.checkpoint.write import Progress
from factory.errors import StoreError
from factory.hub.pull import cache_demand
from factory.pruning.prune import Thoroughness, prune
from factory.store.capacity import check_room, demands
from factory.store.files import sync_files

LONGEST_NAME = 240  # bytes; file systems take 255, and the partial folder adds to it
SPARE_BYTES = 100_000_000  # for tokenizer and configuration


def find(source: Source, plan: PruningPlan, *, out: Path, logits: bool, force: bool) -> Pruning | None:
    """What lies in `out`, if it is the very result that is asked for; None where it is to be made.

    Args:
        logits: Whether they are to be compared; a result whose were not is made again.
        force: Another result may be replaced.

    Raises:
        StoreError: `out` holds something else, or is no place to write to.
    """
    out = out.resolve()
    too_long = len(os.fsencode(out.name)) > LONGEST_NAME
    if out == Path(out.anchor) or too_long or not is_writable(out):
        raise StoreError(f"cannot write a model to {out}", hint="give another folder with `out`")
    if source.repo_id is None and source.folder:
        theirs, ours = source.folder.resolve(), out.resolve()
        if theirs == ours or theirs in ours.parents or ours in theirs.parents:
            raise StoreError(
                f"{out} and the source {source.folder} lie in each other",
                hint="give another folder with `out`",
            )
    check_beside(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / Pruning.file_name).is_file():
        raise StoreError(
            f"{out} is there already and was not made by `factory prune`",
            hint="give another folder with `out`, or move it away",
        )
    found = Pruning.read(out)
    if _is_same(found, source, plan) and _is_whole(found, out):
        return found if "logits" in found.verified or not logits else None
    if not force:
        raise StoreError(
            f"{out} holds another model: {found.source_name} without {len(found.dropped)} layers",
            hint="give another folder with `out`, or add `force` to replace it",
        )
    return None


def _is_same(found: Pruning, source: Source, plan: PruningPlan) -> bool:
    return (found.commit, found.repo_id, found.dropped) == (source.commit, source.repo_id, plan.dropped)


def _is_whole(found: Pruning, out: Path) -> bool:
    """Whether all weights are there in their size; what else may be edited by hand."""
    paths = [out / name for name in found.files]
    return (out / "config.json").is_file() and (
        sum(path.stat().st_size for path in paths if path.is_file()) == found.result_bytes
    )


def check_disk(source: Source, plan: PruningPlan, *, out: Path) -> None:
    """Refuse before any work what does not fit.

    Raises:
        DiskSpaceError: Says how much is needed and how much there is.
    """
    needed = source.size_bytes - sum(source.layer_bytes[layer] for layer in plan.dropped) + SPARE_BYTES
    check_room(demands([(out.resolve().parent, "`out`", needed), cache_demand(source)]))


def remove_layers(
    source: Source, plan: PruningPlan, *, out: Path, thoroughness: Thoroughness, progress: Progress
) -> Pruning:
    """Write the source without the dropped layers to `out`, whatever lies there, once it is verified.

    A run that is cut short leaves `.NAME.partial` beside `out` at most, which the next one removes.

    Args:
        source: Pulled.
        progress: Called with (bytes done, bytes in all).

    Raises:
        FactoryError: As `prune` does; then `out` is as it was.
    """
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
        license=source.license,
        num_layers=plan.num_layers,
        dropped=plan.dropped,
        source_parameters=source.num_parameters,
        result_parameters=made.num_parameters,
        source_bytes=source.size_bytes,
        result_bytes=made.size_bytes,
        files=made.files,
        verified=made.verified,
    )
