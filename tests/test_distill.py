"""A distilled adapter fits the pruned checkpoint, brings it nearer to its source, and survives a kill."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from factory import hub
from factory.artifacts import Adapter, Checkpoint, PruningPlan
from factory.config import HealSettings
from factory.distill import CHUNK_VALUES, DistillTrainer, SummedDivergence
from factory.heal import heal
from factory.merge import merge
from factory.models import load_model
from factory.prune import prune
from factory.trial import bypassed, record_forms
from tests.test_heal import text_of
from tests.tiny import byte_tokenizer, rhymes, save_llama

DROPPED = (1, 3)
SETTINGS = HealSettings(
    data="x",
    objective="distill",
    learning_rate=1e-2,
    rank=8,
    dropout=0.0,
    num_steps=12,
    warmup_steps=1,
    batch_size=2,
    sequence_length=64,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("source"), num_layers=6)


@pytest.fixture(scope="module")
def pruned(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    plan = PruningPlan(criterion="angular", num_layers=6, dropped=DROPPED)
    folder = tmp_path_factory.mktemp("pruned")
    return prune(hub.resolve(str(source)), plan, folder=folder, progress=lambda *_: None)


def run(
    source: Path,
    pruned: Checkpoint,
    folder: Path,
    progress: Any = lambda *_: None,
    settings: HealSettings = SETTINGS,
) -> Adapter:
    folder.mkdir(exist_ok=True)
    return heal(
        pruned,
        text_of(rhymes(60)),
        source_folder=source,
        dropped=DROPPED,
        settings=settings,
        seed=0,
        folder=folder,
        progress=progress,
    )


@pytest.fixture(scope="module")
def healed(source: Path, pruned: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return run(source, pruned, tmp_path_factory.mktemp("adapter"))


@torch.no_grad()
def divergence(teacher: Any, student: Any) -> float:
    """Mean KL from teacher to student over rhymes that are new to both, in nats a token."""
    ids = torch.tensor([byte_tokenizer()(rhymes(70)[-1]).input_ids[:64]])
    left, right = (model(ids).logits.double().log_softmax(-1) for model in (teacher, student))
    return float((left.exp() * (left - right)).sum(-1).mean())


def test_the_merged_model_is_nearer_to_its_source(
    source: Path, pruned: Checkpoint, healed: Adapter, tmp_path: Path
) -> None:
    merged = merge(pruned, healed, folder=tmp_path)
    teacher, before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (source, pruned.folder, merged.folder)
    )
    assert divergence(teacher, after) < 0.7 * divergence(teacher, before)
    assert healed.objective == "distill"


def test_the_adapter_is_for_the_pruned_checkpoint(pruned: Checkpoint, healed: Adapter) -> None:
    names = load_file(healed.folder / "adapter_model.safetensors")
    layers = {int(name.split(".layers.")[1].split(".")[0]) for name in names}
    assert layers == {0, 1, 2, 3}
    model = AutoModelForCausalLM.from_pretrained(pruned.folder, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(model, healed.folder).state_dict()
    assert all((loaded[name.replace(".weight", ".default.weight")] == names[name]).all() for name in names)


def test_a_run_cut_short_ends_with_the_adapter_of_an_undisturbed_one(
    source: Path, pruned: Checkpoint, healed: Adapter, tmp_path: Path
) -> None:
    def cut(done: int, _total: int, _note: str) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, pruned, tmp_path / "adapter", progress=cut)
    resumed = run(source, pruned, tmp_path / "adapter")
    name = "adapter_model.safetensors"
    assert (resumed.folder / name).read_bytes() == (healed.folder / name).read_bytes()


def test_the_student_in_memory_is_the_pruned_checkpoint(source: Path, pruned: Checkpoint) -> None:
    ids = torch.arange(1, 33)[None]
    whole, cut = load_model(source, four_bit=True), load_model(pruned.folder, four_bit=True)
    with torch.no_grad(), bypassed(whole.model.layers, frozenset(DROPPED), record_forms(whole)):
        student = whole(ids, use_cache=False).logits
    with torch.no_grad():
        assert torch.equal(student, cut(ids, use_cache=False).logits)


def test_starting_from_the_teachers_states_below_the_seam_changes_nothing(
    source: Path, pruned: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS.model_copy(update={"layers": "seam", "bits": 16, "num_steps": 3})
    shared = run(source, pruned, tmp_path / "shared", settings=settings)
    own_init = DistillTrainer.__init__

    def from_the_bottom(self: Any, *args: Any, start: int, **others: Any) -> None:
        own_init(self, *args, start=0, **others)
        assert start == 0 or self.start != start

    monkeypatch.setattr(DistillTrainer, "__init__", from_the_bottom)
    alone = run(source, pruned, tmp_path / "alone", settings=settings)
    left, right = (load_file(a.folder / "adapter_model.safetensors") for a in (shared, alone))
    assert all(torch.allclose(left[name], right[name], atol=1e-6) for name in left)


def test_the_error_behind_the_cut_can_be_trained_on_too(
    source: Path, pruned: Checkpoint, tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"seam_weight": 1.0, "bits": 16, "num_steps": 6})
    plain = SETTINGS.model_copy(update={"bits": 16, "num_steps": 6})
    with_seam = run(source, pruned, tmp_path / "seam", settings=settings)
    without = run(source, pruned, tmp_path / "plain", settings=plain)
    assert with_seam.curve[0].loss > without.curve[0].loss  # the divergence and the error
    assert with_seam.curve[-1].loss < with_seam.curve[0].loss
    assert with_seam.helped


@given(st.integers(1, 40), st.integers(2, 9), st.integers(0, 99))
def test_divergence_and_gradient_are_those_of_the_definition(rows: int, vocabulary: int, seed: int) -> None:
    torch.manual_seed(seed)
    student = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    teacher, head = torch.randn(rows, 6, dtype=torch.float64), torch.randn(6, vocabulary, dtype=torch.float64)
    expected = torch.nn.functional.kl_div(
        (student @ head).log_softmax(-1), (teacher @ head).log_softmax(-1), reduction="sum", log_target=True
    )
    (gradient,) = torch.autograd.grad(3 * expected, student)
    found = SummedDivergence.apply(student, teacher, lambda states: states @ head, CHUNK_VALUES // 7)
    (found_gradient,) = torch.autograd.grad(3 * found, student)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(found_gradient, gradient, rtol=1e-4, atol=1e-5)
