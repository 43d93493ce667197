"""Weights that are packed already: whether transformers loads them here, and into what."""

import re
from collections.abc import Mapping
from typing import Any

from factory.decoder_fields import packing, packing_method
from factory.decoder_proof import CONFIG_ERRORS
from factory.errors import ModelError, UsageError
from factory.header import DTYPE_BITS, TensorInfo

# What lies beside packed weights and holds none: their scales, zero points, codes, order and shape.
BESIDE = re.compile(
    r"[._](absmax|quant_map|quant_state\..*|SCB|weight_format|qzeros|g_idx|zero_point|shape|scales?|scale_inv)$"
)
WORDS = ("U8", "I32")  # hold several weights each


def num_weights(tensor: TensorInfo, config: Mapping[str, Any]) -> int:
    """How many parameters of the model a stored tensor holds."""
    settings = packing(config)
    if not settings:
        return tensor.num_elements
    if BESIDE.search(tensor.name):
        return 0
    bits = settings.get("bits") if isinstance(settings, Mapping) else None
    each = DTYPE_BITS[tensor.dtype] // (bits if bits in (2, 4, 8) else 4) if tensor.dtype in WORDS else 1
    return tensor.num_elements * each


def unpacking(config: Mapping[str, Any]) -> Any:
    """What has transformers unpack weights on loading, where only kernels from the Hub could run packed ones.

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
        four_bit: They are to be packed while they are loaded.

    Raises:
        UsageError: They are packed already.
        ModelError: Names the method and what is missing.
    """
    settings = packing(config)
    if not settings:
        return
    method = packing_method(config)
    if four_bit:
        raise UsageError(
            f"--load-in-4bit: the weights are packed already ({method})", hint="leave the option out"
        )
    from transformers.quantizers.auto import AutoHfQuantizer

    from factory.models import best_device

    try:
        merged = AutoHfQuantizer.merge_quantization_configs(settings, unpacking(config))
        quantizer = AutoHfQuantizer.from_config(merged, pre_quantized=True)
        quantizer.validate_environment(device_map={"": best_device()}, weights_only=True)
    except (*CONFIG_ERRORS, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split()).partition(" - ")[0]
        raise ModelError(
            f"the weights are packed ({method}), and transformers cannot load them here: {reason[:200]}",
            hint="start from the unpacked model; `factory prune` needs no loading",
        ) from error
