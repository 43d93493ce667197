#!/usr/bin/env bash
# transformers reads a GGUF file without the scaling of its positions.
# One would guess: what the file says of RoPE (`rope.scaling.type` and `factor`, or the tensor rope_freqs.weight, in
# which llama.cpp's converter stores the frequencies of Llama 3.1 and later) reaches the model's config, or is an error.
# What happens: of RoPE, only the base and the size are read (GPT-OSS alone has code for more). The weights come out
# exact, config.json says `"rope_type": "default"`, and every logit after the first token is another. Nothing is said.
# Who is hurt: whoever takes a Llama 3.1 or 3.2, a CodeLlama, or a Qwen extended by YaRN from a GGUF to evaluate,
# prune, fine-tune or convert it: all of that is done to another model, and saving writes the wrong config for good.
# Seen with transformers 5.24.0, gguf 0.19.0, torch 2.13.0.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
cd "$folder"
cat > try.py <<'PYTHON'
from importlib.metadata import version

import gguf
import numpy
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

print(*(f"{name} {version(name)}" for name in ("transformers", "gguf", "torch")), sep=", ")
WIDTH, HEADS, LAYERS, VOCABULARY, INNER, LONGEST = 64, 4, 2, 64, 96, 4096
BASE, EPSILON, ORIGINAL = 10_000.0, 1e-6, 1024
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}


def halves_to_pairs(weight):
    """Order the rows of a query or key matrix as GGUF does."""
    return weight.reshape(HEADS, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def write(model, path, rope):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(LONGEST)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(BASE)
    writer.add_vocab_size(VOCABULARY)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(ORIGINAL)
    if rope["rope_type"] == "llama3":
        size = WIDTH // HEADS
        unscaled = BASE ** (-numpy.arange(0, size, 2) / size)
        writer.add_tensor("rope_freqs.weight", (unscaled / model.model.rotary_emb.inv_freq.numpy()).astype("float32"))
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    writer.add_tensor("output.weight", weights["lm_head.weight"])
    for layer in range(LAYERS):
        for name, short in NAMES.items():
            weight = weights[f"model.layers.{layer}.{name}.weight"]
            if short in ("attn_q", "attn_k"):
                weight = numpy.ascontiguousarray(halves_to_pairs(weight))
            writer.add_tensor(f"blk.{layer}.{short}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


as_seen = True
ids = torch.randint(VOCABULARY, (1, 200), generator=torch.Generator().manual_seed(0))
for rope in (
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=LONGEST, rms_norm_eps=EPSILON,
        rope_parameters=rope | {"rope_theta": BASE},
    )
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    write(model, "model.gguf", rope)
    read = AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf", dtype=torch.float32).eval()
    weights = read.state_dict()
    exact = all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    with torch.no_grad():
        expected, found = model(ids).logits, read(ids).logits
    apart, kind = float((found - expected).abs().max()), read.config.rope_parameters["rope_type"]
    print(
        f"{rope['rope_type']}: read as {kind}; weights {'exact' if exact else 'changed'}, "
        f"logits differ by up to {apart:.2g}, deviation {float(expected.std()):.2f}"
    )
    wrong = rope["rope_type"] != "default"
    as_seen = as_seen and exact and kind == "default" and (apart > 0.5 if wrong else apart < 1e-4)
print("as seen before" if as_seen else "this has changed")
raise SystemExit(not as_seen)
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore try.py 2> stderr.txt || { tail -5 stderr.txt; exit 1; }
if grep -qi "rope.scaling\|rope_scaling\|rope_freqs" stderr.txt; then
    echo "this has changed: it warns"
    cat stderr.txt
    exit 1
fi
