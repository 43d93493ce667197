#!/usr/bin/env bash
# lm-eval compiles a task's templates anew for every question, several times each.
# One would guess: a template is compiled when the task is loaded, and then filled in for each question.
# What happens: `apply_template` hands the source to jinja2's `Environment.from_string`, which keeps nothing;
# question, choices and answer are compiled seven times in all for each row. A thousand rows of a task
# with three templates take seven thousand compilations of the same few lines.
# Who is hurt: whoever evaluates a small model, or on a fast GPU: half of the time of PIQA, ARC-Easy and BoolQ
# went into compiling. A cache around `from_string` gives the same prompts.
# Seen with lm-eval 0.4.13, jinja2 3.1.6.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 lm_eval==0.4.13 jinja2==3.1.6 transformers==5.24.0 accelerate==1.15.0
cd "$folder"
cat > shapes.yaml <<'YAML'
task: shapes
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "A shape with {{sides}} sides is a"
doc_to_choice: "{{[first, second]}}"
doc_to_target: "{{0 if sides == 3 else 1}}"
metric_list: [{metric: acc}]
YAML
HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HOME="$folder" "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import json
import logging
from functools import lru_cache
from importlib.metadata import version

from datasets import disable_progress_bars

disable_progress_bars()
with open("rows.jsonl", "w") as file:
    for row in range(200):
        file.write(json.dumps({"sides": 3 + row % 2, "first": "triangle", "second": "square"}) + "\n")
from lm_eval import utils
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

logging.disable()


class Constant(LM):
    seen: list = []

    def loglikelihood(self, requests, **_):
        self.seen = [request.args for request in requests]
        return [(-1.0, False) for _ in requests]

    loglikelihood_rolling = generate_until = None


own, compiled = utils.env.from_string, []


def counting(source, *args, **kwargs):
    compiled.append(source)
    return own(source, *args, **kwargs)


def run(from_string):
    utils.env.from_string = from_string
    compiled.clear()
    model = Constant()
    tasks = TaskManager(include_path=".", include_defaults=False).load(["shapes"])
    evaluate(model, tasks, bootstrap_iters=0)
    return len(compiled), len(set(compiled)), model.seen


print(*(f"{name} {version(name)}" for name in ("lm_eval", "jinja2")), sep=", ")
times, different, prompts = run(counting)
print(f"200 questions: {times} compilations of {different} templates")
cached, _, same = run(lru_cache(counting))
print(f"with a cache: {cached} compilations; the prompts are {'the same' if same == prompts else 'others'}")
as_seen = different == 3 and times > 200 * different and cached == 3 and same == prompts
print("as seen before" if as_seen else "this has changed")
raise SystemExit(not as_seen)
PYTHON
