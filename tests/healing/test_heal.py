"""Healing lowers the loss, resumes where it was cut short, and leaves an adapter without a path in it."""

import itertools
import json
import math
import random
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    TrainerControl,
    TrainerState,
)

from factory.artifacts import Adapter, DataSource
from factory.checkpoint.read import read_checkpoint, read_tensor_bytes
from factory.config.settings import SLOWER
from factory.errors import DataError, HealingError
from factory.healing.callbacks import DivergedError, EarlyStop, refuse_run_away
from factory.healing.data import data_sets, not_in, take_guard
from factory.healing.heal import last_whole_checkpoint
from factory.healing.lora import find_targets
from factory.healing.merge import judge, merge
from factory.model.loading import load_model
from factory.model.tokenizer import load_encoder
from factory.report.summaries import describe_healing
from factory.store.stage import HEAL
from factory.text import text as texts
from factory.text.text import Text
from tests.builders.builds import an_adapter
from tests.builders.healing import SETTINGS, checkpoint, run
from tests.builders.models import save_llama
from tests.builders.texts import rhymes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def healed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return run(model, tmp_path_factory.mktemp("adapter"))


def test_healing_lowers_the_loss_on_held_out_text(healed: Adapter) -> None:
    assert healed.guard_loss_after < healed.guard_loss_before - 0.05
    assert healed.curve[-1].loss < healed.curve[0].loss
    assert healed.num_tokens > 0.8 * 12 * 2 * 64  # packed: hardly any padding


def test_only_peft_files_stay_and_they_name_no_path(healed: Adapter, model: Path) -> None:
    # What training needed itself goes once the adapter is written down as made.
    scratch = {path for pattern in HEAL.scratch for path in healed.folder.glob(pattern)}
    names = sorted(path.name for path in {*healed.folder.iterdir()} - scratch)
    assert names == ["adapter_config.json", "adapter_model.safetensors", "guard.json"]
    config = json.loads((healed.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 4, 0.05)
    assert str(model) not in json.dumps(config)


def test_the_adapter_is_on_the_feed_forward_modules_alone_and_in_fp32(healed: Adapter) -> None:
    tensors = load_file(healed.folder / "adapter_model.safetensors")
    modules = {name.split(".layers.")[1].split(".", 1)[1].split(".lora_")[0] for name in tensors}
    assert modules == {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"} == set(healed.target_modules)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert len(tensors) == 4 * 3 * 2


def test_a_run_cut_short_ends_with_the_adapter_of_an_undisturbed_one(
    model: Path, healed: Adapter, tmp_path: Path
) -> None:
    def cut(done: int, _total: int, _note: str) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "adapter", progress=cut)
    steps: list[int] = []
    resumed = run(model, tmp_path / "adapter", progress=lambda done, _total, _note: steps.append(done))
    assert steps[0] > 1  # it did not begin anew
    name = "adapter_model.safetensors"
    assert (resumed.folder / name).read_bytes() == (healed.folder / name).read_bytes()
    assert resumed.model_dump(exclude={"folder"}) == healed.model_dump(exclude={"folder"})


FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt")  # of the trainer's checkpoints
STATE = '{"global_step": 4, "max_steps": 8}'


def test_a_run_killed_at_five_random_steps_ends_with_the_adapter_of_an_undisturbed_one(
    model: Path, healed: Adapter, tmp_path: Path
) -> None:
    draw = random.Random(7)
    for _ in range(5):
        steps_more = draw.randrange(1, 9)
        seen: list[int] = []

        def cut(done: int, _total: int, _note: str, seen: list[int] = seen, more: int = steps_more) -> None:
            seen.append(done)
            if len(seen) == more:
                raise KeyboardInterrupt

        try:
            run(model, tmp_path / "adapter", progress=cut)
        except KeyboardInterrupt:
            continue
        break
    resumed = run(model, tmp_path / "adapter")
    name = "adapter_model.safetensors"
    assert (resumed.folder / name).read_bytes() == (healed.folder / name).read_bytes()
    assert resumed.model_dump(exclude={"folder"}) == healed.model_dump(exclude={"folder"})


def ruin(update: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all trained weights NaN after that update, counted over restarts, as a gradient's overflow may."""
    step, taken = torch.optim.AdamW.step, itertools.count(1)

    def ruined(optimizer: torch.optim.AdamW, *args: Any, **more: Any) -> Any:
        result = step(optimizer, *args, **more)
        if next(taken) == update:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.data.fill_(math.nan)
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", ruined)


def test_a_loss_that_runs_away_starts_again_at_a_lower_rate_and_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS.model_copy(update={"bits": 16})
    lower = settings.model_copy(update={"learning_rate": SLOWER * settings.learning_rate})
    straight = run(model, tmp_path / "other", settings=lower)
    ruin(3, monkeypatch)
    slowed = run(model, tmp_path / "adapter", settings=settings)
    assert slowed.slowed_at_step == 0
    assert slowed.guard_loss_after < slowed.guard_loss_before
    assert slowed.guard_curve == straight.guard_curve


@pytest.mark.parametrize(
    ("loss", "first", "runs_away"),
    [(5.9, 3.0, False), (6.1, 3.0, True), (1.4, 0.5, False), (1.6, 0.5, True), (math.nan, 3.0, True)],
)
def test_a_loss_has_run_away_at_twice_the_first_and_a_nat_above_it(
    loss: float, first: float, runs_away: bool
) -> None:
    with pytest.raises(DivergedError) if runs_away else nullcontext():
        refuse_run_away("loss", loss, first=first, step=7)


def test_a_loss_that_runs_away_at_a_checkpoint_goes_back_to_the_good_one_before(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruin(10, monkeypatch)  # checkpoints are at 5, 10 and 12
    slowed = run(model, tmp_path / "adapter", settings=SETTINGS.model_copy(update={"bits": 16}))
    assert slowed.slowed_at_step == 5
    assert [point.step for point in slowed.guard_curve] == [0, 5, 10, 12]
    assert slowed.guard_loss_after < slowed.guard_loss_before


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, ""),
        ({"best_step": 10}, ", lowest at step 10"),
        ({"slowed_at_step": 5}, "; learning rate lowered from step 5, after the loss diverged"),
        ({"num_steps": 10, "best_step": 10}, "; stopped early, at step 10 of 12"),
        (
            {"num_steps": 10, "best_step": 10, "ran_away_at_step": 11},
            "; stopped at step 11, where the loss diverged again: went back to step 10",
        ),
        (
            {"num_steps": 0, "best_step": None, "ran_away_at_step": 3},
            "; stopped at step 3, where the loss diverged again: nothing learnt",
        ),
        ({"packed": False}, "; not packed, since this model attends across packed documents"),
    ],
)
def test_the_terminal_says_what_did_not_go_as_asked_for(fields: dict[str, Any], says: str) -> None:
    adapter = an_adapter(**{"best_step": 12, **fields})
    told = describe_healing(adapter, requested_steps=12)
    assert told == f"{adapter.num_steps} steps, 1,536 tokens; held-out loss 3.000 → 2.500{says}"


