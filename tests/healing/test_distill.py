"""A distilled adapter fits the pruned checkpoint, brings it nearer to its source, and survives a kill."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, MixtralConfig, OPTConfig

from factory.artifacts import Adapter, Checkpoint, PruningPlan
from factory.config.settings import HealSettings
from factory.healing.head_loss import CHUNK_VALUES, HeadLoss, head_of
from factory.healing.heal import heal
from factory.healing.merge import merge
from factory.healing.trainers import DistillTrainer
from factory.hub.resolve import resolve
from factory.model.layers import bypassed, record_forms
from factory.model.loading import load_model
from factory.pruning.prune import prune
from tests.builders.healing import cut
from tests.builders.models import byte_tokenizer, save_llama
from tests.builders.texts import rhymes, text_of

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


SIZE = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
TINY = {
    "llama": LlamaConfig(**SIZE),
    "mixtral": MixtralConfig(**SIZE, num_local_experts=2),
    "gemma2": Gemma2Config(**SIZE, head_dim=8, final_logit_softcapping=2.0),
    "gpt2": GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1),
    "opt": OPTConfig(vocab_size=48, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
                     word_embed_proj_dim=16, max_position_embeddings=64),
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("source"), num_layers=6)


@pytest.fixture(scope="module")
def pruned(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return cut(source, tmp_path_factory.mktemp("pruned"), dropped=DROPPED)


def run(
    source: Path,
    pruned: Checkpoint,
    folder: Path,
    progress: Any = lambda *_: None,
    settings: HealSettings = SETTINGS,
    dropped: tuple[int, ...] = DROPPED,
) -> Adapter:
    folder.mkdir(exist_ok=True)
    return heal(
        pruned,
        text_of(rhymes(60)),
        source_folder=source,
        dropped=dropped,
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
        assert torch.allclose(student, cut(ids, use_cache=False).logits, atol=1e-5)


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
    assert all((left[name] - right[name]).norm() < 0.01 * left[name].norm() for name in left)


@pytest.mark.parametrize("layers", ["all", "seam"])
def test_a_student_without_the_first_layers_does_not_start_from_the_teachers_states(
    source: Path, tmp_path: Path, layers: str
) -> None:
    plan = PruningPlan(criterion="chosen", num_layers=6, dropped=(0, 1))
    (tmp_path / "pruned").mkdir()
    cut = prune(resolve(str(source)), plan, folder=tmp_path / "pruned", progress=lambda *_: None)
    settings = SETTINGS.model_copy(update={"layers": layers, "bits": 16, "num_steps": 2})
    adapter = run(source, cut, tmp_path / "adapter", settings=settings, dropped=(0, 1))
    assert adapter.curve[0].loss > 0.001  # the divergence of a model without its first layers


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "opt", "gemma2", "llama"])
def test_the_head_alone_gives_the_logits_of_the_whole_model(name: str) -> None:
    model = AutoModelForCausalLM.from_config(TINY[name]).eval()
    kept: list[Any] = []
    handle = model.get_decoder().register_forward_hook(lambda _m, _a, output: kept.append(output))
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[0]
        handle.remove()
        with head_of(model, type(kept[0]), nullcontext) as logits_of:
            found = logits_of(kept[0].last_hidden_state[0])
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_error_behind_the_cut_can_be_trained_on_too(
    source: Path, pruned: Checkpoint, tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"seam_weight": 1.0, "bits": 16, "num_steps": 6})
    plain = SETTINGS.model_copy(update={"bits": 16, "num_steps": 6})
    with_seam = run(source, pruned, tmp_path / "seam", settings=settings)
    without = run(source, pruned, tmp_path / "plain", settings=plain)
    assert with_seam.curve[0].loss > without.curve[0].loss  # the divergence and the error
    assert with_seam.curve[-1].loss < with_seam.curve[0].loss
    assert with_seam.guard_loss_after < with_seam.guard_loss_before


def test_a_share_of_the_next_token_loss_adds_to_the_divergence(
    source: Path, pruned: Checkpoint, tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"next_token_weight": 0.5, "bits": 16, "num_steps": 6})
    plain = SETTINGS.model_copy(update={"bits": 16, "num_steps": 6})
    both = run(source, pruned, tmp_path / "both", settings=settings)
    divergence = run(source, pruned, tmp_path / "divergence", settings=plain)
    assert both.curve[0].loss > divergence.curve[0].loss  # half of it, and half of the loss on next tokens
    assert both.curve[-1].loss < both.curve[0].loss
    assert both.guard_loss_after < both.guard_loss_before


@given(st.integers(1, 40), st.integers(2, 9), st.sampled_from([0.0, 0.3, 0.99]), st.integers(0, 99))
def test_loss_and_gradient_are_those_of_the_definition(
    rows: int, vocabulary: int, weight: float, seed: int
) -> None:
    torch.manual_seed(seed)
    student = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    teacher, head = torch.randn(rows, 6, dtype=torch.float64), torch.randn(6, vocabulary, dtype=torch.float64)
    labels = torch.randint(vocabulary, (rows,))
    logits = student @ head
    divergence = torch.nn.functional.kl_div(
        logits.log_softmax(-1), (teacher @ head).log_softmax(-1), reduction="sum", log_target=True
    )
    next_tokens = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    expected = (1 - weight) * divergence + weight * next_tokens
    (gradient,) = torch.autograd.grad(3 * expected, student)
    found = HeadLoss.apply(student, teacher, labels, weight, lambda states: states @ head, CHUNK_VALUES // 7)
    (found_gradient,) = torch.autograd.grad(3 * found, student)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(found_gradient, gradient, rtol=1e-4, atol=1e-5)
