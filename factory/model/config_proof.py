"""Prove that a pruned configuration is right, by comparing both models, built without weights, by layer."""

import functools
import inspect
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from factory.errors import CheckpointError, UnsupportedArchitectureError, UnsupportedFieldError
from factory.model import config_fields as fields

if TYPE_CHECKING:
    from torch.nn import Module, ModuleList

# Errors that transformers' classes raise on unexpected values.
CONFIG_ERRORS = (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError)
# Settings that can make transformers fetch and run a kernel from any repository.
KERNELS = ("attn_implementation", "experts_implementation")
MAX_MADE_UP = 1.5  # described per stored parameter, to allow for a head that is tied silently
MAX_PACKED = 16  # the same, for packed weights
MAX_LABELS = 100_000


def full_config(config: dict[str, Any]) -> Any:
    """Load a config.json with transformers' configuration class.

    Raises:
        UnsupportedArchitectureError: transformers does not know the model type.
        UnsupportedFieldError: transformers refuses the configuration.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    model_type = str(config.get("model_type"))
    _check_sources(config)
    try:
        config_class = transformers.CONFIG_MAPPING[model_type]
    except KeyError:
        need = "needs custom code" if "auto_map" in config else "is not known"
        raise UnsupportedArchitectureError(
            f"{model_type} {need} to transformers {transformers.__version__}",
            hint="try a newer transformers; code from model repositories is not run",
        ) from None
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    try:
        return config_class.from_dict(_decode_floats(plain))
    except (*CONFIG_ERRORS, StrictDataclassError) as error:
        raise UnsupportedFieldError(
            f"transformers refuses the configuration of {model_type}: {_last_line(error)}",
            hint="the model's own config.json is wrong: correct it, or download it again",
        ) from error


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[-1].strip()


def _check_sources(config: dict[str, Any]) -> None:
    """Refuse a configuration that names code on the Hub or unchecked weights, or would fill the memory."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in (*KERNELS, *(f"_{name}" for name in KERNELS)):
            if "/" in str(part.get(name)):
                raise UnsupportedFieldError(
                    f"{name} = {str(part[name])[:80]!r} asks for a kernel from the Hub",
                    hint="remove it from config.json; code from repositories is not run",
                )
        labels = part.get("num_labels")
        if isinstance(labels, int) and labels > MAX_LABELS:  # transformers creates a name for each
            raise UnsupportedFieldError(
                f"num_labels = {str(labels)[:40]} is too large", hint="remove it from config.json"
            )
        if part.get("transformers_weights"):
            raise UnsupportedFieldError(
                f"transformers_weights = {str(part['transformers_weights'])[:80]!r} names other weights",
                hint="remove it from config.json if model.safetensors holds the model",
            )


def _decode_floats(value: Any) -> Any:
    """Return a copy with the tagged floats that transformers writes ({"__float__": "Infinity"}) decoded."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {name: _decode_floats(inner) for name, inner in value.items()}
    return [_decode_floats(inner) for inner in value] if isinstance(value, list) else value


def text_config(config: dict[str, Any]) -> Any:
    """Return the decoder's part of `full_config`, with all defaults filled in."""
    if reason := fields.UNPROVEN.get(config["model_type"]):
        raise UnsupportedArchitectureError(
            f"{config['model_type']}: {reason}", hint="a cut of this model type cannot be proved right"
        )
    whole = full_config(config)
    if whole.is_encoder_decoder:
        raise UnsupportedArchitectureError(
            f"{config['model_type']} is an encoder-decoder",
            hint="only decoder-only language models can be pruned",
        )
    text = whole.get_text_config(decoder=True)
    if not hasattr(text, "to_dict"):
        raise UnsupportedArchitectureError(
            f"{config['model_type']} has no nested text configuration, but config.json contains one",
            hint="the configuration is damaged; download it again",
        )
    return text


