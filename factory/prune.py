"""The prune stage: copy the kept layers on disk, renumber them, and prove that the result loads."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from factory import checkpoint, decoder
from factory.artifacts import Checkpoint, PruningPlan, Source
from factory.checkpoint import Progress, TensorInfo
from factory.errors import VerificationError

SMALL_PARAMETERS = 200_000_000  # up to here the logits are compared too; it takes seconds
TORCH_DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
NUM_NAMED = 4  # tensors that an error message names


def prune(source: Source, plan: PruningPlan, *, folder: Path, progress: Progress | None = None) -> Checkpoint:
    """Write the source without the dropped layers into `folder`, in the source's dtype, byte for byte.

    Args:
        source: Pulled: its weights are local.
        plan: Made for this source.
        folder: Exists, and is empty or holds an earlier attempt.
        progress: Called with (bytes done, bytes in all).

    Raises:
        CheckpointError: The source's weights are missing or damaged.
        UnsupportedFieldError: A configuration field that cannot be right without the dropped layers.
        VerificationError: The result does not load as its configuration says, or computes something else
            than the source with those layers skipped.
    """
    source_folder = source.local_folder
    tensors = checkpoint.read_checkpoint(source_folder)
    config = decoder.prune_config(source.config, kept=plan.kept)
    config.pop("auto_map", None)  # names code that is not copied
    kept = _renumber(source, plan, tensors=tensors)
    files = checkpoint.write_checkpoint(kept, folder=folder, progress=progress)
    checkpoint.copy_auxiliary_files(source_folder, folder)
    (folder / "config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    pruned = Checkpoint(
        folder=folder,
        num_layers=len(plan.kept),
        num_parameters=sum(tensor.num_elements for _, tensor in kept),
        size_bytes=sum((folder / name).stat().st_size for name in files),
        files=files,
    )
    verify(folder)
    if source.num_parameters <= SMALL_PARAMETERS:
        verify_logits(source_folder, folder, dropped=plan.dropped)
    return pruned


def _renumber(
    source: Source, plan: PruningPlan, *, tensors: dict[str, TensorInfo]
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


# The reload gate ---------------------------------------------------------------------------------


def verify(folder: Path) -> None:
    """Load the checkpoint's names and shapes, without values, into the architecture its config describes.

    transformers does the matching (renamed and fused weights, tied embeddings, buffers), on the meta
    device. A source that is already quantised is matched by a loader that asks for its own library and
    often a GPU, so its packed tensors are not compared.

    Raises:
        VerificationError: Names the first tensors that are missing, left over or of another shape.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        return
    state = {
        name: torch.empty(tensor.shape, dtype=TORCH_DTYPES.get(tensor.dtype, torch.float32), device="meta")
        for name, tensor in checkpoint.read_checkpoint(folder).items()
    }
    with torch.device("meta"):
        architecture = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    with _quiet_loading():
        try:
            _, report = architecture.from_pretrained(
                None, config=config, state_dict=state, device_map={"": "meta"},
                output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
        except RuntimeError as error:  # fused weights whose parts do not fit together
            raise VerificationError(
                f"{folder} does not load: {str(error).splitlines()[0]}", hint="please report this bug"
            ) from error
    problems = [
        f"{kind} {_some(names)}"
        for kind, names in (
            ("missing", report["missing_keys"]),
            ("unexpected", report["unexpected_keys"]),
            ("of another shape", [name for name, *_ in report["mismatched_keys"]]),
        )
        if names
    ]
    if problems:
        raise VerificationError(
            f"the weights are not those of its config.json: {'; '.join(problems)}",
            hint="the source disagrees with its own configuration, or this architecture is not supported",
        )


def _some(names: Any) -> str:
    shown = ", ".join(sorted(names)[:NUM_NAMED])
    return shown if len(names) <= NUM_NAMED else f"{shown} and {len(names) - NUM_NAMED} more"


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Keep transformers' loading report off the terminal; what it says is raised instead."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@torch.no_grad()
def verify_logits(source_folder: Path, pruned_folder: Path, *, dropped: tuple[int, ...]) -> None:
    """Compare the reloaded checkpoint, in fp32 on the CPU, with the source whose layers are skipped.

    Catches what names and shapes cannot show: a per-layer field of the configuration that went to another
    layer, and layers whose number in the cache is not their place.

    Raises:
        VerificationError: Logits differ, or differ between one pass and a pass with a cache.
    """
    source, pruned = _load(source_folder), _load(pruned_folder)
    vocab_size = pruned.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))  # [b, s]
    with decoder.skip_layers(source, dropped):
        expected = source(tokens, use_cache=False).logits  # [b, s, V]
    actual = pruned(tokens, use_cache=False).logits
    _check_equal(actual, expected, what="the source without the dropped layers")
    prefix = pruned(tokens[:, :-4], use_cache=True)
    rest = pruned(tokens[:, -4:], past_key_values=prefix.past_key_values, use_cache=True)
    cached = torch.cat([prefix.logits, rest.logits], dim=1)
    _check_equal(cached, actual, what="one pass over the same tokens without a cache")


def _load(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    return model.eval()


def _check_equal(actual: torch.Tensor, expected: torch.Tensor, *, what: str) -> None:
    difference = float((actual - expected).abs().max())
    limit = 1e-3 * max(float(expected.abs().max()), 1.0)
    if not difference <= limit:  # NaN fails too
        raise VerificationError(
            f"the pruned model's logits differ by {difference:.3g} from {what} (limit {limit:.3g})",
            hint="this architecture is not pruned right; please report it",
        )
