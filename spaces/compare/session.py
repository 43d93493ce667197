"""The session of one visitor, and its display as HTML, messages and Markdown."""

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
    """One prompt and the replies to it, in the order source, pruned."""

    prompt: str
    replies: tuple[Reply, ...] = (Reply(), Reply())


@dataclass
class Session:
    """The conversation, settings and votes of one visitor."""

    turns: list[Turn] = field(default_factory=list)
    order: tuple[int, ...] = (0, 1)  # models on the left and on the right
    blind: bool = False
    voted: bool = False
    tally: list[int] = field(default_factory=lambda: [0, 0, 0])  # source, pruned, no difference
    halt: Event | None = None  # stops the current run

    @property
    def hides(self) -> bool:
        """Return whether the names are still hidden."""
        return self.blind and not self.voted

    def start_round(self, *, blind: bool) -> None:
        """Clear the conversation; in blind mode, shuffle the sides."""
        if self.halt:
            self.halt.set()
        self.turns, self.voted, self.blind = [], False, blind
        self.order = tuple(random.sample((0, 1), 2)) if blind else (0, 1)

    def messages(self, index: int) -> list[dict[str, str]]:
        """Return the conversation with one model, without turns that have no reply."""
        messages = []
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.prompt})
            if text := turn.replies[index].text:
                messages.append({"role": "assistant", "content": text})
            elif turn is not self.turns[-1]:
                messages.pop()
        return messages


# Display ------------------------------------------------------------------------------------------


def heading(pair: Sequence[Model], session: Session, side: int) -> str:
    """Return the heading of one side: the model, or the side while names are hidden."""
    model = pair[session.order[side]]
    title = SIDES[side] if session.hides else f"{model.role} · {model.name}"
    return f"<h2>{html.escape(title)}</h2>"


def conversation(session: Session, side: int) -> list[dict[str, Any]]:
    """Return the messages of one side, as blocks, since gradio strips indentation from plain strings."""
    return [
        {"role": message["role"], "content": [{"type": "text", "text": message["content"]}]}
        for message in session.messages(session.order[side])
    ]


def completion(session: Session, side: int) -> str:
    """Return the last prompt and its continuation as one text."""
    if not session.turns:
        inner = '<span class="empty">The model goes on with your text: it was not trained to answer.</span>'
    else:
        turn = session.turns[-1]
        reply = turn.replies[session.order[side]]
        inner = f'<span class="prompt">{html.escape(turn.prompt)}</span>{html.escape(reply.text)}'
    label = f'role="region" aria-label="{SIDES[side]} text"'
    return f'<div class="text" tabindex="0" {label}><pre>{inner}</pre></div>'


def facts(pair: Sequence[Model], session: Session, side: int) -> str:
    """Return speed, size and errors of one side, without what would reveal a hidden model."""
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
    """Format with three digits and a prefix: "7.24 B" for parameters, "14.5 GB" for bytes."""
    for prefix, size in (("G" if unit else "B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:.0f} {unit}".strip()


def status(session: Session, writing: bool) -> str:
    """Return the state, for screen readers, and the votes of this visitor."""
    doing = "Both are writing." if writing else "Both have written." if session.turns else ""
    votes = ""
    if session.blind or any(session.tally):
        source, pruned, neither = session.tally
        votes = f"Your votes: source {source}, pruned {pruned}, no difference {neither}."
    if session.voted:
        votes += " The names are shown above; your next prompt starts a new round."
    return f'<p class="unseen">{doing}</p><p>{votes}</p>'


def card_page(pair: Sequence[Model]) -> str | None:
    """Return figures and results of the pruned model's card as HTML and Markdown; None without a card."""
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
    """Make wide tables of a Markdown text scrollable, also with the keyboard."""
    box = '<div class="scroll" tabindex="0">'
    return re.sub(
        r"(?m)^(?:\|.*\n?)+", lambda table: f"{box}\n\n{table[0].strip()}\n\n</div>\n", text
    ).strip()
