#!/usr/bin/env bash
# CTranslate2 converts Gemma 2 and 3 without the settings of their attention that are not those of Gemma 1.
# One would guess: the converter, which knows both by name, reads the fields of config.json that the forward pass
# reads, or refuses values that it has no place for, as it does for RoPE scaling.
# What happens: `query_pre_attn_scalar` is not read, queries are scaled by the size of a head: right for the small
# models only, in which both are the same. Of Gemma 2, the caps of the attention's scores and of the logits and the
# windows are missing too. The conversion succeeds, the model answers, and its logits are others. Nothing is said.
# Who is hurt: whoever serves Gemma 2 or 3 27B (scalars 144 and 168, heads of 128) in CTranslate2, or Gemma 2 of any
# size on text beyond its window; and whoever trusts a check that was made with a small model.
# Seen with ctranslate2 4.8.5, transformers 5.24.0, torch 2.13.0.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 ctranslate2==4.8.5
cd "$folder"
cat > try.py <<'PYTHON'
from importlib.metadata import version

import ctranslate2
import numpy
import torch
from tokenizers import Tokenizer, models
from transformers import (
    Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast,
)

print(*(f"{name} {version(name)}" for name in ("ctranslate2", "transformers", "torch")), sep=", ")
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"word{number}" for number in range(60))]
HEAD, LENGTH = 16, 100
FAMILIES = {"gemma2": (Gemma2Config, Gemma2ForCausalLM), "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM)}
PLAIN = {
    "query_pre_attn_scalar": HEAD, "sliding_window": 2 * LENGTH, "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
CASES = [  # family, what is changed in the plain settings, whether that is obeyed
    ("gemma2", {}, True),
    ("gemma2", {"query_pre_attn_scalar": HEAD * 144 // 128}, False),
    ("gemma2", {"attn_logit_softcapping": 2.0}, False),
    ("gemma2", {"final_logit_softcapping": 2.0}, False),
    ("gemma2", {"sliding_window": LENGTH // 4}, False),
    ("gemma3", {}, True),
    ("gemma3", {"query_pre_attn_scalar": HEAD * 168 // 128}, False),
]
words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
)
ids = torch.randint(4, len(WORDS), (1, LENGTH), generator=torch.Generator().manual_seed(0))
as_seen = True
for number, (family, changed, obeyed) in enumerate(CASES):
    make_config, make_model = FAMILIES[family]
    torch.manual_seed(0)
    config = make_config(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=HEAD, max_position_embeddings=256, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, dtype="float32", **(PLAIN | changed),
    )
    config._attn_implementation = "eager"
    model = make_model(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=1.5 * weight.shape[-1] ** -0.5)
    model.save_pretrained(f"model{number}")
    tokenizer.save_pretrained(f"model{number}")
    ctranslate2.converters.TransformersConverter(f"model{number}").convert(f"converted{number}")
    converted = ctranslate2.Generator(f"converted{number}", device="cpu", intra_threads=1)
    output = converted.forward_batch([[WORDS[index] for index in ids[0]]], return_log_probs=True)
    found = numpy.array(output)[0, :, : len(WORDS)]
    with torch.no_grad():
        expected = model(ids).logits[0].log_softmax(-1).numpy()
    apart = float(abs(found - expected).max())
    same = float((found.argmax(-1) == expected.argmax(-1)).mean())
    name = ", ".join(f"{key} {value:g}" for key, value in changed.items()) or "as in Gemma 1"
    print(f"{family}, {name}: log-probabilities differ by up to {apart:.1g}, {same:.0%} of next tokens the same")
    as_seen = as_seen and (apart < 1e-3 if obeyed else apart > 0.1)
print("as seen before" if as_seen else "this has changed")
raise SystemExit(not as_seen)
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore try.py 2> stderr.txt || { tail -5 stderr.txt; exit 1; }
