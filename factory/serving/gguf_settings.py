"""Map a model's config.json to the settings of a GGUF file, for the families whose mapping was tried."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from factory.errors import UnsupportedFieldError

if TYPE_CHECKING:
    from gguf import GGUFWriter

CONVERTER = "give llama.cpp's own converter with `converter`, or serve the model by transformers"
WINDOWED = "sliding_attention"


@dataclass(frozen=True)
class Family:
    """How llama.cpp computes a family, as far as the numbers in a file depend on it."""

    arch: str  # GGUF's name
    activation: str = "silu"  # the only one it has
    neighbours: bool = False  # RoPE turns neighbouring rows of queries and keys, not those half a head apart
    norm_offset: float = 0.0  # is added to the weights of norms
    rope_types: tuple[str, ...] = ("default",)
    windows: bool = False  # the file says which layers have a window
    soft_caps: bool = False


LINEAR, ALL = ("default", "linear", "yarn"), ("default", "linear", "yarn", "llama3")
FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", neighbours=True, rope_types=ALL),
    "mistral": Family("llama", neighbours=True, rope_types=ALL),
    "smollm3": Family("smollm3", neighbours=True, rope_types=ALL),
    "qwen2": Family("qwen2", rope_types=LINEAR),
    "qwen3": Family("qwen3", rope_types=LINEAR),
    "phi3": Family("phi3", rope_types=("default", "longrope")),
    "olmo2": Family("olmo2", rope_types=("default", "yarn")),
    "olmo3": Family("olmo2", rope_types=("default", "yarn"), windows=True),
    "gemma": Family("gemma", "gelu_pytorch_tanh", norm_offset=1.0),
    "gemma2": Family("gemma2", "gelu_pytorch_tanh", norm_offset=1.0, windows=True, soft_caps=True),
    "gemma3_text": Family(
        "gemma3", "gelu_pytorch_tanh", norm_offset=1.0, rope_types=("default", "linear"), windows=True
    ),
}


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the decoder's settings with the defaults of its class, nested ones included."""
    from factory.model.config_proof import text_config

    values: dict[str, Any] = text_config(dict(config)).to_dict()
    return values


def check_settings(family: Family, values: Mapping[str, Any], *, model_type: str) -> None:
    """Refuse settings that llama.cpp's code for this family has no place for.

    Raises:
        UnsupportedFieldError: Names the setting.
    """
    head_dim = _head_dim(values)
    rope_types = {one.get("rope_type", "default") for one in _ropes(values).values()}
    found = {
        "hidden_act": (values.get("hidden_activation") or values.get("hidden_act"), (family.activation,)),
        "query_pre_attn_scalar": (values.get("query_pre_attn_scalar", head_dim), (head_dim,)),
        "use_bidirectional_attention": (bool(values.get("use_bidirectional_attention")), (False,)),
        **{f"rope_type {name}": (name, family.rope_types) for name in sorted(rope_types)},
    }
    if not family.soft_caps:
        found["attn_logit_softcapping"] = (values.get("attn_logit_softcapping"), (None,))
    if model_type != "phi3":
        partial = [one.get("partial_rotary_factor", 1.0) for one in _ropes(values).values()]
        found["partial_rotary_factor"] = (max(partial, default=1.0), (1.0,))
    for field, (value, allowed) in found.items():
        if value not in allowed:
            shown = field if field.startswith("rope_type") else f"{field}={value!r}"
            raise UnsupportedFieldError(
                f"the GGUF of a {model_type} cannot be written with {shown}", hint=CONVERTER
            )


def add_settings(writer: "GGUFWriter", family: Family, values: Mapping[str, Any]) -> None:
    """Write the settings of the decoder.

    Args:
        values: As `settings_of` returns them, and `check_settings` accepts them.
    """
    num_heads, head_dim = values["num_attention_heads"], _head_dim(values)
    writer.add_vocab_size(values["vocab_size"])
    writer.add_context_length(values["max_position_embeddings"])
    writer.add_embedding_length(values["hidden_size"])
    writer.add_block_count(values["num_hidden_layers"])
    writer.add_feed_forward_length(values["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(values.get("num_key_value_heads") or num_heads)
    writer.add_layer_norm_rms_eps(values["rms_norm_eps"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    _add_rope(writer, values)
    _add_windows(writer, family, values)
    if family.soft_caps:
        writer.add_attn_logit_softcapping(values["attn_logit_softcapping"])
    if values.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(values["final_logit_softcapping"])


def _head_dim(values: Mapping[str, Any]) -> int:
    return int(values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"])


def _ropes(values: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the parameters of RoPE by kind of layer; of models with one kind, under "full_attention"."""
    found = values.get("rope_parameters") or {}
    nested = {kind: one for kind, one in found.items() if isinstance(one, Mapping)}
    return nested or {"full_attention": found}


def rope_of(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the parameters of RoPE in layers without a window."""
    return _ropes(values)["full_attention"]


def _add_rope(writer: "GGUFWriter", values: Mapping[str, Any]) -> None:
    import gguf

    ropes, rope = _ropes(values), rope_of(values)
    writer.add_rope_dimension_count(int(_head_dim(values) * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if WINDOWED in ropes:
        writer.add_rope_freq_base_swa(ropes[WINDOWED]["rope_theta"])
    named = "original_max_position_embeddings"
    original = int(rope.get(named) or values.get(named) or values["max_position_embeddings"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)
    if kind == "longrope":
        scale = values["max_position_embeddings"] / original
        grown = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        writer.add_rope_scaling_attn_factors(rope.get("attention_factor") or grown)
    if values["model_type"] == "phi3":  # llama.cpp asks for both of every Phi-3
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_sliding_window(values.get("sliding_window") or 0)


def _add_windows(writer: "GGUFWriter", family: Family, values: Mapping[str, Any]) -> None:
    """Write the window and, for each layer, whether it has one: without, llama.cpp counts layers."""
    if family.windows and values.get("sliding_window"):
        writer.add_sliding_window(values["sliding_window"])
        writer.add_sliding_window_pattern([kind == WINDOWED for kind in values["layer_types"]])
