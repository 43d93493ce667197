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
from factory.config.references import ModelReference
from factory.config.settings import BuildConfig, EvaluateSettings, HealSettings, MeasureSettings
from factory.errors import DataError, UnknownModelError
from factory.pipeline.texts import check_texts, open_texts
from factory.text.overlap import Contents, keep_apart, look
from factory.text.text import Text, open_text, text_identity

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
        ('{"text": 3}', '"text" is a number, not a text'),
        ('["text"]', "no columns"),
        ('{"text": "a\\ud800"}', "half of a character"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(LINES + line + "\n")
    with pytest.raises(DataError) as caught:
        look(open_text(str(path), split="train"))
    assert "line 4" in caught.value.message
    assert problem in caught.value.message


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
def test_rows_without_text_are_passed_over_and_counted_in_every_format(tmp_path: Path, ending: str) -> None:
    rows = ["first", None, "", "second", " \n"]
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        parquet.write_table(pyarrow.table({"text": rows}), path)
    else:
        path.write_bytes(gzip.compress(lines.encode()) if ending.endswith("gz") else lines.encode())
    texts = open_texts(config_of(calibration=str(path), evaluation=str(write(tmp_path / "b.jsonl"))))
    assert list(texts.calibration.documents()) == ["first", "second"]
    assert check_texts(texts) == (f"3 rows of a.{ending} have no text and are skipped",)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_file_of_rows_without_text_is_refused_with_their_number(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        parquet.write_table(pyarrow.table({"text": ["", "  "]}), path)
    else:
        path.write_text('{"text": ""}\n{"text": null}\n')
    with pytest.raises(DataError, match="contains no text: its 2 rows are empty"):
        look(open_text(str(path), split="train"))


def test_a_file_of_blank_lines_holds_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n")
    with pytest.raises(DataError, match="contains no rows"):
        look(open_text(str(path), split="train"))


@pytest.mark.parametrize("name", ["a.jsonl.xz", "a.jsonl.gz", "a.parquet"])
def test_a_damaged_file_is_a_clear_error(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="cannot read"):
        look(open_text(str(path), split="train"))


def test_a_file_cut_short_is_damaged_rather_than_wrong_in_a_line(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"document {n} {n**9}"}) + "\n" for n in range(3000))
    whole = gzip.compress(lines.encode())
    path = tmp_path / "a.jsonl.gz"
    for content in (whole[: len(whole) // 2], whole[:500] + b"\xff" * 100 + whole[600:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot read"):
            look(open_text(str(path), split="train"))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES, encoding="utf-8-sig")
    assert list(open_text(str(tmp_path / "a.jsonl"), split="train").documents()) == DOCUMENTS


def test_a_parquet_column_that_is_no_text_is_named_by_its_type(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="holds int64 in column 'text'"):
        look(open_text(str(tmp_path / "a.parquet"), split="train"))


@pytest.mark.parametrize("reference", ["~nobody-here/x", "x" * 5000])
def test_what_can_be_no_path_is_refused_as_model_and_as_data(reference: str) -> None:
    with pytest.raises(DataError):
        open_text(reference, split="train")
    with pytest.raises(UnknownModelError):
        ModelReference.read(reference)


def test_a_parquet_file_without_text_says_what_it_has(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"title": ["x"], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no column 'text'; it has title, body"):
        look(open_text(str(tmp_path / "a.parquet"), split="train"))


@pytest.mark.parametrize("reference", ["nix.jsonl", "./nix", "a/b/c", "stdlib:nix", "one word"])
def test_what_is_no_data_reference_is_refused_with_its_value(reference: str) -> None:
    with pytest.raises(DataError) as caught:
        open_text(reference, split="train")
    assert reference in caught.value.message


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.doc").write_text("text\nx\n")
    with pytest.raises(DataError, match="an unsupported format"):
        open_text(str(tmp_path / "a.doc"), split="train")


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


def config_of(*, calibration: str, evaluation: str, healing: str | None = None) -> BuildConfig:
    return BuildConfig(
        reference="m",
        drop=0.3,
        heal_enabled=healing is not None,
        measure=MeasureSettings(data=calibration),
        heal=HealSettings(data=healing or calibration),
        evaluate=EvaluateSettings(data=evaluation),
    )


def written(path: Path, documents: list[str]) -> str:
    """A file of these documents, in the format of its name."""
    lines = "".join(json.dumps({"text": document}) + "\n" for document in documents).encode()
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.table({"text": documents}), path)
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(documents))
    else:
        path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(lines))
    return str(path)


MANY = [f"document {number}" for number in range(200)]


@pytest.mark.parametrize("name", ["b.jsonl", "b.jsonl.gz", "b.jsonl.xz", "b.txt", "b.parquet"])
def test_a_copy_under_another_name_or_in_another_format_is_divided(tmp_path: Path, name: str) -> None:
    first, copy = written(tmp_path / "a.jsonl", MANY), written(tmp_path / name, MANY)
    texts = open_texts(config_of(calibration=first, evaluation=copy, healing=copy))
    measured, healed, evaluated = (
        {document.strip() for document in text.documents()}
        for text in (texts.calibration, texts.healing, texts.evaluation)
    )
    assert not evaluated & (measured | healed)
    assert evaluated | measured == set(MANY)
    assert min(len(measured), len(evaluated)) > 50
    assert texts.remarks


