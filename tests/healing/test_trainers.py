"""The loss that healing lowers is the model's own, whatever stands before its logits."""

import json
from pathlib import Path
from typing import Any

import pytest

from factory.artifacts import PruningPlan
from factory.healing.lora import GUARD
from factory.hub.resolve import resolve
from factory.model.loading import load_model
from factory.model.losses import token_loss
from factory.pruning.prune import prune
from tests.builders.healing import SETTINGS, run
from tests.builders.models import save_family


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 1.0}),
        ("llama4_text", {}),  # its backbone has another name than transformers takes it for
        ("modernbert-decoder", {"initializer_range": 0.3}),  # a layer and a norm before the logits
        ("recurrent_gemma", {"logits_soft_cap": 0.1}),
    ],
)
@pytest.mark.parametrize("objective", ["sft", "distill"])
def test_the_loss_is_of_next_tokens_by_the_models_own_head(
    tmp_path: Path, model_type: str, fields: dict[str, Any], objective: str
) -> None:
    source, dropped = save_family(tmp_path / "source", model_type, **fields), (2, 3)
    (tmp_path / "pruned").mkdir()
    plan = PruningPlan(criterion="chosen", num_layers=6, dropped=dropped)
    pruned = prune(resolve(str(source)), plan, folder=tmp_path / "pruned")
    settings = {"bits": 16, "modules": "all-linear", "num_steps": 6, "dropout": 0.0, "objective": objective}
    adapter = run(
        pruned.folder,
        tmp_path / "adapter",
        settings=SETTINGS.model_copy(update=settings),
        source=source,
        dropped=dropped,
    )
    guard = json.loads((adapter.folder / GUARD).read_text(encoding="utf-8"))
    assert adapter.guard_loss_before == pytest.approx(token_loss(load_model(pruned.folder), guard), abs=2e-4)
    assert adapter.curve[-1].loss < adapter.curve[0].loss
