"""The lm-eval task "which line comes next?", made from the held-out modules of the standard library.

An item shows 12 lines of a module and asks which of four lines follows. The right one is a line of code, not
of a comment or docstring, that is not among the shown lines. The wrong ones are lines of code of the same
module with the same indentation and the closest length, from elsewhere in the module. So neither the shape
of a line nor the subject of the module gives the answer away, and chance is 0.25.

Order, wrong lines and places follow from a sha256 of the module's name, the line's number and the lines:
every process makes the same items from the same Python. Another Python has other sources and so other
items; compare scores of one machine only.

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
NEAR_LINES = 24  # lines this close are not used as wrong answers: they might be right
SHORTEST, LONGEST = (16, 100)  # characters without indentation; `else:` would say too little
CLOSEST = 12  # number of lines, closest in length, that the wrong ones are drawn from
MAX_UNLIKE = 0.25  # largest difference in length, as a share of the right line's
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
    """Return the items as a `DatasetDict` with the split "test"; lm-eval calls this.

    Args:
        _: Metadata of the task and of lm-eval's `--metadata`, which are ignored.

    Raises:
        DataError: The interpreter lacks the held-out modules.
    """
    from datasets import Dataset, DatasetDict

    return DatasetDict({"test": Dataset.from_list(items(modules()))})


def items(sources: Mapping[str, str], *, count: int = NUM_ITEMS) -> list[Item]:
    """Make at most `count` items from name → source, the right answers spread over all positions."""
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
    """Return the 0-based numbers of code lines of a fair length, outside of strings over several lines."""
    code: set[int] = set()
    inside_strings: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            code.add(token.start[0] - 1)
        elif token.type == tokenize.STRING:
            inside_strings.update(range(token.start[0], token.end[0]))
    return [row for row in sorted(code - inside_strings) if SHORTEST <= len(lines[row].strip()) <= LONGEST]


def _wrong_lines(lines: list[str], code: list[int], *, row: int, name: str) -> list[str]:
    """Return three lines of the same shape as line `row`; fewer if the module lacks them."""
    right = lines[row]
    near = {line.strip() for line in lines[max(row - NEAR_LINES, 0) : row + NEAR_LINES + 1]}
    if right.strip() in {line.strip() for line in lines[row - CONTEXT_LINES : row]}:
        return []
    alike = {
        lines[other]
        for other in code
        if _indentation(lines[other]) == _indentation(right)
        and abs(len(lines[other]) - len(right)) <= MAX_UNLIKE * len(right.strip())
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
