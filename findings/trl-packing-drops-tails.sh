#!/usr/bin/env bash
# TRL's default packing leaves out the end of every document that is longer than a sequence.
# One would guess: packing arranges the text in full sequences; what is too long is split.
# What happens: the default strategy "bfd" cuts each document at `seq_length` and drops the rest without a
# word; of long documents most of the text is never trained on. "bfd_split" keeps every token, and still no
# sequence reaches across two documents without positions that say so.
# Who is hurt: whoever continues pretraining on books or articles with `SFTConfig(packing=True)`: a budget
# counted in documents trains on a fraction of it, and always on their beginnings.
# Seen with trl 1.16.0, datasets 5.2.0.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 trl==1.16.0 datasets==5.2.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import inspect
from importlib.metadata import version

from datasets import Dataset, disable_progress_bars
from trl import SFTConfig
from trl.data_utils import pack_dataset

disable_progress_bars()
print(*(f"{name} {version(name)}" for name in ("trl", "datasets")), sep=", ")
default = inspect.signature(SFTConfig).parameters["packing_strategy"].default
documents = Dataset.from_dict({"input_ids": [list(range(1000)), list(range(50)), list(range(300))]})
kept = {}
for strategy in ("bfd", "bfd_split", "wrapped"):
    packed = pack_dataset(documents, seq_length=256, strategy=strategy)
    kept[strategy] = sum(map(len, packed["input_ids"]))
    print(f"{strategy}: {kept[strategy]} of 1350 tokens" + " (the default)" * (strategy == default))
as_seen = default == "bfd" and kept == {"bfd": 562, "bfd_split": 1350, "wrapped": 1350}
print("as seen before" if as_seen else "this has changed")
raise SystemExit(not as_seen)
PYTHON
