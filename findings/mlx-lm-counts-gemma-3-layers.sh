#!/usr/bin/env bash
# mlx-lm does not read which layers of a Gemma 3 have a window: it counts them.
# One would guess: config.json lists the kind of every layer in `layer_types`, so a program follows the list.
# What happens: mlx-lm takes every sixth layer for one without a window, whatever the list says. A model whose list
# is another one (after layers were dropped or repeated) loads, answers without an error, and is wrong. With
# `sliding_window_pattern` in config.json it counts by that number instead, so a list with a period can be saved.
# Who is hurt: whoever prunes, merges or stacks Gemma 3 and serves the result on a Mac.
# Seen with mlx-lm 0.32.2, mlx 0.32.4 and transformers 4.57.6, torch 2.13.0.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/torch"
"$folder/torch/bin/pip" install -q torch==2.13.0 transformers==4.57.6
python3 -m venv "$folder/mlx"
"$folder/mlx/bin/pip" install -q "mlx[cpu]==0.32.4" mlx-lm==0.32.2
cd "$folder"
export HF_HUB_OFFLINE=1
"$folder/torch/bin/python" - <<'PYTHON'
import json
from pathlib import Path

import numpy
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

ids = torch.randint(64, (1, 200), generator=torch.Generator().manual_seed(0))
numpy.save("ids.npy", ids.numpy())
for period in (6, 5):
    torch.manual_seed(0)
    kinds = ["sliding_attention" if (n + 1) % period else "full_attention" for n in range(10)]
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=16,
        layer_types=kinds,
    )
    model = Gemma3ForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    with torch.no_grad():
        numpy.save(f"{period}.npy", model(ids).logits.numpy())
    for name in (f"{period}", f"{period}-named"):
        model.save_pretrained(name)
        path = Path(name, "config.json")
        saved = {k: v for k, v in json.loads(path.read_text()).items() if "sliding_window_pattern" not in k}
        if name.endswith("named"):
            saved["sliding_window_pattern"] = period
        path.write_text(json.dumps(saved))
PYTHON
"$folder/mlx/bin/python" - <<'PYTHON'
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy
from mlx_lm.utils import load_model

print(*(f"{name} {version(name)}" for name in ("mlx-lm", "mlx")), sep=", ")
mx.set_default_device(mx.cpu)
ids = mx.array(numpy.load("ids.npy"))
apart = {}
for name in ("6", "5", "5-named"):
    model, _ = load_model(Path(name))
    expected = numpy.load(f"{name[0]}.npy")
    apart[name] = float(abs(numpy.array(model(ids)) - expected).max()) / float(expected.std())
    print(f"every {name[0]}th layer full{', with the period' * ('named' in name)}: {apart[name]:.2f} deviations apart")
as_seen = apart["6"] < 0.1 and apart["5-named"] < 0.1 and apart["5"] > 1
print("as seen before" if as_seen else "this has changed")
raise SystemExit(not as_seen)
PYTHON
