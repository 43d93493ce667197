"""The comparison page: a source and its pruned copy answer the same prompt, side by side.

Configured by SOURCE_MODEL, PRUNED_MODEL, SOURCE_REVISION, PRUNED_REVISION, MAX_NEW_TOKENS, LOAD_IN_4BIT.
"""

import base64
import html
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from threading import Event

try:
    import spaces  # has to come before torch where the Space runs on ZeroGPU
except ImportError:
    spaces = None

import gradio as gr
from pair import Model, Reply, Sampling, find_file

GPU_SECONDS = 60  # a call, on ZeroGPU
VISITORS = 4  # served at the same time; others wait in line
SIDES = ("Left", "Right")
CHAT_EXAMPLES = [
    "Explain to a ten-year-old why the sky is blue.",
    "Write a Python function that merges two sorted lists.",
    "All but 9 of a farmer's 17 sheep run away. How many are left?",
]
COMPLETION_EXAMPLES = ["A glacier is", "The three largest cities of Japan are", "def read_lines(path):\n    "]
THEME = gr.themes.Default(
    primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=["system-ui", "sans-serif"]
)
CSS = """
.gradio-container {max-width: 1280px !important; margin: auto}
.pane h2 {font-size: 1.05rem; margin: 0 0 .1rem; overflow-wrap: anywhere}
.text {white-space: pre-wrap; overflow-wrap: anywhere; overflow-y: auto; height: 22rem; margin: 0;
  padding: .8rem 1rem; border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg);
  background: var(--input-background-fill); color: var(--body-text-color);
  font: .92rem/1.55 ui-monospace, monospace}
.text .prompt {color: var(--body-text-color-subdued)}
.text .empty {color: var(--body-text-color-subdued); font-family: system-ui, sans-serif}
.facts {display: grid; grid-template-columns: repeat(4, 1fr); gap: .3rem .8rem; margin: 0}
.facts dt {font-size: .75rem; color: var(--body-text-color-subdued)}
.facts dd {margin: 0; font-variant-numeric: tabular-nums; font-weight: 600}
.note {margin: .4rem 0 0; padding: .35rem .6rem; border-left: 3px solid var(--color-accent); font-size: .9rem}
.note.error {border-color: #dc2626}
.card img {width: 100%; background: white; border-radius: var(--radius-lg)}
.card figure {margin: 0 0 1rem}
.card figcaption {font-size: .85rem; color: var(--body-text-color-subdued)}
.card .table-wrap, .card .prose {overflow-x: auto}
@media (max-width: 640px) {
  .facts {grid-template-columns: repeat(2, 1fr)}
  .text {height: 13rem}
  .gradio-container {padding: .4rem !important}
}
"""


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


# What is shown ------------------------------------------------------------------------------------


def heading(pair: Sequence[Model], session: Session, side: int) -> str:
    """The name of the model on one side, or only the side."""
    model = pair[session.order[side]]
    title = SIDES[side] if session.hides else f"{model.role} · {model.name}"
    return f"<h2>{html.escape(title)}</h2>"


def completion(session: Session, side: int) -> str:
    """The last prompt and its continuation as one text."""
    if not session.turns:
        inner = '<span class="empty">The model goes on with your text: it was not trained to answer.</span>'
    else:
        turn = session.turns[-1]
        reply = turn.replies[session.order[side]]
        inner = f'<span class="prompt">{html.escape(turn.prompt)}</span>{html.escape(reply.text)}'
    return f'<pre class="text" tabindex="0" role="region" aria-label="{SIDES[side]} text">{inner}</pre>'


def facts(pair: Sequence[Model], session: Session, side: int) -> str:
    """Speed, size, and what went wrong; nothing that gives a hidden model away."""
    index = session.order[side]
    model, reply = pair[index], session.turns[-1].replies[index] if session.turns else Reply()
    rate, first = reply.tokens_per_second, reply.first_token_seconds
    values = {
        "tokens/s": f"{rate:.1f}" if rate else "–",
        "first token": f"{first * 1000:,.0f} ms" if first else "–",
        "parameters": amount(model.num_parameters),
        "weights in memory": amount(model.size_bytes, "B"),
    }
    if session.hides:
        values = dict.fromkeys(values, "?")
    rows = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in values.items())
    notes = f'<p class="note">{html.escape(reply.notice)}</p>' if reply.notice else ""
    if reply.error:
        notes += f'<p class="note error" role="alert">This model failed. {html.escape(reply.error)}</p>'
    return f'<dl class="facts">{rows}</dl>{notes}'


