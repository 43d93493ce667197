"""Healing on conversations: the answers alone carry loss, and no conversation sees another."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from factory.artifacts import PruningPlan
from factory.healing.data import data_sets
from factory.healing.heal import begin
from factory.healing.lora import read_guard
from factory.healing.merge import judge, merge
from factory.healing.seam.fit import fit_seams
from factory.hub.resolve import resolve
from factory.model.layers import skip_layers
from factory.model.loading import load_model
from factory.model.losses import token_loss
from factory.model.tokenizer import Answered, load_encoder
from factory.pruning.prune import prune
from tests.builders.healing import SETTINGS, quiet, run
from tests.builders.models import save_llama
from tests.builders.texts import chats, text_of

TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
DROPPED = (2, 3)
CHAT = SETTINGS.model_copy(
    update={"bits": 16, "modules": "all-linear", "dropout": 0.0, "sequence_length": 160, "num_steps": 8}
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_llama(tmp_path_factory.mktemp("source"), num_layers=6)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def pruned(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    plan = PruningPlan(criterion="chosen", num_layers=6, dropped=DROPPED)
    return prune(resolve(str(source)), plan, folder=tmp_path_factory.mktemp("pruned"))


@pytest.mark.parametrize("objective", ["sft", "distill"])
def test_the_held_out_loss_is_that_of_the_answers_of_each_conversation_alone(
    source: Path, pruned: Any, tmp_path: Path, objective: str
) -> None:
    settings = CHAT.model_copy(update={"objective": objective})
    adapter = run(
        pruned.folder,
        tmp_path / "adapter",
        settings=settings,
        source=source,
        dropped=DROPPED,
        documents=chats(60),
    )
    guard = read_guard(adapter.folder)
    assert all(isinstance(one, Answered) and 0 < sum(one.answers) < len(one) for one in guard)
    assert adapter.packed
    alone = token_loss(load_model(pruned.folder), guard)
    assert adapter.guard_loss_before == pytest.approx(alone, abs=2e-4)
    assert adapter.guard_loss_after < adapter.guard_loss_before
    (tmp_path / "merged").mkdir()
    merged = judge(merge(pruned, adapter, folder=tmp_path / "merged"), pruned, adapter)
    assert merged.guard_losses == pytest.approx(
        {"unhealed": alone, "healed": adapter.guard_loss_after}, abs=0.02
    )


def begun(source: Path, pruned: Any, folder: Path, **changes: Any) -> Any:
    """The trainer of a healing on conversations, before the first step."""
    settings = CHAT.model_copy(update=changes)
    encoder = load_encoder(pruned.folder)
    texts = data_sets(text_of(chats(60)), encoder, settings=settings, seed=0, folder=folder)
    base = source if settings.objective == "distill" else pruned.folder
    start = partial(begin, tokenizer=encoder.tokenizer, texts=texts, dropped=DROPPED, settings=settings)
    return start(load_model(base), seed=0, folder=folder, progress=quiet)[1]


def test_the_labels_in_training_are_the_answers(source: Path, pruned: Any, tmp_path: Path) -> None:
    trainer = begun(source, pruned, tmp_path, objective="sft")
    decode = trainer.processing_class.decode
    rows = [trainer.train_dataset[row] for row in range(len(trainer.train_dataset))]
    assert any(len(row["seq_lengths"]) > 1 for row in rows)  # several conversations in one row
    for row in rows:
        labels = trainer.data_collator([row])["labels"][0].tolist()
        assert all(label in (-100, token) for label, token in zip(labels, row["input_ids"], strict=True))
        told = decode([label for label in labels if label != -100])
        turns = decode(row["input_ids"]).split("<|end|>")
        assert told == "".join(f"{turn[3:]}<|end|>" for turn in turns if turn.startswith("<a>"))


@pytest.mark.parametrize("seam_weight", [0.0, 0.5])
def test_distillation_is_at_the_positions_of_the_answers(
    source: Path, pruned: Any, tmp_path: Path, seam_weight: float
) -> None:
    trainer = begun(source, pruned, tmp_path, objective="distill", seam_weight=seam_weight)
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[0]])
    model = load_model(source)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    places = (batch["labels"][0, 1:] != -100).nonzero()[:, 0]
    with torch.no_grad():
        found = float(trainer.compute_loss(trainer.model, dict(batch)))
        teacher = model(**inputs, use_cache=False, output_hidden_states=True)
        with skip_layers(model, DROPPED):
            student = model(**inputs, use_cache=False, output_hidden_states=True)
    one, other = (out.logits[0, places].float().log_softmax(-1) for out in (teacher, student))
    expected = float((one.exp() * (one - other)).sum(-1).mean())
    if seam_weight:
        target, given = (
            teacher.hidden_states[4][0, places].float(),
            student.hidden_states[2][0, places].float(),
        )
        expected += seam_weight * float(((given - target).square().sum(-1) / target.square().sum(-1)).mean())
    assert found == pytest.approx(expected, rel=0.02)


def test_a_seam_is_fitted_on_conversations_too(source: Path, tmp_path: Path) -> None:
    fit = fit_seams(
        source,
        text_of(chats(200)),
        dropped=DROPPED,
        settings=CHAT,
        rank=4,
        seed=0,
        folder=tmp_path,
        progress=quiet,
    )
    assert all(isinstance(one, Answered) for one in read_guard(tmp_path))
    assert fit.loss_after <= fit.loss_before
