"""Modelfiles: the template for Ollama says what the model's own chat template says, or is left out."""

import pytest

from factory.model.tokenizer import Encoder
from factory.serving.modelfile import find_marks, write_modelfile
from tests.builders.models import END, merging_tokenizer

LOOP = "{% for m in messages %}"
OPEN = "{% if add_generation_prompt %}"
TEMPLATES = {
    "chatml": LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + OPEN + "<|im_start|>assistant\n{% endif %}",
    "with a system text of its own": "{% if messages[0].role != 'system' %}[S]Be kind.[/S]{% endif %}"
    + LOOP + "[{{ m.role }}]{{ m.content }}[/]{% endfor %}" + OPEN + "[assistant]{% endif %}",
    "with the system text in the first question":
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}[INST] {{ (s if loop.first else '') + m.content }} [/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}",
}  # fmt: skip
TURNS = [("user", "Why?"), ("assistant", "So."), ("user", "Really?"), ("assistant", "Yes."), ("user", "Hm.")]


def an_encoder(template: str | None, around: str = "$A") -> Encoder:
    tokenizer = merging_tokenizer(around)
    tokenizer.chat_template = template
    return Encoder(tokenizer, vocab_size=260)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=list(TEMPLATES))
def test_the_marks_give_what_the_template_gives_for_other_conversations(template: str) -> None:
    encoder = an_encoder(template)
    marks = find_marks(encoder)
    assert marks is not None
    for turns in (TURNS[:1], TURNS, [("system", "Be brief."), *TURNS[:3]]):
        messages = [{"role": role, "content": text} for role, text in turns]
        shown = encoder.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert marks.render(turns) == shown


def test_a_chat_template_becomes_a_template_of_go_with_the_mark_that_stops_an_answer() -> None:
    text, has_template = write_modelfile(an_encoder(TEMPLATES["chatml"].replace("<|im_end|>", END)), "m.gguf")
    assert has_template
    assert text == (
        "FROM ./m.gguf\n"
        'TEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|end|>\n{{ else }}{{ end }}'
        '{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|end|>\n'
        '<|im_start|>assistant\n{{ else if eq .Role "assistant" }}{{ .Content }}<|end|>\n'
        '{{ end }}{{ end }}"""\n'
        'PARAMETER stop "<|end|>"\n'
    )


def test_the_token_that_begins_every_text_is_left_to_llama_cpp() -> None:
    encoder = an_encoder("{{ bos_token }}" + TEMPLATES["chatml"], around=f"{END} $A")
    marks = find_marks(encoder)
    assert marks is not None
    assert marks.head == ""


@pytest.mark.parametrize(
    "template",
    [
        None,
        LOOP + "{{ loop.index }}: {{ m.content }}\n{% endfor %}",  # marks that count the turns
        LOOP + "{{ m.content | upper }}\n{% endfor %}",
        LOOP + "{% if m.role == 'system' %}{{ raise_exception('') }}{% endif %}{{ m.content }}\n{% endfor %}",
        LOOP + "{{ '{{' }}{{ m.content }}{{ '}}' }}{% endfor %}",  # would be read as Go
    ],
)
def test_what_cannot_be_said_in_ollamas_terms_is_left_out(template: str | None) -> None:
    text, has_template = write_modelfile(an_encoder(template), "m.gguf")
    assert not has_template
    assert text == "FROM ./m.gguf\n"