def values_of(config: Any) -> dict[str, Any]:
    """Return the fields of a configuration with defaults filled in, without nested configurations."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if not isinstance(value, dict) or name == "per_layer_config"
    }


def num_layers_of(config: Any) -> int:
    """Return the number of decoder layers of a configuration.

    Raises:
        UnsupportedArchitectureError: The configuration does not say.
    """
    values = values_of(config)
    counts = [values[name] for name in fields.COUNTS if isinstance(values.get(name), int)]
    # Some classes count the entries of a list instead.
    count = counts[0] if counts else getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int):
        raise UnsupportedArchitectureError(
            f"{config.model_type} does not say how many layers it has", hint="it has no decoder stack"
        )
    return count


def check_decoder(config: dict[str, Any], *, num_parameters: int) -> None:
    """Refuse early, whatever the cut, a model that transformers cannot build as a decoder.

    Args:
        config: Contents of config.json.
        num_parameters: Parameter count of the stored weights; a much larger configuration is refused, since
            loading would invent the missing ones, however many.

    Raises:
        UnsupportedArchitectureError: transformers cannot build the model as a decoder.
        CheckpointError: The configuration describes a model much larger than the weights.
    """
    model = on_meta(config)
    described = int(model.num_parameters())
    maximum = MAX_PACKED if fields.packing(config) else MAX_MADE_UP
    if described > maximum * num_parameters:
        raise CheckpointError(
            f"config.json describes {described:,} parameters, the weights hold {num_parameters:,}",
            hint="they belong to two different models; download both again",
        )
    _, layers = find_layers(model)
    _check_causal(layers[0], model_type=config["model_type"])


def verify_structure(config: dict[str, Any], pruned_config: dict[str, Any], kept: Sequence[int]) -> None:
    """Prove that each kept layer of the pruned configuration is built as in the original one.

    Raises:
        UnsupportedArchitectureError: transformers cannot build the model.
        UnsupportedFieldError: A layer, or a part outside the layers, is built differently.
    """
    old = on_meta(config)
    try:
        new = on_meta(pruned_config)
    except (UnsupportedArchitectureError, UnsupportedFieldError) as error:
        raise UnsupportedFieldError(
            f"without the dropped layers, {error.message}",
            hint="the kept layers cannot be described by this model type",
        ) from error
    old_path, old_layers = find_layers(old)
    new_path, new_layers = find_layers(new)
    model_type = config["model_type"]
    if old_path != new_path or len(new_layers) != len(kept):
        raise UnsupportedFieldError(
            f"{model_type}: {len(new_layers)} layers at {new_path} instead of {len(kept)} at {old_path}",
            hint=_suspects(config),
        )
    _check_causal(old_layers[0], model_type=model_type)
    if list(kept) != list(range(len(kept))):
        _check_arithmetic(old_layers, model_type=model_type)
    stride = fields.NUMBERS_A_LAYER.get(model_type, 1)
    new_numbers = {old_number: number for number, old_number in enumerate(kept)}
    for position, layer in enumerate(kept):
        before = _signature(old_layers[layer], number=layer, stride=stride, renumbered=new_numbers)
        after = _signature(new_layers[position], number=position, stride=stride, renumbered=None)
        _compare(before, after, where=f"{model_type}: layer {layer} as layer {position}", config=config)
    _compare(
        *(_shapes(model, without=old_path) for model in (old, new)),
        where=f"{model_type}: outside the layers, the model",
        config=config,
    )
    _check_shared_weights(old_layers, new_layers, kept=kept, model_type=model_type)


def _shapes(model: "Module", *, without: str) -> dict[str, Any]:
    """Return the shapes of the weights outside the decoder's layers."""
    return {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not name.startswith(f"{without}.")
    }


def _check_causal(layer: "Module", *, model_type: str) -> None:
    """Refuse encoders: they load as causal language models but attend to later tokens."""
    if any(getattr(module, "is_decoder", None) is False for module in layer.modules()):
        raise UnsupportedArchitectureError(
            f"{model_type}: is_decoder is false, so this is an encoder",
            hint="only decoder-only language models can be pruned",
        )


def _check_arithmetic(layers: "ModuleList", *, model_type: str) -> None:
    """Refuse layers that compute with their number when they run.

    Results of a constructor are among the compared attributes and shapes; those of other methods are not.
    """
    classes = {type(module) for layer in layers for module in layer.modules()}
    for cls in sorted(classes, key=lambda cls: cls.__qualname__):
        for name, function in vars(cls).items():
            if not cls.__module__.startswith("transformers.") or not inspect.isfunction(function):
                continue
            code = re.sub(r"#.*", "", inspect.getsource(function))
            if name != "__init__" and fields.ARITHMETIC.search(code):
                raise UnsupportedFieldError(
                    f"{model_type}: {cls.__qualname__}.{name} computes with the number of its layer",
                    hint="only layers at the end can be dropped",
                )


