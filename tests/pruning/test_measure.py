"""Distances are those of the definition, at places all over a text, whatever the batch and the padding."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from factory.artifacts import DistanceProfile, Source
from factory.config.settings import MeasureSettings
from factory.errors import DataError, ModelError
from factory.pruning.criteria import plan
from factory.pruning.measure import (
    Moments,
    Sample,
    Sums,
    _positions,
    angular_distances,
    measure,
    measure_batches,
    take_samples,
)
from factory.resources import DEMO_MODEL
from tests.builders.builds import profile_from
from tests.builders.models import byte_encoder
from tests.builders.texts import text_of
from tests.families import build, config_of

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
    return profile_from(sums)


def test_distances_are_those_computed_naively_in_float64() -> None:
    model = toy("llama", 4)
    mean = torch.tensor(profile_of(model).mean)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for sample in samples(7):
        with torch.no_grad():
            states = model(torch.tensor([sample]), output_hidden_states=True).hidden_states[:4]
        for place in range(1, len(sample)):  # as many as there are, in so short a text
            for i, a in enumerate(state[0, place].double() for state in states):
                for j, b in enumerate(state[0, place].double() for state in states):
                    cosine = (a @ b / (a.norm() * b.norm())).clamp(-1, 1)
                    expected[i, j] += torch.arccos(cosine) / math.pi / (len(sample) - 1) / 7
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
    assert torch.allclose(distances, distances.T)


def test_block_influence_is_the_mean_over_tokens_of_one_minus_the_cosine() -> None:
    model = toy("llama", 4)
    found = torch.tensor(profile_of(model).influence)
    expected = torch.zeros(3, dtype=torch.float64)
    for sample in samples(7):
        with torch.no_grad():
            states = model(torch.tensor([sample]), output_hidden_states=True).hidden_states[:4]
        for layer, (a, b) in enumerate(pairwise(states)):  # [1, s, d]; the first token is an outlier
            cosine = torch.cosine_similarity(a[0, 1:].double(), b[0, 1:].double(), dim=-1)
            expected[layer] += (1 - cosine).mean() / 7
    assert (found[:3] - expected).abs().max() < 1e-6


def test_distances_over_all_tokens_leave_out_the_first() -> None:
    model = toy("llama", 3)
    taken = list(enumerate(samples(5)))
    batches = measure_batches(model, taken, pad_token_id=0, max_tokens=30, all_tokens=True)
    found = torch.cat([distances for distances, *_ in batches]).mean(dim=0)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for sample in samples(5):
        with torch.no_grad():
            states = model(torch.tensor([sample]), output_hidden_states=True).hidden_states[:3]
        together = torch.stack([state[0, 1:].double() for state in states], dim=1)  # [s - 1, 3, d]
        expected += angular_distances(together).mean(dim=0) / 5
    assert (found[:3, :3] - expected).abs().max() < 1e-6


# Where samples end ------------------------------------------------------------------------------


def places(samples: list[Sample], *, maximum: int = 4, seed: int = 0) -> list[list[int]]:
    found, _ = _positions(samples, maximum=maximum, seed=seed)
    return found.tolist()


LONG = [(number, list(range(1, 41))) for number in range(50)]


def test_distances_are_the_mean_over_samples_that_end_at_each_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factory.pruning.measure.PLACES", 4)
    model, sample = toy("llama", 3), (5, samples(1)[0] * 9)
    (found, *_), *_ = measure_batches(model, [sample], pad_token_id=0, max_tokens=128, seed=3)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for place in places([sample], seed=3)[0]:
        beginning = torch.tensor([sample[1][: place + 1]])
        with torch.no_grad():
            states = model(beginning, output_hidden_states=True).hidden_states[:3]
        expected += angular_distances(torch.stack([state[:, -1].double() for state in states], dim=1))[0] / 4
    assert (found[0, :3, :3] - expected).abs().max() < 1e-6


def test_places_depend_on_nothing_but_the_seed_the_sample_and_its_length() -> None:
    together = places(LONG)
    assert [places([sample])[0] for sample in reversed(LONG)] == together[::-1]
    assert places(LONG, seed=1) != together


def test_places_are_spread_over_the_text_and_never_the_first_token() -> None:
    found = places(LONG)
    assert all(len(set(row)) == 4 and 1 <= min(row) < 11 and 30 <= max(row) < 40 for row in found)
    assert {place for row in found for place in row} >= {1, 39}  # the whole text is in reach
    assert places([(0, [1, 2, 3])]) == [[2, 2, 1, 2]]  # padded in front, with weight 0


def test_a_measurement_does_not_depend_on_batches(tiny_source: Source, tmp_path: Path) -> None:
    taken = [(number, tokens * 12) for number, tokens in enumerate(samples(7))]
    model = toy("llama", 3)
    alone, together = (sums_over(model, taken, max_tokens=tokens) for tokens in (1, 1000))
    for one, other in zip(alone.moments, together.moments, strict=True):
        assert torch.allclose(one.mean, other.mean, atol=1e-6)


def sums_over(model: torch.nn.Module, taken: list[Sample], *, max_tokens: int) -> Sums:
    sums = Sums(len(model.model.layers), ())
    batches = measure_batches(model, taken, pad_token_id=0, max_tokens=max_tokens)
    sums.add(taken, list(batches))
    return sums


# The attention sink -----------------------------------------------------------------------------


def with_sink(layer: int | None) -> DistanceProfile:
    """The profile of a model whose `layer` adds a large state to the token that starts every text."""
    model = toy("llama", 4, range(4))
    model.model.embed_tokens.weight.data[1, 0] = 30.0  # only the first token has this direction
    if layer is not None:
        mlp = model.model.layers[layer].mlp
        for projection in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            projection.weight.data.zero_()
        mlp.gate_proj.weight.data[0, 0] = mlp.up_proj.weight.data[0, 0] = 10.0
        mlp.down_proj.weight.data[1, 0] = 10.0
        model.model.embed_tokens.weight.data[2:, 0] = 0.0
    taken = [
        (number, [1, *(token for token in tokens if token > 1), 2])
        for number, tokens in enumerate(samples(7))
    ]
    return profile_from(sums_over(model, taken, max_tokens=100))


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_the_layer_that_lifts_the_first_token_is_the_sink(layer: int) -> None:
    assert with_sink(layer).sink == layer


def test_a_model_whose_layers_leave_the_first_token_alone_has_no_sink() -> None:
    assert with_sink(None).sink is None
    assert profile_of(toy("llama", 4)).sink is None


# When to stop -----------------------------------------------------------------------------------


def distances_with(best: float, *, noise: float, count: int, num_layers: int = 5) -> torch.Tensor:
    """Samples [b, L + 1, L + 1] in which the block of 2 layers from layer 1 on has mean distance `best`."""
    generator = torch.Generator().manual_seed(0)
    size = num_layers + 1
    found = torch.full((count, size, size), 0.5, dtype=torch.float64)
    found += noise * torch.randn(found.shape, generator=generator, dtype=torch.float64)
    found[:, 1, 3] += best - 0.5
    return found


def sums_of(distances: torch.Tensor) -> Sums:
    size = distances.shape[1]
    sums = Sums(size - 1, (2,))
    sums.add(
        [(number, [1, 2]) for number in range(len(distances))],
        [
            (
                distances,
                torch.zeros(len(distances), size - 1, dtype=torch.float64),
                torch.ones(len(distances), size, 2, dtype=torch.float64),
            )
        ],
    )
    return sums


def test_the_lead_is_that_of_the_paired_difference_in_standard_errors() -> None:
    distances = distances_with(0.4, noise=0.1, count=50)
    rivals = [distances[:, start, start + 2] - distances[:, 1, 3] for start in (0, 2)]
    expected = min(float(d.mean() / (d.std() / math.sqrt(50))) for d in rivals)
    assert sums_of(distances).lead(2) == pytest.approx(expected)


def test_the_choice_is_certain_only_where_every_rival_is_three_standard_errors_behind() -> None:
    assert sums_of(distances_with(0.4, noise=0.1, count=200)).certain() == (2,)
    assert sums_of(distances_with(0.499, noise=0.1, count=200)).certain() == ()


def test_a_block_that_is_equal_in_every_sample_does_not_keep_the_choice_open() -> None:
    distances = distances_with(0.4, noise=0.0, count=10)
    distances[:, 0, 2] = distances[:, 1, 3]
    assert sums_of(distances).certain() == (2,)
    assert sums_of(distances).ties() == {}


def test_blocks_within_three_standard_errors_of_the_nearest_tie_with_it() -> None:
    distances = distances_with(0.4, noise=0.1, count=200)
    distances[:, 0, 2] -= 0.1
    tied = sums_of(distances).ties()[2]
    nearest = int(distances.mean(dim=0).diagonal(offset=2)[:-1].argmin())
    assert tied == tuple({0, 1} - {nearest})


@pytest.fixture(scope="module")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    from factory.hub.resolve import resolve

    return resolve(str(DEMO_MODEL)).model_copy(update={"folder": DEMO_MODEL})


def measured(source: Source, folder: Path, *, documents: int = 200, **settings: Any) -> DistanceProfile:
    words = [
        f"def f{number}(x):\n    return x + {number}\n" * (number % 7 + 1) for number in range(documents)
    ]
    return measure(
        source,
        text_of(words),
        settings=MeasureSettings(**{"sequence_length": 16, **settings}),
        block_sizes=(),
        seed=0,
        folder=folder,
        progress=lambda *_: None,
    )


def test_a_killed_measurement_goes_on_where_it_was(
    tiny_source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("factory.pruning.measure.SAVE_EVERY", 64)
    whole = measured(tiny_source, tmp_path, num_samples=160)
    assert not (tmp_path / "measuring.pt").exists()

    class Killed(BaseException):
        pass

    def kill(done: int, total: int, note: str) -> None:
        if done >= 128:
            raise Killed

    text = text_of(
        [f"def f{number}(x):\n    return x + {number}\n" * (number % 7 + 1) for number in range(200)]
    )
    arguments: dict[str, Any] = {"block_sizes": (), "seed": 0, "folder": tmp_path}
    settings = MeasureSettings(sequence_length=16, num_samples=160)
    with pytest.raises(Killed):
        measure(tiny_source, text, settings=settings, progress=kill, **arguments)
    assert (tmp_path / "measuring.pt").exists()
    seen: list[int] = []
    again = measure(
        tiny_source, text, settings=settings, progress=lambda done, *_: seen.append(done), **arguments
    )
    assert seen[0] == 128
    assert again == whole


def test_fewer_documents_than_asked_is_an_error(tiny_source: Source, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 20 usable documents; 30 were requested"):
        measured(tiny_source, tmp_path, documents=20, num_samples=30)


def test_sequences_shorter_than_asked_are_an_error(tiny_source: Source, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the longest of 20 documents .* sequences of 200 were requested"):
        measured(tiny_source, tmp_path, documents=20, num_samples=20, sequence_length=200, exact_length=True)


def test_each_document_gives_one_sample_cut_to_length() -> None:
    settings = MeasureSettings(sequence_length=4)
    found = take_samples(text_of(["abcde", "a", "bb", "ccd"]), byte_encoder(), settings=settings, seed=0)
    letters = byte_encoder().encode(["abcd", "bb", "ccd"])  # of a lone token, nothing can be measured
    assert sorted(tokens for _, tokens in found) == sorted(letters)


@pytest.mark.parametrize("family", ["openai-gpt", "gpt2", "mamba", "mixtral", "gemma3_text", "bloom"])
def test_layers_may_return_and_be_given_what_their_family_does(family: str) -> None:
    model = build(config_of(family))
    (found, *_), *_ = measure_batches(model, [(0, samples(1)[0])], pad_token_id=0, max_tokens=64)
    assert found.shape == (1, 9, 9)
    assert float(found.diagonal(offset=1, dim1=1, dim2=2).min()) > 1e-4
