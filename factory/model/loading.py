"""Load a model with its weights, or its skeleton without values."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging as transformers_logging

from factory.checkpoint.read import read_checkpoint
from factory.errors import ModelError, VerificationError
from factory.model.config_fields import read_config
from factory.model.devices import SHARE_FOR_WEIGHTS, best_device, compute_dtype
from factory.model.quantization import (
    four_bit_layers,
    keep_scales_whole,
    nf4_config,
    repair_four_bit_on_cpu,
    unpacking,
)
from factory.store.capacity import no_room

transformers_logging.disable_progress_bar()
UNPACKED_SIZE = 4  # times the size of the files, at most: MXFP4's 4 bits become 16
NUM_NAMED = 4  # tensors named in an error message
ATTENTION = "eager"  # every model type has it; the one in config.json may need another library


def load_model(folder: Path, *, four_bit: bool = False, to_shard: bool = False) -> Any:
    """Load a causal language model in evaluation mode, as a user would, onto the best device.

    Weights that do not fit one GPU are spread over all of them, and the rest over the host's memory.

    Args:
        folder: Folder of a complete checkpoint.
        four_bit: Quantise the linear layers to bitsandbytes NF4 while loading.
        to_shard: Load into the host's memory, in a form that FSDP can shard: NF4 weights are stored as if
            they were floating-point numbers.

    Raises:
        ModelError: transformers cannot load it, or would invent missing parameters.
    """
    device = best_device()
    place = torch.device("cpu") if to_shard else device
    dtype = compute_dtype(device)
    quantization = nf4_config(dtype, to_shard=to_shard) if four_bit else unpacking(read_config(folder))
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": place} if to_shard or four_bit or fits(folder, device) else "auto",
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below
            # Passing None would make transformers read packed weights as if they were not.
            **({"quantization_config": quantization} if quantization else {}),
        )
    except (ValueError, TypeError, AttributeError, KeyError, ImportError) as error:
        raise ModelError(
            f"transformers cannot load {folder}: {' '.join((str(error) or repr(error)).split())[:300]}",
            hint="its config.json or generation_config.json requires something that is missing",
        ) from error
    _check_whole(found, folder)
    if device.type == "cpu":
        repair_four_bit_on_cpu(model)
        _widen(model, dtype)
    if to_shard:
        keep_scales_whole(model, device)
    return model.eval()


def _check_whole(found: Mapping[str, Any], folder: Path) -> None:
    """Refuse a model with parameters that transformers has invented.

    Args:
        found: transformers' report of the loading.
    """
    made_up = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if made_up:
        more = f" and {len(made_up) - 1:,} more" if len(made_up) > 1 else ""
        raise ModelError(
            f"{folder} lacks {made_up[0]}{more}, which transformers fills with random values",
            hint="the checkpoint is incomplete, or config.json belongs to another model; download both again",
        )


def _widen(model: Any, dtype: torch.dtype) -> None:
    """Compute in fp32 even with packed weights, or unpacked ones, that specify 16 bits."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in (torch.bfloat16, torch.float16):
            tensor.data = tensor.data.to(dtype)
    for _, layer in four_bit_layers(model):
        layer.compute_dtype = dtype


def fits(folder: Path, device: torch.device) -> bool:
    """Return whether a device has enough free memory for a checkpoint's weights and some working space."""
    if device.type == "cpu":
        return True
    free_bytes, _ = torch.cuda.mem_get_info(device)
    size_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if unpacking(read_config(folder)):
        size_bytes *= UNPACKED_SIZE
    return size_bytes < SHARE_FOR_WEIGHTS * free_bytes


def matrix_weights(module: Any) -> int:
    """Count the weights of the linear layers: a pass takes two operations per token for each."""
    return sum(
        linear.weight.numel() if isinstance(linear, Conv1D) else linear.in_features * linear.out_features
        for linear in module.modules()
        if isinstance(linear, torch.nn.Linear | Conv1D)  # the weight of 4-bit ones is packed
    )


