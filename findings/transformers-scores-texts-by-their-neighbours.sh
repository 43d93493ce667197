#!/usr/bin/env bash
# In transformers, what a model with scaled positions makes of a short text depends on the other texts of its batch.
# One would guess: rows of a batch, padded and masked, do not know of each other; batching changes speed alone.
# What happens: `longrope` and `dynamic` choose their frequencies once for the batch, by its largest position. A short
# text beside one longer than the original length gets the factors for long texts, with padding on either side.
# Alone or among short texts it gets those for short ones. Nothing is said.
# Who is hurt: whoever evaluates a Phi-3 with 128k, Phi-4-mini or MiniCPM in batches: answers and scores change with
# the batch size and the order of the rows, and a comparison of two models (source and pruned, before and after
# healing) compares batches too if these differ.
# A batch of one, or rows sorted so that no batch reaches across the original length, avoid it.
# Seen with transformers 5.24.0, torch 2.13.0.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
cd "$folder"
cat > try.py <<'PYTHON'
from importlib.metadata import version

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

print(*(f"{name} {version(name)}" for name in ("transformers", "torch")), sep=", ")
ORIGINAL, SHORT, LONG = 64, 40, 100
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
CONFIGS = {
    "yarn": LlamaConfig(
        **SIZES, max_position_embeddings=4 * ORIGINAL,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": ORIGINAL,
        },
    ),
    "longrope": Phi3Config(
        **SIZES, max_position_embeddings=4 * ORIGINAL, original_max_position_embeddings=ORIGINAL,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
            "long_factor": [1.0 + index / 2 for index in range(8)], "original_max_position_embeddings": ORIGINAL,
            "partial_rotary_factor": 1.0,
        },
    ),
    "dynamic": LlamaConfig(
        **SIZES, max_position_embeddings=ORIGINAL,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    ),
}
draws = torch.Generator().manual_seed(0)
lengths = {"first": SHORT, "other": SHORT - 5, "long": LONG}
texts = {name: torch.randint(3, 64, (length,), generator=draws) for name, length in lengths.items()}


def scores(model, *rows, left):
    """Return the first row's log-probabilities from a padded batch."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for row, text in enumerate(rows):
        place = slice(width - len(text), None) if left else slice(len(text))
        ids[row, place], mask[row, place] = text, 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions).logits[0]
    return logits[mask[0].bool()].log_softmax(-1)


as_seen = True
for name, config in CONFIGS.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=1.5 * weight.shape[-1] ** -0.5)
    for left in (False, True):
        alone = scores(model, texts["first"], left=left)
        apart = {
            other: float((scores(model, texts["first"], texts[other], left=left) - alone).abs().max())
            for other in ("other", "long")
        }
        print(
            f"{name}, padded on the {'left' if left else 'right'}: log-probabilities of {SHORT} tokens change by up to "
            f"{apart['other']:.1g} beside {SHORT - 5} tokens, by {apart['long']:.2g} beside {LONG}"
        )
        depends = name != "yarn"
        as_seen = as_seen and apart["other"] < 1e-3 and (apart["long"] > 0.1 if depends else apart["long"] < 1e-3)
print("as seen before" if as_seen else "this has changed")
raise SystemExit(not as_seen)
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore try.py 2> stderr.txt || { tail -5 stderr.txt; exit 1; }
