"""Several evaluation texts: given, refused, kept apart, and read by builds of before."""

import gzip
import json
from pathlib import Path

import pytest

from factory.artifacts import DataSource
from factory.config.request import BuildRequest
from factory.config.settings import BuildConfig, EvaluateSettings, HealSettings, MeasureSettings
from factory.errors import DataError
from factory.pipeline.texts import open_texts
from factory.text.standard_library import documents


def written(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


DOCUMENTS = [f"document {number}" for number in range(40)]


def config_of(*evaluated: Path, healed: Path) -> BuildConfig:
    return BuildConfig(
        reference="m",
        drop=0.3,
        measure=MeasureSettings(data="stdlib:train"),
        heal=HealSettings(data=str(healed)),
        evaluate=EvaluateSettings(data=tuple(map(str, evaluated))),
    )


def test_one_text_or_several_can_be_given() -> None:
    for given in ("stdlib:prose", ["stdlib:prose"], ("stdlib:prose",)):
        request = BuildRequest.read({"model": "demo", "drop": 0.3, "eval_data": given})
        assert request.eval_data == ("stdlib:prose",)
    assert EvaluateSettings.model_validate({"data": "stdlib:prose"}).data == ("stdlib:prose",)  # as it was


def test_a_text_named_twice_is_evaluated_once_with_a_remark(tmp_path: Path) -> None:
    first = written(tmp_path / "a.jsonl", DOCUMENTS)
    request = BuildRequest.read({"model": "demo", "drop": 0.3, "eval_data": [str(first)] * 2})
    assert request.eval_data == (str(first),) * 2
    texts = open_texts(config_of(first, first, healed=written(tmp_path / "c.jsonl", ["else"])))
    assert [text.data.name for text in texts.evaluations] == ["a.jsonl"]
    assert texts.remarks == ("a.jsonl is named twice: it is evaluated once",)


@pytest.mark.parametrize("name", ["b.jsonl", "b.jsonl.gz", "b.txt"])
def test_an_equal_text_under_another_name_or_in_another_format_is_evaluated_once(
    tmp_path: Path, name: str
) -> None:
    first, copy = written(tmp_path / "a.jsonl", DOCUMENTS), tmp_path / name
    lines = first.read_bytes()
    copy.write_bytes(gzip.compress(lines) if copy.suffix == ".gz" else lines)
    if copy.suffix == ".txt":
        copy.write_text("\n\n".join(DOCUMENTS))
    texts = open_texts(config_of(first, copy, healed=written(tmp_path / "c.jsonl", ["else"])))
    assert [text.data.name for text in texts.evaluations] == ["a.jsonl"]
    assert texts.remarks == (f"{name} is the same text as a.jsonl: it is evaluated once",)


def test_documents_that_two_evaluation_texts_share_are_told_and_evaluated_in_both(tmp_path: Path) -> None:
    texts = [DOCUMENTS[:20], DOCUMENTS[10:30], DOCUMENTS[30:]]
    paths = [written(tmp_path / f"{name}.jsonl", lines) for name, lines in zip("abc", texts, strict=True)]
    opened = open_texts(config_of(*paths, healed=written(tmp_path / "h.jsonl", ["else"])))
    assert [list(text.documents()) for text in opened.evaluations] == texts
    assert opened.remarks == ("10 documents of b.jsonl are also in a.jsonl: both losses include them",)


def test_two_different_texts_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in "xy":
        (tmp_path / folder).mkdir()
    paths = [written(tmp_path / folder / "a.jsonl", [f"only in {folder}"]) for folder in "xy"]
    with pytest.raises(DataError, match=r"two texts are called a\.jsonl"):
        open_texts(config_of(*paths, healed=written(tmp_path / "h.jsonl", ["else"])))


def test_no_text_that_is_evaluated_shares_a_document_with_the_healing_text(tmp_path: Path) -> None:
    healed = written(tmp_path / "h.jsonl", DOCUMENTS)
    first = written(tmp_path / "a.jsonl", [*DOCUMENTS[:5], "only here"])
    second = written(tmp_path / "b.jsonl", [*DOCUMENTS[5:9], "only there"])
    texts = open_texts(config_of(first, second, healed=healed))
    assert list(texts.healing.documents()) == DOCUMENTS[9:]
    assert [len(list(text.documents())) for text in texts.evaluations] == [6, 5]


def test_held_out_code_is_of_the_corpus_of_the_code_and_the_manual_is_not() -> None:
    train, held_out, prose = (
        DataSource(name=f"stdlib:{part}", version=part).corpus for part in ("train", "held-out", "prose")
    )
    assert train == held_out != prose


def test_the_prose_is_whole_topics_without_code() -> None:
    topics = list(documents("prose"))
    assert len(topics) > 50
    assert not any(line.startswith("   >>>") for topic in topics for line in topic.splitlines())
