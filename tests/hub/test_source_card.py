"""A source's card is read as far as it can be, and what is wrong with it never stops a build."""

from pathlib import Path

import pytest

from factory.hub.front_matter import MAX_FRONT_MATTER
from factory.hub.source_card import (
    README,
    languages_of,
    licenses_of,
    read_card,
    short_text,
    texts_of,
    unread_card,
)

CARD = "---\nlicense: mit\nlanguage: fr\nauthor: Amélie\n---\n# Modèle\n"
# Ten times as many parts per line with each alias written out:
GROWING = "x0: &x0 x\n" + "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]\n" for n in range(1, 8))
FIELDS = {"license": "mit", "language": "fr", "author": "Amélie"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_card_is_read_however_it_was_saved(tmp_path: Path, encoding: str, end: str) -> None:
    (tmp_path / README).write_bytes(CARD.replace("\n", end).encode(encoding))
    assert read_card(tmp_path) == FIELDS
    assert unread_card(tmp_path) is None


@pytest.mark.parametrize(
    "content", ["", "# A model\n", "---\n---\n", "---\n# only a comment\n---\n", "---\nlicense: mit\n"]
)
def test_a_card_that_says_nothing_is_no_fault(tmp_path: Path, content: str) -> None:
    (tmp_path / README).write_text(content)
    assert (read_card(tmp_path), unread_card(tmp_path)) == ({}, None)


@pytest.mark.parametrize(
    ("front_matter", "reason"),
    [
        ("- license: mit", "of type list"),
        ("mit", "of type str"),
        ("3", "of type int"),
        ("license: [mit", "is not YAML"),
        ("license: mit\n\tlanguage: fr", "is not YAML"),
        ("{license: mit", "is not YAML"),
        ("? [a]\n: b", "is not YAML"),
        ("date: 2024-13-45", "is not YAML"),
        ("x: !!python/object:os.system {}", "is not YAML"),
        ("x: \x00", "is not YAML"),
        ("x: &x {license: mit}\n<<: *x", "merge keys are not allowed"),
        ("x: &x [*x]", "an alias refers to a node that contains it"),
        (GROWING, "its aliases expand to more than 1,000,000 parts"),
        ("[" * 5000, "is not YAML"),
        ("x: " + "y" * MAX_FRONT_MATTER, "has 1,000,003 characters"),
    ],
    ids=lambda value: value[:20],
)
def test_front_matter_that_is_none_counts_for_nothing_and_says_so(
    tmp_path: Path, front_matter: str, reason: str
) -> None:
    (tmp_path / README).write_text(f"---\n{front_matter}\n---\n")
    assert read_card(tmp_path) == {}
    told = unread_card(tmp_path)
    assert told is not None
    assert reason in told
    assert "\n" not in told


def test_an_alias_that_repeats_little_is_read(tmp_path: Path) -> None:
    (tmp_path / README).write_text("---\nname: &name mit\nlicense: [*name, *name]\n---\n")
    assert read_card(tmp_path) == {"name": "mit", "license": ["mit", "mit"]}


@pytest.mark.parametrize(
    "value", ["\ud800", "mit \udfff", 10**5000, None], ids=["half", "half at the end", "digits", "none"]
)
def test_what_is_no_short_text_that_can_be_written_counts_as_none(value: object) -> None:
    assert short_text(value) is None
    assert licenses_of([value, "mit"]) == "mit"
    assert languages_of([value, "fr"]) == ("fr",)


def test_of_a_licence_with_its_name_and_link_the_name_is_taken() -> None:
    value = [{"name": "mit", "link": "https://example.org/mit"}, {"link": "LICENSE", "name": "own-1"}]
    assert texts_of(value) == ("mit", "own-1")
