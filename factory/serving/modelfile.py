"""Write the Modelfile with which Ollama runs a GGUF, its template derived from the model's chat template.

Ollama reads no Jinja: it compares the template in a GGUF with a list of known ones, and where none is near
enough, sends the user's text without any turn marks and without a warning.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError

from factory.model.tokenizer import Encoder

MODELFILE = "Modelfile"
SYSTEM, ASKED, ANSWERED, AGAIN = "The system's text.", "First question?", "The answer.", "Another question?"
Turns = Sequence[tuple[str, str]]  # role and text


@dataclass(frozen=True)
class Marks:
    """What a chat template puts around texts."""

    head: str  # before the first question, without a system text
    system: tuple[str, str]
    user: tuple[str, str]  # the second one opens the answer
    after_answer: str

    def render(self, turns: Turns) -> str:
        """Return a conversation that ends with a question, as the template below writes it."""
        system = "".join(text for role, text in turns if role == "system")
        parts = [self.system[0] + system + self.system[1] if system else self.head]
        for role, text in turns:
            if role == "user":
                parts.append(self.user[0] + text + self.user[1])
            elif role == "assistant":
                parts.append(text + self.after_answer)
        return "".join(parts)

    @property
    def template(self) -> str:
        """Return the same as a template of Go, in Ollama's terms."""
        before, after = self.system
        return (
            f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{self.head}{{{{ end }}}}"
            '{{ range .Messages }}{{ if eq .Role "user" }}'
            f"{self.user[0]}{{{{ .Content }}}}{self.user[1]}"
            '{{ else if eq .Role "assistant" }}'
            f"{{{{ .Content }}}}{self.after_answer}{{{{ end }}}}{{{{ end }}}}"
        )


def write_modelfile(encoder: Encoder, name: str) -> tuple[str, bool]:
    """Return the text of a Modelfile for the GGUF `name` beside it, and whether it holds the chat template.

    It does not if the model has none, or if the marks around a text depend on more than its role.
    """
    lines = [f"FROM ./{name}"]
    marks = find_marks(encoder)
    if marks is None:
        return "\n".join(lines) + "\n", False
    lines.append(f'TEMPLATE """{marks.template}"""')
    added = sorted(encoder.tokenizer.get_added_vocab(), key=len, reverse=True)
    end = next((token for token in added if marks.after_answer.startswith(token)), None)
    lines += [
        f'PARAMETER stop "{token}"' for token in dict.fromkeys((end, encoder.tokenizer.eos_token)) if token
    ]
    return "\n".join(lines) + "\n", True


def find_marks(encoder: Encoder) -> Marks | None:
    """Return the marks of a chat template, if rendering by them gives what the template gives."""
    tokenizer = encoder.tokenizer
    if not isinstance(tokenizer.chat_template, str):
        return None
    # llama.cpp puts these tokens before a text itself.
    prefix = tokenizer.decode(encoder.prefix) if encoder.prefix else ""

    def rendered(turns: Turns) -> str:
        messages = [{"role": role, "content": text} for role, text in turns]
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text.removeprefix(prefix)

    one: Turns = [("user", ASKED)]
    two: Turns = [*one, ("assistant", ANSWERED), ("user", AGAIN)]
    with_system: Turns = [("system", SYSTEM), *two]
    try:
        shown = [rendered(turns) for turns in (one, two, with_system)]
        marks = _read_marks(*shown, special=tokenizer.get_added_vocab())
    except (TemplateError, ValueError):  # roles that a template refuses; a text that it changes
        return None
    same = [marks.render(turns) for turns in (one, two, with_system)] == shown
    return marks if same and "{{" not in marks.render(two) and '"""' not in marks.template else None


def _read_marks(one: str, two: str, with_system: str, *, special: Collection[str]) -> Marks:
    """Read the marks off three conversations: a question; two of them; these after a system text.

    Args:
        special: Tokens, of which one may end every turn.

    Raises:
        ValueError: A text is missing or changed in the template's output.
    """
    head, opens = one.split(ASKED)
    between = two.split(ANSWERED)[1].split(AGAIN)[0]
    before, rest = with_system.split(SYSTEM)
    after = rest.split(ASKED)[0]
    user = _common_end(head, between, after)
    token = next((token for token in special if opens.startswith(token)), "")
    spaces = len(opens) - len(token) - len(opens.removeprefix(token).lstrip()) if token else 0
    end = opens[: len(token) + spaces]
    user = user.removeprefix(end)  # it ends the turn before
    return Marks(
        head=head.removesuffix(user),
        system=(before, after.removesuffix(user)),
        user=(user, opens),
        after_answer=between.removesuffix(user),
    )


def _common_end(*texts: str) -> str:
    size = next(
        (
            n
            for n, letters in enumerate(zip(*(text[::-1] for text in texts), strict=False))
            if len({*letters}) > 1
        ),
        min(map(len, texts)),
    )
    return texts[0][len(texts[0]) - size :]