def test_with_the_seam_only_layers_from_the_one_before_the_cut_on_are_adapted(
    model: Path, tmp_path: Path
) -> None:
    seam = SETTINGS.model_copy(update={"layers": "seam", "modules": "all-linear", "bits": 16})
    adapter = run(model, tmp_path / "adapter", settings=seam, dropped=(2, 3))  # of six; four are left
    names = load_file(adapter.folder / "adapter_model.safetensors")
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in names} == {1, 2, 3}
    assert {"self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"} < set(adapter.target_modules)
    assert (adapter.quantization, adapter.layers) == ("none", "seam")
    assert adapter.guard_loss_after < adapter.guard_loss_before


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        ([5, 4, 3, 2, 2.1, 2.2, 2.3], True),
        ([5, 4, 3, 2, 2.1, 2.2, 2.2], False),
        ([2, 4, 5, 6, 5, 4, 3], False),  # rose while the rate was high
    ],
)
def test_training_ends_where_the_guard_goes_on_rising_in_the_second_half(
    losses: list[float], stops: bool
) -> None:
    history = [{"step": 10 * place, "eval_loss": loss} for place, loss in enumerate(losses)]
    state = TrainerState(max_steps=60, log_history=history)
    control = TrainerControl()
    EarlyStop().on_evaluate(None, state, control)
    assert control.should_training_stop is stops


