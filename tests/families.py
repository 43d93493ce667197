"""Small decoders of many families, whose layers differ in what their family lets differ."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

TINY: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 64,
    "sliding_window": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE: dict[str, Any] = {**TINY, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
MLA: dict[str, Any] = {
    **MOE, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 8, "n_head": 4, "n_positions": 64, "vocab_size": 64}
HYBRID = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": TINY,
    "qwen2": {**TINY, "use_sliding_window": True, "max_window_layers": 4},
    "qwen3": TINY,
    "gemma2": TINY,
    "gemma3_text": TINY,
    "smollm3": TINY,
    "gpt2": GPT2,
    "gpt_neo": {
        "hidden_size": 32, "num_layers": 8, "num_heads": 4, "vocab_size": 64, "window_size": 4,
        "attention_types": [[["global", "local"], 4]], "max_position_embeddings": 64,
    },
    "gpt_neox": TINY,
    "phi3": TINY,
    "qwen3_moe": {**MOE, "num_experts": 4, "mlp_only_layers": [2, 6]},
    "deepseek_v3": {**MLA, "first_k_dense_replace": 3},
    "glm4_moe": {**MOE, "n_routed_experts": 4, "first_k_dense_replace": 2},
    "minicpm3": {**MLA, "scale_depth": 1.4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 8, "vocab_size": 64},
    "bloom": {"hidden_size": 32, "n_layer": 8, "n_head": 4, "vocab_size": 64},
    "cohere2": {**TINY, "layer_types": HYBRID},
    "falcon": {
        "hidden_size": 32, "num_hidden_layers": 8, "num_attention_heads": 4, "num_kv_heads": 2,
        "new_decoder_architecture": True, "alibi": False, "vocab_size": 64,
    },
    "falcon_h1": {
        **TINY, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
        "mamba_chunk_size": 4,
    },
    "gemma": TINY,
    "gpt_oss": {**MOE, "num_local_experts": 4, "layer_types": HYBRID},
    "gptj": {**GPT2, "rotary_dim": 8},
    "granitemoehybrid": {
        **MOE, "num_local_experts": 4, "shared_intermediate_size": 32, "mamba_n_heads": 8, "mamba_d_head": 8,
        "mamba_d_state": 8, "mamba_chunk_size": 4,
        "layer_types": ["mamba", "mamba", "attention", "mamba"] * 2,
    },
    "jamba": {
        **TINY, "attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1,
        "expert_layer_offset": 0, "num_experts": 4, "num_experts_per_tok": 2,
    },
    "lfm2": {**TINY, "layer_types": ["conv", "conv", "full_attention", "conv"] * 2},
    "llama4_text": {
        **TINY, "intermediate_size_mlp": 48, "num_local_experts": 4, "interleave_moe_layer_step": 2,
        "attention_chunk_size": 4,
    },
    "mamba2": {
        "hidden_size": 32, "num_hidden_layers": 8, "vocab_size": 64, "num_heads": 8, "head_dim": 8,
        "expand": 2, "state_size": 8, "n_groups": 1, "chunk_size": 4,
    },
    "mistral": TINY,
    "mixtral": {**TINY, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mpt": {"d_model": 32, "n_layers": 8, "n_heads": 4, "vocab_size": 64, "max_seq_len": 64},
    "olmo2": TINY,
    "opt": {**TINY, "ffn_dim": 48, "word_embed_proj_dim": 16},
    "phi": TINY,
    "qwen3_next": {
        **MOE, "num_experts": 4, "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"] * 4,
    },
    "recurrent_gemma": {**TINY, "attention_window_size": 4, "lru_width": 32},
    "starcoder2": TINY,
}  # fmt: skip


def config_of(model_type: str, **fields: Any) -> dict[str, Any]:
    """A configuration as config.json holds it."""
    config = CONFIG_MAPPING[model_type](**{**FAMILIES.get(model_type, TINY), **fields})
    return {**config.to_dict(), "model_type": model_type}


def plain(model_type: str, **fields: Any) -> dict[str, Any]:
    """A configuration that leaves everything else to the defaults of its class."""
    return {"model_type": model_type, **TINY, **fields}


def build(config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    whole = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    model = AutoModelForCausalLM.from_config(whole, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the last digits of fp32: where a tensor lies may decide in which order sums are taken."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
