"""Distances are those of the definition, at the last real token, whatever the batch and the padding."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from factory.artifacts import DataSource, DistanceProfile
from factory.config import MeasureSettings
from factory.errors import ModelError
from factory.measure import Moments, Sums, angular_distances, measure_batches, take_samples
from factory.plan import plan
from factory.texts import Text

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def toy(family: str, num_layers: int, identities: range = range(0)) -> torch.nn.Module:
    """A random model; the layers in `identities` add exactly nothing to the stream."""
    torch.manual_seed(0)
    config, architecture = FAMILIES[family]
    model = architecture(config(**SIZES, num_hidden_layers=num_layers)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that ordinary layers do turn the stream
        for index in identities:
            model.model.layers[index].self_attn.o_proj.weight.zero_()
            model.model.layers[index].mlp.down_proj.weight.zero_()
    return model


def samples(count: int, *, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 12, (count,), generator=generator).tolist()
    return [torch.randint(1, 64, (length,), generator=generator).tolist() for length in lengths]


def profile_of(model: torch.nn.Module, batch_size: int = 3) -> DistanceProfile:
    taken = list(enumerate(samples(7)))
    sums = Sums(len(model.model.layers), ())
    sums.add(taken, list(measure_batches(model, taken, pad_token_id=0, max_tokens=12 * batch_size)))
    return DistanceProfile(
        num_layers=sums.num_layers,
        num_samples=7,
        sequence_length=12,
        num_tokens=50,
        mean=tuple(map(tuple, sums.distance.mean.tolist())),
        stderr=tuple(map(tuple, sums.distance.stderr.tolist())),
        influence=tuple(sums.influence.mean.tolist()),
        data=DataSource(name="x", version="1"),
    )


def test_distances_are_those_computed_naively_in_float64() -> None:
    model = toy("llama", 4)
    mean = torch.tensor(profile_of(model).mean)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for sample in samples(7):
        with torch.no_grad():
            states = model(torch.tensor([sample]), output_hidden_states=True).hidden_states[:4]
        last = [state[0, -1].double() for state in states]
        for i, a in enumerate(last):
            for j, b in enumerate(last):
                cosine = (a @ b / (a.norm() * b.norm())).clamp(-1, 1)
                expected[i, j] += torch.arccos(cosine) / math.pi / 7
    expected.fill_diagonal_(0)
    assert (mean[:4, :4] - expected).abs().max() < 1e-6


def test_the_last_boundary_is_before_the_final_norm() -> None:
    model = toy("llama", 3)
    before = profile_of(model).mean[2][3]
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.randn(16))  # turns whatever comes after it
    assert profile_of(model).mean[2][3] == before


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_batch_size_and_padding_change_nothing(batch_size: int) -> None:
    model = toy("llama", 3)
    alone, together = profile_of(model, 1), profile_of(model, batch_size)
    assert torch.allclose(torch.tensor(alone.mean), torch.tensor(together.mean), atol=1e-6)
    assert torch.allclose(torch.tensor(alone.stderr), torch.tensor(together.stderr), atol=1e-6)


@settings(max_examples=12, deadline=None)
@given(st.data(), st.sampled_from(sorted(FAMILIES)))
def test_the_plan_finds_layers_that_do_nothing(data: st.DataObject, family: str) -> None:
    num_layers = data.draw(st.integers(min_value=4, max_value=8))
    n = data.draw(st.integers(min_value=1, max_value=num_layers - 2))
    start = data.draw(st.integers(min_value=0, max_value=num_layers - n - 1))
    profile = profile_of(toy(family, num_layers, range(start, start + n)))
    made = plan(profile, block_size=n)
    assert made.dropped == tuple(range(start, start + n))
    assert made.distance is not None
    assert made.distance < 1e-6


def test_a_state_that_is_not_finite_is_named_by_layer_and_sample() -> None:
    model = toy("llama", 4)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(math.inf)
    with pytest.raises(ModelError, match="layer 2 is not finite on sample 1"):  # the longest is read first
        profile_of(model)


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=4), min_size=2, max_size=30))
def test_streamed_statistics_are_those_of_the_whole(rows: list[list[float]]) -> None:
    values = torch.tensor(rows, dtype=torch.float64).reshape(-1, 2, 2)
    moments = Moments(2, 2)
    for batch in values.split(3):
        moments.add(batch)
    assert torch.allclose(moments.mean, values.mean(dim=0), atol=1e-9)
    assert torch.allclose(moments.stderr, values.std(dim=0) / math.sqrt(len(values)), atol=1e-8)


def test_angles_have_their_known_values() -> None:
    states = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [1.0, 1.0]]], dtype=torch.float64)
    distances = angular_distances(states)[0]
    assert torch.allclose(distances[0], torch.tensor([0.0, 0.5, 1.0, 0.25], dtype=torch.float64))
    assert torch.equal(distances, distances.T)


class WordTokenizer:
    """As much of a tokenizer as taking samples needs: a token a word."""

    def __call__(self, text: str, *, truncation: bool, max_length: int) -> "WordTokenizer":
        self.input_ids = [len(word) for word in text.split()][: max_length if truncation else None]
        return self


def text_of(documents: list[str]) -> Text:
    return Text(DataSource(name="some text", version="1"), lambda: iter(documents))


def test_each_document_gives_one_sample_cut_to_length() -> None:
    found = take_samples(
        text_of(["a b c d e", "one", "aa bb", "ccc ddd"]),
        WordTokenizer(),
        settings=MeasureSettings(sequence_length=4),
        seed=0,
    )
    # A lone token has no neighbour to predict.
    assert sorted(tokens for _, tokens in found) == [[1, 1, 1, 1], [2, 2], [3, 3]]
