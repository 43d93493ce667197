"""A checkpoint in memory: device, dtype, padded batches and their losses."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from factory.errors import ModelError
from factory.packed import unpacking

transformers_logging.disable_progress_bar()


SHARE_FOR_WEIGHTS = 0.9  # of a GPU's free memory
SHARE_FOR_TRAINED = 0.7  # the same, where activations, gradients and an optimiser need room
UNPACKED_SIZE = 4  # times that of the files, at most: MXFP4's 4 bits become 16
FOUR_BIT_BYTES = 0.6  # a parameter: NF4, its scales, and the embeddings in 16 bits


def best_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """For people: "NVIDIA H100 80GB HBM3", "CPU, 2 cores"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU; fp32 on a CPU, where bf16 is 4 to 30 times slower."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_model(folder: Path, *, four_bit: bool = False, to_shard: bool = False) -> Any:
    """Load a causal language model in evaluation mode, as a user would, onto the best device.

    Weights that do not fit one GPU are spread over all of them and, what is left, over the host's memory.

    Args:
        folder: A complete checkpoint.
        four_bit: Quantise the linear layers to bitsandbytes NF4 while loading.
        to_shard: Load into the host's memory, in a form that FSDP can divide among GPUs: NF4 weights are
            stored as if they were floating-point numbers.

    Raises:
        ModelError: transformers cannot load it, or would make up parameters that it lacks.
    """
    device = best_device()
    place = torch.device("cpu") if to_shard else device
    dtype = compute_dtype(device)
    quantization = _nf4(dtype, to_shard=to_shard) if four_bit else unpacking(_config(folder))
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": place} if to_shard or four_bit or fits(folder, device) else "auto",
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are told below
            # Given as None, it would have packed weights read as if they were not.
            **({"quantization_config": quantization} if quantization else {}),
        )
    except (ValueError, TypeError, AttributeError, KeyError, ImportError) as error:
        raise ModelError(
            f"transformers cannot load {folder}: {' '.join((str(error) or repr(error)).split())[:300]}",
            hint="its config.json or generation_config.json asks for what is not there",
        ) from error
    _check_whole(found, folder)
    if device.type == "cpu":
        _repair_four_bit_on_cpu(model)
        _widen(model, dtype)
    if to_shard:
        _keep_scales_whole(model, device)
    return model.eval()


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def _nf4(dtype: torch.dtype, *, to_shard: bool) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,  # 3 GB less of a 70B model, which else leaves no room in 40 GB
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if to_shard else torch.uint8,
    )


def _check_whole(found: Mapping[str, Any], folder: Path) -> None:
    """Refuse a model of which transformers has made up parameters.

    Args:
        found: What it says of the loading.
    """
    made_up = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if made_up:
        more = f" and {len(made_up) - 1:,} more" if len(made_up) > 1 else ""
        raise ModelError(
            f"{folder} lacks {made_up[0]}{more}, which transformers fills with random values",
            hint="the checkpoint is incomplete, or config.json is another model's; download both again",
        )


def _widen(model: Any, dtype: torch.dtype) -> None:
    """Compute in fp32 also where packed weights, or what was unpacked from them, ask for 16 bits."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in (torch.bfloat16, torch.float16):
            tensor.data = tensor.data.to(dtype)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype


def fits(folder: Path, device: torch.device) -> bool:
    """Whether a checkpoint's weights, and some room to work, fit into what is free on a device."""
    if device.type == "cpu":
        return True
    free_bytes, _ = torch.cuda.mem_get_info(device)
    size_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if unpacking(_config(folder)):
        size_bytes *= UNPACKED_SIZE
    return size_bytes < SHARE_FOR_WEIGHTS * free_bytes


def training_processes(asked: int, *, batch_size: int) -> int:
    """How many processes share a step: each takes as many of its sequences, so that the batch stays."""
    return max(number for number in range(1, asked + 1) if batch_size % number == 0)


def trains_on_one(
    num_parameters: int, device: torch.device, *, four_bit: bool, num_unpacked: int = 0
) -> bool:
    """Whether a model, and what training an adapter of it takes, fit into what is free on a device.

    Args:
        num_unpacked: Those of the parameters that stay in 16 bits: experts that are one parameter.
    """
    if device.type == "cpu":
        return True
    free_bytes, _ = torch.cuda.mem_get_info(device)
    bytes_each = compute_dtype(device).itemsize
    packed = (FOUR_BIT_BYTES if four_bit else bytes_each) * (num_parameters - num_unpacked)
    return packed + bytes_each * num_unpacked < SHARE_FOR_TRAINED * free_bytes


