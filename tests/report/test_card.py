"""The card: golden files for some builds, and what holds for every card."""

import json
import math
import os
import re
import shlex
import unicodedata
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard, ModelCardData
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from jinja2 import UndefinedError
from markdown_it import MarkdownIt

from factory.artifacts import Build, DataSource, Publication, Share
from factory.builds.folder import read_if_same
from factory.cli.build import build as command_line_build
from factory.cli.main import cli
from factory.config.settings import SLOWER
from factory.errors import StoreError, UsageError
from factory.report.card import front_matter, render, write_card
from factory.report.command import reproduction_command
from factory.report.markdown import SMALLEST_P, markdown, text_name
from factory.report.tables import recovery, worst_parts
from factory.resources import CARD_TEMPLATES
from tests.builders.builds import (
    SUBJECTS,
    a_gguf,
    a_score,
    a_seam,
    chat_with_other_licence,
    chosen_by,
    demo_healed,
    fitted_seam,
    healing_discarded,
    healing_harmful,
    of_an_adapter,
    on_two_texts,
    perplexities,
    served_elsewhere,
    sized,
    unhealed,
    with_a_full_card,
    within_budget,
    without_measurable_loss,
)
from tests.loopback_hub import Hub
from tests.places import GOLDEN

# Golden files -----------------------------------------------------------------------------------

CARDS = {
    "demo": partial(render, demo_healed(), has_healing_figure=True),
    "chat": partial(
        render,
        chat_with_other_licence(),
        repo_id="someone/Llama-3.1-8B-Instruct-24-layers",
        has_healing_figure=True,
    ),
    "unhealed": partial(render, unhealed(), repo_id="someone/mistral-23-layers", has_healing_figure=False),
    "discarded": partial(render, healing_discarded(), has_healing_figure=False),
    "two_texts": partial(render, on_two_texts(), has_healing_figure=True),
    "greedy": partial(render, chosen_by("greedy"), has_healing_figure=False),
}


@pytest.mark.parametrize("name", CARDS)
def test_the_card_is_the_golden_one(name: str) -> None:
    """After a wanted change: UPDATE_GOLDEN=1 pytest tests/report/test_card.py, then read the difference."""
    path = GOLDEN / f"card_{name}.md"
    card = CARDS[name]()
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(card, encoding="utf-8")
    assert card == path.read_text(encoding="utf-8")


def test_the_card_of_the_demo_that_people_are_shown_is_the_one_of_today() -> None:
    """After a wanted change: `factory build demo --drop 0.3`, or `factory card` where only words changed."""
    folder = CARD_TEMPLATES / "demo-drop30"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card == render(Build.read(folder), has_healing_figure=True)


# What the template names ------------------------------------------------------------------------


def test_the_rate_after_a_loss_that_ran_away_is_the_one_trained_at() -> None:
    build = demo_healed()
    slowed = build.adapter.model_copy(update={"slowed_at_step": 900})
    card = render(build.model_copy(update={"adapter": slowed}), has_healing_figure=False)
    assert f"; {SLOWER} times that from step 900, after" in card


def test_a_base_that_was_the_only_one_to_merge_into_was_not_chosen_of_two() -> None:
    build = chat_with_other_licence()
    assert "of two bases" in render(build, has_healing_figure=False)
    alone = build.model_copy(update={"merge_losses": {"source weights": 2.9}})
    assert "of two bases" not in render(alone, has_healing_figure=False)


def test_a_fitted_seam_without_training_is_shown_as_what_it_is() -> None:
    card = render(fitted_seam(shipped="healed"), has_healing_figure=False)
    assert "## Fitted seam, no training" in card
    assert "fitted seam (layer 9) on 20,147 tokens, 94 outliers left out" in card
    assert "trained for" not in card
    assert "How it was healed" not in card
    assert "## Fitted seam that was discarded" in render(
        fitted_seam(shipped="pruned"), has_healing_figure=False
    )


def test_a_gguf_beside_the_model_is_on_the_card_with_what_its_comparison_found() -> None:
    files = (a_gguf(), a_gguf(name="demo-drop30-F16.gguf", check=None, bound="up to 4,096 tokens"))
    card = render(demo_healed(), ggufs=files, has_healing_figure=True)
    assert (
        "- GGUF: `demo-drop30-Q8_0.gguf`, 2.7 MB, verified against transformers: largest logit difference "
        "0.91, 98% of next tokens agree, at 128 positions of texts of up to 160 tokens.\n"
        "- GGUF: `demo-drop30-F16.gguf`, 2.7 MB, not verified: llama.cpp was not installed "
        "where it was made; right up to 4,096 tokens.\n"
    ) in card
    assert "- GGUF:" not in render(demo_healed(), has_healing_figure=True)
    check = files[0].check
    assert check
    close = a_gguf(check=check.model_copy(update={"largest": 0.000217}))
    assert "difference 0.00022," in render(demo_healed(), ggufs=(close,), has_healing_figure=True)


