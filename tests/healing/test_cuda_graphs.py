"""A pass that is launched as one graph learns from the same tokens as one that is not."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from factory.healing.cuda_graphs import PassGraphs
from tests.families import build, config_of

LONGEST, ROWS = 12, 3


def packed(rows: list[list[int]]) -> dict[str, Any]:
    """Return what the collator makes of rows of documents with these lengths."""
    counted = iter(range(3, 10**6))
    examples = [
        {"input_ids": [next(counted) % 40 for _ in range(sum(lengths))], "seq_lengths": lengths}
        for lengths in rows
    ]
    return DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(examples)


def graphs_of(model: Any, told: list[str]) -> PassGraphs:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return PassGraphs(trained, width=ROWS * LONGEST, longest=LONGEST, tell=told.append)


def nats(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    labels = inputs["labels"][0, 1:]
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    return cross_entropy(model(**rest).logits[0, :-1], labels, ignore_index=-100, reduction="sum")


@given(st.lists(st.lists(st.integers(1, LONGEST // 3), min_size=1, max_size=3), min_size=1, max_size=ROWS))
def test_rows_are_filled_up_with_documents_of_padding(rows: list[list[int]]) -> None:
    inputs = packed(rows)
    graphs = graphs_of(torch.nn.Linear(1, 1), [])
    most = graphs.documents(inputs)
    buffers, total = graphs._buffers(most), torch.zeros((), dtype=torch.long)
    graphs._fill(buffers, total, inputs, torch.tensor(7))
    tokens, ends = inputs["input_ids"].shape[1], buffers["cu_seq_lens_q"]
    assert int(total) == 7
    assert len(ends) - 1 == most
    assert most.bit_count() == 1
    assert (int(ends[0]), int(ends[-1])) == (0, ROWS * LONGEST)
    assert 0 <= int(ends.diff().min()) <= int(ends.diff().max()) <= LONGEST
    for name in ("input_ids", "labels", "position_ids", "seq_idx"):
        assert torch.equal(buffers[name][:, :tokens], inputs[name])
    assert bool((buffers["labels"][:, tokens:] == -100).all())
    starts = (buffers["position_ids"][0] == 0).nonzero().flatten()
    assert starts.tolist() == sorted(set(ends.tolist()) - {ROWS * LONGEST})
    assert torch.equal(buffers["seq_idx"][0].diff() != 0, buffers["position_ids"][0, 1:] == 0)


def test_padding_changes_no_loss() -> None:
    model, inputs = build(config_of("llama")), packed([[5, 7], [3]])
    graphs = graphs_of(model, [])
    buffers = graphs._buffers(graphs.documents(inputs))
    graphs._fill(buffers, torch.zeros((), dtype=torch.long), inputs, torch.tensor(1))
    assert nats(model, buffers).item() == pytest.approx(nats(model, inputs).item(), rel=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can capture a pass")
def test_a_pass_that_cannot_be_captured_runs_as_it_is_and_is_told_once() -> None:
    model, told = build(config_of("llama")), list[str]()
    graphs, inputs = graphs_of(model, told), packed([[5, 7], [3]])

    def run(inputs: dict[str, Any], num_items: Any) -> torch.Tensor:
        loss = nats(model, inputs) / num_items
        loss.backward()
        return loss.detach()

    losses = [graphs.run(run, inputs, torch.tensor(12)) for _ in range(2)]
    assert torch.equal(*losses)
    assert len(told) == 1
    assert "launches the kernels of this model one by one" in told[0]
    found = [parameter.grad.clone() for parameter in graphs.trained if parameter.grad is not None]
    model.zero_grad()
    run(inputs, torch.tensor(6))  # twice a pass of twelve tokens
    expected = [parameter.grad for parameter in graphs.trained if parameter.grad is not None]
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, expected, strict=True))
