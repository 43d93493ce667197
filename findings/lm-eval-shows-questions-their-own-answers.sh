#!/usr/bin/env bash
# lm-eval draws few-shot examples from the questions themselves, answer included.
# One would guess: whatever split the examples come from, a question is never among its own examples.
# What happens: the question is taken out only if the task's `fewshot_split` and `test_split` have the same value. A
# task with `test_split` alone, and one with `validation_split: validation` and `fewshot_split: validation`, draw
# their examples from the split that they ask about, and nothing is taken out: with 5 examples from 40 rows, about
# every eighth prompt holds its own answer. Nothing is said.
# Who is hurt: whoever asks a test-only or custom task with --num_fewshot: scores are too high, the more so the fewer
# rows there are, and a model that copies well beats one that knows more. `fewshot_split: test` beside
# `test_split: test` avoids it; a task with a validation split alone must not name it as `fewshot_split`.
# Known upstream in part: EleutherAI/lm-evaluation-harness#4145.
# Seen with lm-eval 0.4.13, datasets 5.2.0.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 lm_eval==0.4.13 datasets==5.2.0 transformers==5.24.0 accelerate==1.15.0
cd "$folder"
HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HOME="$folder" "$folder/venv/bin/python" -W ignore - 2> /dev/null <<'PYTHON'
import json
import logging
from importlib.metadata import version
from pathlib import Path

from datasets import disable_progress_bars

disable_progress_bars()
ROWS, SHOTS = 40, 5
with open("rows.jsonl", "w") as file:
    for row in range(ROWS):
        file.write(json.dumps({"number": row, "word": f"word{row}"}) + "\n")
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{{split}: rows.jsonl}}}}
{splits}
output_type: multiple_choice
doc_to_text: "The name of number {{{{number}}}} is"
doc_to_choice: "{{{{[word, 'another']}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
SPLITS = {
    "test_only": ("test", "test_split: test"),
    "test_named": ("test", "test_split: test\nfewshot_split: test"),
    "validation_only": ("validation", "validation_split: validation"),
    "validation_named": ("validation", "validation_split: validation\nfewshot_split: validation"),
}
for name, (split, splits) in SPLITS.items():
    Path(f"{name}.yaml").write_text(TASK.format(name=name, split=split, splits=splits))
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

logging.disable()
print(*(f"{name} {version(name)}" for name in ("lm_eval", "datasets")), sep=", ")


class Copier(LM):
    """Knows nothing: it answers rightly where the prompt holds the question with the answer."""

    def loglikelihood(self, requests, **_):
        self.leaks = len({request.args[0] for request in requests if self.leaked(request)})
        return [(0.0 if self.leaked(request) or request.idx == 1 else -1.0, False) for request in requests]

    @staticmethod
    def leaked(request):
        prompt, answer = request.args
        question = prompt.rpartition("\n")[2]
        return f"{question}{answer}\n" in prompt

    loglikelihood_rolling = generate_until = None


found = {}
for name in SPLITS:
    model, loaded = Copier(), TaskManager(include_path=".", include_defaults=False).load([name])
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=SHOTS)
        task.set_fewshot_seed(seed=1234)
    score = evaluate(model, loaded, bootstrap_iters=0)["results"][name]["acc,none"]
    found[name] = model.leaks
    print(f"{name}: {model.leaks} of {ROWS} prompts hold their own answer; a model that only copies scores {score:.2f}")
as_seen = {name for name, leaks in found.items() if leaks} == {"test_only", "validation_named"}
print("as seen before" if as_seen else "this has changed")
raise SystemExit(not as_seen)
PYTHON
