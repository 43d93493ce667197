"""Copy the kept layers on disk, renumber them, and verify that the result loads."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from factory.artifacts import Checkpoint, PruningPlan, Source
from factory.checkpoint.auxiliary import copy_auxiliary_files
from factory.checkpoint.header import TensorInfo
from factory.checkpoint.read import read_checkpoint
from factory.checkpoint.write import Progress, write_checkpoint
from factory.errors import UsageError, VerificationError
from factory.hub.remote_code import point_to_source
from factory.model.architecture import DecoderStack, locate, num_weights, prune_config, renumber
from factory.model.config_fields import packing, packing_method
from factory.pruning.config_forms import with_older_forms
from factory.pruning.verify import verify, verify_logits, verify_values

SMALL_PARAMETERS = 200_000_000  # logits are compared up to this size, which takes seconds
Thoroughness = Literal["auto", "full"]


def compares_logits(source: Source, *, thoroughness: Thoroughness) -> bool:
    """Return whether the result's logits are compared with the source's, besides names and shapes.

    Raises:
        UsageError: Full verification of a quantised source, which needs its own library and often a GPU.
    """
    quantized = packing(source.config)
    if quantized and thoroughness == "full":
        method = packing_method(source.config)
        raise UsageError(
            f"`verify=full` cannot run {source.name}: its weights are packed ({method})",
            hint="omit it: names, shapes and the architecture are still compared",
        )
    return not quantized and (thoroughness == "full" or source.num_parameters <= SMALL_PARAMETERS)


def prune(
    source: Source,
    plan: PruningPlan,
    *,
    folder: Path,
    thoroughness: Thoroughness = "auto",
    progress: Progress | None = None,
) -> Checkpoint:
    """Write the source without the dropped layers into `folder`, in the source's dtype, byte for byte.

    Args:
        source: Source whose weights are on this machine.
        plan: Plan made for this source.
        folder: Existing folder, empty or holding an earlier attempt.
        thoroughness: "full" compares logits at any size; "auto" does so for small models only, and for
            others compares the stored values of a few layers.
        progress: Callback that receives (bytes done, total bytes).

    Raises:
        CheckpointError: The source's weights are missing or damaged.
        DiskSpaceError: The disk is full.
        UnsupportedArchitectureError: The source has no single stack of decoder layers.
        UnsupportedFieldError: A configuration field cannot be adapted to the missing layers.
        VerificationError: The result does not load as its configuration says, or does not compute the same
            as the source with those layers skipped.
    """
    source_folder = source.local_folder
    tensors = read_checkpoint(source_folder)
    stack = _stack(source, plan, tensors)
    kept = _kept_tensors(tensors, stack=stack, kept=plan.kept)
    config = with_older_forms(prune_config(source.config, kept=plan.kept))
    if not source.remote_code:
        config.pop("auto_map", None)  # refers to code that is neither needed nor copied
    config.pop("_name_or_path", None)  # may be a path on its author's disk
    files = write_checkpoint(kept, folder=folder, progress=progress)
    copy_auxiliary_files(source_folder, folder)
    (folder / "config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    if source.remote_code:
        point_to_source(source, folder)
    verify(folder, source_folder=source_folder)
    logits = compares_logits(source, thoroughness=thoroughness)
    if logits:
        verify_logits(source_folder, folder, dropped=plan.dropped)
    else:
        verify_values(source_folder, folder, kept=plan.kept, prefix=stack.tensor_prefix)
    return Checkpoint(
        folder=folder,
        num_layers=len(plan.kept),
        num_parameters=sum(num_weights(tensor, source.config) for _, tensor in kept),
        size_bytes=sum((folder / name).stat().st_size for name in files),
        files=files,
        verified=("names and shapes", "logits" if logits else "values"),
    )


def _stack(source: Source, plan: PruningPlan, tensors: Mapping[str, TensorInfo]) -> DecoderStack:
    stack = locate(source.config, tensors)
    if stack.num_layers != plan.num_layers:
        raise VerificationError(
            f"the plan is for {plan.num_layers} layers, but {source.name} has {stack.num_layers}",
            hint="make a new plan for this source",
        )
    return stack


def _kept_tensors(
    tensors: Mapping[str, TensorInfo], *, stack: DecoderStack, kept: Sequence[int]
) -> list[tuple[str, TensorInfo]]:
    """Return pairs (name in the result, tensor in the source) of all kept tensors."""
    kept_index = {old: new for new, old in enumerate(kept)}
    names = ((renumber(name, stack=stack, kept_index=kept_index), name) for name in tensors)
    return [(new, tensors[old]) for new, old in names if new is not None]
