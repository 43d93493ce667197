"""Texts are checked against the model before any work: conversations need a chat template."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from factory.api.progress import Bars
from factory.config.request import BuildRequest
from factory.config.settings import BuildConfig, EvaluateSettings, HealSettings, MeasureSettings
from factory.errors import DataError, HubError, UsageError
from factory.hub.resolve import resolve
from factory.model.tokenizer import load_tokenizer
from factory.pipeline.prepare import check_question_form, prepare
from factory.pipeline.texts import SPLITS, check_kinds, check_tokens, open_texts, split_otherwise
from factory.resources import DEMO_MODEL
from factory.text.text import Texts, text_identity
from tests.builders.models import END, byte_tokenizer, save_llama
from tests.builders.texts import chats, conversation, rhymes

MERGES = [("1", "2"), ("12", "3")]
STRICT = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}"
    "{{ raise_exception('no role ' ~ m.role) }}{% endif %}{{ m.content }}{% endfor %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_llama(tmp_path / "tiny", num_layers=2)
    rows = [{"messages": json.loads(chat), "source": "x"} for chat in chats(40)]
    texts = [{"text": rhyme} for rhyme in rhymes(8)]
    for name, lines in (("chat", rows), ("text", texts), ("odd", [*rows, {"messages": odd()}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def odd() -> list[dict[str, str]]:
    return [{"role": "critic", "content": "?"}, {"role": "assistant", "content": "!"}]


def opened(folder: Path, *, healing: str = "text", evaluation: str = "text", **more: Any) -> Texts:
    return open_texts(
        BuildConfig(
            reference="m",
            drop=0.5,
            measure=MeasureSettings(data="stdlib:train"),
            heal=HealSettings(data=str(folder / f"{healing}.jsonl")),
            evaluate=EvaluateSettings(data=(str(folder / f"{evaluation}.jsonl"),)),
            **more,
        )
    )


@pytest.mark.parametrize("use", ["healing", "evaluation"])
def test_conversations_without_a_chat_template_are_refused(folder: Path, use: str) -> None:
    source = resolve(str(folder / "tiny"))
    with pytest.raises(DataError, match="tiny has no chat template to render them") as caught:
        check_kinds(source, opened(folder, **{use: "chat"}))
    assert caught.value.message.startswith("chat.jsonl#messages holds conversations")
    assert check_kinds(source, opened(folder)) is None


def test_a_chat_model_healed_on_plain_text_is_told(folder: Path) -> None:
    (folder / "tiny" / "chat_template.jinja").write_text(STRICT)
    source = resolve(str(folder / "tiny"))
    note = "tiny is a chat model to be healed on plain text, text.jsonl: `heal_data` takes conversations"
    assert check_kinds(source, opened(folder)) == note
    assert check_kinds(source, opened(folder, heal_enabled=False)) is None
    assert check_kinds(source, opened(folder, healing="chat")) is None


def test_questions_in_a_chat_template_need_one(folder: Path) -> None:
    config = BuildConfig(reference="m", drop=0.5, evaluate=EvaluateSettings(apply_chat_template=True))
    with pytest.raises(UsageError, match="`apply_chat_template`: tiny has no chat template"):
        check_question_form(resolve(str(folder / "tiny")), config)
    (folder / "tiny" / "chat_template.jinja").write_text(STRICT)
    check_question_form(resolve(str(folder / "tiny")), config)


def test_a_template_that_fails_is_found_before_the_work(folder: Path) -> None:
    (folder / "tiny" / "chat_template.jinja").write_text(STRICT)
    source, config = resolve(str(folder / "tiny")), BuildConfig(reference="m", drop=0.5)
    check_tokens(source, opened(folder, healing="chat"), config, note=pytest.fail)
    with pytest.raises(DataError, match="no role critic"):
        check_tokens(source, opened(folder, healing="odd"), config, note=pytest.fail)


def test_a_dry_run_renders_the_first_conversations(folder: Path) -> None:
    save_llama(folder / "tiny", num_layers=4)
    (folder / "tiny" / "chat_template.jinja").write_text("{{ raise_exception('not today') }}")
    texts = dict.fromkeys(("heal_data", "calibration_data", "eval_data"), f"{folder}/chat.jsonl")
    asked = {"model": str(folder / "tiny"), "drop": 0.5, "home": str(folder / "home"), **texts}
    with pytest.raises(DataError, match="not today"):
        prepare([BuildRequest.read(asked)], Bars(), dry_run=True)
    assert not (folder / "home").exists()


def test_conversations_without_an_answer_in_a_sequence_are_counted(folder: Path) -> None:
    (folder / "tiny" / "chat_template.jinja").write_text(STRICT)
    source, notes = resolve(str(folder / "tiny")), list[str]()
    config = BuildConfig(reference="m", drop=0.5, evaluate=EvaluateSettings(sequence_length=8))
    rows = [{"messages": json.loads(conversation(question, "Yes."))} for question in ("So?", "A longer one?")]
    (folder / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    check_tokens(source, opened(folder, evaluation="two"), config, note=notes.append)
    assert notes == [
        "1 of the first 2 conversations of two.jsonl#messages have no answer in 8 tokens and are not used"
    ]


def test_conversations_are_divided_and_kept_apart_as_texts_are(folder: Path) -> None:
    texts = opened(folder, healing="chat", evaluation="chat")
    healed, evaluated = (set(text.documents()) for text in (texts.healing, texts.evaluation))
    assert not healed & evaluated
    assert len(healed | evaluated) == 40
    more = opened(folder, healing="odd", evaluation="chat")
    assert len(list(more.healing.documents())) + len(list(more.evaluation.documents())) == 41
    assert text_identity(texts.healing.data) != text_identity(texts.evaluation.data)


@pytest.mark.parametrize("by_class", [True, False])
def test_a_tokenizer_that_does_not_split_as_its_file_says_is_told(folder: Path, by_class: bool) -> None:
    tokenizer = byte_tokenizer().backend_tokenizer
    words = Tokenizer(models.BPE(vocab={**tokenizer.get_vocab(), "12": 257, "123": 258}, merges=MERGES))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    words.decoder = decoders.ByteLevel()
    words.save(str(folder / "tiny" / "tokenizer.json"))
    named = "GPT2Tokenizer" if by_class else "PreTrainedTokenizerFast"
    config = {"tokenizer_class": named, "eos_token": END, "bos_token": END, "unk_token": END}
    (folder / "tiny" / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder / "tiny")
    assert split_otherwise(folder / "tiny", tokenizer) == (SPLITS[0] if by_class else None)


def test_a_tokenizer_that_obeys_its_file_is_not_told(folder: Path) -> None:
    for model in (DEMO_MODEL, folder / "tiny"):
        assert split_otherwise(model, load_tokenizer(model)) is None


@pytest.mark.parametrize(
    ("here", "away", "options"),
    [
        (
            (),
            "allenai/c4:en and wikimedia/wikipedia:20231101.en",
            "`calibration_data`, `heal_data`, `eval_data`",
        ),
        (("heal", "evaluate"), "allenai/c4:en", "`calibration_data`"),
        (("measure", "evaluate"), "allenai/c4:en", "`heal_data`"),
    ],
)
def test_without_a_network_the_data_that_is_not_here_is_named_with_its_options(
    folder: Path, monkeypatch: pytest.MonkeyPatch, here: tuple[str, ...], away: str, options: str
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")  # nothing answers there
    text = str(folder / "text.jsonl")
    local = {part: {"data": text if part == "measure" else [text]} for part in here}
    config = BuildConfig.model_validate({"reference": "m", "drop": 0.3, **local})
    with pytest.raises(HubError) as refused:
        open_texts(config)
    assert refused.value.message.startswith(f"cannot read {away}: no connection to http://127.0.0.1:1")
    assert refused.value.hint.endswith(f"; or give a text on this machine with {options}")


def test_without_a_network_only_options_that_the_command_has_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(HubError) as refused:
        open_texts(BuildConfig(reference="m", drop=0.3), heals=False, evaluates=False)  # as `plan` does
    assert refused.value.hint.endswith("; or give a text on this machine with `calibration_data`")


def test_a_run_whose_texts_are_here_asks_no_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    text = str(folder / "text.jsonl")
    sections = {"measure": {"data": text}, "heal": {"data": [text]}, "evaluate": {"data": [text]}}
    texts = open_texts(BuildConfig.model_validate({"reference": "m", "drop": 0.3, **sections}))
    assert {one.data.name for one in texts.whole} == {"text.jsonl"}