@pytest.mark.parametrize(("steps", "words"), [(1, "1 warm-up step |"), (20, "20 warm-up steps |")])
def test_one_warm_up_step_is_not_several(steps: int, words: str) -> None:
    build = demo_healed()
    config = build.config | {"heal": build.config["heal"] | {"warmup_steps": steps}}
    assert words in render(build.model_copy(update={"config": config}), has_healing_figure=True)


def test_a_renamed_name_anywhere_in_the_template_stops_the_rendering(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (CARD_TEMPLATES / "card.md.j2").read_text(encoding="utf-8")
    monkeypatch.setattr("factory.report.card.CARD_TEMPLATES", tmp_path)
    words = {"if", "else", "elif", "endif", "for", "endfor", "in", "set", "and", "or", "not", "none", "is"}
    survivors, tried = [], 0
    others = [
        partial(render, chosen_by(criterion), has_healing_figure=False)
        for criterion in ("deepest", "loss", "chosen", "block-influence")
    ]
    foreign = demo_healed().source.model_copy(update={"remote_code": True})
    others.append(
        partial(render, demo_healed().model_copy(update={"source": foreign}), has_healing_figure=False)
    )
    others.append(partial(render, without_measurable_loss(), has_healing_figure=False))
    others.append(partial(render, perplexities(None), has_healing_figure=False))
    chat = chat_with_other_licence()
    seam = chat.adapter.model_copy(
        update={
            "layers": "seam",
            "seam": a_seam(),
            "slowed_at_step": 900,
            "best_step": 950,
            "ran_away_at_step": 990,
            "experts": ("mlp.experts.up",),
            "left_out": ("mlp.experts.down", "mlp.experts.gate"),
        }
    )
    others.append(partial(render, chat.model_copy(update={"adapter": seam}), has_healing_figure=False))
    others.append(partial(render, demo_healed(), space="me/it", has_healing_figure=False))
    others.append(partial(render, served_elsewhere(), has_healing_figure=False))
    others.append(partial(render, demo_healed(), ggufs=(a_gguf(),), has_healing_figure=False))
    others.append(partial(render, with_a_full_card(), has_healing_figure=False))
    others.append(partial(render, of_an_adapter(), has_healing_figure=False))
    others.append(partial(render, sized(target=6 * 10**9), has_healing_figure=False))
    others.append(partial(render, within_budget(1800), has_healing_figure=False))
    for prose in ((3.9, 3.905, 3.91), (3.9, 6.1, 6.2), (3.9, 6.1, 3.5)):  # the same, harmed, better
        others.append(partial(render, on_two_texts(prose=prose), has_healing_figure=False))
    fitted = on_two_texts().model_copy(update={"adapter": fitted_seam(shipped="healed").adapter})
    others.append(partial(render, fitted, has_healing_figure=False))
    for shipped in ("healed", "pruned"):
        others.append(partial(render, fitted_seam(shipped=shipped), has_healing_figure=False))
    others.append(partial(render, healing_harmful(), has_healing_figure=False))
    cards = [*CARDS.values(), *others]
    head, *sections = re.split(r"(?m)^(?=## \w)", template)
    names = "".join(re.findall(r"{% set .*\n", head))  # of what every section may use
    used = "".join(f"{{{{ {name} }}}}" for name in re.findall(r"{% set (\w+)", names))  # or nothing is missed
    # A section is tried without the others: to compile them all takes ten times as long.
    for before, section, after in [("", head, used), *((names, each, "") for each in sections)]:
        for expression in re.finditer(r"\{[{%].*?[%}]\}", section):
            without_strings = re.sub(r'"[^"]*"', lambda found: " " * len(found[0]), expression[0])
            for name in re.finditer(r"(?<![|.\w] )\b[a-z_]{3,}\b", without_strings):
                is_filter = re.search(r"\|\s*$", without_strings[: name.start()])
                if name[0] in words or is_filter or without_strings[name.end() :].startswith("="):
                    continue
                place = expression.start() + name.end()
                renamed = f"{before}{section[:place]}_x{section[place:]}{after}"
                (tmp_path / "card.md.j2").write_text(renamed, encoding="utf-8")
                tried += 1
                stopped = next((card for card in cards if _fails(card)), None)
                if stopped is None:
                    survivors.append((section[:place].splitlines()[-1], name[0]))
                else:  # it is the likeliest to use the next name too
                    cards.remove(stopped)
                    cards.insert(0, stopped)
    assert tried > 100
    assert survivors == []
    for section in sections:  # by themselves they do not fail
        (tmp_path / "card.md.j2").write_text(names + section, encoding="utf-8")
        assert not any(_fails(card) for card in (*CARDS.values(), *others)), section


def _fails(card: Callable[[], str]) -> bool:
    try:
        card()
    except (UndefinedError, TypeError):  # formatting an undefined value is a TypeError
        return True
    return False


# Numbers ----------------------------------------------------------------------------------------


THE_DEMO = Build.read(CARD_TEMPLATES / "demo-drop30")


@pytest.mark.parametrize(
    "build", [demo_healed(), chat_with_other_licence(), unhealed(), healing_discarded(), THE_DEMO]
)
def test_every_number_on_the_card_is_in_the_build_or_follows_from_it(build: Build) -> None:
    card = render(build, has_healing_figure=True)
    body = card.split("\n---\n", 1)[1].split("## Citation")[0]
    body = re.sub(r"```python.*?```", "", body, flags=re.DOTALL)
    known = _written(json.loads(build.model_dump_json())) | _derived(build) | {"0", "1"}  # ends of scales
    for number in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)*", body):
        grouped = re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d+)?", number)
        plain = number.replace(",", "") if grouped else number.rstrip(",")
        assert plain in known, f"{number} comes from nowhere"


