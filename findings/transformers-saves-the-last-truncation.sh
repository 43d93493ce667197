#!/usr/bin/env bash
# A tokenizer that transformers saves cuts every text to the length of the last call before it was saved.
# One would guess: `truncation=True, max_length=8` are arguments of one call; what is saved is the tokenizer.
# What happens: the call sets them on the tokenizer beneath, and save_pretrained writes them into tokenizer.json, with
# padding to a fixed length if that was asked for. transformers resets both when it is called, so nobody who tests
# there sees it; a program that reads tokenizer.json with the tokenizers library cuts all its prompts, at the end,
# where the question is, and pads the short ones. Nothing is said. A call without truncation before saving undoes it.
# Who is hurt: whoever tokenizes training text with a maximum length and saves or pushes model and tokenizer after
# it: the model is right in transformers and answers half of the prompt elsewhere.
# Seen with transformers 5.24.0 and 4.57.6, tokenizers 0.23.3 and 0.22.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
for version in 5.24.0 4.57.6; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install -q "transformers==$version"
done
cd "$folder"
export HF_HUB_OFFLINE=1
cat > try.py <<'PYTHON'
from importlib.metadata import version

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

print(*(f"{name} {version(name)}" for name in ("transformers", "tokenizers")), sep=", ")
words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "word": 2}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
LONG, SHORT = " ".join(["word"] * 100), "word word"


def lengths(call):
    call()
    tokenizer.save_pretrained("model")
    plain = Tokenizer.from_file("model/tokenizer.json")
    found = [len(plain.encode(text).ids) for text in (LONG, SHORT)]
    found += [len(AutoTokenizer.from_pretrained("model")(text).input_ids) for text in (LONG, SHORT)]
    return found


calls = {
    "truncated": lambda: tokenizer([LONG], truncation=True, max_length=8),
    "truncated and padded": lambda: tokenizer([LONG], truncation=True, max_length=8, padding="max_length"),
    "plain": lambda: tokenizer([LONG]),
}
seen = {}
for name, call in calls.items():
    seen[name] = lengths(call)
    print(
        f"texts of 100 and 2 tokens, saved after a call that was {name}: "
        "{} and {} by tokenizer.json, {} and {} in transformers".format(*seen[name])
    )
as_seen = seen == {
    "truncated": [8, 2, 100, 2],
    "truncated and padded": [8, 8, 100, 2],
    "plain": [100, 2, 100, 2],
}
print("as seen before" if as_seen else "this has changed")
raise SystemExit(not as_seen)
PYTHON
for version in 5.24.0 4.57.6; do
    "$version/bin/python" try.py 2> stderr.txt || { cat stderr.txt; exit 1; }
done