def _keep_scales_whole(model: Any, device: torch.device) -> None:
    """Put the scales of NF4 weights on the GPU: they are no parameters, so that FSDP does not see them."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.quant_state = module.weight.quant_state  # of the layer: a share of its weight has none
            module.quant_state.to(device)


def _repair_four_bit_on_cpu(model: Any) -> None:
    """Work around two silent faults of bitsandbytes 0.50 on CPUs.

    A layer whose inputs are no multiple of the block size is unpacked with the wrong scales: it is
    replaced by one that holds the right NF4 values in full precision. And on CPUs with AVX512-BF16 a
    layer is repacked for good at its first pass in evaluation mode, after which training has no
    gradient for its input: that is switched off.
    """
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if not isinstance(module, Linear4bit):
                continue
            module.support_avx512bf16_for_cpu = False
            if module.in_features % module.weight.quant_state.blocksize:
                setattr(parent, name, _unpacked(module))


def _unpacked(module: Linear4bit) -> torch.nn.Linear:
    """The same layer with its NF4 values in fp32: code[nibble] · scale of its block, by definition."""
    state = module.weight.quant_state
    packed = module.weight.data.view(torch.uint8).flatten().long()
    nibbles = torch.stack((packed >> 4, packed & 15), dim=1).flatten()
    count = module.in_features * module.out_features
    absmax = state.absmax
    if state.nested:  # scales have scales
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    scales = absmax.repeat_interleave(state.blocksize)[:count]
    linear = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    linear.weight.data = (state.code[nibbles[:count]] * scales).view(module.out_features, module.in_features)
    if module.bias is not None:
        linear.bias.data = module.bias.data.float()
    return linear.requires_grad_(False)


def round_to_nf4(weight: torch.Tensor) -> torch.Tensor:
    """What a linear layer's weight, [out, in], is after it was packed as `load_model` packs it; in fp32."""
    device = best_device()
    module = Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.float32, device="meta"
    )
    values = weight.to(compute_dtype(device)).contiguous()
    packed = Params4bit(
        values, requires_grad=False, quant_type="nf4", compress_statistics=True, module=module
    )
    module.weight = packed.to(device)
    if module.in_features % module.weight.quant_state.blocksize:
        unpacked: torch.Tensor = _unpacked(module).weight.detach()
    else:
        unpacked = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    return unpacked.cpu()


def matrix_weights(module: Any) -> int:
    """Weights of the linear layers: a token costs two operations for each of them in a pass."""
    return sum(
        linear.weight.numel() if isinstance(linear, Conv1D) else linear.in_features * linear.out_features
        for linear in module.modules()
        if isinstance(linear, torch.nn.Linear | Conv1D)  # of 4-bit ones the weight is packed
    )


@torch.no_grad()
def fuse_norms(model: Any) -> int:
    """Let RMS norms run as one kernel instead of six, which saves a seventh of a 7B model's pass on a GPU.

    Each is tried first: one that adds 1 to its weight, subtracts a mean or is wrapped stays as it is.
    PyTorch's kernel rounds to 16 bits once, where transformers' norms round twice.

    Returns:
        How many were replaced.
    """
    count = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not type(module).__name__.endswith("RMSNorm") or weight is None or epsilon is None:
            continue
        fused = partial(
            torch.nn.functional.rms_norm, normalized_shape=weight.shape, weight=weight, eps=epsilon
        )
        plain = "forward" not in vars(module) and weight.dtype == model.dtype and not weight.is_meta
        if plain and _agree(module, fused, like=weight):
            module.forward = fused
            count += 1
    return count


def _agree(norm: Any, fused: Any, *, like: torch.Tensor) -> bool:
    """Whether two norms give the same but for rounding, also where their epsilon counts."""
    states = torch.randn(8, *like.shape).to(like) + 0.5  # of a mean that is not 0
    return all(
        torch.allclose(norm(states * scale), fused(states * scale), rtol=0.02, atol=0) for scale in (1, 1e-3)
    )


def pad_batch(sequences: list[list[int]], *, pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad token lists to one batch: ids and attention mask, both [b, s]."""
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), longest), pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(sequences), longest), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, : len(sequence)] = 1
    return ids, mask


def row_losses(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, *, num_given: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted tokens and summed next-token loss in nats of each row: two of [b] in float64.

    Args:
        ids: [b, s], right-padded, on the model's device.
        mask: [b, s], 1 on real tokens.
        num_given: Tokens at the start of each row that are not predicted.
    """
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # [b, s, v]
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    targets[:, : num_given - 1] = -100
    nats = [  # a row at a time: fp32 is large
        torch.nn.functional.cross_entropy(row.float(), target, reduction="sum")
        for row, target in zip(logits[:, :-1], targets.to(logits.device), strict=True)
    ]
    return (targets != -100).sum(dim=1).double(), torch.stack(nats).double()


@torch.inference_mode()
def token_loss(model: Any, sequences: Sequence[list[int]], *, batch_size: int = 1) -> float:
    """Mean next-token loss in nats over token lists; every predicted token counts alike."""
    counts, nats = 0.0, 0.0
    for start in range(0, len(sequences), batch_size):
        ids, mask = pad_batch(list(sequences[start : start + batch_size]), pad_token_id=0)
        tokens, sums = row_losses(model, ids.to(model.device), mask.to(model.device))
        counts, nats = counts + float(tokens.sum()), nats + float(sums.sum())
    return nats / counts