def test_a_text_that_holds_the_evaluation_s_leaves_its_documents_out(tmp_path: Path) -> None:
    evaluation = written(tmp_path / "e.jsonl", MANY[:20])
    healing = written(tmp_path / "t.parquet", [f" {document}\r\n" for document in MANY])
    texts = open_texts(config_of(calibration="stdlib:train", evaluation=evaluation, healing=healing))
    assert list(texts.evaluation.documents()) == MANY[:20]
    assert [document.strip() for document in texts.healing.documents()] == MANY[20:]
    assert texts.remarks == (
        "20 documents of t.parquet are also in the evaluation text e.jsonl: they are left out",
    )
    assert texts.evaluation.data.part is None
    assert texts.healing.data.part.startswith("without any of 20 documents that serve another use (")
    other = written(tmp_path / "e.jsonl", MANY[1:21])
    texts_of_other = open_texts(config_of(calibration="stdlib:train", evaluation=other, healing=healing))
    assert text_identity(texts_of_other.healing.data) != text_identity(texts.healing.data)


def test_texts_without_a_common_document_keep_their_names_in_the_keys(tmp_path: Path) -> None:
    first, second = written(tmp_path / "a.jsonl", MANY[:100]), written(tmp_path / "b.jsonl", MANY[100:])
    texts = open_texts(config_of(calibration=first, evaluation=second, healing="stdlib:train"))
    assert [text_identity(text.data) for text in (texts.calibration, texts.healing, texts.evaluation)] == [
        text_identity(open_text(name, split="train").data) for name in (first, "stdlib:train", second)
    ]
    assert not texts.remarks


def stream(documents: list[str], name: str = "acme/text", split: str = "train") -> Text:
    data = DataSource(name=name, version="1", hub_id=name, split=split)
    return Text(data, lambda: iter(documents))


def first_ten(text: Text) -> Contents:
    return look(text, most=10 if text.data.hub_id else None)


def test_a_stream_leaves_out_documents_that_its_beginning_did_not_show() -> None:
    evaluation = Text(DataSource(name="e.jsonl", version="2"), lambda: iter(["document 3", "document 150"]))
    apart = keep_apart(evaluation, (stream(MANY),), look=lambda text: first_ten(text).hashes)
    assert list(apart.others[0].documents()) == [m for m in MANY if m not in ("document 3", "document 150")]
    assert list(apart.evaluation.documents()) == ["document 3", "document 150"]


def test_a_stream_leaves_out_what_is_evaluated_on_though_its_beginning_shows_none_of_it() -> None:
    evaluation = Text(DataSource(name="e.jsonl", version="2"), lambda: iter(["document 150"]))
    apart = keep_apart(evaluation, (stream(MANY),), look=lambda text: first_ten(text).hashes)
    assert list(apart.others[0].documents()) == [m for m in MANY if m != "document 150"]


def test_a_document_in_two_spellings_of_its_spaces_serves_one_use() -> None:
    same = Text(DataSource(name="x", version="1"), lambda: iter([*MANY, *(f"{m}\n" for m in MANY)]))
    apart = keep_apart(same, (same,), look=lambda text: pytest.fail("read"))
    evaluated, healed = ({m.strip() for m in t.documents()} for t in (apart.evaluation, apart.others[0]))
    assert not evaluated & healed
    assert evaluated | healed == set(MANY)


def test_splits_of_one_data_set_are_not_read_to_be_compared() -> None:
    train, validation = stream(MANY), stream(MANY, split="validation")
    apart = keep_apart(validation, (train,), look=lambda text: pytest.fail("read"))
    assert (apart.evaluation, apart.others) == (validation, (train,))


def test_one_split_under_two_configurations_is_divided_in_halves() -> None:
    all_of_it, some = stream(MANY), stream(MANY[::2])
    some = Text(some.data.model_copy(update={"name": "acme/text:some"}), some.rows)
    apart = keep_apart(all_of_it, (some,), look=lambda text: pytest.fail("read"))
    assert (apart.evaluation.data.part, apart.others[0].data.part) == ("2 of 2", "1 of 2")
    assert not set(apart.evaluation.documents()) & set(apart.others[0].documents())


@given(st.lists(st.text(), max_size=30), st.lists(st.text(), max_size=30))
def test_whatever_two_texts_share_serves_one_use(ours: list[str], theirs: list[str]) -> None:
    evaluation, other = (
        Text(DataSource(name=name, version=name), lambda documents=documents: iter(documents))
        for name, documents in (("x", ours), ("y", theirs))
    )
    apart = keep_apart(evaluation, (other,), look=lambda text: look(text).hashes)
    evaluated, used = (
        {" ".join(document.split()) for document in text.documents()}
        for text in (apart.evaluation, apart.others[0])
    )
    assert not evaluated & used
    assert evaluated | used == {" ".join(document.split()) for document in [*ours, *theirs]}


@given(st.lists(st.text(), max_size=40))
def test_no_document_is_evaluated_on_and_used_otherwise(documents: list[str]) -> None:
    same = Text(DataSource(name="x", version="1"), lambda: iter(documents))
    other = Text(DataSource(name="y", version="1"), lambda: iter(documents))
    apart = keep_apart(same, (same, other), look=lambda text: look(text).hashes)
    evaluation, (calibration, healing) = apart.evaluation, apart.others
    assert not set(evaluation.documents()) & set(calibration.documents())
    assert sorted([*evaluation.documents(), *calibration.documents()]) == sorted(documents)
    assert not {" ".join(d.split()) for d in evaluation.documents()} & {
        " ".join(d.split()) for d in healing.documents()
    }
    assert (evaluation.data.part, calibration.data.part) == ("2 of 2", "1 of 2")


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
