#!/usr/bin/env bash
# transformers 5 splits text otherwise than tokenizer.json says, where the tokenizer's class is GPT2Tokenizer.
# One would guess: tokenizer.json says how a text is split before merging, and every program that reads it obeys.
# What happens: transformers 5 builds the pre-tokenizer of the named class anew and drops the one in the file. A
# tokenizer that takes digits one by one, as SmolLM2's does, merges them if its vocabulary has numbers, and takes
# other numerals, such as ½, with the space before them. Nothing is said, and saving writes the changed tokenizer.
# The tokenizers library and transformers 4 obey the file.
# Who is hurt: whoever trains, evaluates or converts such a model with transformers 5: its tokens are not those that
# it was trained on, nor those of llama.cpp.
# Seen with transformers 5.24.0 and 4.57.6.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
for version in 5.24.0 4.57.6; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install -q "transformers==$version"
done
cd "$folder"
export HF_HUB_OFFLINE=1
cat > write.py <<'PYTHON'
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
vocabulary = {symbol: index for index, symbol in enumerate(["<|endoftext|>", *alphabet, "12", "123"])}
tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("1", "2"), ("12", "3")]))
split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
tokenizer.decoder = decoders.ByteLevel()
Path("model").mkdir()
tokenizer.save("model/tokenizer.json")
end = "<|endoftext|>"
config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": end, "eos_token": end, "unk_token": end}
Path("model/tokenizer_config.json").write_text(json.dumps(config))
PYTHON
cat > read.py <<'PYTHON'
from tokenizers import Tokenizer
from transformers import AutoTokenizer, __version__

obeyed = len(Tokenizer.from_file("model/tokenizer.json").encode("123").ids)
found = len(AutoTokenizer.from_pretrained("model")("123").input_ids)
print(f"transformers {__version__}: '123' is {found} tokens; by tokenizer.json, {obeyed}")
raise SystemExit(not (obeyed == 3 and found == (1 if __version__.startswith("5.") else 3)))
PYTHON
"5.24.0/bin/python" write.py
for version in 5.24.0 4.57.6; do
    "$version/bin/python" read.py 2> /dev/null || { echo "this has changed"; exit 1; }
done
echo "as seen before"
