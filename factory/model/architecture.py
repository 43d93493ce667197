"""Handle any decoder: find its layers, and rewrite names and config fields when layers are removed."""

import copy
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from factory.checkpoint.auxiliary import CONFIG
from factory.checkpoint.header import DTYPE_BITS, TensorInfo
from factory.errors import (
    UNTRUSTED,
    CheckpointError,
    ModelError,
    UnsupportedArchitectureError,
    UnsupportedFieldError,
)
from factory.model import config_fields as fields
from factory.model.config_fields import packing
from factory.model.config_proof import num_layers_of, text_config, values_of, verify_structure

FIRST_NUMBER = re.compile(r"^(|.*?\.)(0|[1-9][0-9]{0,8})\.")
# Tensors beside packed weights that hold none: scales, zero points, codes, order and shape.
BESIDE = re.compile(
    r"[._](absmax|quant_map|quant_state\..*|SCB|weight_format|qzeros|g_idx|zero_point|shape|scales?|scale_inv)$"
)
WORDS = ("U8", "I32")  # types that hold several weights each
MAX_LAYERS = 10_000
# safetensors' name of a type → transformers'
DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "I32": "int32",
}


@dataclass(frozen=True)
class DecoderStack:
    """The decoder layers of a checkpoint; tensors of layer i start with f"{tensor_prefix}{i}."."""

    model_type: str
    num_layers: int
    tensor_prefix: str


@dataclass(frozen=True)
class Sizes:
    """What a checkpoint holds, in numbers."""

    num_parameters: int
    layer_parameters: tuple[int, ...]
    layer_bytes: tuple[int, ...]
    vocab_size: int
    dtype: str  # of most weights, by transformers' name


def locate(config: dict[str, Any], tensor_names: Iterable[str]) -> DecoderStack:
    """Find the decoder stack of a checkpoint from its config.json and its tensor names.

    Args:
        config: Contents of config.json.
        tensor_names: Names of all tensors in the checkpoint.

    Raises:
        UnsupportedArchitectureError: It is an encoder-decoder, or has no single stack of the configured size.
    """
    model_type = str(config.get("model_type", ""))
    _, num_layers = _path_and_count(config)
    indices: dict[str, set[int]] = {}
    for name in tensor_names:
        if match := FIRST_NUMBER.match(name):
            indices.setdefault(match[1], set()).add(int(match[2]))
    # The numbers of multi-token prediction layers may continue after the last decoder layer.
    whole = [
        prefix
        for prefix, found in indices.items()
        if sum(index < num_layers for index in found) == num_layers > 0
    ]
    prefix = fields.only_decoder(whole, model_type=model_type, num_layers=num_layers)
    return DecoderStack(model_type, num_layers, prefix)


def renumber(name: str, *, stack: DecoderStack, kept_index: Mapping[int, int]) -> str | None:
    """Return the name of a tensor after pruning; None if its layer is dropped.

    Layers numbered past the last decoder layer (multi-token prediction) follow the last kept one.

    Args:
        kept_index: Old → new 0-based number of each kept layer.
    """
    match = FIRST_NUMBER.match(name)
    if match is None or match[1] != stack.tensor_prefix:
        return name
    index = int(match[2])
    new = kept_index.get(index) if index < stack.num_layers else index - stack.num_layers + len(kept_index)
    return None if new is None else f"{match[1]}{new}.{name[match.end() :]}"


def prune_config(config: dict[str, Any], *, kept: Sequence[int]) -> dict[str, Any]:
    """Return config.json for the kept layers, proven by building both models without weights.

    Args:
        config: Contents of config.json.
        kept: 0-based numbers of the kept layers, ascending.

    Raises:
        UnsupportedArchitectureError: transformers does not know the model type, or it is not a decoder.
        UnsupportedFieldError: A field would give a kept layer another kind, window or position encoding.
    """
    path, num_layers = _path_and_count(config)
    if not kept or list(kept) != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < num_layers:
        raise ValueError(f"kept layers {list(kept)} are not ascending numbers below {num_layers}")
    pruned = copy.deepcopy(config)
    target = _at(pruned, path)
    values = {**values_of(text_config(config)), **target}
    target |= _rewritten(values, kept=kept, num_layers=num_layers, model_type=config["model_type"])
    for part in (pruned,) if target is pruned else (pruned, target):
        if "quantization_config" in part:
            part["quantization_config"] = fields.renumber_module_names(
                part["quantization_config"], kept=kept, num_layers=num_layers
            )
    verify_structure(config, pruned, kept)
    return pruned


def may_drop(config: dict[str, Any], dropped: Collection[int]) -> bool:
    """Return whether the fields of a configuration allow these layers to be dropped, without building it."""
    path, num_layers = _path_and_count(config)
    kept = [layer for layer in range(num_layers) if layer not in dropped]
    values = {**values_of(text_config(config)), **_at(config, path)}
    try:
        _rewritten(values, kept=kept, num_layers=num_layers, model_type=config["model_type"])
    except (UnsupportedArchitectureError, UnsupportedFieldError):
        return False
    return True


