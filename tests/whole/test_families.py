"""Of many families: a decoder saved, pruned on disk and loaded again computes what the original does."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from factory.artifacts import PruningPlan
from factory.hub.resolve import resolve
from factory.model.completeness import check_source
from factory.model.layers import skip_layers
from factory.pruning.prune import prune
from tests.families import FAMILIES, assert_same_logits, build, config_of

DROPPED = (1, 3, 4)
GENERATE = {
    "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0,
    "output_logits": True, "return_dict_in_generate": True,
}  # fmt: skip


def test_there_are_many_families() -> None:
    assert len(FAMILIES) >= 25


@torch.no_grad()
@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_and_cached_generation_equal_those_of_the_original_with_its_layers_skipped(
    tmp_path: Path, model_type: str
) -> None:
    original = build(config_of(model_type))
    original.save_pretrained(tmp_path / "source")
    (tmp_path / "pruned").mkdir()
    plan = PruningPlan(criterion="test", num_layers=8, dropped=DROPPED)
    source = resolve(str(tmp_path / "source"))
    check_source(source)
    made = prune(source, plan, folder=tmp_path / "pruned")
    assert made.verified == ("names and shapes", "logits")
    pruned = AutoModelForCausalLM.from_pretrained(made.folder, attn_implementation="eager").eval()
    tokens = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    whole = original(tokens).logits
    with skip_layers(original, DROPPED):
        expected = original(tokens).logits
        words = original.generate(tokens[:, :8], **GENERATE)
    assert float((whole - expected).abs().max()) > 1e-3
    assert_same_logits(pruned(tokens).logits, expected)
    again = pruned.generate(tokens[:, :8], **GENERATE)
    for step, (found, logits) in enumerate(zip(again.logits, words.logits, strict=True)):
        assert_same_logits(found, logits)
        if not torch.equal(again.sequences[:, : 9 + step], words.sequences[:, : 9 + step]):
            break  # two tokens were even, and what follows belongs to another text
    assert_same_logits(original(tokens).logits, whole)
