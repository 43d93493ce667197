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
    choice: int | None = None  # vote of this round: source, smaller, no difference
    tally: list[int] = field(default_factory=lambda: [0, 0, 0])  # source, smaller, no difference
    halt: Event | None = None  # stops the current run

    @property
    def hides(self) -> bool:
        """Return whether the names are still hidden."""
        return self.blind and self.choice is None

    def start_round(self, *, blind: bool) -> None:
        """Clear the conversation; in blind mode, shuffle the sides."""
        if self.halt:
            self.halt.set()
        self.turns, self.choice, self.blind = [], None, blind
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

    def waits(self, index: int) -> bool:
        """Return whether the first token of one model is still to come."""
        reply = self.turns[-1].replies[index] if self.turns else None
        return bool(self.halt and reply and not reply.text and not reply.error)


# Display ------------------------------------------------------------------------------------------


def heading(pair: Sequence[Model], session: Session, side: int) -> str:
    """Return the heading of one side: the model, or the side while names are hidden."""
    model = pair[session.order[side]]
    title = SIDES[side] if session.hides else f"{model.role} · {model.name}"
    return f"<h2>{html.escape(title)}</h2>"


def conversation(session: Session, side: int) -> list[dict[str, Any]]:
    """Return the messages of one side, as blocks, since gradio strips indentation from plain strings."""
    index = session.order[side]
    waiting = [{"role": "assistant", "content": "…"}] if session.waits(index) else []
    return [
        {"role": message["role"], "content": [{"type": "text", "text": message["content"]}]}
        for message in (*session.messages(index), *waiting)
    ]


def completion(session: Session, side: int) -> str:
    """Return the last prompt and its continuation as one text."""
    if not session.turns:
        inner = '<span class="empty">The model goes on with your text: it was not trained to answer.</span>'
    else:
        turn = session.turns[-1]
        reply = turn.replies[session.order[side]]
        inner = f'<span class="prompt">{html.escape(turn.prompt)}</span>{html.escape(reply.text)}'
        if session.waits(session.order[side]):
            inner += '<span class="waits" aria-hidden="true"></span>'
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


def status(pair: Sequence[Model], session: Session, writing: bool) -> str:
    """Return the state, for screen readers, what the vote was for, and the votes of this visitor."""
    doing = "Both are writing." if writing else "Both have written." if session.turns else ""
    votes = ""
    if session.blind or any(session.tally):
        source, smaller, neither = session.tally
        votes = f"Your votes: source {source}, smaller {smaller}, no difference {neither}."
    return f'<p class="unseen">{doing}</p><p>{_revealed(pair, session)}{votes}</p>'


def _revealed(pair: Sequence[Model], session: Session) -> str:
    """Say what the vote of this round was for, where it was given."""
    if session.choice is None:
        return ""
    if session.choice < 2:
        model = pair[session.choice]
        which = "the source" if session.choice == 0 else "the smaller model"
        name, size = html.escape(model.name), amount(model.num_parameters)
        return f"You chose <strong>{name}</strong>, {which} ({size} parameters). "
    left = html.escape(pair[session.order[0]].name)
    return f"You saw no difference; <strong>{left}</strong> was on the left. "


def card_page(pair: Sequence[Model]) -> str | None:
    """Return headline, results and figures of the smaller model's card; None without a card."""
    card = find_file(pair[1], "README.md")
    if card is None:
        return None
    text = card.read_text(encoding="utf-8")
    results = re.search(r"^## Results\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    parts = [headline(text)] + ([scrolling(results.group(1).strip())] if results else [])
    for alt, name in re.findall(r"!\[([^]]*)\]\((figures/[\w.-]+\.png)\)", text):
        if path := find_file(pair[1], name):
            data = base64.b64encode(path.read_bytes()).decode()
            parts.append(
                f'<figure><img alt="{html.escape(alt)}" src="data:image/png;base64,{data}"></figure>'
            )
    return "\n\n".join(filter(None, parts)) or None


def headline(card: str) -> str:
    """Return the table below the title of a card as HTML that wraps; empty without one."""
    found = re.search(r"^# [^\n]*\n+\|(.*)\|\n\|[:|-]*\|\n\|(.*)\|$", card, re.M)
    if not found:
        return ""
    figures, names = (
        [html.escape(re.sub(r"\\(.)", r"\1", html.unescape(cell.strip()))) for cell in line.split(" | ")]
        for line in found.groups()
    )
    rows = (
        f"<div><dd>{figure}</dd><dt>{name}</dt></div>" for figure, name in zip(figures, names, strict=False)
    )
    return f'<dl class="headline">{"".join(rows)}</dl>'


def scrolling(text: str) -> str:
    """Make wide tables of a Markdown text scrollable, also with the keyboard."""
    box = '<div class="scroll" tabindex="0">'
    return re.sub(
        r"(?m)^(?:\|.*\n?)+", lambda table: f"{box}\n\n{table[0].strip()}\n\n</div>\n", text
    ).strip()