def _rewritten(values: dict[str, Any], **cut: Any) -> dict[str, Any]:
    """Call `config_fields.rewritten`, whose rules assume that every field has a sensible value."""
    try:
        return fields.rewritten(values, **cut)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UnsupportedFieldError(
            f"{cut['model_type']}: a field about layers has an invalid value: {error!r}"[:200],
            hint="the configuration is damaged; download it again",
        ) from error


def _path_and_count(config: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """Return the path to the decoder's fields and its number of layers."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UnsupportedArchitectureError(
            "config.json names no model_type", hint="only models that transformers knows can be pruned"
        )
    if config.get("is_encoder_decoder"):
        raise UnsupportedArchitectureError(
            f"{model_type} is an encoder-decoder", hint="only decoder-only language models can be pruned"
        )
    nested = [name for name in fields.NESTED if isinstance(config.get(name), dict)]
    path = (nested[0],) if nested else ()
    counts = [value for name in fields.COUNTS if isinstance(value := _at(config, path).get(name), int)]
    if counts:
        return path, counts[0]
    return path, num_layers_of(text_config(config))


def _at(config: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for name in path:
        config = config[name]
    return config


def num_weights(tensor: TensorInfo, config: Mapping[str, Any]) -> int:
    """Return how many parameters of the model a stored tensor holds."""
    settings = packing(config)
    if not settings:
        return tensor.num_elements
    if BESIDE.search(tensor.name):
        return 0
    bits = settings.get("bits") if isinstance(settings, Mapping) else None
    each = DTYPE_BITS[tensor.dtype] // (bits if bits in (2, 4, 8) else 4) if tensor.dtype in WORDS else 1
    return tensor.num_elements * each


def sizes_of(config: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> Sizes:
    """Count a model from its config.json and its headers.

    Raises:
        UnsupportedArchitectureError: The model is not a decoder, or has no single stack of layers.
        CheckpointError: The weights do not match the configuration.
        ModelError: The size of the vocabulary is unknown.
    """
    stack = locate(config, tensors)
    _check_weights(config, tensors, stack)
    layers = _by_layer(tensors, stack)
    types: Counter[str] = Counter()
    for tensor in tensors.values():
        types[tensor.dtype] += tensor.num_elements
    (most, _), *_ = types.most_common(1)
    return Sizes(
        num_parameters=max(1, sum(num_weights(t, config) for t in tensors.values())),
        layer_parameters=tuple(sum(num_weights(t, config) for t in layer) for layer in layers),
        layer_bytes=tuple(sum(t.size_bytes for t in layer) for layer in layers),
        vocab_size=_vocab_size(config),
        dtype=DTYPES.get(most, most.lower()),
    )


def _by_layer(tensors: Mapping[str, TensorInfo], stack: DecoderStack) -> list[list[TensorInfo]]:
    """Return the tensors of each decoder layer."""
    prefix, num_layers = stack.tensor_prefix, stack.num_layers
    if num_layers > MAX_LAYERS:
        raise CheckpointError(
            f"{CONFIG} says {num_layers:,} layers; no model has more than {MAX_LAYERS:,}", hint=UNTRUSTED
        )
    layers: dict[str, list[TensorInfo]] = {str(index): [] for index in range(num_layers)}
    for name, tensor in tensors.items():
        index, dot, _ = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and dot and index in layers:
            layers[index].append(tensor)
    return list(layers.values())


def _check_weights(config: dict[str, Any], tensors: Mapping[str, TensorInfo], stack: DecoderStack) -> None:
    """Refuse weights that do not match the configuration: more layers, or embeddings of another width."""
    prefix, num_layers = stack.tensor_prefix, stack.num_layers
    part = config.get("text_config") or config
    found = {name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)}
    numbers = [int(index) for index in found if re.fullmatch("[0-9]{1,9}", index)]
    on_disk = 1 + max(numbers, default=-1)
    if on_disk > num_layers + (part.get("num_nextn_predict_layers") or 0):
        raise CheckpointError(
            f"the weights have {on_disk} layers, {CONFIG} says {num_layers}",
            hint="they belong to two different models; download both again",
        )
    width = part.get("word_embed_proj_dim") or part.get("hidden_size")  # OPT's embedding may be narrower
    name = f"{prefix.removesuffix('layers.')}embed_tokens.weight"
    tensor = tensors.get(name)
    # Packed weights are narrower than the model.
    if tensor and width and tensor.dtype in ("BF16", "F16", "F32") and tensor.shape[-1:] != (width,):
        raise CheckpointError(
            f"{name} has shape {list(tensor.shape)}, {CONFIG} says hidden_size {width}",
            hint="they belong to two different models; download both again",
        )


def _vocab_size(config: Mapping[str, Any]) -> int:
    if (stated := fields.vocab_size(config)) is not None:
        return stated
    size = getattr(text_config(dict(config)), "vocab_size", None)
    if isinstance(size, int):
        return size
    raise ModelError(f"{CONFIG} has no vocab_size", hint="give a text model that transformers can load")
