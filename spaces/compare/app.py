"""The comparison page: a source and its pruned copy answer the same prompt, side by side.

Configured by SOURCE_MODEL, PRUNED_MODEL, SOURCE_REVISION, PRUNED_REVISION, MAX_NEW_TOKENS, LOAD_IN_4BIT.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

try:
    from spaces import GPU  # must be imported before torch on ZeroGPU
except ImportError:
    GPU = None
if os.environ.get("SPACES_ZERO_GPU"):  # only the main thread sees its emulated GPU: load there
    os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
os.environ.setdefault("GRADIO_RUN_HISTORY", "False")  # prompts are not kept, not even in the browser

import gradio as gr
from pair import Model, Reply, Sampling, load_pair, stream
from session import (
    SIDES,
    Session,
    Turn,
    card_page,
    completion,
    conversation,
    facts,
    heading,
    status,
)

GPU_SECONDS = 60  # per call, on ZeroGPU
VISITORS = 4  # served at the same time; others wait in a queue
AS_GROUP = """const pane = element.closest(".pane")
pane.setAttribute("role", "group")
pane.setAttribute("aria-label", "{name}")"""  # tells the conversations apart in a screen reader
UNCHANGED = [gr.skip()] * 11  # outputs of a prompt; an event that yields none would clear them
CHAT_EXAMPLES = [
    "Explain to a ten-year-old why the sky is blue.",
    "Write a Python function that merges two sorted lists.",
    "All but 9 of a farmer's 17 sheep run away. How many are left?",
]
COMPLETION_EXAMPLES = ["A glacier is", "The three largest cities of Japan are", "def read_lines(path):\n    "]
THEME = gr.themes.Default(
    primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=["system-ui", "sans-serif"]
).set(  # the defaults have too little contrast
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_400",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_hover_dark="*primary_800",
    color_accent="*primary_700",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
)
LOOK: dict[str, Any] = {
    "theme": THEME,
    "css_paths": Path(__file__).with_name("style.css"),
    "footer_links": ["gradio", "settings"],
}


# Actions ------------------------------------------------------------------------------------------


def vote(session: Session, choice: int) -> None:
    """Count a vote for the left (0), the right (1) or neither (2), and reveal the names."""
    if session.hides and session.turns and not session.halt:
        session.choice = session.order[choice] if choice < 2 else 2
        session.tally[session.choice] += 1


@dataclass(frozen=True)
class Desk:
    """Handles the events of the page and returns the new values of its parts."""

    pair: Sequence[Model]
    generate: Callable[..., Iterator[tuple[Reply, ...]]]  # `stream`, or the same on a borrowed GPU

    @property
    def chats(self) -> bool:
        """Return whether both models chat; otherwise they continue texts."""
        return all(model.chats for model in self.pair)

    def answer(self, session: Session, prompt: str, sampling: Sampling, *, blind: bool) -> Iterator[bool]:
        """Let both models reply into `session`, and yield whether they are still writing."""
        if session.halt:
            session.halt.set()
        if session.choice is not None or blind != session.blind:
            session.start_round(blind=blind)
        halt = session.halt = Event()
        turn = Turn(prompt)
        session.turns = [*session.turns, turn] if self.chats else [turn]
        yield True
        conversations = [session.messages(index) for index in (0, 1)]
        try:
            with closing(self.generate(conversations, sampling, session.hides)) as snapshots:
                for turn.replies in snapshots:
                    if halt.is_set():
                        break
                    yield True
        except gr.Error:  # ZeroGPU has no free GPU, or this visitor has no time left
            session.turns = session.turns[:-1]
            session.halt = None
            yield False
            raise
        if session.halt is halt:
            session.halt = None
            yield False

    def send(
        self, session: Session, text: str, seed: float, blind: bool, length: int, *how: float
    ) -> Iterator[list[Any]]:
        """Send a new prompt; ignore an empty one."""
        if not text.strip():
            yield UNCHANGED
        else:
            seed = int(seed or 0)  # the field may be empty
            sampling = Sampling(int(length), *how, seed=seed)
            typed: list[Any] = ["", seed]
            for writing in self.answer(session, text, sampling, blind=blind):
                yield [*self.view(session, writing), *typed]
                typed = UNCHANGED[:2]  # by now the visitor may be typing the next prompt

    def retry(self, session: Session, text: str, seed: float, *settings: Any) -> Iterator[list[Any]]:
        """Send the last prompt again with the next seed, and keep the text in the box."""
        if not session.turns:
            yield UNCHANGED
        else:
            last, session.turns = session.turns[-1], session.turns[:-1]
            seed = int(seed or 0) + 1
            typed = [text, seed]
            for update in self.send(session, last.prompt, seed, *settings):
                yield [*update[:-2], *typed]
                typed = UNCHANGED[:2]

    def stop(self, session: Session) -> None:
        """Stop the current run, which then updates the page one last time."""
        if session.halt:
            session.halt.set()

    def restart(self, session: Session, blind: bool) -> list[Any]:
        """Clear both sides."""
        session.start_round(blind=blind)
        return self.view(session, False)

    def hide(self, session: Session, blind: bool) -> list[Any]:
        """Clear both sides when blind mode changes, unless a prompt sent right after did so."""
        if blind != session.blind:
            session.start_round(blind=blind)
        return self.view(session, session.halt is not None)

    def vote(self, session: Session, choice: int) -> list[Any]:
        """Count the vote and show the names."""
        vote(session, choice)
        return self.view(session, False)

    def view(self, session: Session, writing: bool) -> list[Any]:
        """Return new values of both sides, the stop button, the vote buttons and the status."""
        asks = session.hides and bool(session.turns) and not writing
        return [
            *(part for side in (0, 1) for part in self.side(session, side)),
            gr.update(interactive=writing),
            gr.update(visible=asks),
            status(self.pair, session, writing),
        ]

    def side(self, session: Session, side: int) -> tuple[str, Any, str]:
        """Return heading, text and facts of one side."""
        text = conversation(session, side) if self.chats else completion(session, side)
        return heading(self.pair, session, side), text, facts(self.pair, session, side)


# The page -----------------------------------------------------------------------------------------


def page(pair: Sequence[Model], *, most_tokens: int) -> gr.Blocks:
    """Build the page for a loaded pair; `most_tokens` is the maximum length of a reply."""

    def generate(conversations: Any, sampling: Sampling, in_step: bool) -> Iterator[tuple[Reply, ...]]:
        yield from stream(pair, conversations, sampling, in_step=in_step)

    desk = Desk(pair, GPU(duration=GPU_SECONDS)(generate) if GPU else generate)
    with gr.Blocks(title=f"{pair[1].name} and its source", analytics_enabled=False) as demo:
        gr.Markdown(introduction(pair), elem_classes="title")
        with gr.Tabs():
            with gr.Tab("Compare"):
                compare_tab(desk, most_tokens)
            if card := card_page(pair):
                with gr.Tab("Measurements"):
                    gr.Markdown(card, elem_classes="card")
    return demo.queue(default_concurrency_limit=VISITORS)


def introduction(pair: Sequence[Model]) -> str:
    """Return a title and a sentence about what is compared."""
    source, pruned = pair
    less = 1 - pruned.num_parameters / source.num_parameters
    return (
        f"# {pruned.name} and its source\n"
        f"{pruned.name} is {source.name} without some of its layers: {less * 100:.0f}% fewer parameters. "
        "Both write at the same time on one device, so each is slower here than alone."
    )


def compare_tab(desk: Desk, most_tokens: int) -> None:
    """Build two panes, one text box and the controls."""
    session = gr.State(Session())
    panes = pane_row(desk)
    with gr.Row(visible=False, elem_classes=["actions", "votes"]) as votes:
        names = [f"{side} is better" for side in SIDES] + ["No difference"]
        choices = [gr.Button(name, size="md", min_width=90) for name in names]
    counted = gr.HTML(
        status(desk.pair, Session(), False),
        elem_classes="status",
        js_on_load="element.setAttribute('role', 'status')",
    )
    with gr.Column(elem_classes="composer"):
        box = gr.Textbox(
            label="Message" if desk.chats else "Text to be continued",
            placeholder="Enter sends, Shift+Enter starts a new line",
            max_lines=8,
            autofocus=True,
        )
        with gr.Row(elem_classes="actions"):
            send = gr.Button("Send", variant="primary", size="md", min_width=70)
            stop = gr.Button("Stop", size="md", min_width=70, interactive=False)
            retry = gr.Button("Retry", size="md", min_width=70)
            clear = gr.Button("Clear", size="md", min_width=70)
            blind = gr.Checkbox(
                label="Blind: hide which is which until I vote", container=False, elem_classes="blind"
            )
    gr.Examples(CHAT_EXAMPLES if desk.chats else COMPLETION_EXAMPLES, box, label="Try")
    with gr.Accordion("Sampling, the same for both", open=False), gr.Row():
        length = gr.Slider(1, most_tokens, min(256, most_tokens), step=1, label="Longest reply, tokens")
        temperature = gr.Slider(0, 2, 0.7, step=0.05, label="Temperature (0: the likeliest token)")
        top_p = gr.Slider(0.05, 1, 0.95, step=0.05, label="Top p")
        seed = gr.Number(0, precision=0, minimum=0, maximum=2**32, label="Seed (Retry adds one)")

    shown = [*panes, stop, votes, counted]
    asked = [session, box, seed, blind, length, temperature, top_p]
    quiet: dict[str, Any] = {"show_progress": "hidden"}
    again: dict[str, Any] = {"trigger_mode": "multiple"}  # a new prompt stops the current run
    gr.on([send.click, box.submit], desk.send, asked, [*shown, box, seed], **again, **quiet)
    retry.click(desk.retry, asked, [*shown, box, seed], **again, **quiet)
    stop.click(desk.stop, session, None, queue=False, **quiet)
    emptied = [part.clear for part in panes if isinstance(part, gr.Chatbot)]
    gr.on([clear.click, *emptied], desk.restart, [session, blind], shown, **quiet)
    blind.input(desk.hide, [session, blind], shown, **quiet)
    for choice, button in enumerate(choices):
        button.click(partial(desk.vote, choice=choice), session, shown, api_name=f"vote_{choice}", **quiet)


def pane_row(desk: Desk) -> list[Any]:
    """Build heading, text and facts of both sides, left before right."""
    parts: list[Any] = []
    with gr.Row():
        for number, name in enumerate(SIDES):
            head, text, below = desk.side(Session(), number)
            with gr.Column(min_width=300, elem_classes="pane"):
                parts.append(gr.HTML(head, js_on_load=AS_GROUP.format(name=name)))
                if desk.chats:
                    label = f"{name} conversation"
                    parts.append(gr.Chatbot(text, label=label, show_label=False, buttons=["copy"]))
                else:
                    parts.append(gr.HTML(text))
                parts.append(gr.HTML(below))
    return parts


def most_tokens_of(environ: Mapping[str, str]) -> int:
    """Return MAX_NEW_TOKENS, or 512 if it is not set.

    Raises:
        SystemExit: The value is not a positive whole number.
    """
    text = environ.get("MAX_NEW_TOKENS") or "512"
    if not text.isdecimal() or int(text) == 0:
        raise SystemExit(f"MAX_NEW_TOKENS is {text!r}: give a whole number of tokens")
    return int(text)


if __name__ == "__main__":
    most_tokens = most_tokens_of(os.environ)  # before anything is loaded
    page(load_pair(os.environ), most_tokens=most_tokens).launch(**LOOK)
