"""What one visitor has done, and how it is shown: as HTML, messages and Markdown."""

import base64
import html
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any

from pair import Model, Reply, find_file

SIDES = ("Left", "Right")


@dataclass
class Turn:
    """One prompt and what each model made of it, in the order source, pruned."""

    prompt: str
    replies: tuple[Reply, ...] = (Reply(), Reply())


@dataclass
class Session:
    """What one visitor has done."""

    turns: list[Turn] = field(default_factory=list)
    order: tuple[int, ...] = (0, 1)  # which model is on the left, which on the right
    blind: bool = False
    voted: bool = False
    tally: list[int] = field(default_factory=lambda: [0, 0, 0])  # source, pruned, no difference
    halt: Event | None = None  # of the run that is under way

    @property
    def hides(self) -> bool:
        """Whether the names are not to be told yet."""
        return self.blind and not self.voted

    def start_round(self, *, blind: bool) -> None:
        """Forget the conversation; in blind mode, draw anew who is on which side."""
        if self.halt:
            self.halt.set()
        self.turns, self.voted, self.blind = [], False, blind
        self.order = tuple(random.sample((0, 1), 2)) if blind else (0, 1)

    def messages(self, index: int) -> list[dict[str, str]]:
        """The conversation with one model; turns without a reply are left out."""
        said = []
        for turn in self.turns:
            said.append({"role": "user", "content": turn.prompt})
            if text := turn.replies[index].text:
                said.append({"role": "assistant", "content": text})
            elif turn is not self.turns[-1]:
                said.pop()
        return said


# How it is shown ------------------------------------------------------------------------------------


def heading(pair: Sequence[Model], session: Session, side: int) -> str:
    """The name of the model on one side, or only the side."""
    model = pair[session.order[side]]
    title = SIDES[side] if session.hides else f"{model.role} · {model.name}"
    return f"<h2>{html.escape(title)}</h2>"


def conversation(session: Session, side: int) -> list[dict[str, Any]]:
    """The messages of one side; as blocks, since gradio takes indents away from plain strings."""
    return [
        {"role": message["role"], "content": [{"type": "text", "text": message["content"]}]}
        for message in session.messages(session.order[side])
    ]


def completion(session: Session, side: int) -> str:
    """The last prompt and its continuation as one text."""
    if not session.turns:
        inner = '<span class="empty">The model goes on with your text: it was not trained to answer.</span>'
    else:
        turn = session.turns[-1]
        reply = turn.replies[session.order[side]]
        inner = f'<span class="prompt">{html.escape(turn.prompt)}</span>{html.escape(reply.text)}'
    label = f'role="region" aria-label="{SIDES[side]} text"'
    return f'<div class="text" tabindex="0" {label}><pre>{inner}</pre></div>'


def facts(pair: Sequence[Model], session: Session, side: int) -> str:
    """Speed, size, and what went wrong; nothing that gives a hidden model away."""
    index = session.order[side]
    model, reply = pair[index], session.turns[-1].replies[index] if session.turns else Reply()
    rate, first = reply.tokens_per_second, reply.first_token_seconds
    values = {
        "tokens/s": f"{rate:.1f}" if rate else "–",
        "first token": f"{first * 1000:,.0f} ms" if first else "–",
        "parameters": amount(model.num_parameters),
        "memory": amount(model.size_bytes, "B"),
    }
    if session.hides:
        values = dict.fromkeys(values, "?")
    rows = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in values.items())
    notes = f'<p class="note">{html.escape(reply.notice)}</p>' if reply.notice else ""
    if reply.error:
        notes += f'<p class="note error" role="alert">This model failed. {html.escape(reply.error)}</p>'
    return f'<dl class="facts">{rows}</dl>{notes}'


def amount(number: float, unit: str = "") -> str:
    """Three digits and a prefix: "7.24 B" for parameters, "14.5 GB" for bytes."""
    for prefix, size in (("G" if unit else "B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:.0f} {unit}".strip()


def status(session: Session, writing: bool) -> str:
    """What goes on, for those who do not see it, and the votes of this visitor."""
    doing = "Both are writing." if writing else "Both have written." if session.turns else ""
    votes = ""
    if session.blind or any(session.tally):
        source, pruned, neither = session.tally
        votes = f"Your votes: source {source}, pruned {pruned}, no difference {neither}."
    if session.voted:
        votes += " The names are shown above; your next prompt starts a new round."
    return f'<p class="unseen">{doing}</p><p>{votes}</p>'


def card_page(pair: Sequence[Model]) -> str | None:
    """Figures and results of the pruned model's card, as HTML and Markdown; None without a card."""
    card = find_file(pair[1], "README.md")
    if card is None:
        return None
    text = card.read_text(encoding="utf-8")
    results = re.search(r"^## Results\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    parts = [scrolling(results.group(1).strip())] if results else []
    for alt, name in re.findall(r"!\[([^]]*)\]\((figures/[\w.-]+\.png)\)", text):
        if path := find_file(pair[1], name):
            data = base64.b64encode(path.read_bytes()).decode()
            parts.append(
                f'<figure><img alt="{html.escape(alt)}" src="data:image/png;base64,{data}"></figure>'
            )
    return "\n\n".join(parts) or None


def scrolling(text: str) -> str:
    """Markdown whose tables, if they are too wide, can be scrolled, with the keyboard too."""
    box = '<div class="scroll" tabindex="0">'
    return re.sub(
        r"(?m)^(?:\|.*\n?)+", lambda table: f"{box}\n\n{table[0].strip()}\n\n</div>\n", text
    ).strip()
