#!/usr/bin/env bash
# A LoRA adapter on a tied embedding: merging it gives another model than the one that was trained.
# One would guess: `merge_and_unload` leaves the logits as they were with the adapter on, the more so with
# `ensure_weight_tying=True`, which is there for tied models.
# What happens: with it, the update is added twice to the one weight that embedding and head share. Without it,
# the update is added once, but the head gets it too, which it did not have in training (peft warns of that).
# Who is hurt: whoever adapts embed_tokens of Gemma, SmolLM2, Qwen3-0.6B … and ships the merged weights.
# Seen with peft 0.21.2, transformers 5.23.0, torch 2.13.0 on a CPU.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

print(*(f"{name} {version(name)}" for name in ("peft", "transformers", "torch")), sep=", ")
ids = torch.tensor([[1, 2, 3, 4]])
times = {}
for ensure in (True, False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    before = model.model.embed_tokens.weight.detach().clone()
    settings = LoraConfig(
        r=4, target_modules=["embed_tokens"], init_lora_weights=False, ensure_weight_tying=ensure
    )
    adapted = get_peft_model(model, settings)
    with torch.no_grad():
        trained = adapted(ids).logits
        update = adapted.base_model.model.model.embed_tokens.get_delta_weight("default").clone()
        merged = adapted.merge_and_unload()
        shipped = merged(ids).logits
    added = merged.model.embed_tokens.weight.detach() - before
    times[ensure] = float((added * update).sum() / update.square().sum())
    print(
        f"ensure_weight_tying={ensure}: the update was added {times[ensure]:.2f} times; logits of up to "
        f"{float(trained.abs().max()):.2g} change by up to {float((trained - shipped).abs().max()):.2g}"
    )
as_seen = abs(times[True] - 2) < 0.01 and abs(times[False] - 1) < 0.01
print("as seen before" if as_seen else "this has changed")
raise SystemExit(not as_seen)
PYTHON