@pytest.mark.parametrize("build", [demo_healed(), chat_with_other_licence(), unhealed(), THE_DEMO])
def test_every_result_in_the_front_matter_is_the_builds_to_the_last_digit(build: Build) -> None:
    evaluation = json.loads(build.model_dump_json())["evaluations"][build.shipped]
    losses = [evaluation["loss"], *evaluation["more_losses"]]
    known = [value for loss in losses for value in (loss["nats"], loss["normalized"], math.exp(loss["nats"]))]
    known += [task["value"] for task in evaluation["tasks"]]
    (model,) = front_matter(build, repo_id=None)["model-index"]
    assert [metric["value"] for result in model["results"] for metric in result["metrics"]] == known


def _written(value: Any) -> set[str]:
    """Every number of a nested value, in each way that a card writes numbers."""
    if isinstance(value, dict):
        return set().union(*(_written(item) for item in value.values()), *(_written(key) for key in value))
    if isinstance(value, list):
        return set().union(*map(_written, value))
    if isinstance(value, str):
        return set(re.findall(r"(?<![\w.])\d+(?:\.\d+)*", value)) | {value[:12]}
    if isinstance(value, bool) or value is None:
        return set()
    value = abs(value)  # a sign is no digit
    forms = {f"{value:.{digits}f}" for digits in range(4)} | {f"{value:g}", f"{100 * value:.0f}"}
    return (
        forms
        | {f"{value / unit:.3g}" for unit in (1e9, 1e6, 60)}
        | {f"{value / unit:.2f}" for unit in (1e9, 1e6)}
        | {f"{value / 60:.0f}", f"{value / 3600:.1f}"}
    )


def _derived(build: Build) -> set[str]:
    source, shipped = build.evaluations["source"], build.evaluations[build.shipped]
    n, layers = len(build.dropped), build.plan.num_layers
    values = [math.exp(loss.nats) for one in build.evaluations.values() for loss in one.losses]
    for old, new in zip(source.losses, shipped.losses, strict=True):
        values += [new.nats - old.nats, math.exp(new.nats - old.nats)]
    fewer = 1 - build.result_parameters / build.source_parameters
    values += [fewer, 1 - fewer, build.result_bytes / build.source_bytes]
    values += [build.source_parameters - build.result_parameters, n, n / layers, layers - 1, layers - n - 1]
    for before, after in zip(source.tasks, shipped.tasks, strict=True):
        if before.chance is not None:
            values.append((after.value - before.chance) / (before.value - before.chance))
    if "healed" in build.evaluations:
        pruned, healed = (build.evaluations[name].losses for name in ("pruned", "healed"))
        for before, cut, after in zip(source.losses, pruned, healed, strict=True):
            values.append((cut.nats - after.nats) / (cut.nats - before.nats))
    if build.comparisons:
        values += [1 - 0.95, SMALLEST_P]
    for before, after in zip(source.tasks, shipped.tasks, strict=True):
        values += [after.value - before.value, len(before.parts)]
        values += [b.value - a.value for a, b in zip(before.parts, after.parts, strict=True)]
    if build.speed:
        old, new = build.speed.source, build.speed.result
        values.append((new.memory_bytes or 0) / (old.memory_bytes or 1))
        values.append((new.cache_bytes_per_token or 0) / (old.cache_bytes_per_token or 1))
        values.append(new.prefill_tokens_per_second / old.prefill_tokens_per_second)
        values.append(new.decode_tokens_per_second / old.decode_tokens_per_second)
    return _written(values)


