#!/usr/bin/env bash
# peft's add_weighted_adapter leaves out adapters on layers that the first adapter does not have.
# One would guess: a sum of two LoRA adapters, one on layers 0 and 1, the other on layers 2 and 3, changes all four.
# What happens: the new adapter inherits `layers_to_transform` from the first one, so it has no place in layers 2
# and 3. The second adapter is lost whole, whatever its weight; in the other order, the first. `target_modules` are
# united, and different layers of the same adapters are not: nothing is said. The saved adapter is the wrong one too.
# Who is hurt: whoever trains layers or stages apart (around a cut, then the rest) and combines the parts.
# Loading both and calling `merge_and_unload(adapter_names=[...])` adds both.
# Seen with peft 0.21.2, transformers 5.24.0, torch 2.13.0.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$folder"
cat > try.py <<'PYTHON'
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

print(*(f"{name} {version(name)}" for name in ("peft", "transformers", "torch")), sep=", ")
ids = torch.randint(64, (1, 32), generator=torch.Generator().manual_seed(0))
PARTS = {"lower": [0, 1], "upper": [2, 3]}


def with_adapters():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    )
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    for name, layers in PARTS.items():
        settings = LoraConfig(
            r=4, lora_alpha=4, target_modules=["down_proj"], layers_to_transform=layers, init_lora_weights=False
        )
        if name == "lower":
            model = get_peft_model(model, settings, adapter_name=name)
        else:
            model.add_adapter(name, settings)
    return model


@torch.no_grad()
def logits(model, *names):
    model.base_model.set_adapter(list(names))
    return model(ids).logits


as_seen = True
for method in ("cat", "linear", "svd"):
    for order in (["lower", "upper"], ["upper", "lower"]):
        model = with_adapters()
        expected = logits(model, *order)
        alone = {name: logits(model, name) for name in order}
        model.add_weighted_adapter(order, [1.0, 1.0], "sum", combination_type=method)
        found = logits(model, "sum")
        apart = {name: float((found - other).abs().max()) for name, other in (alone | {"both": expected}).items()}
        print(f"{method} of {' + '.join(order)}: the logits differ by up to", end=" ")
        print(*(f"{value:.1g} from {name}" for name, value in apart.items()), sep=", ")
        as_seen = as_seen and apart[order[0]] < 1e-3 and apart[order[1]] > 0.1 and apart["both"] > 0.1
model = with_adapters()
with torch.no_grad():
    both = logits(model, "lower", "upper")
    merged = float((model.merge_and_unload(adapter_names=["lower", "upper"])(ids).logits - both).abs().max())
print(f"merge_and_unload of both: differs by up to {merged:.1g} from both")
as_seen = as_seen and merged < 1e-3
print("as seen before" if as_seen else "this has changed")
raise SystemExit(not as_seen)
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W error::UserWarning -W ignore::FutureWarning try.py
