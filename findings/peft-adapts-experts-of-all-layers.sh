#!/usr/bin/env bash
# peft's layers_to_transform does not hold for target_parameters: the experts of all layers get LoRA.
# One would guess: `layers_to_transform=[3]` restricts a LoRA to layer 3, whatever in the layer is adapted.
# What happens: it restricts `target_modules` alone. The experts of a mixture are parameters since transformers 5 and
# are chosen by `target_parameters`; all layers' experts are adapted and trained, with no warning. Names with the
# layer in them, as "layers.3.mlp.experts.down_proj", are obeyed.
# Who is hurt: whoever heals or fine-tunes some layers of a mixture (around a cut, or the top): all the others move
# too, with their optimiser's memory, and a comparison of one layer with all compares nothing.
# Seen with peft 0.21.2, transformers 5.24.0, torch 2.13.0.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$folder"
cat > try.py <<'PYTHON'
import re
from importlib.metadata import version

from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

print(*(f"{name} {version(name)}" for name in ("peft", "transformers", "torch")), sep=", ")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SETTINGS = {
    "layers_to_transform=[3]": {"target_parameters": EXPERTS, "layers_to_transform": [3]},
    "layers written out": {
        "target_parameters": [f"layers.3.{name}" for name in EXPERTS], "layers_to_transform": [3],
    },
}
found = {}
for name, settings in SETTINGS.items():
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4,
        )
    )
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], **settings))
    trained = {part: set() for part in ("q_proj", "experts")}
    count = 0
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            count += parameter.numel()
            part = "experts" if "experts" in key else "q_proj"
            trained[part].add(int(re.search(r"layers\.(\d+)", key)[1]))
    found[name] = {part: sorted(layers) for part, layers in trained.items()}
    print(f"{name}: {count:,} trained parameters, in layers", found[name])
as_seen = found == {
    "layers_to_transform=[3]": {"q_proj": [3], "experts": [0, 1, 2, 3]},
    "layers written out": {"q_proj": [3], "experts": [3]},
}
print("as seen before" if as_seen else "this has changed")
raise SystemExit(not as_seen)
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W error::UserWarning -W ignore::FutureWarning try.py 2> stderr.txt || {
    cat stderr.txt
    exit 1
}
if grep -qi "layers_to_transform" stderr.txt; then
    echo "this has changed: it warns"
    cat stderr.txt
    exit 1
fi
