"""What configuration fields mean, by name: counts, per-layer lists, layer numbers, thresholds, periods."""

# Number of decoder layers, in the order of preference.
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

# Lists with one entry a layer.
PER_LAYER = frozenset(
    {
        "activation_sparsity_pattern",
        "attention_layers",
        "attn_layers",
        "indexer_types",
        "intermediate_size",
        "layer_rope_theta",
        "layer_types",
        "layers_block_type",
        "mlp_layer_types",
        "no_rope_layers",
        "num_attention_heads_per_layer",
    }
)
# Lists that may have as many entries as there are layers, by accident.
NOT_PER_LAYER = frozenset(
    {
        "architectures",
        "axial_pos_embds_dim",
        "axial_pos_shape",
        "block_types",
        "bos_token_id",
        "eos_token_id",
        "mlp_multipliers",
        "mtp_layer_types",
        "mtp_layers_block_type",
        "mtp_mlp_layer_types",
        "pad_token_id",
        "ssm_multipliers",
        "time_step_limit",
    }
)
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
        "ple_layer_ids",
    }
)
# Layers below the value differ from those at or above it.
THRESHOLDS = frozenset(
    {"first_k_dense_replace", "max_window_layers", "moe_layer_start_index", "num_dense_layers"}
)
# Every so many layers one is of another kind; nothing to rewrite, the kept layers must still follow it.
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
# Words in a tensor's or module's name that mark a stack which is not the decoder.
TOWERS = ("vision", "visual", "audio", "image", "speech")
# Names under which models keep their list of layers.
STACKS = frozenset({"layers", "h", "layer", "blocks", "block"})
# Attributes in which a module keeps its layer's number.
INDEX_ATTRIBUTES = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number"})
