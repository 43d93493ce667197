#!/usr/bin/env bash
# transformers 4 reads a config.json that transformers 5 saved with another RoPE base, without a word.
# One would guess: the major versions read each other's models; a field that is missing is an error or a warning.
# What happens: transformers 5 writes `rope_parameters` in place of `rope_theta` and `rope_scaling`. transformers 4
# does not know the name and takes 10,000 for the base. The model loads and answers, and its logits are others.
# Who is hurt: whoever saves a Llama, Qwen or Mistral again (after fine-tuning, merging, pruning) and is read by
# last year's transformers, or by a program that pins it, as optimum-onnx does.
# Seen with transformers 5.24.0 and 4.57.6, torch 2.13.0.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
for version in 5.24.0 4.57.6; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install -q torch==2.13.0 "transformers==$version"
done
cd "$folder"
export HF_HUB_OFFLINE=1
"$folder/5.24.0/bin/python" - <<'PYTHON'
import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
)
model = LlamaForCausalLM(config).eval()
for weight in model.parameters():
    if weight.ndim > 1:
        torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
model.save_pretrained("model")
saved = json.loads(Path("model/config.json").read_text())
print("saved:", {name: value for name, value in saved.items() if name.startswith("rope")})
ids = torch.randint(64, (1, 200))
with torch.no_grad():
    torch.save((ids, model(ids).logits), "expected.pt")
PYTHON
"$folder/4.57.6/bin/python" - 2> stderr.txt <<'PYTHON'
import torch
import transformers

ids, expected = torch.load("expected.pt")
model = transformers.AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32).eval()
with torch.no_grad():
    apart = float((model(ids).logits - expected).abs().max())
print(f"transformers {transformers.__version__}: base {model.config.rope_theta:,.0f}")
print(f"largest difference of logits {apart:.1f}, their deviation {float(expected.std()):.1f}")
as_seen = model.config.rope_theta == 10_000 and apart > float(expected.std())
print("as seen before" if as_seen else "this has changed")
raise SystemExit(not as_seen)
PYTHON
if grep -qi "rope" stderr.txt; then
    echo "this has changed: it warns"
    cat stderr.txt
    exit 1
fi