def test_the_template_itself_holds_no_numbers_but_the_ends_of_scales() -> None:
    template = (CARD_TEMPLATES / "card.md.j2").read_text(encoding="utf-8").split("## Citation")[0]
    prose = re.sub(r"```python.*?```|\{[{%].*?[%}]\}", "", template, flags=re.DOTALL)
    assert set(re.findall(r"\d+", prose)) <= {"0", "1"}


def test_no_measurable_loss_is_said_only_where_the_paired_test_finds_none() -> None:
    card = render(chat_with_other_licence(), has_healing_figure=False)
    assert re.findall(r"No measurable loss in (\w+)", card) == ["BoolQ"]
    card = render(without_measurable_loss(), has_healing_figure=False)
    assert "- No measurable loss in predicting this text: −0.001 nats per token, within chance" in card
    assert "cannot rule out a loss of up to 0.013." in card
    assert "It predicts text worse" not in card


def test_a_build_from_before_the_models_were_compared_still_has_a_card() -> None:
    card = render(chat_with_other_licence().model_copy(update={"comparisons": {}}), has_healing_figure=False)
    assert "measurable" not in card
    assert "| change |" not in card.split("## Limits")[0]
    assert "MMLU fell from 0.679 to 0.634" in card


def test_the_five_parts_of_a_group_that_fell_most_are_named_worst_first() -> None:
    card = render(chat_with_other_licence(), has_healing_figure=False)
    named = re.findall(r"^\| ([a-z\\_]+) \|.*−.* (\d+) \|$", card, flags=re.MULTILINE)
    assert [name.replace("\\", "") for name, _ in named] == list(SUBJECTS)[:5]
    assert [int(count) for _, count in named] == [count for *_, count in SUBJECTS.values()][:5]


def test_a_perplexity_that_rose_is_a_loss_and_one_that_fell_is_none() -> None:
    card = render(perplexities(False), has_healing_figure=False)
    assert "| wiki, 0-shot, word\\_perplexity ↓ | 410.500" in card
    assert "- wiki rose from 410.500 to 502.250.\n" in card
    better = render(perplexities(False, 410.5, 9_000.25, 402.25), has_healing_figure=False)
    assert "- wiki" not in better
    same = render(perplexities(False, 410.5, 9_000.25, 410.503), has_healing_figure=False)
    assert "No measurable loss in wiki: +0.003" in same
    assert "cannot rule out a rise of up to 0.017" in same


def test_a_metric_without_a_direction_is_no_loss_and_no_gain() -> None:
    card = render(perplexities(None), has_healing_figure=False)
    assert "| wiki, 0-shot, word\\_perplexity | 410.500" in card
    assert "wiki does not say whether higher or lower word\\_perplexity is better" in card
    assert "rose from" not in card
    assert "fell from" not in card


def test_the_parts_of_a_group_that_rose_most_are_those_that_lost_where_less_is_better() -> None:
    build = chat_with_other_licence()
    evaluations = {
        name: evaluation.model_copy(
            update={
                "tasks": tuple(t.model_copy(update={"higher_is_better": False}) for t in evaluation.tasks)
            }
        )
        for name, evaluation in build.evaluations.items()
    }
    (group,) = worst_parts(build.model_copy(update={"evaluations": evaluations}))
    assert [row[0] for row in group["rows"]] == ["sociology"]
    assert group["fall"] == ("rose", "rise")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_kept_and_shown_but_not_sent_to_the_hub(
    tmp_path: Path, value: float
) -> None:
    build = perplexities(False, 410.5, value, value)
    build.write(tmp_path)
    assert Build.read(tmp_path).model_dump_json() == build.model_dump_json()
    shown = {math.nan: "n/a", math.inf: "∞", -math.inf: "−∞"}[value]
    card = render(build, has_healing_figure=False)
    assert f" | {shown} ± 0.008" in card.replace("\u00a0", " ")
    assert "word_perplexity" not in card.partition("\n---\n")[0]


def test_free_writing_is_unknown_only_where_no_task_asks_for_it() -> None:
    unknown = "None of these tasks tests free writing"
    assert unknown in render(perplexities(False), has_healing_figure=False)
    assert unknown not in render(perplexities(True, metric="bleu", writes=True), has_healing_figure=False)


