"""Losses are those of the definition, tasks are lm-eval's, and speeds come from turns."""

import ast
import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lm_eval.models
import pytest
import torch
from lm_eval.tasks import TaskManager
from transformers import LlamaForCausalLM

from factory.errors import DataError, UsageError
from factory.evaluation.answers import LOSSES, read_answers, read_losses
from factory.evaluation.evaluate import evaluate
from factory.evaluation.harness import vllm_arguments
from factory.evaluation.speed import _footprint, compare_speed
from factory.evaluation.tasks import check_backend
from factory.model.loading import load_model
from factory.model.tokenizer import load_tokenizer
from tests.builders.evaluation import CHOICES, SETTINGS, evaluation_of, questions, quiet, save_task
from tests.builders.models import END, byte_tokenizer, save_llama
from tests.builders.texts import chats, rhymes, text_of
from tests.places import ROOT

DEMO = ROOT / "factory" / "demo"
WRITTEN = """output_type: generate_until
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list:
  - metric: exact_match
filter_list:
  - name: strict
    filter:
      - {function: regex, regex_pattern: "#### ([0-9]+)"}
      - {function: take_first}
  - name: flexible
    filter:
      - {function: regex, regex_pattern: "([0-9]+)"}
      - {function: take_first}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


def test_a_model_that_knows_nothing_loses_log_v(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    blank = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        blank.model.embed_tokens.weight.zero_()  # tied: every logit is 0
    blank.save_pretrained(folder)
    loss = evaluation_of(folder, tmp_path / "into", ["some words", "and some more"]).loss
    assert loss.nats == pytest.approx(math.log(257), abs=1e-5)
    assert loss.normalized == pytest.approx(1)
    assert loss.perplexity == pytest.approx(257, rel=1e-4)
    assert loss.stderr == pytest.approx(0, abs=1e-6)


def test_the_loss_is_that_computed_naively_one_window_at_a_time(model: Path, tmp_path: Path) -> None:
    documents = [text[: 20 + 37 * index] for index, text in enumerate(rhymes(6))]
    loss = evaluation_of(model, tmp_path / "into", documents).loss
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    totals = []
    for document in documents:
        tokens = tokenizer(document).input_ids
        nats, count = 0.0, 0
        for start in range(0, len(tokens), 64):
            window = torch.tensor([tokens[start : start + 64]])
            if window.shape[1] > 1:
                with torch.no_grad():
                    mean = loaded(window, labels=window).loss.item()
                nats, count = nats + mean * (window.shape[1] - 1), count + window.shape[1] - 1
        totals.append((count, nats))
    tokens_in_all = sum(count for count, _ in totals)
    mean = sum(nats for _, nats in totals) / tokens_in_all
    assert loss.num_tokens == tokens_in_all
    assert loss.nats == pytest.approx(mean, abs=1e-5)
    spread = sum((nats - mean * count) ** 2 for count, nats in totals) * 6 / 5
    assert loss.stderr == pytest.approx(math.sqrt(spread) / tokens_in_all, rel=1e-3)
    by_document = json.loads((tmp_path / "into" / LOSSES).read_text())
    assert sorted(count for count, _ in by_document) == sorted(count for count, _ in totals)


def test_every_token_is_predicted_once_where_each_window_begins_with_the_tokenizers_prefix(
    tmp_path: Path,
) -> None:
    folder = save_llama(tmp_path / "model")
    byte_tokenizer(f"{END} $A {END}").save_pretrained(folder)
    documents = ["x" * 200, "y" * 10]
    loss = evaluation_of(folder, tmp_path / "into", documents).loss
    loaded, nats = load_model(folder), 0.0
    for window in (["x"] * 63, ["x"] * 63, ["x"] * 63, ["x"] * 11, ["y"] * 10):
        ids = torch.tensor([[0, *byte_tokenizer()("".join(window)).input_ids]])
        with torch.no_grad():
            nats += loaded(ids, labels=ids).loss.item() * len(window)
    assert loss.num_tokens == 210
    assert loss.nats == pytest.approx(nats / 210, abs=1e-5)


def test_only_as_many_documents_are_read_as_asked(model: Path, tmp_path: Path) -> None:
    assert evaluation_of(model, tmp_path / "into", rhymes(9), num_documents=4).loss.num_documents == 4


def test_too_little_text_is_a_clear_error(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="rhymes has 1 usable documents"):
        evaluation_of(model, tmp_path / "into", ["only one"])


def test_the_embedded_task_is_scored_as_by_lm_eval_itself(tmp_path: Path) -> None:
    limit = 24
    (score,) = evaluation_of(
        DEMO / "model", tmp_path / "into", rhymes(2), tasks=("next_line",), limit=limit
    ).tasks
    found = lm_eval.simple_evaluate(
        "hf",
        f"pretrained={DEMO / 'model'},dtype=float32",
        ["next_line"],
        task_manager=TaskManager(include_path=str(DEMO / "tasks"), include_defaults=False),
        limit=limit,
        batch_size=8,
        device="cpu",
    )
    theirs = found["results"]["next_line"]
    assert score.value == theirs["acc_norm,none"]
    assert score.stderr == theirs["acc_norm_stderr,none"]
    assert (score.metric, score.chance, score.num_samples, score.num_fewshot) == ("acc_norm", 0.25, limit, 0)


def with_template(folder: Path, template: str) -> Path:
    save_llama(folder, num_layers=2)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_the_loss_on_conversations_is_of_their_answers(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    folder = with_template(tmp_path / "model", template)
    found = evaluation_of(folder, tmp_path / "into", chats(3), sequence_length=200).loss
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    counts, nats = 0, 0.0
    for chat in chats(3):
        rendered = tokenizer.apply_chat_template(json.loads(chat), tokenize=False)
        logits = model(torch.tensor([tokenizer(rendered).input_ids])).logits[0].log_softmax(-1)
        at = 0
        for turn in rendered.split(END)[:-1]:  # one token per byte, and one for the end
            until = at + len(turn) + 1
            if turn.startswith("[assistant]"):
                ids = tokenizer(rendered).input_ids
                answer = range(at + len("[assistant]"), until)
                nats -= sum(float(logits[place - 1, ids[place]]) for place in answer)
                counts += len(answer)
            at = until
    assert found.num_tokens == counts
    assert found.nats == pytest.approx(nats / counts, rel=1e-4)


def test_tasks_are_asked_in_the_chat_template_if_that_is_wanted(tmp_path: Path) -> None:
    folder = with_template(tmp_path / "model", "{{ raise_exception('asked ' ~ messages[0].content) }}")
    task = save_task(tmp_path, "mine", questions(6))
    evaluation_of(folder, tmp_path / "into", rhymes(2), tasks=(str(task),))
    with pytest.raises(UsageError, match="asked a and"):
        evaluation_of(folder, tmp_path / "in", rhymes(2), tasks=(str(task),), apply_chat_template=True)


def test_a_task_in_a_yaml_file_needs_no_name_that_lm_eval_knows(model: Path, tmp_path: Path) -> None:
    task = save_task(tmp_path, "mine", questions(6))
    (score,) = evaluation_of(model, tmp_path / "into", rhymes(2), tasks=(str(task),)).tasks
    assert (score.task, score.metric, score.chance, score.num_samples) == ("mine", "acc", 0.5, 6)
    assert score.parts == ()
    kept = read_answers(tmp_path / "into", 0)
    assert kept
    assert kept[0][0] == score
    assert sum(kept[0][1]["mine"]) / 6 == score.value


def test_a_group_tells_the_score_of_each_of_its_tasks(model: Path, tmp_path: Path) -> None:
    for name, count in (("first", 3), ("second", 5)):
        save_task(tmp_path, name, questions(count))
    group = tmp_path / "both.yaml"
    group.write_text(
        "group: both\ntask: [first, second]\n"
        "aggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"
    )
    (score,) = evaluation_of(model, tmp_path / "into", rhymes(2), tasks=(str(group),)).tasks
    assert [(part.label, part.num_samples) for part in score.parts] == [("first", 3), ("second", 5)]
    assert score.num_samples == 8
    assert score.value == pytest.approx(sum(part.value * part.num_samples for part in score.parts) / 8)
    kept = read_answers(tmp_path / "into", 0)
    assert kept
    assert {task: len(answers) for task, answers in kept[0][1].items()} == {"first": 3, "second": 5}


@pytest.mark.parametrize(
    ("choices", "chance"),
    [
        (lambda _: ["no", "yes"], 0.75),  # whoever always says yes
        (lambda index: ["no", f"yes {index}"], 0.5),  # which is no answer that all questions have
    ],
)
def test_chance_is_no_less_than_the_share_of_the_commonest_answer_of_these_questions(
    model: Path, tmp_path: Path, choices: Any, chance: float
) -> None:
    rows = [{"q": f"{i} is", "choices": choices(i), "answer": int(i not in (2, 7))} for i in range(9)]
    task = save_task(tmp_path, "mostly", rows)
    (score,) = evaluation_of(model, tmp_path / "into", rhymes(2), tasks=(str(task),), limit=8).tasks
    assert (score.metric, score.chance, score.num_samples) == ("acc", chance, 8)


def test_a_question_whose_answer_is_looked_for_in_two_ways_counts_once(model: Path, tmp_path: Path) -> None:
    rows = [{"q": "one plus one is", "answer": "2"}, {"q": "two plus two is", "answer": "4"}]
    task = save_task(tmp_path, "written", rows, WRITTEN)
    (score,) = evaluation_of(model, tmp_path / "into", rhymes(2), tasks=(str(task),)).tasks
    assert (score.metric, score.answers, score.num_samples) == ("exact_match", "strict", 2)
    assert score.chance is None
    kept = read_answers(tmp_path / "into", 0)
    assert kept
    assert len(kept[0][1]["written"]) == 2


class KilledError(Exception): ...


@pytest.mark.parametrize("killed_in", ["loss", "second"])
def test_an_evaluation_that_was_killed_repeats_nothing_that_it_had_finished(
    model: Path, tmp_path: Path, killed_in: str
) -> None:
    tasks = tuple(str(save_task(tmp_path, name, questions(4))) for name in ("first", "second"))
    documents = [f"{index} {text}" for index, text in enumerate(rhymes(40))]
    settings = SETTINGS.model_copy(update={"tasks": tasks})
    whole = evaluation_of(model, tmp_path / "whole", documents, tasks=tasks)
    into = tmp_path / "into"
    into.mkdir()

    def deadly(done: int, _total: int, note: str) -> None:
        if note == killed_in and (done > 32 or note != "loss"):
            raise KilledError

    with pytest.raises(KilledError):
        evaluate(model, text_of(documents), settings=settings, into=into, progress=deadly)
    heard: list[tuple[int, str]] = []
    again = evaluate(
        model,
        text_of(documents),
        settings=settings,
        into=into,
        progress=lambda done, _total, note: heard.append((done, note)),
    )
    assert again == whole
    assert read_losses(into) == read_losses(tmp_path / "whole")
    if killed_in == "loss":  # it had kept 32 documents
        done = [done for done, note in heard if note == "loss"]
        assert done == sorted(done)
        assert 32 < done[0] < done[-1] == 40
    else:
        assert {note for _, note in heard} == {"second"}


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "does not exist"), ("dataset_path: json\n", "names no task")]
)
def test_a_yaml_file_that_is_no_task_is_a_clear_error(
    model: Path, tmp_path: Path, content: str | None, problem: str
) -> None:
    task = tmp_path / "mine.yaml"
    if content:
        task.write_text(content)
    with pytest.raises(UsageError, match=problem):
        evaluation_of(model, tmp_path / "into", rhymes(2), tasks=(str(task),))


@pytest.mark.parametrize("wrong", ["test_split: validation\n", "doc_to_text: '{{ q '\n"])
def test_a_task_file_that_does_not_fit_its_data_is_a_clear_error(
    model: Path, tmp_path: Path, wrong: str
) -> None:
    task = save_task(tmp_path, "mine", questions(2), more=CHOICES)
    key = wrong.partition(":")[0]
    kept = [line for line in task.read_text().splitlines(keepends=True) if not line.startswith(key)]
    task.write_text("".join(kept) + wrong)
    with pytest.raises(UsageError, match=r"lm-eval cannot use the task file '.*mine\.yaml'"):
        evaluation_of(model, tmp_path / "into", rhymes(2), tasks=(str(task),))


def test_speed_is_measured_for_both_models_on_the_named_device(model: Path, tmp_path: Path) -> None:
    smaller = save_llama(tmp_path / "smaller", num_layers=1)
    speed = compare_speed(model, smaller, rounds=2, prompt_tokens=16, new_tokens=4, progress=quiet)
    assert speed.device.startswith("CPU")
    for side in (speed.source, speed.result):
        assert side.prefill_tokens_per_second > 0
        assert side.decode_tokens_per_second > 0
        assert side.decode_spread >= 0


def test_memory_is_that_of_the_weights_and_of_a_cache_that_grows_by_its_layers(
    model: Path, tmp_path: Path
) -> None:
    smaller = save_llama(tmp_path / "smaller", num_layers=1)
    speed = compare_speed(model, smaller, rounds=2, prompt_tokens=16, new_tokens=4, progress=quiet)
    assert (speed.memory, speed.dtype) == ("weights and cache", "float32")
    for side, folder, num_layers in ((speed.source, model, 4), (speed.result, smaller, 1)):
        # Keys and values of one head of 32 numbers of 4 bytes.
        assert side.cache_bytes_per_token == num_layers * 2 * 32 * 4
        loaded = load_model(folder)
        weights = sum(tensor.nbytes for tensor in (*loaded.parameters(), *loaded.buffers()))
        assert side.memory_bytes == weights + 20 * side.cache_bytes_per_token


def test_a_cache_that_slides_or_holds_a_state_is_counted_as_it_is() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    sliding = MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=8)).eval()
    prompt = torch.ones((1, 16), dtype=torch.long)
    _, growth = _footprint(sliding, prompt, new_tokens=4)
    assert growth == 0


def test_vllm_that_is_not_installed_is_a_clear_error() -> None:
    settings = SETTINGS.model_copy(update={"backend": "vllm"})
    if find_spec("vllm"):
        check_backend(settings)
        return
    with pytest.raises(UsageError, match="`eval_backend=vllm`: vLLM is not installed here") as raised:
        check_backend(settings)
    assert "pip install vllm" in raised.value.hint


@pytest.mark.parametrize(("num_gpus", "used"), [(0, 1), (1, 1), (2, 2), (3, 2), (8, 2)])
def test_vllm_gets_the_files_that_ship_and_gpus_that_divide_its_heads(
    model: Path, num_gpus: int, used: int
) -> None:
    arguments = vllm_arguments(model, num_gpus=num_gpus)  # of a model with two heads
    assert (arguments["pretrained"], arguments["tensor_parallel_size"]) == (str(model), used)
    # Without vLLM the module that takes them cannot be imported, but read.
    read = ast.parse((Path(lm_eval.models.__file__).parent / "vllm_causallms.py").read_text())
    (taken,) = (
        each
        for node in read.body
        if isinstance(node, ast.ClassDef) and node.name == "VLLM"
        for each in node.body
        if isinstance(each, ast.FunctionDef) and each.name == "__init__"
    )
    assert arguments.keys() <= {argument.arg for argument in taken.args.args}
