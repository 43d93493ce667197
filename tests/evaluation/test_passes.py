"""What is read in one pass changes no loss and no answer."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance

from factory.evaluation.evaluate import _document_losses
from factory.evaluation.harness_model import HarnessModel
from factory.model.loading import load_model
from factory.model.losses import token_loss
from factory.model.tokenizer import load_encoder, load_tokenizer
from tests.builders.models import save_llama
from tests.builders.texts import rhymes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


@given(
    st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=6), st.none() | st.integers(1, 40)
)
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_documents_loss_does_not_depend_on_what_is_read_beside_it(
    folder: Path, lengths: list[list[int]], most: int | None
) -> None:
    model, encoder = load_model(folder), load_encoder(folder)
    documents = [[list(range(3, 3 + length)) for length in pieces] for pieces in lengths]
    shares: list[float] = []
    found = _document_losses(model, documents, encoder, most=most, report=shares.append)
    for pieces, (count, nats) in zip(documents, found, strict=True):
        assert count == sum(len(piece) - 1 for piece in pieces)
        expected = sum(token_loss(model, [piece]) * (len(piece) - 1) for piece in pieces if len(piece) > 1)
        assert nats == pytest.approx(expected, abs=1e-4)
    assert shares == sorted(shares)
    assert not shares or shares[-1] == 1


def test_a_pass_on_a_gpu_holds_as_many_requests_as_its_tokens_allow(folder: Path) -> None:
    loaded, tokenizer = load_model(folder), load_tokenizer(folder)
    texts = [(text[:40], text[40 : 41 + 7 * index]) for index, text in enumerate(rhymes(12))]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(texts)]
    expected = HarnessModel(loaded, tokenizer, report=lambda *_: None).loglikelihood(requests)
    packed = HarnessModel(loaded, tokenizer, report=lambda *_: None)
    packed.most, packed.batch_size_per_gpu = 200, "auto"
    passes: list[tuple[int, ...]] = []
    packed.model.register_forward_pre_hook(lambda _module, args: passes.append(tuple(args[0].shape)))
    for one, other in zip(expected, packed.loglikelihood(requests), strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4)
        assert one[1] == other[1]
    assert sum(rows for rows, _ in passes) == len(requests)
    assert all(rows * longest <= 200 for rows, longest in passes)
    assert all((rows + 1) * (longest + 1) > 200 for rows, longest in passes[:-1])
