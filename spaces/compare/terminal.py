"""The comparison in a terminal: source and result answer each line, one after the other."""

import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TextIO

from pair import Model, Reply, Sampling, load_pair, stream
from session import Session, Turn, amount

ROLES = ("source", "result")
# Control characters, which could change the terminal, but not tabs and ends of lines.
HARMFUL = dict.fromkeys([*range(9), 11, 12, *range(13, 32), *range(127, 160)])
HELP = "Ctrl-C stops an answer; Ctrl-D ends."


def talk(pair: Sequence[Model], sampling: Sampling, ask: Callable[[str], str], out: TextIO) -> None:
    """Put each prompt to both models until the input ends.

    A base model continues each text by itself; two chat models remember the conversation.
    """
    chats = all(model.chats for model in pair)
    for role, model in zip(ROLES, pair, strict=True):
        print(f"{role}  {model.name}, {amount(model.num_parameters)} parameters", file=out)
    if chats:
        print(f"{HELP} An empty line starts a new conversation.", file=out)
    else:
        print(f"They are base models: they continue each text, and do not answer it. {HELP}", file=out)
    session = Session()
    while True:
        try:
            prompt = ask("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=out)
            return
        if not prompt:
            if session.turns and chats:
                session.start_round(blind=False)
                print("(a new conversation)", file=out)
            continue
        turn = Turn(prompt)
        session.turns = [*session.turns, turn] if chats else [turn]
        turn.replies = tuple(
            answer(ROLES[index], model, session.messages(index), sampling, out)
            for index, model in enumerate(pair)
        )


def answer(role: str, model: Model, messages: list[dict[str, str]], sampling: Sampling, out: TextIO) -> Reply:
    """Show the answer of one model as it is written, then its pace; Ctrl-C ends it."""
    print(f"\n{role}:", file=out)
    reply, shown, stopped = Reply(), "", ""
    try:
        with closing(stream([model], [messages], sampling)) as snapshots:
            for (reply,) in snapshots:
                text = reply.text.translate(HARMFUL)
                if text.startswith(shown):  # later tokens can change how the last ones are decoded
                    out.write(text[len(shown) :])
                    out.flush()
                    shown = text
    except KeyboardInterrupt:
        stopped = "stopped"
    pace = f"{reply.tokens_per_second:.0f} tokens/s" if reply.tokens_per_second else ""
    most = model.max_length // 2
    full = "the most for this model" if reply.num_tokens == most < sampling.max_new_tokens else ""
    facts = [f"{reply.num_tokens} tokens", full, pace, stopped, reply.notice, reply.error]
    print(f"\n({', '.join(fact for fact in facts if fact)})", file=out)
    return reply


def main() -> None:
    """Load both models from the environment, and talk on the standard streams."""
    pair = load_pair(os.environ)
    length, temperature = os.environ.get("MAX_NEW_TOKENS", "256"), os.environ.get("TEMPERATURE", "0.7")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        import readline  # noqa: F401 - lets `input` recall earlier lines
    talk(pair, Sampling(int(length), float(temperature)), input, sys.stdout)


if __name__ == "__main__":
    main()
