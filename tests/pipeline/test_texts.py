"""Texts are checked against the model before any work: conversations need a chat template."""

import json
from pathlib import Path
from typing import Any

import pytest

from factory.config.settings import BuildConfig, EvaluateSettings, HealSettings, MeasureSettings
from factory.errors import DataError, UsageError
from factory.hub.resolve import resolve
from factory.pipeline.prepare import check_question_form
from factory.pipeline.texts import check_kinds, check_tokens, open_texts
from factory.text.text import Texts, text_identity
from tests.builders.models import save_llama
from tests.builders.texts import chats, conversation, rhymes

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
