"""Every `--help` page, as a reader at 80 columns sees it."""

import os
from collections.abc import Iterator

import click
import pytest

from factory.cli.main import cli
from tests.places import ROOT

GOLDEN = ROOT / "tests" / "golden" / "help.txt"
COLUMNS = 80
WIDTH = COLUMNS - 2  # what click fills of them


def commands(command: click.Command, *words: str) -> Iterator[tuple[str, ...]]:
    """Yield the words of a command and of every command below it."""
    yield words
    for name, below in sorted(getattr(command, "commands", {}).items()):
        yield from commands(below, *words, name)


def help_page(*words: str) -> str:
    command, context = cli, None
    for name in ("factory", *words):
        command = command.commands[name] if context else cli
        settings = command.context_settings | {"terminal_width": WIDTH}
        context = click.Context(command, info_name=name, parent=context, **settings)
    return command.get_help(context)


def summary(words: tuple[str, ...]) -> str:
    command = cli
    for word in words:
        command = command.commands[word]
    return str(command.help).split("\n", 1)[0]


def test_the_help_pages_are_those_in_the_golden_file() -> None:
    """After a wanted change: UPDATE_GOLDEN=1 pytest tests/cli/test_help.py, then read the whole page."""
    pages = "\n\n".join(f"$ {' '.join(('factory', *words))} --help\n{help_page(*words)}"
                        for words in commands(cli)) + "\n"  # fmt: skip
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(pages, encoding="utf-8")
    assert pages == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("words", [words for words in commands(cli) if words], ids=" ".join)
def test_the_first_line_of_a_help_page_fits_the_list_of_commands(words: tuple[str, ...]) -> None:
    assert len(summary(words)) <= 45
    assert summary(words) in help_page(*words[:-1])


@pytest.mark.parametrize("words", list(commands(cli)), ids=lambda words: " ".join(("factory", *words)))
def test_no_line_of_a_help_page_is_wider_than_the_terminal(words: tuple[str, ...]) -> None:
    assert max(map(len, help_page(*words).splitlines())) <= COLUMNS
