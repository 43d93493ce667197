"""Texts as token sequences: how each begins and ends, and tokens that the model has no row for."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from factory.config.settings import BuildConfig, HealSettings, MeasureSettings, PlanSettings
from factory.errors import ModelError
from factory.healing.data import data_sets
from factory.hub.resolve import resolve
from factory.model.tokenizer import Encoder, load_encoder, load_tokenizer
from factory.pipeline.texts import check_tokens
from factory.pruning.measure import take_samples
from factory.pruning.search import SEARCH, take_sequences
from factory.text.text import Texts, open_text
from tests.builders.models import END, byte_encoder, byte_tokenizer, save_llama
from tests.builders.texts import text_of

AROUND = ["$A", f"{END} $A", f"{END} {END} $A", f"$A {END}", f"{END} $A {END}"]

CONFIG = BuildConfig(reference="m", drop=0.3)


@given(st.text(max_size=60), st.integers(min_value=4, max_value=9), st.sampled_from(AROUND))
def test_windows_hold_a_text_once_and_each_begins_as_a_text_does(text: str, length: int, around: str) -> None:
    encoder = byte_encoder(around)
    (tokens,) = encoder.encode([text])
    pieces = list(encoder.windows(tokens, length=length))
    begin = len(encoder.prefix)
    assert all(piece[:begin] == encoder.prefix for piece in pieces)
    joined = [token for piece in pieces for token in piece[begin:]]
    # Of a piece of one token, nothing can be predicted without a prefix.
    assert joined == (tokens[:-1] if not begin and len(tokens) % length == 1 else tokens)
    assert all(begin < len(piece) <= length for piece in pieces)


@pytest.mark.parametrize(
    ("around", "prefix", "end", "num_given"),
    [("$A", 0, 1, 1), (f"{END} $A", 1, 1, 1), (f"{END} {END} $A", 2, 1, 2), (f"{END} $A {END}", 1, 1, 1)],
)
def test_a_document_begins_as_the_tokenizer_says_and_ends_once(
    around: str, prefix: int, end: int, num_given: int
) -> None:
    encoder = byte_encoder(around)
    assert (encoder.prefix, encoder.end, encoder.num_given) == ([0] * prefix, [0] * end, num_given)


def test_every_use_of_a_text_sees_windows_that_begin_alike_and_end_tokens_only_behind_documents(
    tmp_path: Path,
) -> None:
    encoder = byte_encoder(f"{END} $A {END}")
    text = text_of([letter * 20 for letter in "abcdefgh"])
    samples = take_samples(text, encoder, settings=MeasureSettings(sequence_length=8), seed=0)
    searched = take_sequences(
        text, encoder, settings=PlanSettings(sequence_length=8, num_documents=3), seed=0, half=SEARCH
    )
    settings = HealSettings(num_steps=2, batch_size=2, sequence_length=16)
    guard, train = data_sets(text, encoder, settings=settings, seed=0, folder=tmp_path)
    for sequence in [*(tokens for _, tokens in samples), *searched]:
        assert sequence == [0, *sequence[1:2] * 7]  # one letter throughout, and no end behind a cut text
    for sequence in [*guard["input_ids"], *train["input_ids"]]:
        assert sequence[0] == 0
        assert sequence[1:].count(0) == (len(sequence) < 16)  # behind the last window of a document only


def test_a_task_s_question_is_not_ended() -> None:
    encoder = byte_encoder(f"{END} $A {END}")
    assert encoder.open_ended("abc").input_ids == [0, *byte_encoder().encode(["abc"])[0]]
    assert encoder.tokenizer("abc").input_ids[-1] == 0
    assert byte_encoder(f"{END} $A").open_ended.backend_tokenizer is not None


def test_the_probe_is_of_letters_that_the_tokenizer_knows() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "A": 2, "C": 3}, merges=[]))
    special = [("<s>", 0), ("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    dna = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")
    encoder = Encoder(dna, vocab_size=4)
    assert (encoder.prefix, encoder.end) == ([0], [1])
    tokenizer.normalizer = normalizers.Replace("A", "")
    with pytest.raises(ModelError, match="cannot tell what the tokenizer puts around a text"):
        assert Encoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer), vocab_size=4).prefix


def test_no_window_is_made_of_the_end_of_a_document_alone(tmp_path: Path) -> None:
    text = text_of([letter * 14 for letter in "abcdefgh"])
    settings = HealSettings(num_steps=2, batch_size=2, sequence_length=8)
    encoder = byte_encoder(f"{END} $A")
    guard, train = data_sets(text, encoder, settings=settings, seed=0, folder=tmp_path)
    assert all(len(set(sequence)) == 2 for sequence in [*guard["input_ids"], *train["input_ids"]])


def test_an_end_token_without_a_row_is_refused_before_the_work(tmp_path: Path) -> None:
    save_llama(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"puts around a text '<\|im_end\|>', token 257, but"):
        load_encoder(tmp_path / "model").check([])


def test_a_word_that_contains_an_added_token_is_not_taken_for_it(tmp_path: Path) -> None:
    save_llama(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("cat", single_word=True)])
    tokenizer.save_pretrained(tmp_path / "model")
    encoder = load_encoder(tmp_path / "model")
    encoder.check(["concatenate"])
    with pytest.raises(ModelError, match="a text contains 'cat'"):
        encoder.check(["concatenate", "a cat"])


def test_the_rows_of_an_embedding_may_be_left_to_the_configuration_s_class(tmp_path: Path) -> None:
    save_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_encoder(tmp_path).vocab_size == 32_000
    assert resolve(str(tmp_path)).vocab_size == 32_000


def test_a_tokenizer_without_padding_pads_with_its_end_token(tmp_path: Path) -> None:
    save_llama(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == tokenizer.eos_token


def test_a_padding_token_without_a_row_in_the_embedding_is_not_used(tmp_path: Path) -> None:
    save_llama(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path)
    assert load_encoder(tmp_path).pad_token_id == 0


def test_a_text_with_a_token_that_the_embedding_lacks_is_refused_before_the_work(tmp_path: Path) -> None:
    save_llama(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.jsonl").write_text('{"text": "plain"}\n{"text": "one <extra> too many"}\n')
    (tmp_path / "plain.jsonl").write_text('{"text": "plain"}\n{"text": "words"}\n')
    plain, text = (open_text(str(tmp_path / f"{name}.jsonl"), split="train") for name in ("plain", "text"))
    source = resolve(str(tmp_path / "model"))
    check_tokens(source, Texts(plain, plain, plain), CONFIG, note=pytest.fail)
    for texts in (Texts(text, plain, plain), Texts(plain, text, plain), Texts(plain, plain, text)):
        with pytest.raises(ModelError, match=r"contains '<extra>', token 257, but .* embedding has 257 rows"):
            check_tokens(source, texts, CONFIG, note=pytest.fail)
    with pytest.raises(ModelError, match="contains '<extra>', token 257"):
        load_encoder(tmp_path / "model").encode(["one <extra> too many"])


def test_a_missing_or_damaged_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)
