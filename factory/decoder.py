"""Any decoder: where its layers live, which config fields are per layer, how to renumber them."""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from factory import decoder_fields as fields
from factory.errors import UnsupportedArchitectureError, UnsupportedFieldError

if TYPE_CHECKING:
    from torch.nn import ModuleList

FIRST_NUMBER = re.compile(r"^(|.*?\.)(\d+)\.")
LAYER_IN_NAME = re.compile(r"^(.*\b(?:layers|layer|h|blocks|block)\.)(\d+)(\b.*)$")


@dataclass(frozen=True)
class DecoderStack:
    """Where the decoder layers of a checkpoint are.

    Tensors of layer i start with f"{tensor_prefix}{i}."; `config_path` leads to the decoder's fields in
    config.json: () or ("text_config",).
    """

    model_type: str
    num_layers: int
    tensor_prefix: str
    config_path: tuple[str, ...]


def locate(config: dict[str, Any], tensor_names: Iterable[str]) -> DecoderStack:
    """Find the decoder stack of a checkpoint from its config.json and its tensor names.

    Args:
        config: config.json as it stands.
        tensor_names: Of the whole checkpoint.

    Raises:
        UnsupportedArchitectureError: An encoder-decoder, or no single stack of the configured size.
    """
    model_type = str(config.get("model_type", ""))
    path, num_layers = _path_and_count(config)
    indices: dict[str, set[int]] = {}
    for name in tensor_names:
        if match := FIRST_NUMBER.match(name):
            indices.setdefault(match[1], set()).add(int(match[2]))
    # Layers of multi-token prediction may be numbered on after the last decoder layer.
    whole = [prefix for prefix, found in indices.items() if found >= set(range(num_layers))]
    prefix = _only_decoder(whole, model_type=model_type, num_layers=num_layers)
    return DecoderStack(model_type, num_layers, prefix, path)


def renumber(name: str, *, stack: DecoderStack, kept_index: Mapping[int, int]) -> str | None:
    """Name of a tensor after pruning, None if its layer is dropped.

    Layers numbered past the last decoder layer (multi-token prediction) stay behind the last kept one.

    Args:
        kept_index: Old 0-based layer number to new one, for the layers that stay.
    """
    match = FIRST_NUMBER.match(name)
    if match is None or match[1] != stack.tensor_prefix:
        return name
    index = int(match[2])
    new = kept_index.get(index) if index < stack.num_layers else index - stack.num_layers + len(kept_index)
    return None if new is None else f"{match[1]}{new}.{name[match.end() :]}"


def prune_config(config: dict[str, Any], *, kept: Sequence[int]) -> dict[str, Any]:
    """config.json for the kept layers, proven by building both models without weights.

    Args:
        config: config.json as it stands.
        kept: 0-based layer numbers, ascending.

    Raises:
        UnsupportedArchitectureError: transformers does not know the model type, or it is no decoder.
        UnsupportedFieldError: A field would give a kept layer another kind, window or position encoding.
    """
    from factory.decoder_proof import text_config, verify_structure

    path, num_layers = _path_and_count(config)
    if not kept or list(kept) != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < num_layers:
        raise ValueError(f"kept layers {list(kept)} are not ascending numbers below {num_layers}")
    pruned = copy.deepcopy(config)
    target = _at(pruned, path)
    values = {**_values_of(text_config(config)), **target}
    for name, value in values.items():
        if name not in fields.NOT_PER_LAYER:
            _prune_field(target, name, value, kept=kept, num_layers=num_layers, config=config)
    _prune_kv_sharing(target, values, kept=kept, num_layers=num_layers, config=config)
    target[_count_name(values)] = len(kept)
    _renumber_module_names(pruned.get("quantization_config"), kept=kept)
    verify_structure(config, pruned, kept)
    return pruned


def verify_structure(config: dict[str, Any], pruned_config: dict[str, Any], kept: Sequence[int]) -> None:
    """Prove that each kept layer of the pruned configuration is built as in the original one.

    Raises:
        UnsupportedArchitectureError: transformers cannot build the model.
        UnsupportedFieldError: A layer, or something beside the layers, is built differently.
    """
    from factory.decoder_proof import verify_structure as verify

    verify(config, pruned_config, kept)


def decoder_layers(model: Any) -> "ModuleList":
    """The decoder's layers of a loaded causal language model, as the list that its forward walks.

    Raises:
        UnsupportedArchitectureError: No single list of the configured length.
    """
    from factory.decoder_proof import find_layers

    return find_layers(model)[1]