@torch.no_grad()
def fuse_norms(model: Any) -> int:
    """Run RMS norms as one kernel instead of six, which saves a seventh of a 7B model's pass on a GPU.

    Each is tried first: one that adds 1 to its weight, subtracts a mean or is wrapped is not replaced.
    PyTorch's kernel rounds to 16 bits once, transformers' norms twice.

    Returns:
        The number of replaced norms.
    """
    count = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not type(module).__name__.endswith("RMSNorm") or weight is None or epsilon is None:
            continue
        fused = partial(_fused_norm, module, epsilon)
        plain = "forward" not in vars(module) and weight.dtype == model.dtype and not weight.is_meta
        if plain and _agree(module, fused, like=weight):
            module.forward = fused
            count += 1
    return count


def _fused_norm(module: Any, epsilon: float, states: torch.Tensor) -> torch.Tensor:
    weight = module.weight  # at each call: FSDP replaces it
    return torch.nn.functional.rms_norm(states, weight.shape, weight, epsilon)


def _agree(norm: Any, fused: Any, *, like: torch.Tensor) -> bool:
    """Return whether two norms agree up to rounding, even on inputs where their epsilon matters."""
    states = torch.randn(8, *like.shape).to(like) + 0.5  # with a mean other than 0
    return all(
        torch.allclose(norm(states * scale), fused(states * scale), rtol=0.02, atol=0) for scale in (1, 1e-3)
    )


def skeleton(folder: Path) -> Any:
    """Build the causal language model of a checkpoint's config.json, without values."""
    return _skeleton(auto_config(folder))


def transposed_modules(model: Any) -> set[str]:
    """Return the names of modules with weights stored as [in, out]: GPT-2's Conv1D, GPT-OSS's experts."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, Conv1D) or getattr(module, "is_transposed", False)
    }


def quantized_modules(model: Any) -> set[str]:
    """Return the names of modules whose weights become NF4 when the model is loaded in 4 bits."""
    kept = get_keys_to_not_convert(model)
    return {
        name
        for name, module in model.named_modules()
        if (isinstance(module, Conv1D) or type(module) is torch.nn.Linear)
        and should_convert_module(name, kept)
    }


def auto_config(folder: Path) -> Any:
    return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _skeleton(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=False, attn_implementation=ATTENTION
        )


def report_of(folder: Path, config: Any) -> dict[str, Any]:
    tensors = read_checkpoint(folder)
    return loading_report(_skeleton(config), {name: tensor.shape for name, tensor in tensors.items()})


def loading_report(skeleton: Any, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return `from_pretrained`'s findings: the sets missing_keys, unexpected_keys and mismatched_keys.

    Args:
        skeleton: Model without values; its own configuration is used, for a multimodal model the text
            model's.
        shapes: Shape of each stored tensor by name.

    Raises:
        VerificationError: Parts of a fused weight do not fit together.
    """
    state = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
    with quietly():
        try:
            _, report = type(skeleton).from_pretrained(
                None,
                config=skeleton.config,
                attn_implementation=ATTENTION,
                state_dict=state,
                dtype=torch.float32,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # report them instead of raising
            )
        except RuntimeError as error:
            raise VerificationError(
                "the weights cannot be fused as this architecture requires",
                hint="the model does not match its own configuration",
            ) from error
    found: dict[str, Any] = report
    return found


@contextmanager
def quietly() -> Iterator[None]:
    """Silence the libraries' log lines; problems that matter are raised."""
    loggers = [logging.getLogger(name) for name in ("transformers", "accelerate")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turn what transformers raises on a configuration that it accepted into a one-line error."""
    try:
        yield
    except (
        ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError,
        ValueError,
    ) as error:  # fmt: skip
        if no_room(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise VerificationError(
            f"the model cannot {what} by transformers: {reason[:200]}",
            hint="if the source itself can, please report it",
        ) from error


def any_layer(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def some(names: Iterable[str]) -> str:
    """List the first names in order, and the number of others."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:NUM_NAMED])
    return shown if len(ordered) <= NUM_NAMED else f"{shown} and {len(ordered) - NUM_NAMED} more"
