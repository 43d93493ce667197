"""Several evaluation texts: given, refused, kept apart, and read by builds of before."""

import json
from pathlib import Path

import pytest

from factory.artifacts import DataSource
from factory.config.request import BuildRequest
from factory.config.settings import BuildConfig, EvaluateSettings, HealSettings, MeasureSettings
from factory.errors import DataError, UsageError
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


def test_the_same_text_twice_is_refused_by_its_name_and_by_its_content(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names stdlib:prose twice"):
        BuildRequest.read({"model": "demo", "drop": 0.3, "eval_data": ["stdlib:prose"] * 2})
    first, second = (written(tmp_path / f"{name}.jsonl", DOCUMENTS) for name in "ab")
    with pytest.raises(DataError, match=r"b\.jsonl is the same text as a\.jsonl"):
        open_texts(config_of(first, second, healed=written(tmp_path / "c.jsonl", ["else"])))


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
