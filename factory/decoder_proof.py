"""The proof that a pruned configuration is right: both models built without weights, layer by layer."""

import copy
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from factory import decoder_fields as fields
from factory.errors import UnsupportedArchitectureError, UnsupportedFieldError

if TYPE_CHECKING:
    from torch.nn import Module, ModuleList


def full_config(config: dict[str, Any]) -> Any:
    """The config class of transformers for a config.json.

    Raises:
        UnsupportedArchitectureError: transformers does not know the model type.
        UnsupportedFieldError: It refuses the configuration.
    """
    import transformers

    model_type = str(config.get("model_type"))
    try:
        config_class = transformers.CONFIG_MAPPING[model_type]
    except KeyError:
        need = "needs custom code" if "auto_map" in config else "is not known"
        raise UnsupportedArchitectureError(
            f"{model_type} {need} to transformers {transformers.__version__}",
            hint="a newer transformers may know it; code from model repositories is not run",
        ) from None
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    try:
        return config_class.from_dict(copy.deepcopy(plain))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnsupportedFieldError(
            f"transformers refuses the configuration of {model_type}: {str(error).strip().splitlines()[-1]}",
            hint="the kept layers cannot be described by this model type",
        ) from error


def text_config(config: dict[str, Any]) -> Any:
    """The decoder's part of `full_config`, with all defaults filled in."""
    whole = full_config(config)
    if whole.is_encoder_decoder:
        raise UnsupportedArchitectureError(
            f"{config['model_type']} is an encoder-decoder",
            hint="only decoder-only language models can be pruned",
        )
    return whole.get_text_config(decoder=True)


def verify_structure(config: dict[str, Any], pruned_config: dict[str, Any], kept: Sequence[int]) -> None:
    """See `factory.decoder.verify_structure`."""
    old, new = _build(config), _build(pruned_config)
    old_path, old_layers = find_layers(old)
    new_path, new_layers = find_layers(new)
    model_type = config["model_type"]
    if old_path != new_path or len(new_layers) != len(kept):
        raise UnsupportedFieldError(
            f"{model_type}: {len(new_layers)} layers at {new_path} instead of {len(kept)} at {old_path}",
            hint=_suspects(config),
        )
    for position, layer in enumerate(kept):
        before = _signature(old_layers[layer], index=layer)
        after = _signature(new_layers[position], index=position)
        _compare(before, after, where=f"{model_type}: layer {layer} as layer {position}", config=config)
    outside = [
        {
            name: tuple(tensor.shape)
            for name, tensor in model.state_dict().items()
            if not name.startswith(old_path)
        }
        for model in (old, new)
    ]
    _compare(*outside, where=f"{model_type}: beside the layers,", config=config)


def find_layers(model: Any) -> tuple[str, "ModuleList"]:
    """Name and module of the decoder's list of layers.

    Raises:
        UnsupportedArchitectureError: No single list of the configured length.
    """
    from torch.nn import ModuleList

    from factory.decoder import _count_name, _only_decoder, _values_of

    values = _values_of(model.config.get_text_config(decoder=True))
    num_layers = values[_count_name(values)]
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ModuleList)
        and len(module) == num_layers
        and not any(part.isdigit() for part in name.split("."))
    }
    name = _only_decoder(list(lists), model_type=model.config.model_type, num_layers=num_layers)
    return name, lists[name]


def _build(config: dict[str, Any]) -> Any:
    """The causal language model of a config.json, on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    whole = full_config(config)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(whole, attn_implementation="eager")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedArchitectureError(
            f"transformers cannot build {config['model_type']} as a causal language model: {reason}",
            hint="only decoder-only language models can be pruned",
        ) from error


def _signature(layer: "Module", *, index: int) -> dict[str, Any]:
    """What a layer is: classes, shapes, plain attributes; its own number stands as True if right."""
    found: dict[str, Any] = {}
    for path, module in layer.named_modules():
        found[f"{path}:class"] = type(module).__qualname__
        for name, value in vars(module).items():
            if name in fields.INDEX_ATTRIBUTES:
                found[f"{path}.{name}"] = value == index
            elif not name.startswith("_") and name != "training" and _is_plain(value):
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
    for name in before.keys() | after.keys():
        if before.get(name) != after.get(name):
            raise UnsupportedFieldError(
                f"{where} would have {name.lstrip('.:')} {after.get(name)} instead of {before.get(name)}",
                hint=_suspects(config),
            )


def _suspects(config: dict[str, Any]) -> str:
    """Names the fields that cannot be rewritten and that this configuration has."""
    decoder = next((config[name] for name in fields.NESTED if isinstance(config.get(name), dict)), config)
    found = sorted(name for name in decoder if name in fields.PERIODS)
    if found:
        return f"the kept layers must still follow {', '.join(found)}"
    return "this model type cannot describe the kept layers"
