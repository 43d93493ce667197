"""Make a source of an adapter: check that it fits its base, and merge it."""

import math
from collections.abc import Mapping
from pathlib import Path

from factory.artifacts import Checkpoint, Source
from factory.checkpoint.adapter import copy_files_beside
from factory.checkpoint.header import DTYPE_BITS, TensorInfo
from factory.checkpoint.write import Progress
from factory.errors import CheckpointError
from factory.healing.merge import checkpoint_of, find_updates, merge_into
from factory.model.completeness import check_source
from factory.model.config_proof import on_meta
from factory.model.experts import stored_parts


def check_adapter(source: Source) -> None:
    """Check from headers alone that an adapter can be merged into its base.

    Raises:
        CheckpointError: The adapter has other tensors than those of LoRA.
        VerificationError: It does not fit the base.
    """
    if (unmerged := source.unmerged) is None:
        return
    check_source(source)
    model = on_meta(source.config)
    parts = stored_parts(model, _headers(source.tensors))
    find_updates(unmerged.config, _headers(unmerged.tensors), parts, model=model)


def _headers(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, TensorInfo]:
    """Return tensors of known type and shape, as if each were a file."""
    return {
        name: TensorInfo(name, dtype, shape, Path(), 0, math.prod(shape) * DTYPE_BITS[dtype] // 8)
        for name, (dtype, shape) in tensors.items()
    }


def assemble(source: Source, *, folder: Path, progress: Progress | None = None) -> Checkpoint:
    """Write a source whose parts are here into `folder`: its adapter merged into its base.

    Raises:
        OverflowedError: A value is not finite.
    """
    unmerged = source.unmerged
    if unmerged is None or unmerged.folder is None:
        raise CheckpointError(f"{source.name} has not been pulled", hint="this is a bug; please report it")
    base = unmerged.base.local_folder
    files = merge_into(base, unmerged.folder, folder=folder, progress=progress)
    copy_files_beside(base, unmerged.folder, folder)
    return checkpoint_of(files, folder, like=source)
