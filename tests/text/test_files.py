"""Local data as people have it: each layout is read right, or refused in one line with what there is."""

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from factory.config.references import check_data
from factory.config.settings import BuildConfig, EvaluateSettings, MeasureSettings
from factory.errors import DataError
from factory.pipeline.texts import check_texts, open_texts
from factory.text.text import open_text, text_identity

TEXTS = ["one", "two, with a comma", "drei äöü"]
CHAT = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
SHAREGPT = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def texts_as(ending: str, texts: list[str | None], column: str = "text") -> bytes:
    """Return a file of rows in a format."""
    kind, *compressed = ending.lower().split(".")[1:]
    rows = [{column: text} for text in texts]
    if kind == "parquet":
        stream = io.BytesIO()
        parquet.write_table(pyarrow.table({column: pyarrow.array(texts, pyarrow.string())}), stream)
        return stream.getvalue()
    if kind == "csv":
        lines = io.StringIO()
        writer = csv.DictWriter(lines, [column, "n"])
        writer.writeheader()
        writer.writerows({**row, "n": n} for n, row in enumerate(rows))
        content = lines.getvalue().encode()
    else:
        content = {"jsonl": jsonl, "json": lambda rows: json.dumps(rows, indent=1).encode()}[kind](rows)
    for each in compressed:
        content = COMPRESS[each](content)
    return content


COMPRESS: Mapping[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "zst": lambda content: pyarrow.Codec("zstd").compress(content, asbytes=True),
}
ENDINGS = [
    f".{kind}{more}" for kind in ("jsonl", "json", "csv") for more in ("", ".gz", ".xz", ".bz2", ".zst")
]
ENDINGS += [".parquet", ".JSONL", ".Json.GZ", ".CSV", ".PARQUET"]


def table(values: pyarrow.Array, column: str = "text") -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table({column: values, "n": range(len(values))}), stream)
    return stream.getvalue()


# Name → (files, reference, documents).
LAYOUTS: dict[str, tuple[dict[str, bytes], str, list[str]]] = {
    "JSON lines in a .json": ({"a.json": jsonl([{"text": t} for t in TEXTS])}, "a.json", TEXTS),
    "another column": ({"a.jsonl": jsonl([{"id": 1, "body": "x", "title": "t"}])}, "a.jsonl#body", ["x"]),
    "nothing in the first rows": (
        {"a.jsonl": jsonl([{"text": None}] * 3 + [{"text": "x"}])},
        "a.jsonl",
        ["x"],
    ),
    "an empty shard before others": (
        {"d/a.jsonl": b"", "d/b.csv.gz": gzip.compress(b"body\n"), "d/c.csv": b"body\nx\n"},
        "d",
        ["x"],
    ),
    "the only strings": ({"a.jsonl": jsonl([{"id": 1, "body": "x"}])}, "a.jsonl", ["x"]),
    "a hash in the name": ({"a#b.jsonl": jsonl([{"text": "x"}])}, "a#b.jsonl", ["x"]),
    "a hash in the name and a column": (
        {"a#b.jsonl": jsonl([{"text": "x", "body": "y"}])},
        "a#b.jsonl#body",
        ["y"],
    ),
    "a column of a csv": ({"a.csv": b"id,body,more\n1,x,y\n"}, "a.csv#body", ["x"]),
    "lines in a cell": ({"a.csv": b'text\n"one\ntwo"\n'}, "a.csv", ["one\ntwo"]),
    "missing cells and an index": ({"a.csv": b",text,n\n0,x,1\n1\n"}, "a.csv", ["x"]),
    "a byte order mark": ({"a.csv": b"\xef\xbb\xbftext\nx\n"}, "a.csv", ["x"]),
    "a long cell": ({"a.csv": b"text\n" + b"x" * 200_000 + b"\n"}, "a.csv", ["x" * 200_000]),
    "string views": (
        {"a.parquet": table(pyarrow.array(TEXTS).cast(pyarrow.string_view()))},
        "a.parquet",
        TEXTS,
    ),
    "large strings": (
        {"a.parquet": table(pyarrow.array(TEXTS).cast(pyarrow.large_string()))},
        "a.parquet",
        TEXTS,
    ),
    "a dictionary": ({"a.parquet": table(pyarrow.array(TEXTS).dictionary_encode())}, "a.parquet", TEXTS),
    "a folder of shards": (
        {
            "d/b.jsonl": jsonl([{"text": "2"}]),
            "d/a.csv": b"text\none\n",
            "d/c/x.txt": b"3",
            "d/README.rst": b"no",
        },
        "d",
        ["one", "2", "3"],
    ),
    "hidden files": ({"d/.x.jsonl": b"{", "d/.c/a.txt": b"no", "d/a.txt": b"yes"}, "d", ["yes"]),
    "a pattern": (
        {
            "d/train-0.jsonl": jsonl([{"text": "0"}]),
            "d/train-1.jsonl": jsonl([{"text": "1"}]),
            "d/x.csv": b"no",
        },
        "d/train-*.jsonl",
        ["0", "1"],
    ),
    "a pattern and a column": ({"d/a.csv": b"a,b\n1,two\n"}, "d/*.csv#b", ["two"]),
    "an empty shard among others": ({"d/a.txt": b"", "d/b.txt": b"x"}, "d", ["x"]),
    "paragraphs": ({"a.txt": b"one\nmore\n\n\ntwo\n"}, "a.txt", ["one\nmore", "two"]),
    "separators": (
        {"a.txt": b"one\n\nmore\n<|endoftext|>\ntwo\n<|endoftext|>\n"},
        "a.txt",
        ["one\n\nmore", "two"],
    ),
    "Markdown": ({"a.md": b"# Title\n\nText\n"}, "a.md", ["# Title\n\nText"]),
    "one row": ({"a.json": b'{"text": "one"}\n'}, "a.json", ["one"]),
    "rows after blank lines": ({"a.json": b'\n{"text": "one"}\n\n{"text": "two"}'}, "a.json", ["one", "two"]),
    "a text beside numbers": ({"a.csv": b"id,body\n1,one\n2,2\n"}, "a.csv", ["one", "2"]),
    "compressed text": ({"a.TXT.gz": gzip.compress(b"one\n\ntwo")}, "a.TXT.gz", ["one", "two"]),
}


