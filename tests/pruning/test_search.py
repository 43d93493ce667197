"""Losses with layers left out are those of the shortened model, and the searches find what is best."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from factory.artifacts import DataSource
from factory.config.settings import PlanSettings
from factory.errors import ModelError
from factory.hub.resolve import resolve
from factory.model.layers import decoder_layers, skip_layers
from factory.pruning.criteria import plan
from factory.pruning.measure import Sums, measure_batches
from factory.pruning.search import (
    COMPARE,
    SEARCH,
    Trial,
    best_candidate,
    compare,
    mean_loss,
    search_block,
    search_greedily,
    take_sequences,
)
from factory.resources import DEMO_MODEL
from factory.text.text import Text
from tests.builders.builds import profile_from
from tests.builders.models import byte_encoder, save_llama

ROUNDING = 1e-5  # of a loss, nats per token
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "gpt_neox": {},
    "gpt2": {"n_layer": 6, "n_embd": 16, "n_head": 2},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4},
    "mixtral": {"num_local_experts": 2},
    "smollm3": {},
}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 6,
    "pad_token_id": 0,
}


def model_of(family: str, *, num_layers: int = 6, identities: tuple[int, ...] = ()) -> Any:
    """A random model in which some layers add exactly nothing to the stream."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, "num_hidden_layers": num_layers, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that each layer matters
        for index in identities:
            for name, parameter in decoder_layers(model)[index].named_parameters():
                if name.split(".")[-2] in ("o_proj", "down_proj", "dense", "dense_4h_to_h"):
                    parameter.zero_()
    return model


def sequences(count: int = 5) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 12, (count,), generator=generator).tolist()
    return [torch.randint(1, 64, (length,), generator=generator).tolist() for length in lengths]


def trial_of(model: Any, *, batch_size: int = 2) -> Trial:
    return Trial(model, sequences(), pad_token_id=0, batch_size=batch_size)


@torch.no_grad()
def naive_losses(model: Any, dropped: tuple[int, ...]) -> torch.Tensor:
    """Nats and tokens of each sequence, one at a time, by the reference that runs and discards layers."""
    rows = []
    with skip_layers(model, dropped):
        for tokens in sequences():
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="sum")
            rows.append([float(loss), float(len(tokens) - 1)])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_model_whose_layers_are_skipped(family: str) -> None:
    model = model_of(family)
    trial = trial_of(model)
    blocks = [(0, 1), (2, 3), (4, 5), ()]
    for block, losses in zip(blocks, trial.losses((), blocks), strict=True):
        assert torch.allclose(losses, naive_losses(model, block), rtol=1e-5)
    found = trial.losses((1, 4), [(0,), (2,), (3,), (5,)])
    for layer, losses in zip((0, 2, 3, 5), found, strict=True):
        assert torch.allclose(losses, naive_losses(model, tuple(sorted((1, 4, layer)))), rtol=1e-5)


def test_measuring_and_losses_are_the_same_where_layers_are_offloaded(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model", num_layers=6)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{index}": "disk" if index in (1, 2, 4) else "cpu" for index in range(6)}
    here, spread = (
        AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, device_map=device_map, offload_folder=tmp_path / "offload"
        ).eval()
        for device_map in ("cpu", places)
    )
    taken = list(enumerate(sequences()))
    found, expected = (
        [
            torch.cat(parts)
            for parts in zip(*measure_batches(m, taken, pad_token_id=0, max_tokens=64), strict=True)
        ]
        for m in (spread, here)
    )
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
    cuts = [(1,), (2, 3), (4, 5)]
    found_losses, expected_losses = (trial_of(m).losses((0,), cuts) for m in (spread, here))
    assert torch.allclose(found_losses, expected_losses, rtol=1e-5)


def test_a_search_leaves_the_model_as_it_was() -> None:
    model = model_of("llama")
    before = naive_losses(model, ())
    trial_of(model).losses((1,), [(0,), (3,)])
    assert torch.equal(naive_losses(model, ()), before)
    assert not any("forward" in layer.__dict__ for layer in decoder_layers(model))


def test_the_best_block_is_the_best_of_all_blocks() -> None:
    model = model_of("llama")
    blocks = [(start, start + 1) for start in range(5)]
    naive = torch.stack([naive_losses(model, block) for block in blocks])
    chosen = search_block(trial_of(model), blocks, progress=lambda *_: None)
    assert chosen == blocks[int(mean_loss(naive).argmin())]


def test_greedy_search_takes_the_least_loss_at_every_step() -> None:
    model = model_of("llama")
    order = search_greedily(
        trial_of(model), num_layers=3, rank=list, may_drop=lambda _: True, progress=lambda *_: None
    )
    for step in range(3):
        naive = {
            layer: float(mean_loss(naive_losses(model, tuple(sorted([*order[:step], layer])))))
            for layer in range(6)
            if layer not in order[:step]
        }
        assert order[step] == min(naive, key=lambda layer: naive[layer])


def test_a_greedy_search_cut_short_goes_on_after_its_last_layer(tmp_path: Path) -> None:
    model = model_of("llama")

    def search(num_layers: int, steps: list[int]) -> list[int]:
        return search_greedily(
            trial_of(model),
            num_layers=num_layers,
            rank=list,
            may_drop=lambda _: True,
            progress=lambda done, _total, _note: steps.append(done),
            state=tmp_path / "order.json",
        )

    first: list[int] = []
    rest: list[int] = []
    search(2, first)
    assert first == [0, 1]
    whole = search_greedily(
        trial_of(model), num_layers=3, rank=list, may_drop=lambda _: True, progress=lambda *_: None
    )
    assert search(3, rest) == whole
    assert rest == [2]