@pytest.mark.parametrize("state", [None, "{", ""])
def test_a_trainer_checkpoint_cut_short_while_it_was_written_is_passed_over(
    tmp_path: Path, state: str | None
) -> None:
    for step, written in ((4, STATE), (6, state)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in FILES:
            (tmp_path / f"checkpoint-{step}" / name).touch()
        if written is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(written)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert not (tmp_path / "checkpoint-6").exists()
    assert last_whole_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize("gone", FILES)
def test_a_trainer_checkpoint_cut_short_while_it_was_removed_is_passed_over(
    tmp_path: Path, gone: str
) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    for name in {*FILES, "trainer_state.json"} - {gone}:
        (tmp_path / "checkpoint-4" / name).write_text(STATE)
    assert last_whole_checkpoint(tmp_path) is None
    assert not (tmp_path / "checkpoint-4").exists()


def test_four_bit_weights_keep_their_gradient_after_a_pass_in_evaluation_mode(model: Path) -> None:
    def input_gradient(*, evaluate_first: bool) -> torch.Tensor:
        loaded = load_model(model, four_bit=True)
        if evaluate_first:
            with torch.no_grad():
                loaded(torch.arange(8)[None])
        loaded.train()
        embeddings = loaded.get_input_embeddings()(torch.arange(8)[None]).detach().requires_grad_()
        loaded(inputs_embeds=embeddings).logits.square().mean().backward()
        return embeddings.grad

    found, expected = (input_gradient(evaluate_first=first) for first in (True, False))
    assert (found - expected).norm() < 1e-4 * expected.norm()


pieces = st.lists(st.just(0), min_size=1, max_size=4)


@given(st.lists(st.lists(pieces, max_size=4), max_size=9), st.integers(1, 40))
def test_no_document_is_partly_guard_and_partly_training_text(
    documents: list[list[list[int]]], num_tokens: int
) -> None:
    numbered = [[[number] * len(piece) for piece in document] for number, document in enumerate(documents)]
    stream = iter(numbered)
    guard = take_guard(stream, num_tokens=num_tokens)
    seen = {piece[0] for piece in guard}
    rest = {piece[0] for document in stream for piece in document}
    assert not seen & rest
    assert sum(map(len, guard)) < num_tokens + 4


@given(st.lists(st.lists(pieces, max_size=4), min_size=1, max_size=9), st.integers(1, 40))
def test_a_document_that_the_guard_has_is_not_trained_on_again(
    documents: list[list[list[int]]], num_tokens: int
) -> None:
    numbered = [[[number] * len(piece) for piece in document] for number, document in enumerate(documents)]
    guard = take_guard(iter(numbered), num_tokens=num_tokens)
    rest = list(not_in(guard, iter(numbered)))
    assert not {tuple(piece) for piece in guard} & {tuple(piece) for document in rest for piece in document}
    begun = {piece[0] for piece in guard}
    assert all(document in rest for document in numbered if document and document[0][0] not in begun)


def test_what_a_text_raises_in_its_middle_is_raised_as_it_is(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "SHUFFLE_BUFFER", 4)

    def rows() -> Iterator[str]:
        yield from (f"{number} {rhyme}" for number, rhyme in enumerate(rhymes(70)))
        raise DataError("row 71 cannot be read", hint="take another text")

    with pytest.raises(DataError, match="row 71 cannot be read"):
        data_sets(
            Text(DataSource(name="x", version="1"), rows),
            load_encoder(model),
            settings=SETTINGS.model_copy(update={"num_steps": 300}),
            seed=0,
            folder=tmp_path,
        )


def test_text_that_is_too_short_is_a_clear_error(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="rhymes has too little text"):
        run(model, tmp_path / "adapter", documents=["one two"])


@pytest.mark.parametrize("bits", [4, 16])
def test_a_loss_that_runs_away_before_any_checkpoint_leaves_an_adapter_that_changes_nothing(
    model: Path, tmp_path: Path, bits: int
) -> None:
    wild = SETTINGS.model_copy(update={"learning_rate": 1e30, "bits": bits})
    adapter = run(model, tmp_path / "adapter", settings=wild)
    assert adapter.num_steps == adapter.num_tokens == adapter.slowed_at_step == 0
    assert adapter.ran_away_at_step
    assert adapter.guard_loss_after == adapter.guard_loss_before
    assert Adapter.model_validate_json(adapter.text()) == adapter.model_copy(update={"folder": Path()})
    pruned = read_checkpoint(model)
    merged = judge(merge(checkpoint(model), adapter, folder=tmp_path), checkpoint(model), adapter)
    assert not merged.helped
    assert read_checkpoint(tmp_path).keys() == pruned.keys()
    for name, tensor in read_checkpoint(tmp_path).items():
        assert bytes(read_tensor_bytes(tensor)) == bytes(read_tensor_bytes(pruned[name]))


def test_a_loss_that_runs_away_twice_ends_with_the_best_checkpoint(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruin(8, monkeypatch)
    ruin(11, monkeypatch)  # step 8, seen in the loss of step 9; from 5 on again, step 7
    settings = SETTINGS.model_copy(update={"bits": 16})
    adapter = run(model, tmp_path / "adapter", settings=settings)
    assert (adapter.slowed_at_step, adapter.num_steps, adapter.best_step) == (5, 5, 5)
    assert adapter.ran_away_at_step == 8
    assert [point.step for point in adapter.guard_curve] == [0, 5]
    assert max(point.step for point in adapter.curve) == 5
    assert adapter.guard_loss_after == pytest.approx(adapter.guard_curve[-1].loss, abs=1e-4)
    assert adapter.guard_loss_after < adapter.guard_loss_before
    assert Adapter.model_validate_json(adapter.text()) == adapter.model_copy(update={"folder": Path()})
    weights = load_file(adapter.folder / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_model_whose_loss_is_not_a_number_before_healing_is_an_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = load_model(model)
    with torch.no_grad():
        broken.get_output_embeddings().weight.fill_(math.nan)
    broken.save_pretrained(tmp_path / "broken")
    for file in model.glob("*token*"):
        shutil.copy(file, tmp_path / "broken")
    with pytest.raises(HealingError, match="not a number before the first step"):
        run(tmp_path / "broken", tmp_path / "adapter", settings=SETTINGS.model_copy(update={"bits": 16}))


def test_feed_forward_modules_are_found_by_structure() -> None:
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**size, vocab_size=32))
    phi = Phi3ForCausalLM(Phi3Config(**size, vocab_size=32, num_key_value_heads=2, pad_token_id=0))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2))
    assert find_targets(gpt2, "ffn").modules == ["mlp.c_fc", "mlp.c_proj"]
    assert find_targets(neox, "ffn").modules == ["mlp.dense_4h_to_h", "mlp.dense_h_to_4h"]
    assert find_targets(phi, "ffn").modules == ["mlp.down_proj", "mlp.gate_up_proj"]