def laid_out(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(("files", "reference", "documents"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_gives_its_documents(
    tmp_path: Path, files: dict[str, bytes], reference: str, documents: list[str]
) -> None:
    laid_out(tmp_path, files)
    check_data(f"{tmp_path}/{reference}")
    text = pickle.loads(pickle.dumps(open_text(f"{tmp_path}/{reference}", split="train")))
    assert [document.strip() for document in text.documents()] == documents
    assert str(tmp_path) not in text.data.name


CHATS = {
    "ShareGPT, of Bing": jsonl([{"conversations": [SHAREGPT[0], {**SHAREGPT[1], "from": "bing"}]}]),
    "messages": jsonl([{"messages": CHAT, "source": "x"}]),
    "ShareGPT": jsonl([{"conversations": SHAREGPT, "id": "1"}]),
}


@pytest.mark.parametrize("content", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_conversations_are_read_with_the_roles_that_templates_know(
    tmp_path: Path, content: bytes, ending: str
) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_bytes(content)
    if ending == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist([json.loads(content)]), path)
    text = open_text(str(path), split="train")
    assert text.data.is_chat
    assert [document.messages for document in text.documents()] == [CHAT]  # type: ignore[attr-defined]


def test_conversations_without_an_answer_are_skipped_and_counted(tmp_path: Path) -> None:
    rows = [{"messages": messages} for messages in ([], None, CHAT, CHAT[:1], CHAT)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows))
    texts = opened(tmp_path / "a.jsonl")
    assert len(list(texts.calibration.documents())) == 2
    assert check_texts(texts) == ("3 rows of a.jsonl#messages have no answer and are skipped",)


ERRORS: dict[str, tuple[dict[str, bytes], str, str, str]] = {
    "an unknown column": (
        {"a.csv": b"a,b\nx,y\n"},
        "a.csv#c",
        "has no column 'c'; it has a, b",
        "a.csv#a or ",
    ),
    "no usual column": ({"a.csv": b"a,b\nx,y\n"}, "a.csv", "has no column 'text'; it has a, b", "a.csv#b"),
    "numbers": ({"a.jsonl": b'{"text": 1}\n'}, "a.jsonl", "holds a number in column 'text'", "use another"),
    "numbers in a CSV file": (
        {"a.csv": b"text\n1\n\n-2.5e3\n3,000\n".replace(b"3,000", b'"3,000"')},
        "a.csv",
        "holds numbers in column 'text'",
        "use another",
    ),
    "one object on one line": (
        {"a.json": json.dumps({"version": 1, "data": [{"text": "x"}]}).encode()},
        "a.json",
        "holds one object, not rows",
        "only what is under 'data'",
    ),
    "one object over several lines": (
        {"a.json": json.dumps({"text": "x"}, indent=1).encode()},
        "a.json",
        "holds one object, not rows",
        "an array of objects",
    ),
    "lines of an object": (
        {"a.jsonl": json.dumps({"text": "x"}, indent=1).encode()},
        "a.jsonl",
        "line 1: not JSON: '{'",
        "an object must be on one line",
    ),
    "blank rows alone": (
        {"a.jsonl": jsonl([{"text": " ", "body": "x"}] * 2)},
        "a.jsonl",
        "its 2 rows are empty",
        "a.jsonl#COLUMN, or fill it",
    ),
    "a column of a text": ({"a.txt": b"x"}, "a.txt#text", "has no columns", "a.txt"),
    "no such file": ({}, "a.jsonl", "does not exist", "give a .jsonl"),
    "a column without a name": ({"a.csv": b"text\nx\n"}, "a.csv#", "does not exist", "/a.csv'?"),
    "a split of a file": ({"a.csv": b"text\nx\n"}, "a.csv[train]", "a local file has no", "a.csv#column"),
    "a revision of a file": ({"a.csv": b"text\nx\n"}, "a.csv@main", "a local file has no", "a.csv#column"),
    "no such file with a column": ({}, "a.jsonl#text", "does not exist", "give a .jsonl"),
    "a folder of other files": ({"d/a.doc": b"x"}, "d", "is a folder without data files", "give a .jsonl"),
    "a pattern of nothing": ({}, "d/*.jsonl", "matches no file", "give a .jsonl"),
    "a pattern of other files": ({"a.doc": b"x"}, "*.doc", "has an unsupported format", "give a .jsonl"),
    "an empty file": ({"a.csv": b""}, "a.csv", "is empty", "a .csv has a header"),
    "an empty text": ({"a.txt": b""}, "a.txt", "is empty", "a .txt or .md holds the text itself"),
    "an empty .jsonl": ({"a.jsonl": b""}, "a.jsonl", "is empty", 'a .jsonl has one {"text": …} per line'),
    "a header alone": ({"a.csv": b"text\n"}, "a.csv", "contains no rows", "a .csv has a header"),
    "an array of nothing": ({"a.json": b"[]"}, "a.json", "contains no rows", "a .json an array of them"),
    "a mistyped name": ({"rows.jsonl": b"x"}, "row.jsonl", "does not exist", "/rows.jsonl'?"),
    "a mistyped folder": ({"d/a.txt": b"x"}, "e/a.txt", "does not exist", "/e'"),
    "tabs": ({"a.tsv": b"text\nx\n"}, "a.tsv", "has an unsupported format", "save it as a .csv"),
    "an archive": ({"a.zip": b"PK"}, "a.zip", "has an unsupported format", "unpack it"),
    "semicolons": ({"a.csv": b"text;n\nx;1\n"}, "a.csv", "its header 'text;n' has no commas", "by commas"),
    "a comma without quotes": (
        {"a.csv": b"text\nx\none, two\n"},
        "a.csv",
        "line 3: more cells than the 1 of the header",
        "in double quotes",
    ),
    "blank text": ({"a.md": b" \n"}, "a.md", "contains no text", "a .txt or .md holds the text itself"),
    "an array with a number": (
        {"a.json": b'[{"text": "x"}, 1]'},
        "a.json",
        "item 2: no columns in '1'",
        "write",
    ),
    "half an array": ({"a.json": b'[{"text": "x"}'}, "a.json", "not JSON", "write"),
    "not UTF-8": ({"a.txt": b"\xff\xfe"}, "a.txt", "cannot read", "UTF-8"),
    "half a zst": ({"a.jsonl.zst": b"\x28\xb5\x2f\xfd\x04\x00"}, "a.jsonl.zst", "cannot read", "complete"),
    "a message without role": (
        {"a.jsonl": jsonl([{"messages": CHAT}, {"messages": [{"content": "x"}]}])},
        "a.jsonl",
        'line 2: "messages" has a message without',
        "write",
    ),
    "questions alone": (
        {"a.jsonl": jsonl([{"messages": CHAT[:1]}] * 2)},
        "a.jsonl",
        "contains no answer in 2 conversations",
        'the role "assistant"',
    ),
    "text where messages were": (
        {"a.jsonl": jsonl([{"messages": CHAT}, {"messages": "x"}])},
        "a.jsonl",
        'line 2: "messages" is a text, not a list',
        "write",
    ),
    "a parquet that is none": ({"a.parquet": b"x"}, "a.parquet", "cannot read", "parquet"),
    "shards with other columns": (
        {"d/a.parquet": table(pyarrow.array(["x"])), "d/b.parquet": table(pyarrow.array(["x"]), "body")},
        "d",
        "b.parquet has no column 'text'",
        "same columns",
    ),
}


@pytest.mark.parametrize(("files", "reference", "message", "hint"), ERRORS.values(), ids=ERRORS)
def test_what_cannot_be_read_is_one_line_with_a_hint(
    tmp_path: Path, files: dict[str, bytes], reference: str, message: str, hint: str
) -> None:
    laid_out(tmp_path, files)
    with pytest.raises(DataError) as caught:
        list(open_text(f"{tmp_path}/{reference}", split="train").documents())
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    assert hint in str(caught.value.hint)


def opened(path: Path) -> Any:
    return open_texts(
        BuildConfig(
            reference="m",
            drop=0.3,
            heal_enabled=False,
            measure=MeasureSettings(data=str(path)),
            evaluate=EvaluateSettings(data=("stdlib:prose",)),
        )
    )


@pytest.mark.parametrize("ending", ENDINGS)
def test_empty_rows_are_skipped_and_counted_in_every_format(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(texts_as(ending, ["first", None, "", "second", " \n"]))
    texts = opened(path)
    assert list(texts.calibration.documents()) == ["first", "second"]
    assert check_texts(texts) == (f"3 rows of a{ending} have no text and are skipped",)


WORDS = st.text(
    st.characters(codec="utf-8", exclude_characters="\r\n\x00\x85\u2028\u2029"), min_size=1, max_size=9
)


@given(st.lists(WORDS.filter(str.strip), min_size=1, max_size=30), st.sampled_from(ENDINGS))
def test_division_by_document_holds_in_every_format(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], ending: str
) -> None:
    path = tmp_path_factory.mktemp("data") / f"a{ending}"
    texts = ["word", *texts]  # numbers alone are refused in a CSV file
    path.write_bytes(texts_as(ending, [*texts]))
    config = BuildConfig(
        reference="m",
        drop=0.3,
        heal_enabled=False,
        measure=MeasureSettings(data=str(path)),
        evaluate=EvaluateSettings(data=(str(path),)),
    )
    found = open_texts(config)
    measured, evaluated = (list(text.documents()) for text in (found.calibration, found.evaluation))
    assert sorted([*measured, *evaluated]) == sorted(texts)
    assert not {" ".join(t.split()) for t in measured} & {" ".join(t.split()) for t in evaluated}


def test_the_identity_tells_columns_and_separators_apart(tmp_path: Path) -> None:
    laid_out(
        tmp_path, {"a.csv": b"text,body\nx,y\n", "a.txt": b"x\n\ny", "d/a.txt": b"x\n\ny", "b.txt": b"x"}
    )
    names = ["a.csv", "a.csv#body", "a.txt", "b.txt"]
    found = {text_identity(open_text(f"{tmp_path}/{name}", split="train").data) for name in names}
    assert len(found) == len(names)
    one, folder = (open_text(f"{tmp_path}/{name}", split="train").data for name in ("a.txt", "d"))
    assert (folder.name, folder.version) == ("d/", one.version)
