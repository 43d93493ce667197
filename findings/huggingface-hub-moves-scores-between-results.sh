#!/usr/bin/env bash
# huggingface_hub's ModelCard moves scores of a card to other settings and other models when it reads and saves it.
# One would guess: loading a card, adding a tag and saving it changes the tag alone.
# What happens: results are taken for the same if task type, data set, configuration, split and revision are the same.
# A 5-shot score below a 0-shot one of the same data set is written under `num_few_shot: 0` and the first one's
# source; the 5 is gone. Of several models in the model-index only the last name is kept, for the scores of all.
# Nothing is said.
# Who is hurt: whoever edits a card by program (adding a tag, licence or base model, or pushing a new result) where
# it compares settings or holds a source's scores beside its own: the published numbers are then wrong.
# Known upstream in part: huggingface/huggingface_hub#4975, for results that are written anew.
# Seen with huggingface_hub 2.4.0.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q huggingface_hub==2.4.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

CARD = """---
license: apache-2.0
model-index:
- name: source
  results:
  - task: {type: text-generation}
    dataset: {name: MMLU, type: cais/mmlu, args: {num_few_shot: 0}}
    metrics: [{type: acc, value: 0.41}]
    source: {name: leaderboard, url: https://example.org/zero}
  - task: {type: text-generation}
    dataset: {name: MMLU, type: cais/mmlu, args: {num_few_shot: 5}}
    metrics: [{type: acc, value: 0.52}]
    source: {name: leaderboard, url: https://example.org/five}
- name: pruned
  results:
  - task: {type: text-generation}
    dataset: {name: PIQA, type: ybisk/piqa}
    metrics: [{type: acc, value: 0.63}]
---
# A card
"""


def scores(path):
    """Return model, data set, number of examples and source of every score."""
    return {
        metric["value"]: (
            model["name"],
            result["dataset"]["name"],
            result["dataset"].get("args", {}).get("num_few_shot"),
            result.get("source", {}).get("url"),
        )
        for model in yaml.safe_load(path.read_text().split("---")[1])["model-index"]
        for result in model["results"]
        for metric in result["metrics"]
    }


print(f"huggingface_hub {version('huggingface_hub')}")
path = Path("README.md")
path.write_text(CARD)
before = scores(path)
card = ModelCard.load(path)
card.data.tags = ["pruned"]
card.save(path)
after = scores(path)
for value, old in before.items():
    print(f"{value}: {old}" + (f" became {after[value]}" if after[value] != old else " was kept"))
as_seen = after == {
    0.41: ("pruned", *before[0.41][1:]),
    0.52: ("pruned", *before[0.41][1:]),
    0.63: before[0.63],
}
print("as seen before" if as_seen else "this has changed")
raise SystemExit(not as_seen)
PYTHON
