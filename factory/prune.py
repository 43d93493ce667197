"""The prune stage: copy the kept layers on disk, renumber them, and prove that the result loads."""

import json
from collections.abc import Mapping
from pathlib import Path

from factory import checkpoint, decoder
from factory.artifacts import Checkpoint, PruningPlan, Source
from factory.checkpoint import Progress, TensorInfo
from factory.errors import VerificationError
from factory.reload import verify, verify_logits

SMALL_PARAMETERS = 200_000_000  # up to here the logits are compared too; it takes seconds


def prune(source: Source, plan: PruningPlan, *, folder: Path, progress: Progress | None = None) -> Checkpoint:
    """Write the source without the dropped layers into `folder`, in the source's dtype, byte for byte.

    Args:
        source: Pulled: its weights are local.
        plan: Made for this source.
        folder: Exists, and is empty or holds an earlier attempt.
        progress: Called with (bytes done, bytes in all).

    Raises:
        CheckpointError: The source's weights are missing or damaged.
        DiskSpaceError: The disk is full.
        UnsupportedArchitectureError: The source has no single stack of decoder layers.
        UnsupportedFieldError: A configuration field that cannot be right without the dropped layers.
        VerificationError: The result does not load as its configuration says, or computes something else
            than the source with those layers skipped.
    """
    source_folder = source.local_folder
    kept = _kept_tensors(source, plan, checkpoint.read_checkpoint(source_folder))
    config = decoder.prune_config(source.config, kept=plan.kept)
    config.pop("auto_map", None)  # names code that is not copied
    config.pop("_name_or_path", None)  # where somebody had it on disk
    files = checkpoint.sha256_of_files(
        folder, checkpoint.write_checkpoint(kept, folder=folder, progress=progress)
    )
    checkpoint.copy_auxiliary_files(source_folder, folder)
    (folder / "config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    verify(folder, source_folder=source_folder)
    if source.num_parameters <= SMALL_PARAMETERS and "quantization_config" not in config:
        verify_logits(source_folder, folder, dropped=plan.dropped)
    return Checkpoint(
        folder=folder,
        num_layers=len(plan.kept),
        num_parameters=sum(tensor.num_elements for _, tensor in kept),
        size_bytes=sum((folder / name).stat().st_size for name in files),
        files=files,
    )


def _kept_tensors(
    source: Source, plan: PruningPlan, tensors: Mapping[str, TensorInfo]
) -> list[tuple[str, TensorInfo]]:
    """Pairs (name in the result, where the values lie) of every tensor that stays."""
    stack = decoder.locate(source.config, tensors)
    if stack.num_layers != plan.num_layers:
        raise VerificationError(
            f"the plan is for {plan.num_layers} layers, {source.name} has {stack.num_layers}",
            hint="plan again from this source",
        )
    kept_index = {old: new for new, old in enumerate(plan.kept)}
    names = ((decoder.renumber(name, stack=stack, kept_index=kept_index), name) for name in tensors)
    return [(new, tensors[old]) for new, old in names if new is not None]
