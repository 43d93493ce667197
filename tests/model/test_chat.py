"""Conversations are rendered by the model's own template, and only the answers carry loss."""

import json
from pathlib import Path

import pytest
import torch
import trl
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from factory.errors import DataError
from factory.model.losses import token_loss
from factory.model.tokenizer import Answered, Conversation, Encoder
from tests.builders.models import END, byte_tokenizer, save_llama
from tests.builders.texts import conversation

PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{{ eos_token }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN
FORGETFUL = "{% for m in messages %}{% if not loop.last %}-{% else %}{{ m.content }}{% endif %}{% endfor %}"
KNOWN = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text(encoding="utf-8")
TURNS = ("Hi?", "Yes.", "So?", "No [user]!")


def encoder_with(template: str | None, around: str = "$A") -> Encoder:
    tokenizer = byte_tokenizer(around)
    tokenizer.chat_template = template
    return Encoder(tokenizer, vocab_size=257)


def encoded(template: str | None, *turns: str, system: str | None = None) -> tuple[Encoder, Answered]:
    encoder = encoder_with(template)
    (tokens,) = encoder.encode([conversation(*turns, system=system)])
    assert isinstance(tokens, Answered)
    return encoder, tokens


def answers_of(encoder: Encoder, tokens: Answered) -> str:
    kept = [token for token, answer in zip(tokens, tokens.answers, strict=True) if answer]
    return str(encoder.tokenizer.decode(kept))


@pytest.mark.parametrize(
    ("template", "end"),
    [(MARKED, END), (PLAIN, END), (KNOWN, "<|im_end|>")],
    ids=["marked by the model", "found by comparing", "marked by TRL"],
)
def test_the_answers_and_their_ends_are_marked_and_nothing_else(template: str, end: str) -> None:
    encoder, tokens = encoded(template, *TURNS)
    assert answers_of(encoder, tokens).replace("\n", "") == f"Yes.{end}No [user]!{end}"
    own = encoder.tokenizer.apply_chat_template(conversation(*TURNS).messages, tokenize=True)
    assert list(tokens) == list(own["input_ids"])


def test_a_tokenizer_written_in_python_marks_answers_by_comparing(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_with(MARKED + "{% if add_generation_prompt %}[assistant]{% endif %}")
    monkeypatch.setattr(type(encoder.tokenizer), "is_fast", False)
    (tokens,) = encoder.encode([conversation(*TURNS)])
    assert isinstance(tokens, Answered)
    assert answers_of(encoder, tokens).replace("\n", "") == f"Yes.{END}No [user]!{END}"


@given(st.lists(st.text(max_size=9), min_size=2, max_size=6))
def test_both_ways_mark_the_same_answers(turns: list[str]) -> None:
    (marker, marked), (comparer, compared) = encoded(MARKED, *turns), encoded(PLAIN, *turns)
    assert list(marked) == list(compared)
    assert answers_of(comparer, compared).replace(f"{END}\n", END) == answers_of(marker, marked)


@pytest.mark.parametrize(
    ("template", "system", "message"),
    [
        (None, None, "the model has no chat template"),
        (STRICT, "Be.", 'fails on the conversation \'[{"role": "system"'),
        (FORGETFUL, None, "it renders an answer otherwise once more messages follow"),
        ("{{ messages | length }}", None, "leaves out the words of an answer"),
        ("{{ messages[0].content + 1 }}", None, "the model's chat template fails on the conversation"),
    ],
)
def test_a_template_that_fails_or_is_missing_is_one_line(
    template: str | None, system: str | None, message: str
) -> None:
    with pytest.raises(DataError) as caught:
        encoded(template, *TURNS, system=system)
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_parts_of_a_content_are_refused_where_the_template_writes_them_as_python_would() -> None:
    parts = [{"type": "text", "text": "Yes."}]
    talk = Conversation(
        json.dumps([{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": parts}])
    )
    with pytest.raises(DataError, match="it takes a content that is a text, not a list of parts"):
        encoder_with("{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}").encode([talk])
    both = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{{ eos_token }}{% endfor %}"
    )
    encoder = encoder_with(both)
    (tokens,) = encoder.encode([talk])
    assert isinstance(tokens, Answered)
    assert answers_of(encoder, tokens) == f"Yes.{END}"


def test_a_conversation_is_one_piece_that_begins_as_the_template_does() -> None:
    encoder = encoder_with(PLAIN, around=f"{END} $A")
    (tokens,) = encoder.encode([conversation(*TURNS)])
    assert encoder.ended(tokens) == tokens
    (piece,) = encoder.windows(tokens, length=30)
    assert isinstance(piece, Answered)
    assert (list(piece), piece.answers) == (list(tokens[:30]), tokens.answers[:30])
    assert encoder.beginning(conversation(*TURNS), length=30) == list(piece)
    assert not list(encoder.windows(tokens, length=12))  # the question alone


def test_the_loss_of_a_conversation_is_of_its_answers(tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(save_llama(tmp_path, num_layers=2), dtype=torch.float32)
    found = [encoded(PLAIN, *turns)[1] for turns in (TURNS, ("a", "b"))]
    nats, count = 0.0, 0
    for tokens in found:
        logits = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        for place in range(1, len(tokens)):
            if tokens.answers[place]:
                nats, count = nats - float(logits[place - 1, tokens[place]]), count + 1
    for batch_size in (1, 2):
        assert token_loss(model, found, batch_size=batch_size) == pytest.approx(nats / count, rel=1e-4)
