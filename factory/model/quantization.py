"""Work with weights in fewer bits: packed checkpoints, and NF4."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from factory.errors import ModelError, UsageError
from factory.model.config_fields import packing, packing_method
from factory.model.config_proof import CONFIG_ERRORS
from factory.model.devices import best_device, compute_dtype


def nf4_config(dtype: torch.dtype, *, to_shard: bool) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,  # saves 3 GB of a 70B model, which otherwise fills 40 GB
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if to_shard else torch.uint8,
    )


def four_bit_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield name and module of each 4-bit linear layer, without loading bitsandbytes where none can be."""
    if "bitsandbytes" in sys.modules:
        from bitsandbytes.nn import Linear4bit

        yield from ((name, layer) for name, layer in model.named_modules() if isinstance(layer, Linear4bit))


def keep_scales_whole(model: Any, device: torch.device) -> None:
    """Put the scales of NF4 weights on the GPU: they are not parameters, so FSDP ignores them."""
    for _, layer in four_bit_layers(model):
        layer.quant_state = layer.weight.quant_state  # a shard of the weight has none
        layer.quant_state.to(device)


def repair_four_bit_on_cpu(model: Any) -> None:
    """Work around two silent faults of bitsandbytes 0.50 on CPUs.

    A layer whose input size is not a multiple of the block size is unpacked with wrong scales: it is
    replaced by one with the right NF4 values in full precision. And with AVX512-BF16, the first pass in
    evaluation mode repacks a layer for good, so that training has no gradient for its input: this is
    switched off.
    """
    for name, layer in list(four_bit_layers(model)):
        layer.support_avx512bf16_for_cpu = False
        if layer.in_features % layer.weight.quant_state.blocksize:
            model.set_submodule(name, _unpacked(layer))


def _unpacked(module: Any) -> torch.nn.Linear:
    """Return a 4-bit layer with its NF4 values in fp32: code[nibble] · scale of its block, by definition."""
    from bitsandbytes.functional import dequantize_blockwise

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
    """Round a linear layer's weight, [out, in], as `load_model` packs it; the result is fp32."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit, Params4bit

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


def unpacking(config: Mapping[str, Any]) -> Any:
    """Return a configuration that unpacks weights on loading if only Hub kernels can run them packed.

    Returns:
        A quantisation configuration; None for all other weights, packed or not.
    """
    from transformers import FineGrainedFP8Config, Mxfp4Config

    method = packing_method(config) if packing(config) else None
    classes = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
    return classes[method](dequantize=True) if method in classes else None


def check_loads(config: Mapping[str, Any], *, four_bit: bool) -> None:
    """Refuse packed weights that transformers cannot load here, before they are downloaded.

    Args:
        config: Contents of config.json.
        four_bit: Whether loading would pack the weights.

    Raises:
        UsageError: The weights are already packed.
        ModelError: transformers cannot load them; the message names the method and what is missing.
    """
    settings = packing(config)
    if not settings:
        return
    method = packing_method(config)
    if four_bit:
        raise UsageError(
            f"`load_in_4bit`: the weights are already packed ({method})", hint="remove `load_in_4bit`"
        )
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        merged = AutoHfQuantizer.merge_quantization_configs(settings, unpacking(config))
        quantizer = AutoHfQuantizer.from_config(merged, pre_quantized=True)
        quantizer.validate_environment(device_map={"": best_device()}, weights_only=True)
    except (*CONFIG_ERRORS, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split()).partition(" - ")[0]
        raise ModelError(
            f"the weights are packed ({method}), and transformers cannot load them here: {reason[:200]}",
            hint="start from the unpacked model; `factory prune` works without loading it",
        ) from error
