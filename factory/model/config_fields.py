"""Classify configuration fields by name, and rewrite each kind when layers are removed."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from factory.errors import UnsupportedArchitectureError, UnsupportedFieldError

# Number of decoder layers; the first one in a configuration counts, others must agree with it.
COUNTS = (
    "decoder_layers",
    "num_decoder_layers",
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_blocks",
    "num_layers",
)
# Where a multimodal configuration keeps the decoder's fields.
NESTED = ("text_config", "language_config", "llm_config", "decoder")
# One entry per layer: lists, or strings with one letter per layer.
PER_LAYER = frozenset(
    {
        "activation_sparsity_pattern",
        "attention_layers",
        "attn_layers",
        "attn_type_list",
        "compress_ratios",
        "hybrid_layer_pattern",
        "hybrid_override_pattern",
        "index_topk_pattern",
        "indexer_types",
        "intermediate_size",
        "layer_rope_theta",
        "layer_types",
        "layers_block_type",
        "mlp_layer_types",
        "moe_intermediate_size",
        "moe_layer_freq",
        "moe_topk",
        "no_rope_layers",
        "num_attention_heads",
        "num_attention_heads_per_layer",
        "num_experts",
        "num_key_value_heads",
        "num_shared_expert",
        "sparse_attention_freq",
    }
)
# Lists that may happen to have as many entries as there are layers.
NOT_PER_LAYER = frozenset(
    {
        "architectures",
        "axial_norm_std",
        "axial_pos_embds_dim",
        "axial_pos_shape",
        "begin_suppress_tokens",
        "bos_token_id",
        "encoder_hash_byte_group_size",
        "eos_token_id",
        "keys_to_ignore_at_inference",
        "langs",
        "languages",
        "lsh_attn_chunk_length",
        "mlp_multipliers",
        "mtp_layer_types",
        "mtp_layers_block_type",
        "mtp_local_layer_ids",
        "mtp_mlp_layer_types",
        "num_buckets",
        "pad_token_id",
        "ssm_multipliers",
        "suppress_tokens",
        "time_step_limit",
    }
)
# Patterns that are repeated until there are enough layers.
CYCLES = frozenset({"block_types"})
# Lists of 0-based layer numbers.
LAYER_NUMBERS = frozenset(
    {
        "attn_layer_indices",
        "cross_attention_layers",
        "full_attn_idxs",
        "hybrid_layer_ids",
        "local_layer_ids",
        "mlp_only_layers",
        "moe_layers",
    }
)
# Lists of 1-based layer numbers.
LAYER_ORDINALS = frozenset({"full_attn_layers", "kda_layers"})
# Layers below the value differ from those at or above it.
THRESHOLDS = frozenset(
    {
        "dense_mlp_idx",
        "first_k_dense_replace",
        "max_window_layers",
        "moe_layer_start_index",
        "num_dense_layers",
        "num_hash_layers",
    }
)
# Layers up to and including the value differ from those above it; negative numbers count from the end.
LAST_OF_KIND = frozenset({"moe_layer_end_index"})
# Multiplied by 1/sqrt(number of layers) in every layer.
OVER_SQRT_OF_COUNT = frozenset({"scale_depth"})
# One in so many layers is of another kind; not rewritten: the kept layers must still follow the period.
PERIODS = frozenset(
    {
        "attn_layer_offset",
        "attn_layer_period",
        "decoder_sparse_step",
        "expert_layer_offset",
        "expert_layer_period",
        "full_attention_interval",
        "global_attn_every_n_layers",
        "interleave_moe_layer_step",
        "layer_group_size",
        "moe_layer_freq",
        "moe_layer_interval",
        "no_rope_layer_interval",
        "sliding_window_pattern",
    }
)
# Fields that, if set, cannot be right once any layer is missing.
INSEPARABLE = {
    "hidden_size_per_layer_input": "the embeddings of all layers are in one table",
    "n_layers_per_attn_res_block": "layers read the sums of all blocks of layers before them",
    "num_layers_per_stack": "stacks of layers are run several times",
    "ple_layer_ids": "embeddings depend on the numbers of their layers",
}
# Types whose layers are not a chain of functions of the hidden states.
UNPROVEN = {"reformer": "its layers are reversible and pass on two streams"}
# Words in a tensor's or module's name that mark a stack other than the decoder.
TOWERS = ("vision", "visual", "audio", "image", "speech")
# Names of lists of layers.
STACKS = frozenset({"layers", "h", "layer", "blocks", "block"})
# Attributes that hold the number of a module's layer.
INDEX_ATTRIBUTES = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number"})
# Attributes that hold the numbers of several layers.
INDEX_LISTS = frozenset({"layer_block_map"})
# Attributes that no layer of the pruned model reads. From transformers 5.24 on, Gemma 4 keeps the keys and
# values of the last layer of each type even if no layer shares them, for an assistant model beside it; where
# layers do share them, `_kv_sharing` checks that they still read the same ones.
UNREAD_ATTRIBUTES = frozenset({"store_full_length_kv"})
# How many numbers the parts of a layer take in the cache, if not one.
NUMBERS_A_LAYER = {"longcat_flash": 2}
# Code that computes with the number of a layer.
ARITHMETIC = re.compile(
    r"layer_(?:idx|id|index|number)\s*(?:[-+*/%]|//)\s"
    r"|(?:[-+*/%]|//)\s*(?:float\()?(?:self\.)?layer_(?:idx|id|index|number)\b"
)
# Nested groups of fields, some of them about layers.
GROUPS = frozenset({"linear_attn_config", "sparse_attention_config"})
# Nested groups whose lists are not about layers.
OTHER_GROUPS = re.compile(
    r"rope|quantization|compression|auto_map|task_specific|2label|label2|^per_layer_config$"
)
# Names in a tower, or in a module of multi-token prediction that numbers its layers separately.
OTHER_STACK = re.compile(rf"{'|'.join(TOWERS)}|(?:^|\.)mtp\.")
# Patterns (re:… of compressed-tensors, -:… and +:… of GPTQ) that seem to choose layers by number.
NUMBER_IN_PATTERN = re.compile(r"layers.*\d|^(?:re|[-+]):.*\.[(\[]*(?:\?:)?\d")
LAYER_IN_NAME = re.compile(r"^(.*\b(?:layers|layer|h|blocks|block)\.)(\d+)(\b.*)$")


def vocab_size(config: Mapping[str, Any]) -> int | None:
    """Return the vocabulary size in config.json; None if it is left to the configuration class."""
    parts = (config, config.get("text_config") or {})
    return next((part["vocab_size"] for part in parts if isinstance(part.get("vocab_size"), int)), None)


def packing(config: Mapping[str, Any]) -> Any:
    """Return the settings of packed weights in config.json; None if they are not packed."""
    parts = (config, *(config.get(name) for name in NESTED))
    found = (part.get("quantization_config") for part in parts if isinstance(part, Mapping))
    return next((settings for settings in found if settings), None)


def packing_method(config: Mapping[str, Any]) -> str:
    """Return the name of the packing method: "gptq"."""
    settings = packing(config)
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    return str(method or "quantised")


def rewritten(
    values: Mapping[str, Any], *, kept: Sequence[int], num_layers: int, model_type: str
) -> dict[str, Any]:
    """Return new values of the fields that change when only some layers are kept.

    Args:
        values: The decoder's fields, with the defaults of its class.
        kept: 0-based numbers of the kept layers, ascending.
        num_layers: Number of layers before.

    Raises:
        UnsupportedFieldError: A field cannot be right for the kept layers, or is unknown.
    """
    changed: dict[str, Any] = {name: len(kept) for name in COUNTS if values.get(name) == num_layers}
    for name, value in values.items():
        if value and name in INSEPARABLE:
            raise UnsupportedFieldError(
                f"{model_type}: {name} = {value}: {INSEPARABLE[name]}",
                hint="none of its layers can be dropped",
            )
        if rule := _rule(name, value, num_layers=num_layers, model_type=model_type):
            changed[name] = rule(value, kept, num_layers)
        elif isinstance(value, dict) and name in GROUPS:
            inner = rewritten(value, kept=kept, num_layers=num_layers, model_type=model_type)
            changed[name] = {**value, **inner}
    if entries := values.get("per_layer_config"):
        by_layer = {int(layer): entry for layer, entry in entries.items()}
        changed["per_layer_config"] = {
            str(new): by_layer[old] for new, old in enumerate(kept) if old in by_layer
        }
    if isinstance(values.get("attention_types"), list):  # gpt_neo: [[["global", "local"], 12]]
        layers = values["attention_layers"]
        changed["attention_types"] = [[[layers[layer]], 1] for layer in kept]
    changed |= _kv_sharing(values, kept=kept, num_layers=num_layers, model_type=model_type)
    _check_indexers(values, kept=kept, model_type=model_type)
    _check_attention(values, kept=kept, model_type=model_type)
    return changed


Rule = Callable[[Any, Sequence[int], int], Any]


def _rule(name: str, value: Any, *, num_layers: int, model_type: str) -> Rule | None:
    """Return the rule that rewrites a field; None if it does not change."""
    if name in NOT_PER_LAYER or name in GROUPS or isinstance(value, bool) or not value:
        return None
    if isinstance(value, int | float):
        return _of_number(name)
    if isinstance(value, str):
        return _entries if name in PER_LAYER and len(value) == num_layers else None
    if isinstance(value, dict) and not OTHER_GROUPS.search(name):
        for inner_name, inner in value.items():
            _refuse_if_long(f"{name}.{inner_name}", inner, num_layers=num_layers, model_type=model_type)
    if isinstance(value, list) and name in PER_LAYER and len(value) >= num_layers:
        return _entries
    for names, rule in ((LAYER_NUMBERS, _numbers), (LAYER_ORDINALS, _ordinals), (CYCLES, _cycle)):
        if name in names:
            return rule
    _refuse_if_long(name, value, num_layers=num_layers, model_type=model_type)
    return None


def _refuse_if_long(name: str, value: Any, *, num_layers: int, model_type: str) -> None:
    """Refuse a list whose length or name suggests that it is about layers."""
    if not isinstance(value, list):
        return
    named = re.search(r"layers|layer_?id|layer_?ind|_idxs", name) and all(
        isinstance(item, int) for item in value
    )
    if len(value) == num_layers or named:
        raise UnsupportedFieldError(
            f"{model_type}: {name} has {len(value)} entries that may be about layers",
            hint="this field is unknown, and its meaning is not guessed",
        )


def _of_number(name: str) -> Rule | None:
    if name in THRESHOLDS:
        return lambda value, kept, _: sum(layer < value for layer in kept)
    if name in LAST_OF_KIND:
        return lambda value, kept, num_layers: sum(layer <= value % num_layers for layer in kept) - 1
    if name in OVER_SQRT_OF_COUNT:
        return lambda value, kept, num_layers: value * math.sqrt(len(kept) / num_layers)
    return None


def _numbers(value: Any, kept: Sequence[int], _: int) -> Any:
    return [new for new, old in enumerate(kept) if old in value]


def _ordinals(value: Any, kept: Sequence[int], _: int) -> Any:
    return [new + 1 for new, old in enumerate(kept) if old + 1 in value]


def _cycle(value: Any, kept: Sequence[int], _: int) -> Any:
    return [value[layer % len(value)] for layer in kept]


def _entries(value: Any, kept: Sequence[int], num_layers: int) -> Any:
    """Keep the entries of kept layers, and those past the last layer, for multi-token prediction."""
    entries = [*(value[layer] for layer in kept), *value[num_layers:]]
    return "".join(entries) if isinstance(value, str) else entries


def _kv_sharing(
    values: Mapping[str, Any], *, kept: Sequence[int], num_layers: int, model_type: str
) -> dict[str, Any]:
    """Rewrite the number of last layers that reuse keys and values of an earlier layer (Gemma 3n, 4)."""
    num_shared = values.get("num_kv_shared_layers") or 0
    if not num_shared:
        return {}
    first_shared = num_layers - num_shared
    types = values.get("layer_types") or ["full_attention"] * num_layers
    for layer in kept:
        source = max((i for i in range(first_shared) if types[i] == types[layer]), default=None)
        if layer >= first_shared and source not in kept:
            where = "another model" if source is None else f"layer {source}"
            raise UnsupportedFieldError(
                f"{model_type}: num_kv_shared_layers = {num_shared}: layer {layer} reads the keys and "
                f"values of {where}",
                hint="it only runs together with that model" if source is None else f"keep layer {source}",
            )
    return {"num_kv_shared_layers": sum(layer >= first_shared for layer in kept)}


def _check_indexers(values: Mapping[str, Any], *, kept: Sequence[int], model_type: str) -> None:
    """Refuse to drop a "full" indexer whose choice a kept layer with a "shared" one uses (GLM DSA)."""
    types = values.get("indexer_types")
    if not isinstance(types, list):
        return
    for layer in kept:
        source = max((i for i in range(layer + 1) if types[i] != "shared"), default=None)
        if source not in kept:
            raise UnsupportedFieldError(
                f"{model_type}: indexer_types: layer {layer} uses the indexer of layer {source}",
                hint=f"keep layer {source}",
            )


def _check_attention(values: Mapping[str, Any], *, kept: Sequence[int], model_type: str) -> None:
    """Refuse a cut without attention layers: transformers counts the tokens in a cache by one of them."""
    for name in ("layer_types", "layers_block_type"):
        types = values.get(name)
        if not isinstance(types, list):
            continue
        before = [
            i for i, kind in enumerate(types) if re.search("attention|hybrid", kind) and "linear" not in kind
        ]
        if before and not set(before) & set(kept):
            raise UnsupportedFieldError(
                f"{model_type}: {name} would have no attention layer left", hint=f"keep one of {before}"
            )


def renumber_module_names(value: Any, *, kept: Sequence[int], num_layers: int) -> Any:
    """Renumber layers in names of modules, such as those that quantisation leaves out.

    Raises:
        UnsupportedFieldError: A pattern seems to choose layers by number.
    """
    new_index = {old: new for new, old in enumerate(kept)}
    new_index |= {old: old - num_layers + len(kept) for old in range(num_layers, num_layers + 16)}

    def renamed(name: Any) -> Any:
        if isinstance(name, str) and OTHER_STACK.search(name):
            return name
        match = LAYER_IN_NAME.match(name) if isinstance(name, str) else None
        if match:
            new = new_index.get(int(match[2]))
            return None if new is None else f"{match[1]}{new}{match[3]}"
        if isinstance(name, str) and NUMBER_IN_PATTERN.search(name):
            raise UnsupportedFieldError(
                f"quantization_config chooses layers by {name!r}", hint="this pattern cannot be renumbered"
            )
        return name

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {new: walk(inner) for old, inner in value.items() if (new := renamed(old)) is not None}
        if isinstance(value, list):
            return [new for old in value if (new := renamed(walk(old))) is not None]
        return value

    return walk(value)


def only_decoder(names: list[str], *, model_type: str, num_layers: int) -> str:
    """Return the decoder's name among those of lists of layers, with or without a final dot."""
    text = [name for name in names if not any(word in name for word in TOWERS)]
    usual = [name for name in text if name.rstrip(".").rpartition(".")[2] in STACKS]
    found = usual or text
    if len(found) != 1:
        listed = ", ".join(sorted(found)) or "none"
        raise UnsupportedArchitectureError(
            f"{model_type}: expected one stack of {num_layers} layers, found {listed}",
            hint="only models with a single stack of decoder layers can be pruned",
        )
    return found[0]


def read_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found
