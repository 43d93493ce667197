#!/usr/bin/env bash
# A model exported by optimum-onnx chooses between RoPE's short and long factors once, at export.
# One would guess: a Phi-3 with `longrope` takes its long factors for texts beyond the original length, and the same
# for `dynamic` scaling, whose base grows with the text; in ONNX as in transformers.
# What happens: transformers decides by the length of the text with an `if`, and tracing keeps the branch that a
# dummy input of some tokens takes. The exported model always uses the short factors, or the unscaled base: right
# up to the original length, and with no error another model beyond it.
# Who is hurt: whoever exports a long-context model to read long texts: only short prompts are right.
# Seen with optimum-onnx 0.1.0, transformers 4.57.6, torch 2.13.0, onnxruntime 1.32.0.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==4.57.6 onnxruntime==1.32.0 onnx==1.23.2 "optimum-onnx[onnxruntime]==0.1.0"
cd "$folder"
cat > try.py <<'PYTHON'
from importlib.metadata import version

import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

print(*(f"{name} {version(name)}" for name in ("optimum-onnx", "transformers", "torch", "onnxruntime")), sep=", ")
ORIGINAL = 64
sizes = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
factors = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}
configs = {
    "longrope": Phi3Config(
        **sizes, max_position_embeddings=4 * ORIGINAL, original_max_position_embeddings=ORIGINAL,
        sliding_window=None, rope_scaling=factors,
    ),
    "dynamic": LlamaConfig(
        **sizes, max_position_embeddings=ORIGINAL, rope_scaling={"rope_type": "dynamic", "factor": 4.0}
    ),
    "yarn": LlamaConfig(
        **sizes, max_position_embeddings=4 * ORIGINAL,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    ),
}
as_seen = True
for name, config in configs.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(name)
    exported = ORTModelForCausalLM.from_pretrained(name, export=True)
    for length in (ORIGINAL - 16, 2 * ORIGINAL):
        tokens = torch.randint(3, 64, (1, length))
        with torch.no_grad():
            fresh = AutoModelForCausalLM.from_pretrained(name).eval()(tokens).logits
        found = exported(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        apart = (found - fresh).abs().max().item()
        print(f"{name}, {length} of {ORIGINAL} tokens: logits differ by up to {apart:.1g}, deviation {fresh.std():.2f}")
        wrong = length > ORIGINAL and name != "yarn"
        as_seen = as_seen and (apart > 1 if wrong else apart < 1e-3)
print("as seen before" if as_seen else "this has changed")
raise SystemExit(not as_seen)
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore try.py 2> /dev/null
