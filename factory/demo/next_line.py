"""The lm-eval task "which line comes next?", made from the held-out modules of the standard library.

An item shows 12 lines of a module and asks which of four lines follows. The right one is a line of code, not
of a comment or of a docstring, that the shown lines do not already hold. The wrong ones are lines of code of
the same module with the same indentation, those closest in length, that stand nowhere near the place. So
neither the shape of a line nor the subject of the module gives the answer away, and chance is 0.25.

Order, wrong lines and places follow from sha256 of the module's name, the line's number and the lines
themselves: every process makes the same items from the same Python. Another Python has other sources and so
other items; compare scores of one machine only.

The score to read is acc_norm, log-likelihood over length: the four lines are close in length but not equal,
and acc alone favours the shortest.
"""

import hashlib
import io
import tokenize
from collections.abc import Mapping
from typing import Any, TypedDict

from factory.text.standard_library import modules

NUM_ITEMS = 400
NUM_CHOICES = 4
CONTEXT_LINES = 12
NEAR_LINES = 24  # lines this close to the place are no wrong answers: they might be right
SHORTEST, LONGEST = 16, 100  # characters without indentation; `else:` says too little
CLOSEST = 12  # the wrong lines are drawn from this many that are closest in length
MOST_UNLIKE = 0.25  # and differ by no more than this share of the right line's length
NOT_CODE = {
    tokenize.STRING,
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


class Item(TypedDict):
    """One question; `answer` is the index of the right choice."""

    place: str  # "textwrap:120", lines counted from 1
    context: str
    choices: list[str]
    answer: int


def dataset(**_: object) -> Any:
    """What lm-eval calls: the items as a `DatasetDict` with the one split "test".

    Args:
        _: The task's metadata and anything given to lm-eval's `--metadata`; nothing of it is used.

    Raises:
        DataError: The interpreter comes without the held-out modules.
    """
    from datasets import Dataset, DatasetDict

    return DatasetDict({"test": Dataset.from_list(items(modules()))})


def items(sources: Mapping[str, str], *, count: int = NUM_ITEMS) -> list[Item]:
    """At most `count` items from modules given as name → source, the right answers spread over all places."""
    lines = {name: source.splitlines() for name, source in sources.items()}
    code = {name: _code_rows(source, lines[name]) for name, source in sources.items()}
    places = [(name, row) for name, rows in code.items() for row in rows if row >= CONTEXT_LINES]
    places.sort(key=lambda place: _digest(*place))
    made: list[Item] = []
    for name, row in places:
        wrong = _wrong_lines(lines[name], code[name], row=row, name=name)
        if len(wrong) == NUM_CHOICES - 1:
            answer = len(made) % NUM_CHOICES
            choices = [*wrong[:answer], lines[name][row], *wrong[answer:]]
            context = "\n".join(lines[name][row - CONTEXT_LINES : row])
            made.append(Item(place=f"{name}:{row + 1}", context=context, choices=choices, answer=answer))
        if len(made) == count:
            break
    return made


def _code_rows(source: str, lines: list[str]) -> list[int]:
    """0-based numbers of the lines that hold code of a fair length, strings over several lines left out."""
    code: set[int] = set()
    inside_strings: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            code.add(token.start[0] - 1)
        elif token.type == tokenize.STRING:
            inside_strings.update(range(token.start[0], token.end[0]))
    return [row for row in sorted(code - inside_strings) if SHORTEST <= len(lines[row].strip()) <= LONGEST]


def _wrong_lines(lines: list[str], code: list[int], *, row: int, name: str) -> list[str]:
    """Three lines that could stand at `row` by their shape; fewer if the module has none or gives it away."""
    right = lines[row]
    near = {line.strip() for line in lines[max(row - NEAR_LINES, 0) : row + NEAR_LINES + 1]}
    if right.strip() in {line.strip() for line in lines[row - CONTEXT_LINES : row]}:
        return []
    alike = {
        lines[other]
        for other in code
        if _indentation(lines[other]) == _indentation(right)
        and abs(len(lines[other]) - len(right)) <= MOST_UNLIKE * len(right.strip())
        and lines[other].strip() not in near
    }
    closest = sorted(alike, key=lambda line: (abs(len(line) - len(right)), _digest(name, row, line)))[
        :CLOSEST
    ]
    return sorted(closest, key=lambda line: _digest(name, row, line))[: NUM_CHOICES - 1]


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def _digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()