def forget(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all updates after that one shrink the trained weights, so that the loss rises on any processor."""
    step = torch.optim.AdamW.step

    def forgetting(optimizer: torch.optim.AdamW, *args: Any, **more: Any) -> Any:
        if max((int(state["step"]) for state in optimizer.state.values()), default=0) < after:
            return step(optimizer, *args, **more)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(0.9)
        return None

    monkeypatch.setattr(torch.optim.AdamW, "step", forgetting)


@pytest.mark.parametrize(
    ("asked", "taken", "best"), [(12, 12, 12), (40, 35, 20)], ids=["after all its steps", "early"]
)
def test_a_run_killed_after_its_last_step_takes_no_further_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: int, taken: int, best: int
) -> None:
    forget(20, monkeypatch)
    settings = SETTINGS.model_copy(update={"num_steps": asked, "bits": 16})
    undisturbed = run(model, tmp_path / "undisturbed", settings=settings)
    assert (undisturbed.num_steps, undisturbed.best_step) == (taken, best)
    # One point per step: that of the best step is not the last one's.
    assert [point.step for point in undisturbed.guard_curve] == [*range(0, taken, 5), taken]
    lowest = min(point.loss for point in undisturbed.guard_curve)
    assert undisturbed.guard_loss_after == pytest.approx(lowest, abs=1e-3)

    def kill(_model: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("factory.healing.heal.adapter_tensors", kill)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "killed", settings=settings)
    (tmp_path / "killed").rename(tmp_path / "elsewhere")
    steps: list[int] = []
    resumed = run(
        model,
        tmp_path / "elsewhere",
        settings=settings,
        progress=lambda done, _total, _note: steps.append(done),
    )
    assert steps == []
    name = "adapter_model.safetensors"
    assert (resumed.folder / name).read_bytes() == (undisturbed.folder / name).read_bytes()
    assert resumed.model_copy(update={"folder": undisturbed.folder}) == undisturbed
