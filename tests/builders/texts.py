"""Texts that a tiny model can learn something of."""

from factory.artifacts import DataSource
from factory.text.text import Text


def rhymes(count: int) -> list[str]:
    """Documents that a tiny model can learn something of in a few steps."""
    words = ["one", "two", "three", "four", "five", "six"]
    return [" ".join(words[(start + step) % len(words)] for step in range(40)) for start in range(count)]


def text_of(documents: list[str]) -> Text:
    return Text(DataSource(name="rhymes", version="1"), lambda: iter(documents))