def amount(number: float, unit: str = "") -> str:
    """Three digits and a prefix: "7.24 G" is written "7.24 B" for parameters, "14.5 GB" for bytes."""
    for prefix, size in (("G" if unit else "B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:.0f} {unit}".strip()


def tally(session: Session) -> str:
    """The votes of this visitor."""
    source, pruned, neither = session.tally
    who = "" if not session.voted else " The names are shown above; your next prompt starts a new round."
    return f"Your votes: source {source}, pruned {pruned}, no difference {neither}.{who}"


def card_page(pair: Sequence[Model]) -> str | None:
    """Figures and results of the pruned model's card, as HTML and Markdown; None without a card."""
    card = find_file(pair[1], "README.md")
    if card is None:
        return None
    text = card.read_text(encoding="utf-8")
    results = re.search(r"^## Results\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    parts = [results.group(1).strip()] if results else []
    for alt, name in re.findall(r"!\[([^]]*)\]\((figures/[\w.-]+\.png)\)", text):
        if path := find_file(pair[1], name):
            data = base64.b64encode(path.read_bytes()).decode()
            parts.append(
                f'<figure><img alt="{html.escape(alt)}" src="data:image/png;base64,{data}"></figure>'
            )
    return "\n\n".join(parts) or None


# What happens -------------------------------------------------------------------------------------


def answer(
    generate: Callable[..., Iterator[tuple[Reply, ...]]],
    session: Session,
    prompt: str,
    sampling: Sampling,
    *,
    blind: bool,
    chats: bool,
) -> Iterator[bool]:
    """Let both models reply, into `session`; yields whether they are still writing."""
    if session.halt:
        session.halt.set()
    if session.voted or blind != session.blind:
        session.start_round(blind=blind)
    halt = session.halt = Event()
    turn = Turn(prompt)
    session.turns = [*session.turns, turn] if chats else [turn]
    yield True
    conversations = [session.messages(index) for index in (0, 1)]
    with closing(generate(conversations, sampling, session.hides)) as snapshots:
        for turn.replies in snapshots:
            if halt.is_set():
                break
            yield True
    if session.halt is halt:
        session.halt = None
        yield False


def vote(session: Session, choice: int) -> None:
    """Count a vote for the left (0), the right (1) or neither (2), and tell who was who."""
    if session.hides and session.turns and not session.halt:
        session.tally[session.order[choice] if choice < 2 else 2] += 1
        session.voted = True


# The page -----------------------------------------------------------------------------------------


def page(pair: Sequence[Model], *, most_tokens: int) -> gr.Blocks:
    """The whole page for a loaded pair; `most_tokens` is the longest reply that can be asked for."""
    with gr.Blocks(title=f"{pair[0].name} and {pair[1].name}", analytics_enabled=False) as demo:
        gr.Markdown(introduction(pair))
        if (card := card_page(pair)) is None:
            compare_tab(pair, most_tokens)
        else:
            with gr.Tab("Compare"):
                compare_tab(pair, most_tokens)
            with gr.Tab("Measurements"):
                gr.Markdown(card, elem_classes="card")
    demo.queue(default_concurrency_limit=VISITORS)
    return demo


def introduction(pair: Sequence[Model]) -> str:
    """What is compared, in a title and one sentence."""
    source, pruned = pair
    less = 1 - pruned.num_parameters / source.num_parameters
    return (
        f"# {source.name} and {pruned.name}\n"
        f"The second is the first without some of its layers: {less:.0%} fewer parameters. "
        "Both answer at the same time and share one device, so each is slower here than alone."
    )


def compare_tab(pair: Sequence[Model], most_tokens: int) -> None:
    """Two panes, one box, and what is done with them."""
    chats = all(model.chats for model in pair)
    session = gr.State(Session)
    panes = pane_row(pair, chats)
    with gr.Row(visible=False, elem_classes="votes") as votes:
        choices = [gr.Button(f"{name} is better", size="sm", min_width=90) for name in SIDES]
        choices.append(gr.Button("No difference", size="sm", min_width=90))
    counted = gr.Markdown(visible=False)
    box = gr.Textbox(
        label="Message" if chats else "Text to be continued",
        placeholder="Enter sends, Shift+Enter starts a new line",
        lines=1,
        max_lines=8,
        autofocus=True,
    )
    with gr.Row():
        send = gr.Button("Send", variant="primary", min_width=70)
        stop = gr.Button("Stop", variant="stop", min_width=70, interactive=False)
        retry = gr.Button("Retry", min_width=70)
        clear = gr.Button("Clear", min_width=70)
    blind = gr.Checkbox(label="Blind: hide which is which until I have voted")
    gr.Examples(CHAT_EXAMPLES if chats else COMPLETION_EXAMPLES, box, label="Try")
    with gr.Accordion("Sampling, the same for both", open=False), gr.Row():
        length = gr.Slider(1, most_tokens, min(256, most_tokens), step=1, label="Longest reply, tokens")
        temperature = gr.Slider(0, 2, 0.7, step=0.05, label="Temperature (0: the likeliest token)")
        top_p = gr.Slider(0.05, 1, 0.95, step=0.05, label="Top p")
        seed = gr.Number(0, precision=0, label="Seed (Retry adds one)")

    def view(state: Session, writing: bool) -> list[Any]:
        asks = state.hides and bool(state.turns) and not writing
        return [
            *(part for side in (0, 1) for part in pane(pair, state, side, chats)),
            gr.update(interactive=writing),
            gr.update(visible=asks),
            gr.update(value=tally(state), visible=state.blind or any(state.tally)),
        ]

    generate = replies_of(pair)
    shown = [*panes, stop, votes, counted]
    asked = [session, box, seed, blind, length, temperature, top_p]

    def run(state: Session, text: str, number: float, is_blind: bool, *how: float) -> Iterator[list[Any]]:
        sampling = Sampling(int(how[0]), how[1], how[2], int(number))
        for writing in answer(generate, state, text, sampling, blind=is_blind, chats=chats):
            yield [*view(state, writing), "", number]

    def sent(state: Session, text: str, *settings: Any) -> Iterator[list[Any]]:
        if text.strip():
            yield from run(state, text, *settings)

    def retried(state: Session, text: str, number: float, *settings: Any) -> Iterator[list[Any]]:
        if state.turns and not state.voted:
            last, state.turns = state.turns[-1], state.turns[:-1]
            for update in run(state, last.prompt, number + 1, *settings):
                yield [*update[:-2], text, number + 1]

    def changed(state: Session, is_blind: bool) -> list[Any]:
        state.start_round(blind=is_blind)
        return view(state, False)

    def voted(state: Session, choice: int) -> list[Any]:
        vote(state, choice)
        return view(state, False)

    quiet: dict[str, Any] = {"show_progress": "hidden"}
    gr.on([send.click, box.submit], sent, asked, [*shown, box, seed], api_name="send", **quiet)
    retry.click(retried, asked, [*shown, box, seed], api_name="retry", **quiet)
    stop.click(stopped, session, None, queue=False, **quiet)
    gr.on([clear.click, blind.input], changed, [session, blind], shown, **quiet)
    for choice, button in enumerate(choices):
        button.click(lambda state, choice=choice: voted(state, choice), session, shown, **quiet)


def pane_row(pair: Sequence[Model], chats: bool) -> list[Any]:
    """Heading, text and facts of both sides, left before right."""
    parts: list[Any] = []
    with gr.Row():
        for side in (0, 1):
            with gr.Column(min_width=300, elem_classes="pane"):
                head, text, below = pane(pair, Session(), side, chats)
                parts.append(gr.HTML(head))
                if chats:
                    parts.append(gr.Chatbot(text, label=f"{SIDES[side]} conversation", height="22rem"))
                else:
                    parts.append(gr.HTML(text))
                parts.append(gr.HTML(below))
    return parts


def pane(pair: Sequence[Model], session: Session, side: int, chats: bool) -> tuple[str, Any, str]:
    """The three parts of one side as they are now."""
    text = session.messages(session.order[side]) if chats else completion(session, side)
    return heading(pair, session, side), text, facts(pair, session, side)


def stopped(session: Session) -> None:
    """Halt the run under way; it then shows itself for the last time."""
    if session.halt:
        session.halt.set()


def replies_of(pair: Sequence[Model]) -> Callable[..., Iterator[tuple[Reply, ...]]]:
    """`stream` for this pair, on a GPU that ZeroGPU lends for the call where the Space has it."""

    def generate(conversations: Any, sampling: Sampling, in_step: bool) -> Iterator[tuple[Reply, ...]]:
        yield from stream(pair, conversations, sampling, in_step=in_step)

    return spaces.GPU(duration=GPU_SECONDS)(generate) if spaces else generate


if __name__ == "__main__":
    page(load_pair(os.environ), most_tokens=int(os.environ.get("MAX_NEW_TOKENS") or 512)).launch(
        theme=THEME, css=CSS
    )