def test_layers_that_hand_on_more_than_states_are_refused_rather_than_searched_wrongly() -> None:
    model = model_of("llama")
    trial_of(model).check()
    layers, beside = decoder_layers(model), []
    layers[2].mlp.register_forward_hook(lambda _module, _args, output: beside.append(output))
    layers[5].register_forward_pre_hook(lambda _module, args: (args[0] + beside[-1][: len(args[0])],))
    with pytest.raises(ModelError, match="llama: dropping layers gives a loss of"):
        trial_of(model).check()


def test_greedy_search_takes_only_what_the_surgery_allows() -> None:
    pairs = {frozenset(pair) for pair in combinations((1, 3, 5), 2)} | {frozenset({i}) for i in (1, 3, 5)}
    order = search_greedily(
        trial_of(model_of("llama")),
        num_layers=2,
        rank=list,
        may_drop=lambda layers: frozenset(layers) in pairs,
        progress=lambda *_: None,
    )
    assert set(order) <= {1, 3, 5}


def test_a_block_of_candidates_costs_less_than_running_each_of_them() -> None:
    trial = trial_of(model_of("llama"))
    blocks = [(start, start + 1) for start in range(5)]
    trial.losses((), blocks)
    assert trial.passes < 4  # two to record, and 4 + 3 + 2 + 1 + 0 of 6 layers; naively 5 times 4 of 6


def test_few_sequences_pick_the_finalists_that_run_on_all() -> None:
    model = model_of("llama")
    many = [tokens for _ in range(5) for tokens in sequences()]
    blocks = [(layer,) for layer in range(6)]
    exact = Trial(model, many, pad_token_id=0, batch_size=2)
    chosen, losses = best_candidate(exact, (), blocks)
    assert losses.shape == (25, 2)
    assert chosen == blocks[int(mean_loss(exact.losses((), blocks)).argmin())]


@settings(max_examples=10, deadline=None)
@given(st.data(), st.sampled_from(["llama", "qwen3", "gpt_neox", "smollm3"]))
def test_every_criterion_finds_layers_that_do_nothing(data: st.DataObject, family: str) -> None:
    num_layers = data.draw(st.integers(min_value=4, max_value=7))
    n = data.draw(st.integers(min_value=1, max_value=num_layers - 2))
    start = data.draw(st.integers(min_value=0, max_value=num_layers - n - 1))
    nothing = tuple(range(start, start + n))
    model = model_of(family, num_layers=num_layers, identities=nothing)
    sums = Sums(num_layers, (n,))
    taken = list(enumerate(sequences()))
    sums.add(taken, list(measure_batches(model, taken, pad_token_id=0, max_tokens=64)))
    profile = profile_from(sums)
    assert plan(profile, block_size=n).dropped == nothing
    assert plan(profile, block_size=n, criterion="block-influence").dropped == nothing
    trial = trial_of(model)
    blocks = [tuple(range(first, first + n)) for first in range(num_layers - n + 1)]
    whole = mean_loss(trial.losses((), [()]))[0]
    found = search_block(trial, blocks, progress=lambda *_: None)
    # Another block may lower the loss of a random model; doing nothing must leave it as it is.
    assert mean_loss(trial.losses((), [found]))[0] <= whole + ROUNDING
    assert torch.allclose(trial.losses((), [nothing]), trial.losses((), [()]), rtol=1e-5)
    order = search_greedily(trial, num_layers=n, rank=list, may_drop=lambda _: True, progress=lambda *_: None)
    assert mean_loss(trial.losses(tuple(sorted(order)), [()]))[0] <= whole + ROUNDING


@settings(deadline=None)
@given(st.lists(st.sampled_from(["one", "two", "three", "four", "five", "six"]), min_size=9, max_size=30))
def test_equal_documents_do_not_serve_search_and_comparison_both(documents: list[str]) -> None:
    more = ["seven", "eight", "nine", "ten"]
    text = Text(DataSource(name="x", version="1"), lambda: iter([*documents, *more]))
    found = [
        take_sequences(text, byte_encoder(), settings=PlanSettings(), seed=0, half=half)
        for half in (SEARCH, COMPARE)
    ]
    together = [tuple(tokens) for tokens in found[0] + found[1]]
    assert len(set(together)) == len(together) == len({*documents, *more})


def test_the_sink_is_compared_with_the_source_and_does_not_count_among_the_cuts() -> None:
    source = resolve(str(DEMO_MODEL)).model_copy(update={"folder": DEMO_MODEL})
    text = Text(DataSource(name="x", version="1"), lambda: (f"def f{n}(x): return {n}" for n in range(8)))
    cuts: list[tuple[int, ...]] = [(0, 1, 2), (3,)]
    options = {"settings": PlanSettings(sequence_length=16), "four_bit": False, "seed": 0}
    found, without = (
        compare(source, text, cuts, sink=sink, progress=lambda *_: None, **options)  # type: ignore[arg-type]
        for sink in (3, None)
    )
    assert found.cuts == without.cuts
    assert without.sink is None
    assert found.sink is not None
    assert found.sink.dropped == (3,)
    assert found.sink.nats == pytest.approx(found.cuts[1].nats)
    assert found.sink.behind == pytest.approx(found.sink.nats - found.source.nats)
