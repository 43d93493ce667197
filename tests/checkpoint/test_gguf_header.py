"""GGUF headers: what they name as their origin is found, and no bytes make the reader fail."""

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory.checkpoint.gguf_header import _facts, is_gguf, made_from
from factory.errors import CheckpointError, UnknownModelError
from factory.hub.resolve import resolve

STRING, ARRAY, UINT32 = 8, 9, 4
ORIGIN = "general.base_model.0.repo_url"


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def a_header(**strings: str) -> bytes:
    """Version 3, no tensors; a number and a list of texts before the given strings."""
    facts = [
        text("general.quantization_version") + struct.pack("<II", UINT32, 2),
        text("general.tags") + struct.pack("<IIQ", ARRAY, STRING, 2) + text("a") + text("b"),
        *(text(key) + struct.pack("<I", STRING) + text(value) for key, value in strings.items()),
    ]
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(facts)) + b"".join(facts)


@pytest.mark.parametrize(
    ("facts", "origin"),
    [
        ({ORIGIN: "https://huggingface.co/acme/tiny"}, "acme/tiny"),
        ({"general.source.huggingface.repository": "acme/chat", ORIGIN: "acme/base"}, "acme/chat"),
        ({ORIGIN: "https://elsewhere.example/acme/tiny"}, None),
        ({ORIGIN: "acme/tiny; rm -r ."}, None),
        ({}, None),
    ],
)
def test_the_origin_in_a_header_is_found_if_it_is_a_repository(
    tmp_path: Path, facts: dict[str, str], origin: str | None
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(a_header(**facts))
    assert is_gguf(path)
    assert made_from(path) == origin


@given(st.integers(0, 400), st.binary(max_size=200))
def test_no_bytes_make_the_reader_fail(size: int, rest: bytes) -> None:
    _facts(a_header(**{ORIGIN: "https://huggingface.co/acme/tiny"})[:size] + rest)


def test_a_gguf_as_a_source_is_refused_with_the_model_to_take(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(a_header(**{ORIGIN: "https://huggingface.co/acme/tiny"}))
    with pytest.raises(CheckpointError, match="is a GGUF") as refused:
        resolve(str(path))
    assert "by its header acme/tiny" in refused.value.hint


def test_another_file_as_a_source_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    with pytest.raises(UnknownModelError, match="is a file, not a model folder"):
        resolve(str(path))


def test_a_folder_of_gguf_names_what_its_card_says_it_was_made_from(tmp_path: Path) -> None:
    (tmp_path / "model.Q4_K_M.gguf").write_bytes(a_header())
    (tmp_path / "README.md").write_text("---\nbase_model: acme/tiny\n---\n")
    with pytest.raises(CheckpointError, match="has only GGUF weights") as refused:
        resolve(str(tmp_path))
    assert refused.value.hint == "choose the repository they were converted from, by its card acme/tiny"