def _check_shared_weights(
    old: "ModuleList", new: "ModuleList", *, kept: Sequence[int], model_type: str
) -> None:
    """Check that layers still share the same weights, and that the layer that stores them is kept."""
    shared = _shared_weights(old, numbers=range(len(old)))
    for layers in shared:
        if len(layers & set(kept)) and min(layers) not in kept:
            raise UnsupportedFieldError(
                f"{model_type}: layers {sorted(layers)} share the weights of layer {min(layers)}",
                hint=f"keep layer {min(layers)}",
            )
    before = {group for layers in shared if len(group := layers & set(kept)) > 1}
    if before != _shared_weights(new, numbers=kept):
        raise UnsupportedFieldError(
            f"{model_type}: other layers than {sorted(map(sorted, before))} would share weights",
            hint="keep all layers that share weights, or one of each group",
        )


def _shared_weights(layers: "ModuleList", *, numbers: Sequence[int]) -> set[frozenset[int]]:
    """Return the sets of layers with a common weight; `numbers` are the layers' numbers."""
    users: dict[int, set[int]] = {}
    for number, layer in zip(numbers, layers, strict=True):
        for tensor in layer.parameters():
            users.setdefault(id(tensor), set()).add(number)
    return {frozenset(group) for group in users.values() if len(group) > 1}


def find_layers(model: Any) -> tuple[str, "ModuleList"]:
    """Return the name and module of the decoder's list of layers.

    Raises:
        UnsupportedArchitectureError: There is no single list of the configured length.
    """
    from torch.nn import ModuleList

    num_layers = num_layers_of(model.config.get_text_config(decoder=True))
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ModuleList)
        and len(module) == num_layers
        and not any(part.isdigit() for part in name.split("."))
    }
    name = fields.only_decoder(list(lists), model_type=model.config.model_type, num_layers=num_layers)
    return name, lists[name]


def on_meta(config: dict[str, Any]) -> Any:
    """Build the causal language model of a config.json on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM, __version__

    whole = full_config(config)
    if type(whole) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedArchitectureError(
            f"{config['model_type']} is not among the causal language models of transformers {__version__}",
            hint="a multimodal model can be pruned only if transformers can load its text part alone",
        )
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(whole, attn_implementation="eager")
    except (*CONFIG_ERRORS, ImportError, RuntimeError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedArchitectureError(
            f"transformers cannot build {config['model_type']} as a causal language model: {reason}",
            hint="the model's own config.json is wrong, or it is not a decoder-only language model",
        ) from error


def _signature(
    layer: "Module", *, number: int, stride: int, renumbered: dict[int, int] | None
) -> dict[str, Any]:
    """Describe a layer by its classes, shapes and plain attributes, with numbers relative to its own.

    Args:
        number: 0-based number of the layer in its model.
        stride: How many numbers the parts of a layer take.
        renumbered: Old → new number of each kept layer, for layers of the original model; otherwise None.
    """
    found: dict[str, Any] = {}
    for path, module in layer.named_modules():
        found[f"{path}:class"] = type(module).__qualname__
        for name, value in vars(module).items():
            if name.startswith("_") or name == "training" or name in fields.UNREAD_ATTRIBUTES:
                continue
            if name in fields.PER_LAYER and isinstance(value, list | tuple):
                continue  # the list of all layers, of which this one reads its entry
            if name in fields.INDEX_ATTRIBUTES and isinstance(value, int) and value >= 0:
                value -= number * (stride if path else 1)
            elif name in fields.INDEX_LISTS and renumbered is not None:
                value = [renumbered[layer] for layer in value if layer in renumbered]
            if _is_plain(value):
                found[f"{path}.{name}"] = value
            elif callable(value) and not isinstance(value, functools.partial):
                found[f"{path}.{name}"] = getattr(value, "__qualname__", type(value).__qualname__)
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        found[name] = tuple(tensor.shape)
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _compare(before: dict[str, Any], after: dict[str, Any], *, where: str, config: dict[str, Any]) -> None:
    for name in sorted(before.keys() | after.keys()):
        if not _is_same(before.get(name), after.get(name)):
            raise UnsupportedFieldError(
                f"{where} would have {name.lstrip('.:')} {after.get(name)} instead of {before.get(name)}",
                hint=_suspects(config),
            )


def _is_same(before: Any, after: Any) -> bool:
    """Return whether two values are equal, allowing for rounding in floats."""
    if isinstance(before, float) and isinstance(after, float):
        return math.isclose(before, after, rel_tol=1e-12)
    return bool(before == after)


def _suspects(config: dict[str, Any]) -> str:
    """Return a hint that names this configuration's fields that cannot be rewritten."""
    decoder = next((config[name] for name in fields.NESTED if isinstance(config.get(name), dict)), config)
    found = sorted(name for name in decoder if name in fields.PERIODS)
    if found:
        return f"the kept layers must still follow {', '.join(found)}"
    return "its layers depend on their position, and no setting preserves them in another one"
