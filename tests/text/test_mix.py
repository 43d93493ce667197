"""Several texts to heal on are one text with the shares that were asked for, the same every time."""

import json
import pickle
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory.artifacts import DataSource
from factory.config.references import share_of, with_share
from factory.config.request import BuildRequest
from factory.config.settings import BuildConfig, EvaluateSettings, HealSettings, MeasureSettings
from factory.errors import DataError
from factory.pipeline.texts import open_texts
from factory.text.text import Text, mixed, text_identity


def text_of(name: str, documents: list[str | None]) -> Text:
    return Text(DataSource(name=name, version=name), lambda: iter(documents))


def lengths(documents: list[str], maximum: int) -> Counter[str]:
    """Characters of each letter in the first documents."""
    found: Counter[str] = Counter()
    for document in islice(documents, maximum):
        found[document[0]] += len(document)
    return found


@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.floats(0.25, 4)),
        min_size=2,
        max_size=4,
    )
)
def test_every_beginning_of_a_mix_has_the_shares_and_its_end_all_documents(
    asked: list[tuple[list[int], float]],
) -> None:
    texts = [
        text_of(letter, [letter * length for length in sizes])
        for letter, (sizes, _) in zip("abcd", asked, strict=False)
    ]
    shares = [share for _, share in asked]
    mix = mixed(texts, shares)
    documents = list(mix.documents())
    assert set(documents) == {document for text in texts for document in text.documents()}
    for end in {1, len(documents) // 2, len(documents) - 1}:
        taken = lengths(documents, end)
        rates = [taken[text.data.name] / share for text, share in zip(texts, shares, strict=True)]
        longest = max(
            max(sizes) / share for (sizes, share) in zip((s for s, _ in asked), shares, strict=True)
        )
        assert max(rates) - min(rates) <= longest + 1e-6
    assert list(mix.documents()) == documents


def test_a_short_text_begins_again_until_the_longest_has_been_read() -> None:
    mix = mixed([text_of("a", ["a1", None, "a2"]), text_of("b", ["b1", "b2", "b3", "b4", "b5"])], [1, 1])
    documents = list(mix.documents())
    assert [one for one in documents if one[0] == "b"] == ["b1", "b2", "b3", "b4", "b5"]
    assert Counter(one[0] for one in documents)["a"] in (5, 6)


def test_a_mix_is_identified_by_its_texts_and_shares() -> None:
    one, other = text_of("a", ["a"]), text_of("b", ["b"])
    mixes = [mixed(texts, shares) for texts, shares in (([one, other], [2, 1]), ([one, other], [1, 1]))]
    assert mixes[0].data.name == "a*2 + b"
    assert len({text_identity(mix.data) for mix in mixes}) == 2
    assert mixed([one, other], [2, 1]).data == mixes[0].data
    assert [share.data.name for share in mixes[0].data.mixed] == ["a", "b"]


def test_conversations_and_plain_text_are_not_mixed_and_no_text_is_given_twice() -> None:
    chat = Text(DataSource(name="chats", version="1", is_chat=True), lambda: iter(()))
    with pytest.raises(DataError, match=r"conversations \(chats\) and plain text \(a\)"):
        mixed([text_of("a", ["a"]), chat], [1, 1])
    with pytest.raises(DataError, match="names a twice"):
        mixed([text_of("a", ["a"]), text_of("a", ["a"])], [1, 2])


def test_a_text_without_documents_is_named_and_does_not_end_the_mix_in_a_circle() -> None:
    with pytest.raises(DataError, match="a has no documents left"):
        list(mixed([text_of("a", [None]), text_of("b", ["b"])], [1, 1]).documents())


# Shares as they are typed --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "data", "share"),
    [
        ("a.jsonl*2", "a.jsonl", 2),
        ("a.jsonl#body*0.5", "a.jsonl#body", 0.5),
        ("owner/name:config[train]#text@main*3", "owner/name:config[train]#text@main", 3),
        ("stdlib:train*2", "stdlib:train", 2),
        ("texts/*.jsonl*2", "texts/*.jsonl", 2),
        ("a.jsonl", "a.jsonl", 1),
        ("texts/*.jsonl", "texts/*.jsonl", 1),
        ("texts/*", "texts/*", 1),
        ("texts/part-*.jsonl.gz", "texts/part-*.jsonl.gz", 1),
    ],
)
def test_a_share_is_what_follows_the_last_star_if_that_is_a_number(
    reference: str, data: str, share: float
) -> None:
    assert share_of(reference) == (data, share)
    assert share_of(with_share(data, share)) == (data, share)


def test_a_file_whose_name_ends_like_a_share_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl*2").write_text("x")
    Path("b.jsonl.gz").write_text("x")
    assert share_of("a.jsonl*2") == ("a.jsonl*2", 1)
    assert share_of("b.jsonl*gz") == ("b.jsonl*gz", 1)


@pytest.mark.parametrize("share", ["0", "-1", "0.0", "nan", "inf", "two", "2x", "1/2", "2,b.jsonl", "1e400"])
def test_a_share_that_is_none_is_refused_with_the_way_to_write_it(tmp_path: Path, share: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"share .* is not a positive number") as refused:
        BuildRequest.read({"model": "owner/name", "drop": 0.3, "heal_data": f"{path}*{share}"})
    assert "`heal_data=a.jsonl*2`" in refused.value.hint


def test_of_several_texts_the_one_that_fails_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    asked = {"model": "owner/name", "drop": 0.3, "heal_data": [f"{path}*2", f"{tmp_path}/missing.jsonl"]}
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        BuildRequest.read(asked)
    with pytest.raises(DataError) as refused:
        BuildRequest.read(asked | {"heal_data": f"{path},{path}"})
    assert refused.value.hint == "give `heal_data` once for each text"


# In a run ------------------------------------------------------------------------------------------


def write(path: Path, letter: str, number: int) -> str:
    path.write_text("".join(json.dumps({"text": f"{letter} {n}"}) + "\n" for n in range(number)))
    return str(path)


def settings(tmp_path: Path, *healing: str, evaluated: str) -> BuildConfig:
    return BuildConfig(
        reference="x",
        drop=0.3,
        measure=MeasureSettings(data=evaluated),
        heal=HealSettings(data=healing),
        evaluate=EvaluateSettings(data=(evaluated,), num_documents=4),
    )


def test_each_text_of_a_mix_is_kept_apart_from_the_evaluation_and_read_in_any_process(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a.jsonl", "a", 20), write(tmp_path / "b.jsonl", "b", 20)
    third = write(tmp_path / "c.jsonl", "c", 20)
    texts = open_texts(settings(tmp_path, f"{one}*3", other, third, evaluated=other))
    assert texts.healing.data.name == "a.jsonl*3 + b.jsonl + c.jsonl"
    evaluated = set(texts.evaluation.documents())
    assert evaluated
    assert evaluated.isdisjoint(texts.healing.documents())
    assert [text.data.part for text in texts.healings] == [None, "1 of 2", None]
    again: Any = pickle.loads(pickle.dumps(texts.healing))  # our own
    assert list(again.documents()) == list(texts.healing.documents())


def test_one_text_with_a_share_is_that_text(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a.jsonl", "a", 20), write(tmp_path / "b.jsonl", "b", 20)
    found = [open_texts(settings(tmp_path, name, evaluated=other)) for name in (one, f"{one}*5")]
    assert found[0].healing.data == found[1].healing.data
    assert found[1].sources == ()
