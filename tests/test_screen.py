"""Numbers and verdicts read as people write them."""

import pytest

from factory.preview import size
from factory.screen import count, duration, printable


def test_text_from_outside_cannot_move_the_cursor() -> None:
    assert printable("a\x1b[2J\rb") == "a[2Jb"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1_234, "1.23 k"), (2_118_240, "2.12 M"), (7_241_732_096, "7.24 B")],
)
def test_counts(number: int, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(12, "12 bytes"), (4_300_000, "4.3 MB"), (14_483_464_192, "14.5 GB"), (2 * 10**12, "2.0 TB")],
)
def test_sizes(number: int, text: str) -> None:
    assert size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.9, "59.9 s"), (200, "3 min 20 s"), (18_725, "5 h 12 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