@contextmanager
def skip_layers(model: Any, dropped: Iterable[int]) -> Iterator[None]:
    """While active, the dropped layers of a loaded model hand on their input.

    They still run, so that what they return beside the hidden states keeps its form and the cache its
    length; only their output is replaced. Nothing of the surgery on disk is used, so the model serves as
    the reference for it.
    """
    layers = decoder_layers(model)
    handles = [layers[i].register_forward_hook(_hand_on, with_kwargs=True) for i in dropped]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hand_on(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook that puts the input's hidden states into the output."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _path_and_count(config: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """Where the decoder's fields are, and how many layers it has."""
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
    target = _at(config, path)
    if not any(isinstance(target.get(name), int) for name in fields.COUNTS):
        from factory.decoder_proof import text_config

        target = _values_of(text_config(config))
    return path, int(target[_count_name(target)])


def _count_name(values: Mapping[str, Any]) -> str:
    for name in fields.COUNTS:
        if isinstance(values.get(name), int):
            return name
    raise UnsupportedArchitectureError(
        f"{values.get('model_type')} does not say how many layers it has", hint="it has no decoder stack"
    )


def _at(config: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for name in path:
        config = config[name]
    return config


def _values_of(config: Any) -> dict[str, Any]:
    """Fields of a config class with its defaults filled in, without nested configurations."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if not isinstance(value, dict) or name == "per_layer_config"
    }


def _only_decoder(names: list[str], *, model_type: str, num_layers: int) -> str:
    """The decoder's among names of lists of layers, with or without a closing dot."""
    text = [name for name in names if not any(word in name for word in fields.TOWERS)]
    usual = [name for name in text if name.rstrip(".").rpartition(".")[2] in fields.STACKS]
    found = usual or text
    if len(found) != 1:
        listed = ", ".join(sorted(found)) or "none"
        raise UnsupportedArchitectureError(
            f"{model_type}: expected one stack of {num_layers} layers, found {listed}",
            hint="only models with a single stack of decoder layers can be pruned",
        )
    return found[0]


def _prune_field(
    target: dict[str, Any], name: str, value: Any, *, kept: Sequence[int], num_layers: int, config: Any
) -> None:
    """Rewrite one field for the kept layers, or refuse it."""
    if name == "per_layer_config" and value:
        by_layer = {int(layer): entry for layer, entry in value.items()}
        target[name] = {str(new): by_layer[old] for new, old in enumerate(kept) if old in by_layer}
    elif name in fields.LAYER_NUMBERS and isinstance(value, list):
        target[name] = [new for new, old in enumerate(kept) if old in value]
    elif name in fields.THRESHOLDS and isinstance(value, int):
        target[name] = sum(layer < value for layer in kept)
    elif isinstance(value, list) and len(value) == num_layers:
        if name not in fields.PER_LAYER:
            raise UnsupportedFieldError(
                f"{config['model_type']}: {name} has {num_layers} entries, perhaps one a layer",
                hint="this field is not known, so it is not guessed",
            )
        target[name] = [value[layer] for layer in kept]


def _prune_kv_sharing(
    target: dict[str, Any], values: Mapping[str, Any], *, kept: Sequence[int], num_layers: int, config: Any
) -> None:
    """The last `num_kv_shared_layers` layers read keys and values of the last earlier layer of their type."""
    num_shared = values.get("num_kv_shared_layers") or 0
    if not num_shared:
        return
    first_shared = num_layers - num_shared
    types = values.get("layer_types") or ["full_attention"] * num_layers
    for layer in kept:
        if layer < first_shared:
            continue
        sources = [i for i in range(first_shared) if types[i] == types[layer]]
        if not sources or sources[-1] not in kept:
            raise UnsupportedFieldError(
                f"{config['model_type']}: num_kv_shared_layers lets layer {layer} read the keys and values "
                f"of layer {sources[-1] if sources else 'none'}, which would be dropped",
                hint="keep that layer",
            )
    target["num_kv_shared_layers"] = sum(layer >= first_shared for layer in kept)


def _renumber_module_names(value: Any, *, kept: Sequence[int]) -> None:
    """Renumber layers in lists of module names, such as those that quantisation leaves out."""
    if isinstance(value, dict):
        for inner in value.values():
            _renumber_module_names(inner, kept=kept)
    elif isinstance(value, list):
        new_index = {old: new for new, old in enumerate(kept)}
        names = []
        for name in value:
            match = LAYER_IN_NAME.match(name) if isinstance(name, str) else None
            if match is None:
                names.append(name)
            elif int(match[2]) in new_index:
                names.append(f"{match[1]}{new_index[int(match[2])]}{match[3]}")
        value[:] = names
