#!/usr/bin/env bash
# datasets reads texts that look like dates as points in time, and lm-eval puts them into prompts and answers so.
# One would guess: a JSON string is text; what a task's file says in quotes is what the model is asked and judged by.
# What happens: a field, or a list of choices, of which every value has the form 1969-07-20 gets the type timestamp. A
# template renders it as "1969-07-20 00:00:00": the answer that is demanded of the model, or that it is measured on.
# A single value of another form keeps all as texts. Nothing is said.
# Who is hurt: whoever asks when something happened from rows of their own: a model that answers rightly scores 0 by
# exact match, and in multiple choice every candidate ends in the same zeros.
# Seen with datasets 5.2.0, lm-eval 0.4.13.
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
DATES = {"the first Moon landing": "1969-07-20", "the fall of the Berlin Wall": "1989-11-09"}
ROWS = [{"event": event, "date": date} for event, date in DATES.items()]
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "Date of {{{{event}}}}, as YYYY-MM-DD:"
doc_to_target: "{{{{date}}}}"
generation_kwargs: {{until: ["\\n"]}}
metric_list: [{{metric: exact_match}}]
"""
for name, rows in {"dates": ROWS, "dates_and_a_text": [*ROWS, {"event": "the end of time", "date": "never"}]}.items():
    Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path(f"{name}.yaml").write_text(TASK.format(name=name))
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

logging.disable()
print(*(f"{name} {version(name)}" for name in ("datasets", "lm_eval")), sep=", ")


class Historian(LM):
    def generate_until(self, requests, **_):
        return [DATES.get(request.doc["event"], "never") for request in requests]

    loglikelihood = loglikelihood_rolling = None


found = {}
for name in ("dates", "dates_and_a_text"):
    loaded = TaskManager(include_path=".", include_defaults=False).load([name])
    results = evaluate(Historian(), loaded, bootstrap_iters=0, log_samples=True)
    sample = results["samples"][name][0]
    found[name] = (sample["target"], results["results"][name]["exact_match,none"])
    print("{}: wanted {!r}; score of right answers {:.2f}".format(name, *found[name]))
as_seen = found == {"dates": ("1969-07-20 00:00:00", 0.0), "dates_and_a_text": ("1969-07-20", 1.0)}
print("as seen before" if as_seen else "this has changed")
raise SystemExit(not as_seen)
PYTHON
