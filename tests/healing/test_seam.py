"""A fitted seam does what the dropped layers did, starts the adapter, and can be merged without training."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from factory.artifacts import Adapter, Checkpoint, FittedSeam, SeamFit
from factory.config.settings import BuildConfig, HealSettings
from factory.errors import DataError, HealingError, UnsupportedArchitectureError
from factory.healing.heal import heal
from factory.healing.merge import judge, merge
from factory.healing.seam.fit import fit_each, fit_seams, load_factors, seams_of, untrained
from factory.healing.seam.regression import Moments, low_rank
from factory.healing.seam.writers import find_writer
from factory.model.layers import decoder_layers
from factory.model.loading import load_model
from factory.pipeline.stages import heal_parameters
from factory.report.summaries import describe_healing, describe_seam
from tests.builders.healing import cut
from tests.builders.models import save_llama
from tests.builders.texts import rhymes, text_of
from tests.families import build, config_of

SETTINGS = HealSettings(
    data="x",
    objective="distill",
    modules="all-linear",
    start="seam-fit",
    bits=16,
    learning_rate=1e-2,
    rank=8,
    dropout=0.0,
    num_steps=4,
    warmup_steps=1,
    batch_size=2,
    sequence_length=64,
)
DROPPED = (2, 4)
DOCUMENTS = 120


@pytest.fixture(autouse=True, scope="module")
def _few_tokens() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("factory.healing.seam.fit.NUM_TOKENS", 1500)
        yield


def fit(
    source: Path,
    folder: Path,
    *,
    dropped: tuple[int, ...] = DROPPED,
    settings: HealSettings = SETTINGS,
    rank: int | None = None,
    documents: int = DOCUMENTS,
) -> SeamFit:
    folder.mkdir(exist_ok=True)
    return fit_seams(
        source,
        text_of(rhymes(documents)),
        dropped=dropped,
        settings=settings,
        rank=rank,
        seed=0,
        folder=folder,
        progress=lambda *_: None,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("source"), num_layers=6)


@pytest.fixture(scope="module")
def pruned(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return cut(source, tmp_path_factory.mktemp("pruned"), dropped=DROPPED)


def in_memory(*, sink: float = 0.0) -> tuple[Any, torch.Tensor]:
    """A Llama whose layer 2 adds M·a, for the activations a of the feed-forward part of layer 1; and M.

    Args:
        sink: Size of what it adds to the first token's states besides, like an attention sink.
    """
    torch.manual_seed(0)
    model = build(config_of("llama"))
    layers = decoder_layers(model)
    matrix = torch.randn(model.config.hidden_size, model.config.intermediate_size) / 10
    seen = {}
    layers[1].mlp.down_proj.register_forward_pre_hook(lambda _module, args: seen.update(a=args[0]))

    def forward(hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        added = seen["a"] @ matrix.T
        added[:, 0] += sink * torch.ones(model.config.hidden_size)
        return hidden_states + added

    layers[2].forward = forward
    return model, matrix


def refit(model: Any, *, rank: int | None = None) -> tuple[FittedSeam, torch.Tensor]:
    """Fit layer 1 to a cut of layer 2; return the record and the update."""
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(1, 64, (32,), generator=generator).tolist() for _ in range(40)]
    writers = {1: find_writer(model, 1)}
    ((seam, (b, a)),) = fit_each(model, writers, iter(sequences), {}, dropped=(2,), rank=rank)
    return seam, (b @ a).float()


def test_a_linear_function_of_the_activations_is_recovered() -> None:
    model, matrix = in_memory()
    seam, update = refit(model)
    assert (update - matrix).norm() < 1e-3 * matrix.norm()
    assert seam.explained > 0.9999
    assert (seam.layer, seam.module, seam.num_tokens, seam.num_left_out) == (1, "mlp.down_proj", 1280, 0)


def test_an_attention_sink_is_left_out_and_would_spoil_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, matrix = in_memory(sink=1e4)
    seam, update = refit(model)
    assert (seam.num_tokens, seam.num_left_out) == (1240, 40)
    assert (update - matrix).norm() < 1e-3 * matrix.norm()
    monkeypatch.setattr("factory.healing.seam.fit.OUTLIER", math.inf)
    _, spoilt = refit(model)
    assert (spoilt - matrix).norm() > matrix.norm()


@given(st.integers(1, 5), st.integers(0, 99))
def test_no_matrix_of_the_same_rank_fits_the_activations_better(rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    activations = torch.randn(50, 8).double() @ torch.diag(torch.logspace(0, 2, 8)).double()
    update = torch.randn(6, 8).double()
    b, a = low_rank(update, activations.T @ activations, rank=rank)
    assert (b.shape, a.shape) == ((6, rank), (rank, 8))
    best = torch.linalg.svdvals(activations @ update.T)[rank:].square().sum()  # Eckart–Young
    found = (activations @ (update - b @ a).T).square().sum()
    assert torch.isclose(found, best, rtol=1e-6, atol=1e-6)
    assert torch.allclose(b.norm(dim=0), a.norm(dim=1))


def test_streamed_moments_solve_like_least_squares() -> None:
    torch.manual_seed(0)
    activations, errors = torch.randn(60, 5), torch.randn(60, 3)
    moments = Moments.none(width=5, states=3, device=torch.device("cpu"))
    for rows in (slice(0, 20), slice(20, 60)):
        moments.add(activations[rows], errors[rows])
    update = moments.solve(1e-12)
    expected = torch.linalg.lstsq(activations.double(), errors.double()).solution.T
    assert torch.allclose(update, expected, atol=1e-6)
    left = (errors.double() - activations.double() @ update.T).square().sum() / errors.double().square().sum()
    assert moments.explained(update) == pytest.approx(float(1 - left))


FOUND = {
    "llama": ("mlp.down_proj", 1.0), "gpt2": ("mlp.c_proj", 1.0), "gpt_neox": ("mlp.dense_4h_to_h", 1.0),
    "phi": ("mlp.fc2", 1.0), "phi3": ("mlp.down_proj", 1.0), "opt": ("fc2", 1.0),
    "gemma": ("mlp.down_proj", 1.0),
    "minicpm3": ("mlp.down_proj", 1.4 / 8**0.5), "deepseek_v3": ("mlp.shared_experts.down_proj", 1.0),
}  # fmt: skip


@pytest.mark.parametrize("family", FOUND)
def test_the_module_that_writes_last_is_found_by_trying(family: str) -> None:
    writer = find_writer(build(config_of(family)), 5)
    name, scale = FOUND[family]
    assert (writer.name, writer.scale) == (name, pytest.approx(scale, rel=1e-4))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2", "mixtral", "qwen3_moe"])
def test_a_norm_after_the_module_and_experts_are_refused_by_name(family: str) -> None:
    model = build(config_of(family))
    with pytest.raises(UnsupportedArchitectureError, match=f"{family} has no feed-forward module in layer 1"):
        find_writer(model, 1)


def test_each_run_of_dropped_layers_is_a_seam() -> None:
    assert seams_of((3, 5, 12, 13, 14)) == [(2, 3), (4, 5), (11, 14)]
    assert seams_of((0, 1, 4)) == [(-1, 1), (3, 4)]


def test_a_cut_at_layer_0_is_left_as_it_is_and_refused_if_it_is_the_only_one(
    source: Path, tmp_path: Path
) -> None:
    found = fit(source, tmp_path, dropped=(0, 3))
    assert [seam.layer for seam in found.seams] == [2]
    assert found.without_layer_before == 1
    assert "none at layer 0" in describe_seam(found)
    with pytest.raises(UnsupportedArchitectureError, match="begins at layer 0"):
        fit(source, tmp_path / "other", dropped=(0, 1))


def test_a_fit_that_raises_the_loss_is_not_kept_even_of_the_deepest_layers(
    source: Path, pruned: Checkpoint, tmp_path: Path
) -> None:
    found = fit(source, tmp_path, dropped=(4, 5))
    assert (found.seams, found.rejected) == ((), (3,))
    assert found.loss_after == found.loss_before
    assert describe_seam(found) == "no fitted seam: a fit of layer 3 does not lower the held-out loss"
    with pytest.raises(HealingError, match="no fitted seam lowers the loss"):
        untrained(found, pruned, text=text_of(rhymes(DOCUMENTS)), dropped=(4, 5), folder=tmp_path)


def test_four_bits_are_fitted_to_the_states_of_nf4(source: Path, tmp_path: Path) -> None:
    four = fit(source, tmp_path / "4", settings=SETTINGS.model_copy(update={"bits": 4}))
    sixteen = fit(source, tmp_path / "16")
    assert (four.quantization, sixteen.quantization) == ("nf4", "none")
    assert four.seams[0].explained != sixteen.seams[0].explained


def test_too_little_text_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too little"):
        fit(source, tmp_path, documents=1)


def test_a_fit_that_is_there_is_not_made_again(source: Path, tmp_path: Path) -> None:
    found = fit(source, tmp_path)
    weights = (tmp_path / "seam.safetensors").read_bytes()
    assert fit(source, tmp_path, documents=0) == found  # without any text
    assert (tmp_path / "seam.safetensors").read_bytes() == weights


def test_the_update_is_merged_without_training(source: Path, pruned: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    found = fit(source, tmp_path / "adapter")
    adapter = untrained(
        found, pruned, text=text_of(rhymes(DOCUMENTS)), dropped=DROPPED, folder=tmp_path / "adapter"
    )
    merged = judge(merge(pruned, adapter, folder=tmp_path / "merged"), pruned, adapter)
    before, after = (load_model(folder).state_dict() for folder in (pruned.folder, merged.folder))
    factors = load_factors(tmp_path / "adapter")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    fitted_layers = {old: new for old, new in ((1, 1), (3, 2)) if old in factors}
    assert changed == {f"model.layers.{new}.mlp.down_proj.weight" for new in fitted_layers.values()}
    for old, new in fitted_layers.items():
        name, (b, a) = f"model.layers.{new}.mlp.down_proj.weight", factors[old]
        assert torch.allclose(after[name], before[name] + b @ a, rtol=1e-2, atol=1e-3)
    assert merged.guard_losses is not None
    assert merged.guard_losses["healed"] == pytest.approx(found.loss_after, abs=1e-3)
    assert merged.helped
    assert describe_healing(adapter, requested_steps=100).endswith("; no training")


def run(source: Path, pruned: Checkpoint, folder: Path, **changes: Any) -> Adapter:
    settings = SETTINGS.model_copy(update=changes)
    found = fit(source, folder, settings=settings, rank=settings.rank)
    return heal(
        pruned,
        text_of(rhymes(DOCUMENTS)),
        source_folder=source,
        dropped=DROPPED,
        settings=settings,
        seed=0,
        folder=folder,
        progress=STEPS,
        seam=found,
    )


class StopError(Exception):
    """Ends a healing."""


class Steps:
    """Callback that ends the healing after a step."""

    last: int | None = None

    def __call__(self, done: int, _total: int, _note: str) -> None:
        if done == self.last:
            raise StopError


STEPS = Steps()


@pytest.fixture(scope="module")
def healed(source: Path, pruned: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return run(source, pruned, tmp_path_factory.mktemp("healed") / "adapter")


def test_healing_starts_from_the_fit(healed: Adapter) -> None:
    assert healed.seam
    assert healed.guard_curve[0].step == 0
    assert healed.guard_curve[0].loss == pytest.approx(healed.seam.loss_after, abs=1e-3)
    assert healed.guard_loss_before == healed.seam.loss_before
    assert {seam.rank for seam in healed.seam.seams} == {8}


@pytest.mark.parametrize(
    "changes", [{"objective": "sft"}, {"layers": "seam"}, {"modules": "ffn", "rank": 80}]
)
def test_every_kind_of_adapter_can_start_from_it(
    source: Path, pruned: Checkpoint, tmp_path: Path, changes: dict[str, Any]
) -> None:
    adapter = run(source, pruned, tmp_path / "adapter", num_steps=1, warmup_steps=0, **changes)
    assert adapter.seam
    assert adapter.guard_curve[0].loss == pytest.approx(adapter.seam.loss_after, abs=1e-3)


def test_a_healing_cut_short_resumes_from_the_same_fit(
    source: Path, pruned: Checkpoint, healed: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(STEPS, "last", 3)
    with pytest.raises(StopError):
        run(source, pruned, tmp_path / "adapter")
    monkeypatch.setattr(STEPS, "last", None)
    resumed = run(source, pruned, tmp_path / "adapter")
    name = "adapter_model.safetensors"
    assert (resumed.folder / name).read_bytes() == (healed.folder / name).read_bytes()
    assert resumed.model_dump(exclude={"folder"}) == healed.model_dump(exclude={"folder"})


def test_only_a_fitted_start_is_part_of_the_key() -> None:
    plain = BuildConfig(reference="m", drop=0.3)
    assert "start" not in heal_parameters(plain)
    fitted = plain.model_copy(update={"heal": plain.heal.model_copy(update={"start": "seam-fit"})})
    assert heal_parameters(fitted) == {**heal_parameters(plain), "start": "seam-fit"}
    untrained = heal_parameters(fitted.model_copy(update={"heal_enabled": False}))
    assert set(untrained) == {"start", "bits", "sequence_length", "trained"}