def test_the_command_on_the_card_lets_the_python_of_a_task_file_run() -> None:
    assert "--run-task-code" not in reproduction_command(perplexities(False))
    command = reproduction_command(perplexities(False, runs_code=True))
    assert "--run-task-code" in command


def test_recovery_counts_from_chance_and_is_unknown_where_the_source_is_at_chance() -> None:
    source = a_score("mmlu", 0.75, chance=0.25)
    assert recovery(source, a_score("mmlu", 0.50, chance=0.25)) == 0.5
    assert recovery(source, source) == 1
    assert recovery(source, a_score("mmlu", 0.25, chance=0.25)) == 0
    assert recovery(a_score("mmlu", 0.26, chance=0.25), source) is None  # 0.01 above, stderr 0.0081
    assert recovery(a_score("gsm8k", 0.7, chance=None), source) is None


def test_a_perplexity_beyond_the_float_range_is_shown_as_infinite_and_kept_from_the_hub() -> None:
    build = unhealed()
    pruned = build.evaluations["pruned"]
    loss = pruned.loss.model_copy(update={"nats": 800.0})
    evaluations = build.evaluations | {"pruned": pruned.model_copy(update={"loss": loss})}
    build = build.model_copy(update={"evaluations": evaluations})
    assert "| Perplexity ↓ | 8.19 | ∞ |" in render(build, has_healing_figure=False)
    metrics = front_matter(build, repo_id=None)["model-index"][0]["results"][0]["metrics"]
    assert [metric["type"] for metric in metrics] == ["loss", "normalized_loss"]


# Front matter -----------------------------------------------------------------------------------


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_the_hub_client_reads_the_front_matter_whole(card: Callable[[], str]) -> None:
    data = ModelCard(card()).data
    known = set(vars(ModelCardData())) | {"base_model_relation"}
    assert set(vars(data)) <= known
    assert data.eval_results
    assert data.eval_results[0].metric_type == "loss"
    assert "merge" not in data.tags


