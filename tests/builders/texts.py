"""Texts that a tiny model can learn something of."""

import json

from factory.artifacts import DataSource
from factory.model.tokenizer import Conversation
from factory.text.text import Text


def rhymes(count: int) -> list[str]:
    """Documents that a tiny model can learn something of in a few steps."""
    words = ["one", "two", "three", "four", "five", "six"]
    return [" ".join(words[(start + step) % len(words)] for step in range(40)) for start in range(count)]


def text_of(documents: list[str]) -> Text:
    is_chat = any(isinstance(document, Conversation) for document in documents)
    return Text(DataSource(name="rhymes", version="1", is_chat=is_chat), lambda: iter(documents))


def conversation(*turns: str, system: str | None = None) -> Conversation:
    """A conversation of these turns, of user and assistant alternately."""
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages += [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    return Conversation(json.dumps(messages))


def chats(count: int) -> list[str]:
    """Conversations whose answers a tiny model can learn something of in a few steps."""
    return [
        conversation(f"{number}?", rhyme[:30], f"{number}!", rhyme[:20])
        for number, rhyme in enumerate(rhymes(count))
    ]
