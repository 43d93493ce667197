"""Text is read whole or not at all, in a fixed order, and named by its content."""

import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from factory.artifacts import DataSource
from factory.config import BuildConfig, EvaluateSettings, HealSettings, MeasureSettings
from factory.errors import DataError, UnknownModelError
from factory.references import check_model
from factory.run import open_texts
from factory.texts import Text, check_text, keep_apart, open_text

DOCUMENTS = ["one", "two\nlines", "drei äöü"]
LINES = "".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS)


def write(path: Path) -> Path:
    if path.name.endswith(".xz"):
        path.write_bytes(lzma.compress(LINES.encode()))
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(LINES.encode()))
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.table({"text": DOCUMENTS}), path)
    elif path.suffix == ".txt":
        path.write_text("\n\n\n".join(DOCUMENTS))
    else:
        path.write_text(LINES)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.xz", "a.jsonl.gz", "a.parquet", "a.txt"])
def test_every_format_gives_the_same_documents_each_time(tmp_path: Path, name: str) -> None:
    text = open_text(str(write(tmp_path / name)), split="train")
    assert [document.strip() for document in text.documents()] == DOCUMENTS
    assert [document.strip() for document in text.documents()] == DOCUMENTS
    assert text.data.name == name
    assert len(text.data.version) == 64


def test_the_version_is_the_content_not_the_place(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    first = open_text(str(write(tmp_path / "a.jsonl")), split="train").data
    second = open_text(str(write(tmp_path / "elsewhere" / "a.jsonl")), split="train").data
    assert first == second
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    assert open_text(str(tmp_path / "a.jsonl"), split="train").data.version != first.version


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ('{"txt": "x"}', 'no "text"'),
        ('{"text": "  "}', 'no "text"'),
        ('{"text": 3}', 'no "text"'),
        ('["text"]', 'no "text"'),
        ('{"text": "a\\ud800"}', "half of a character"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(LINES + line + "\n")
    with pytest.raises(DataError) as caught:
        check_text(open_text(str(path), split="train"))
    assert "line 4" in caught.value.message
    assert problem in caught.value.message


def test_a_file_of_blank_lines_holds_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n")
    with pytest.raises(DataError, match="holds no text"):
        check_text(open_text(str(path), split="train"))


@pytest.mark.parametrize("name", ["a.jsonl.xz", "a.jsonl.gz", "a.parquet"])
def test_a_damaged_file_is_a_clear_error(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="cannot read"):
        check_text(open_text(str(path), split="train"))


def test_a_file_cut_short_is_damaged_rather_than_wrong_in_a_line(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"document {n} {n**9}"}) + "\n" for n in range(3000))
    whole = gzip.compress(lines.encode())
    path = tmp_path / "a.jsonl.gz"
    for content in (whole[: len(whole) // 2], whole[:500] + b"\xff" * 100 + whole[600:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot read"):
            check_text(open_text(str(path), split="train"))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES, encoding="utf-8-sig")
    assert list(open_text(str(tmp_path / "a.jsonl"), split="train").documents()) == DOCUMENTS


def test_a_parquet_column_that_is_no_text_is_named_by_its_type(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="type int64"):
        check_text(open_text(str(tmp_path / "a.parquet"), split="train"))


@pytest.mark.parametrize("reference", ["~nobody-here/x", "x" * 5000])
def test_what_can_be_no_path_is_refused_as_model_and_as_data(reference: str) -> None:
    with pytest.raises(DataError):
        open_text(reference, split="train")
    with pytest.raises(UnknownModelError):
        check_model(reference)


def test_a_parquet_file_without_text_says_what_it_has(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match='no column "text" but body'):
        check_text(open_text(str(tmp_path / "a.parquet"), split="train"))


@pytest.mark.parametrize("reference", ["nix.jsonl", "./nix", "a/b/c", "stdlib:nix", "one word"])
def test_what_is_no_data_reference_is_refused_with_its_value(reference: str) -> None:
    with pytest.raises(DataError) as caught:
        open_text(reference, split="train")
    assert reference in caught.value.message


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nx\n")
    with pytest.raises(DataError, match="format that is not read"):
        open_text(str(tmp_path / "a.csv"), split="train")


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_the_standard_library_is_a_text(split: str) -> None:
    text = open_text(f"stdlib:{split}", split="train")
    first = next(text.documents())
    assert first.strip()
    assert text.data == open_text(f"stdlib:{split}", split="validation").data


@given(st.lists(st.text(min_size=1), max_size=50), st.integers())
def test_shuffling_loses_nothing_and_depends_on_the_seed_alone(documents: list[str], seed: int) -> None:
    text = Text(DataSource(name="x", version="1"), lambda: iter(documents))
    assert sorted(text.shuffled(seed)) == sorted(documents)
    assert list(text.shuffled(seed)) == list(text.shuffled(seed))


@given(st.lists(st.text(), max_size=40))
def test_no_document_is_evaluated_on_and_used_otherwise(documents: list[str]) -> None:
    same = Text(DataSource(name="x", version="1"), lambda: iter(documents))
    other = Text(DataSource(name="y", version="1"), lambda: iter(documents))
    evaluation, (calibration, healing) = keep_apart(same, (same, other))
    assert not set(evaluation.documents()) & set(calibration.documents())
    assert sorted([*evaluation.documents(), *calibration.documents()]) == sorted(documents)
    assert healing is other
    assert (evaluation.data.part, calibration.data.part) == ("2 of 2", "1 of 2")
    assert keep_apart(same, (other, other)) == (same, (other, other))


def test_a_build_that_does_not_heal_opens_no_text_for_it_and_keeps_none_apart(tmp_path: Path) -> None:
    path = str(write(tmp_path / "both.jsonl"))
    config = BuildConfig(
        reference="m",
        drop=0.3,
        heal_enabled=False,
        measure=MeasureSettings(data="stdlib:train"),
        heal=HealSettings(data=path),
        evaluate=EvaluateSettings(data=path),
    )
    unhealed = open_texts(config)
    assert (unhealed.healing.data.name, unhealed.evaluation.data.part) == ("nothing", None)
    healed = open_texts(config.model_copy(update={"heal_enabled": True}))
    assert (healed.healing.data.part, healed.evaluation.data.part) == ("1 of 2", "2 of 2")