@pytest.mark.parametrize("name", CARDS)
def test_the_hub_accepts_every_golden_card(name: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    card = (GOLDEN / f"card_{name}.md").read_text(encoding="utf-8")
    ModelCard(card).validate()
    assert [(r.method, r.path) for r in hub.requests] == [("POST", "/api/validate-yaml")]
    with pytest.raises(ValueError, match="base_model"):
        ModelCard(card.replace("\nlibrary_name:", "\nbase_model: a/b/c\nlibrary_name:", 1)).validate()


def test_the_card_of_a_chat_model_says_what_it_was_healed_on() -> None:
    build = chat_with_other_licence()
    assert build.adapter
    assert "healing used plain text, not conversations" in render(build, has_healing_figure=False)
    data = build.adapter.data.model_copy(update={"is_chat": True})
    build = build.model_copy(update={"adapter": build.adapter.model_copy(update={"data": data})})
    card = render(build, has_healing_figure=False)
    assert "healing used conversations in its chat template" in card
    assert "conversations in the source's chat template; only the answers count in the loss |" in card


def test_a_model_from_a_folder_names_no_base_model_and_no_hub_data_sets() -> None:
    fields = front_matter(demo_healed(), repo_id=None)
    assert not {"base_model", "base_model_relation", "datasets"} & set(fields)
    assert fields["license"] == "apache-2.0"


def test_each_of_several_licences_is_on_the_card() -> None:
    build = with_a_full_card()
    assert front_matter(build, repo_id=None)["license"] == ["cc-by-nd-4.0", "other"]
    said = "Those of the source, all of which apply: cc-by-nd-4.0, own-1 ([text](https://a.b/c))."
    assert said in render(build, has_healing_figure=False)


def test_what_a_folder_descends_from_is_on_the_card() -> None:
    fields = front_matter(with_a_full_card(), repo_id=None)
    assert (fields["base_model"], fields["base_model_relation"]) == (["org/base", "org/other"], "finetune")
    said = "the source was itself derived from [org/base](https://huggingface.co/org/base), [org/"
    assert said in render(with_a_full_card(), has_healing_figure=False)


def test_a_build_of_an_adapter_names_it_and_its_base_with_both_versions() -> None:
    card = render(of_an_adapter(), has_healing_figure=False)
    adapter = f"[me/tuned](https://huggingface.co/me/tuned) (commit `{'ad' * 6}`)"
    assert (
        f"`tuned` is a LoRA adapter, {adapter}, merged into its base, `base`, before anything else." in card
    )
    assert f"| adapter | me/tuned, commit `{'ad' * 20}` |" in card
    assert f"| base of the adapter | base, content hash `{'ba' * 20}` |" in card
    assert f"factory build me/tuned@{'ad' * 20}" in card
    assert "base_model: me/tuned" in card
    assert "itself derived" not in card


def test_the_size_that_was_asked_for_is_on_the_card_with_what_came_of_it() -> None:
    card = render(sized(target=6 * 10**9), has_healing_figure=False)
    assert "| size asked for | for at most 6.00 B parameters, 9 layers must go, which leaves 5.28 B |" in card
    memory = {"fits": 16 * 10**9, "context": 8192, "cache_bytes": 10**9, "overhead_bytes": 2 * 10**9}
    card = render(sized(**memory), has_healing_figure=False)
    assert "to fit in 16.0 GB with 8,192 tokens, 9 layers must go, which leaves at most 13.6 GB" in card
    assert "weights 10.6 GB, cache 1.0 GB, overhead 2.0 GB" in card
    assert "factory build mistral-7b --drop" in card


def test_the_time_that_was_asked_for_is_on_the_card_and_not_in_its_command() -> None:
    card = render(within_budget(1800), has_healing_figure=False)
    assert "| time asked for | 30 min, to which the amounts of work were fitted by an estimate |" in card
    assert "--budget" not in card


def test_a_mix_is_on_the_card_with_the_share_and_version_of_each_text() -> None:
    build = chat_with_other_licence()
    assert build.adapter
    hub = DataSource(name="org/chats", version="c0" * 20, hub_id="org/chats", split="train", is_chat=True)
    file = DataSource(name="own.jsonl", version="f1" * 32, is_chat=True)
    parts = (Share(data=hub, share=2), Share(data=file, share=1))
    data = DataSource(name="org/chats*2 + own.jsonl", version="00" * 32, is_chat=True, mixed=parts)
    adapter = build.adapter.model_copy(update={"data": data})
    card = render(build.model_copy(update={"adapter": adapter}), has_healing_figure=False)
    link = "[org/chats](https://huggingface.co/datasets/org/chats), train split"
    assert f"on a mix, by length, of 2 parts of {link} and 1 part of own.jsonl." in card
    assert f"| healing text, share 2 | {link}, version `{'c0' * 20}` |" in card
    assert f"| healing text, share 1 | own.jsonl, version `{'f1' * 32}` |" in card
    assert "- org/chats\n" in card  # among the data sets of the front matter


def test_a_relative_licence_link_is_made_absolute_at_the_commit() -> None:
    build = chat_with_other_licence()
    link = front_matter(build, repo_id=None)["license_link"]
    assert link == f"https://huggingface.co/{build.source.repo_id}/blob/{build.source.commit}/LICENSE"


def test_a_discarded_healing_text_is_not_among_the_data_sets() -> None:
    build = healing_discarded()
    assert build.adapter is not None
    data = build.adapter.data.model_copy(update={"hub_id": "somebody/else"})
    build = build.model_copy(update={"adapter": build.adapter.model_copy(update={"data": data})})
    assert front_matter(build, repo_id=None)["datasets"] == ["allenai/c4"]


# The command ------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """What a build leaves, as far as its card goes."""
    (tmp_path / "model").mkdir()
    chat_with_other_licence().write(tmp_path)
    return tmp_path


def write_again(folder: Path) -> str:
    return (
        CliRunner().invoke(cli, ["card", str(folder)], catch_exceptions=False, standalone_mode=False).output
    )


def test_the_card_is_written_again_from_the_build(finished: Path) -> None:
    assert write_again(finished).split() == [str(finished / "model" / "README.md")]
    assert (finished / "model" / "README.md").read_text() == render(
        chat_with_other_licence(), has_healing_figure=False
    )
    with pytest.raises(UsageError, match="is not a build folder"):
        write_again(finished / "model")


def test_the_card_of_a_published_build_goes_on_naming_its_repository(finished: Path) -> None:
    place = {"repo_id": "me/smaller", "url": "u", "commit": "c", "private": True, "files": {}}
    Publication.model_validate(place).write(finished)
    write_again(finished)
    assert 'model="me/smaller"' in (finished / "model" / "README.md").read_text()


# Hostile names ----------------------------------------------------------------------------------

PARSER = MarkdownIt("commonmark").enable("table")


def _outline(card: str) -> list[str]:
    """Every element of the body in order, links and images with their address; text is left out."""
    outline = []
    for token in PARSER.parse(card.split("\n---\n", 1)[1]):
        for part in [token, *(token.children or [])]:
            if part.type not in ("text", "text_special", "code_inline"):
                outline.append(f"{part.type} {part.attrs.get('src', '')}{part.attrs.get('href', '')}")
    return outline


def _build_named(name: str) -> Build:
    """The demo with everything that a model, a text, a task or a user can name called `name`."""
    build = demo_healed()
    assert build.adapter is not None
    evaluation = build.evaluations["source"]
    data = build.calibration.model_copy(update={"name": name, "version": name, "split": name or "-"})
    score = evaluation.tasks[0].model_copy(update={"label": name, "metric": name, "task": name})
    loss = evaluation.loss.model_copy(update={"data": data})
    evaluation = evaluation.model_copy(
        update={"tasks": (score,), "loss": loss, "harness": name, "dtype": name}
    )
    return build.model_copy(
        update={
            "name": f"x{name}",
            "device": name,
            "source": build.source.model_copy(update={"name": name, "license": f"x{name}"}),
            "calibration": data,
            "adapter": build.adapter.model_copy(update={"data": data, "target_modules": (name,)}),
            "evaluations": dict.fromkeys(build.evaluations, evaluation),
            "versions": {name: name},
        }
    )


@settings(max_examples=100, deadline=None)
@given(name=st.text(max_size=60) | st.text(alphabet="`|*_[]()<>#!&~$\\\n\t -=+1.:/ab", max_size=60))
@example(name="</code><script>alert(1)</script>")
@example(name="a | b | c\n\n# A heading\n---\nlicense: mit")
@example(name="[click](https://example.com) ![x](https://example.com/x.png) <https://example.com>")
@example(name="`` ` ``` \\` \u202e\u200b\x1b[31m")
@example(name="{{ 7 * 7 }} {% raw %} ~~a~~ **b** __c__ $d$ &lt;")
def test_no_name_changes_the_shape_of_the_card(name: str) -> None:
    assume(name != "exact_match")  # the one metric that means the model writes freely: another sentence
    card = render(_build_named(name), has_healing_figure=True)
    assert _outline(card) == _plain_outline()
    assert [c for c in card if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c != "\n"] == []
    assert ModelCard(card, ignore_metadata_errors=True).data.library_name == "transformers"


@cache
def _plain_outline() -> list[str]:
    return _outline(render(_build_named("word"), has_healing_figure=True))


def test_an_address_in_a_name_does_not_become_a_link() -> None:
    assert markdown("https://example.com") == r"https\://example.com"
    assert markdown("WWW.example.com") == r"WWW\.example.com"


# Code on the card -------------------------------------------------------------------------------


def _tiny_model(folder: Path, *, chat: bool) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<unk>": 0, "</s>": 1, "A": 2, "glacier": 3, "is": 4, "What": 5, "a": 6, "?": 7}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    if chat:
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("name", CARDS)
def test_the_code_on_every_golden_card_runs_as_it_stands(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = (GOLDEN / f"card_{name}.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert code
    place = re.search(r'model="(.*?)"', code[1])
    assert place
    _tiny_model(tmp_path / place[1], chat='"role"' in code[1])
    monkeypatch.chdir(tmp_path)
    exec(compile(code[1], "card", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("criterion", "said"),
    [
        ("deepest", "the deepest layers but the last were dropped"),
        ("block-influence", "by the Block Influence of ShortGPT"),
        ("chosen", "the author of this model chose the layers"),
        ("loss", "raised the loss on 32 passages"),
        ("greedy", "in the order 6, 2, 5."),
    ],
)
def test_the_card_says_how_the_layers_were_chosen(criterion: str, said: str) -> None:
    build = chosen_by(criterion)
    card = render(build, has_healing_figure=False)
    assert said in card
    assert ("scattered" in card) == (build.dropped == (2, 5, 6))
    assert said not in render(demo_healed(), has_healing_figure=False)


# Reproduction and files -------------------------------------------------------------------------


def _options(build: Build) -> dict[str, Any]:
    words = shlex.split(str(reproduction_command(build)).replace("\\\n", " "))
    assert words[:2] == ["factory", "build"]
    return dict(command_line_build.make_context("build", words[2:]).params)


def test_the_command_on_the_card_is_accepted_and_says_what_differs() -> None:
    options = _options(chat_with_other_licence())
    assert options["model"].startswith("meta-llama/Llama-3.1-8B-Instruct@0e9e39f")
    assert (options["drop"], options["seed"], options["no_heal"]) == ("0.25", 3, None)
    assert (options["heal_rank"], options["heal_steps"], options["samples"]) == (8, 2000, None)
    options = _options(unhealed())
    assert (options["model"], options["no_heal"], options["tasks"]) == ("mistral-7b", True, "none")


def test_the_command_repeats_how_the_layers_were_measured_and_chosen() -> None:
    build = demo_healed()
    config = build.config | {
        "measure": build.config["measure"] | {"tokens": "all", "four_bit": True, "exact_length": True},
        "plan": build.config["plan"] | {"criterion": "greedy", "num_documents": 16},
    }
    changed = build.model_copy(update={"config": config})
    options = _options(changed)
    assert (options["tokens"], options["load_in_4bit"]) == ("all", True)
    assert (options["criterion"], options["plan_documents"]) == ("greedy", 16)
    assert "settings without an option" not in render(changed, has_healing_figure=False)


def test_the_command_of_a_recipe_left_alone_is_short() -> None:
    assert str(reproduction_command(demo_healed())) == "factory build demo --drop 0.3"


@pytest.mark.parametrize("name", ["$(touch x)", "a b; rm -r c", "it's", "`id`"])
def test_a_folder_name_is_one_word_of_the_command(name: str) -> None:
    build = demo_healed().model_copy(update={"reference": name})
    assert shlex.split(str(reproduction_command(build)).replace("\\\n", " "))[2] == f"./{name}"


def test_a_setting_without_an_option_is_still_on_the_card() -> None:
    build = demo_healed()
    config = build.config | {"heal": build.config["heal"] | {"dropout": 0.25}}
    card = render(build.model_copy(update={"config": config}), has_healing_figure=False)
    assert "| settings without an option | heal.dropout = 0.25 |" in card


def test_a_build_with_settings_that_are_gone_by_now_still_has_its_card_which_names_them() -> None:
    build = demo_healed()
    config = build.config | {"heal": build.config["heal"] | {"schedule": "linear"}, "device_map": None}
    card = render(build.model_copy(update={"config": config}), has_healing_figure=False)
    told = '| settings without an option | heal.schedule = "linear", device\\_map = null |\n'
    assert told in card
    assert card.replace(told, "") == render(build, has_healing_figure=False)


def test_a_setting_with_a_value_that_is_gone_by_now_is_named_in_one_line() -> None:
    build = demo_healed()
    config = build.config | {"heal": build.config["heal"] | {"objective": "rl"}}
    old = build.model_copy(update={"config": config, "factory_version": "0.0.9"})
    with pytest.raises(
        StoreError, match=r"demo-drop30 was made by factory 0\.0\.9, .*: heal\.objective: "
    ) as raised:
        render(old, has_healing_figure=False)
    assert raised.value.hint == "use factory 0.0.9"


def test_a_field_that_this_version_does_not_have_is_named_and_the_folder_can_be_built_into_again(
    tmp_path: Path,
) -> None:
    build = demo_healed()
    for name in (Build.file_name, "profile.json"):
        value = build.model_dump(mode="json") | {"factory_version": "0.0.9", "mood": "good"}
        (tmp_path / name).write_text(json.dumps(value))
    (tmp_path / "model").mkdir()
    with pytest.raises(StoreError, match=r"cannot read .*build\.json: mood: Extra inputs") as raised:
        Build.read(tmp_path)
    assert raised.value.hint == "use factory 0.0.9, which wrote it"
    assert read_if_same(build, tmp_path) is None


def test_a_heal_that_left_no_model_has_its_infinite_loss_on_the_card_and_no_column() -> None:
    build = healing_discarded()
    del build.evaluations["healed"]
    losses = {"unhealed": 2.88, "healed": math.inf}
    text = render(build.model_copy(update={"guard_losses": losses}), has_healing_figure=False)
    assert "for the files themselves, 2.880 without healing and ∞ with it" in text
    assert "*healed*" not in text
    assert Build.model_validate_json(build.model_copy(update={"guard_losses": losses}).text())


def test_the_card_is_written_with_the_healing_figure_only_where_there_is_one(tmp_path: Path) -> None:
    assert "healing.png" not in write_card(demo_healed(), tmp_path).read_text(encoding="utf-8")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "healing.png").touch()
    path = write_card(demo_healed(), tmp_path, repo_id="me/demo-7-layers")
    card = path.read_text(encoding="utf-8")
    assert path == tmp_path / "README.md"
    assert "](figures/healing.png)" in card
    assert 'model="me/demo-7-layers"' in card


def test_the_card_says_of_a_text_what_another_use_has() -> None:
    text = DataSource(name="t.jsonl", version="0" * 64, part="1 of 2")
    assert text_name(text) == "t.jsonl, part 1 of 2 of its documents"
    left = "without any of 20 documents that serve another use (0123456789abcdef)"
    assert text_name(text.model_copy(update={"part": left})) == f"t.jsonl, {left}"
