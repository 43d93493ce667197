"""Several processes give what one gives, and none outlives the one that started them."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import DistributedType, PartialState
from accelerate.commands.config import load_config_from_file
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import trainer

from factory.artifacts import Adapter, Checkpoint, DistanceProfile, Evaluation
from factory.config.settings import BuildConfig, EvaluateSettings, HealSettings, MeasureSettings
from factory.errors import DataError, UsageError, WorkerError
from factory.evaluation.answers import read_answers, read_losses
from factory.evaluation.evaluate import evaluate
from factory.healing import head_loss
from factory.healing.heal import heal
from factory.healing.trainers import TRAINERS
from factory.hub.resolve import resolve
from factory.model.devices import trains_on_one
from factory.model.layers import decoder_layers
from factory.parallel import processes
from factory.parallel.launch import num_processes, spread
from factory.pipeline.run import Run
from factory.pipeline.stages import in_processes
from factory.pipeline.texts import open_texts
from factory.pruning.measure import measure
from factory.resources import ACCELERATE_CONFIGS
from factory.store.store import Store
from factory.text.text import open_text
from tests.builders.evaluation import questions, save_task
from tests.builders.models import save_family, save_llama
from tests.builders.texts import rhymes
from tests.places import ROOT
from tests.waiting import HUNG_SECONDS, until
from tests.workers import fail_in_the_second, vanish, vanish_while_a_library_waits

HEALING = HealSettings(
    data="x", learning_rate=1e-2, rank=4, num_steps=12, warmup_steps=1, batch_size=4, sequence_length=64
)
CONFIG = BuildConfig(
    reference="x",
    drop=0.5,
    measure=MeasureSettings(data="stdlib:train"),
    heal=HealSettings(data="stdlib:train"),
    evaluate=EvaluateSettings(data="stdlib:held-out"),
)
Progress = Callable[[int, int, str], None]


class Heard:
    """A reporter that remembers how far a stage was said to be."""

    def __init__(self) -> None:
        self.progress: list[tuple[int, int]] = []

    def started(self, stage: str) -> None: ...
    def progressed(self, stage: str, done: int, total: int, note: str) -> None:
        self.progress.append((done, total))

    def finished(self, stage: str, summary: str, seconds: float, reused: bool) -> None: ...
    def waiting(self, stage: str) -> None: ...
    def damaged(self, stage: str, file: str) -> None: ...


def ignore(_done: int, _total: int, _note: str = "") -> None: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, 90 documents of many lengths, and a task of 9 questions."""
    folder = tmp_path_factory.mktemp("spread")
    save_llama(folder / "model")
    documents = [f"{index} {text[: 20 + 7 * index]}" for index, text in enumerate(rhymes(90))]
    (folder / "text.txt").write_text("\n\n".join(documents))
    save_task(folder, "rhyme", questions(9))
    return folder


def heal_it(
    folder: Path,
    into: Path,
    *,
    progress: Progress,
    objective: str = "sft",
    dropped: Sequence[int] = (),
    num_steps: int = HEALING.num_steps,
) -> Adapter:
    return heal(
        Checkpoint(folder=folder / "model", num_layers=4, num_parameters=1, size_bytes=1, files={}),
        open_text(str(folder / "text.txt"), split="train"),
        source_folder=folder / "model",
        dropped=dropped,
        settings=HEALING.model_copy(update={"objective": objective, "num_steps": num_steps}),
        seed=0,
        folder=into,
        progress=progress,
    )


def measure_evaluate_and_heal(
    folder: Path, into: Path, *, progress: Progress
) -> tuple[DistanceProfile, Evaluation, Adapter]:
    text = open_text(str(folder / "text.txt"), split="validation")
    source = resolve(str(folder / "model")).model_copy(update={"folder": folder / "model"})
    profile = measure(
        source,
        text,
        settings=MeasureSettings(num_samples=90, sequence_length=64),
        block_sizes=(),
        seed=0,
        folder=into,
        progress=ignore,
    )
    settings = EvaluateSettings(num_documents=70, sequence_length=64, tasks=(str(folder / "rhyme.yaml"),))
    evaluation = evaluate(folder / "model", text, settings=settings, into=into, progress=ignore)
    return profile, evaluation, heal_it(folder, into, progress=progress)


@pytest.fixture(scope="module")
def alone(folder: Path) -> tuple[DistanceProfile, Evaluation, Adapter]:
    """What one process makes."""
    (folder / "one").mkdir()
    return measure_evaluate_and_heal(folder, folder / "one", progress=ignore)


class Cut(Exception): ...  # noqa: N818


def cut_at_7(done: int, _total: int, _note: str) -> None:
    if done == 7:
        raise Cut


def test_two_processes_make_what_one_makes_and_finish_what_it_began_to_heal(
    folder: Path, alone: tuple[DistanceProfile, Evaluation, Adapter], tmp_path: Path
) -> None:
    with pytest.raises(Cut):
        heal_it(folder, tmp_path, progress=cut_at_7)
    heard = Heard()
    run = Run(CONFIG, Store(tmp_path / "home"), heard, open_texts(CONFIG), processes=2)
    work = partial(measure_evaluate_and_heal, folder, tmp_path)
    profile, evaluation, adapter = in_processes(run, work, name="all", model=folder / "model")

    assert profile.model_copy(update={"mean": alone[0].mean, "stderr": alone[0].stderr}) == alone[0]
    assert torch.allclose(torch.tensor(profile.mean), torch.tensor(alone[0].mean), atol=1e-5)
    assert torch.allclose(torch.tensor(profile.stderr), torch.tensor(alone[0].stderr), atol=1e-5)

    assert evaluation.loss.nats == pytest.approx(alone[1].loss.nats, abs=1e-5)
    assert evaluation.tasks == alone[1].tasks
    losses, same_losses = read_losses(folder / "one"), read_losses(tmp_path)
    assert [count for count, _ in same_losses] == [count for count, _ in losses]
    assert [nats for _, nats in same_losses] == pytest.approx([nats for _, nats in losses], abs=1e-3)
    assert read_answers(tmp_path, 0) == read_answers(folder / "one", 0)

    assert heard.progress[0][0] > 1  # it did not begin anew
    assert heard.progress[-1] == (12, 12)
    check_same_adapter(adapter, alone[2])
    left = {path.name for path in tmp_path.iterdir()} - {"home"}
    assert left == {path.name for path in (folder / "one").iterdir()}


def check_same_adapter(found: Adapter, expected: Adapter) -> None:
    assert found.num_tokens == expected.num_tokens
    assert found.num_trainable_parameters == expected.num_trainable_parameters
    assert found.guard_loss_before == pytest.approx(expected.guard_loss_before, abs=1e-5)
    assert found.guard_loss_after == pytest.approx(expected.guard_loss_after, abs=1e-3)
    curve = [point.loss for point in expected.curve]
    assert [point.loss for point in found.curve] == pytest.approx(curve, abs=1e-3)
    tensors, same = (load_file(each.folder / "adapter_model.safetensors") for each in (expected, found))
    assert tensors.keys() == same.keys()
    for name, tensor in tensors.items():
        # By the norm: where a gradient is next to nothing, Adam makes a whole step of its rounding.
        assert (same[name] - tensor).norm() < 0.05 * tensor.norm(), name


def heal_sharded(
    folder: Path, into: Path, *, progress: Progress, objective: str, dropped: Sequence[int]
) -> tuple[Adapter, list[int]]:
    """Heal under FSDP, and count the elements of the layers, and those that this process holds."""
    held: list[int] = []

    class Watching(TRAINERS[objective]):  # type: ignore[misc, name-defined]
        def training_step(self, *args: Any, **more: Any) -> Any:
            loss = super().training_step(*args, **more)
            weights = list(decoder_layers(self.causal).parameters())
            mine = [weight.to_local().numel() for weight in weights if isinstance(weight, DTensor)]
            held[:] = [sum(mine), sum(weight.numel() for weight in weights)]
            return loss

        def _save_checkpoint(self, *args: Any, **more: Any) -> None:
            # The trainer looks for a folder that another process may have made: here, for all but the last.
            if self.state.global_step < self.state.max_steps:
                name = f"checkpoint-{self.state.global_step}"
                (Path(self.args.output_dir) / name).mkdir(parents=True, exist_ok=True)
            super()._save_checkpoint(*args, **more)

    prepare = PartialState._prepare_backend
    with pytest.MonkeyPatch.context() as patch:
        # Accelerate shards on GPUs only; here it is made to believe that these two CPUs are some.
        patch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
        as_if = lambda self, *args: (prepare(self, *args)[0], DistributedType.MULTI_GPU)  # noqa: E731
        patch.setattr(PartialState, "_prepare_backend", as_if)
        patch.setitem(TRAINERS, objective, Watching)
        patch.setattr(head_loss, "CHUNK_VALUES", 2**11)  # several calls of the head, not as many in both
        save = trainer.save_fsdp_model
        late = lambda *args, **more: (time.sleep(0.3), save(*args, **more))[1]  # noqa: E731
        patch.setattr(trainer, "save_fsdp_model", late)
        how = {"objective": objective, "dropped": dropped, "num_steps": SHARDED_STEPS}
        return heal_it(folder, into, progress=progress, **how), held


SHARDED_STEPS = 5
DROPPED: dict[str, tuple[int, ...]] = {"sft": (), "distill": (1,)}  # by objective


def heal_sharded_by_each(folder: Path, *, progress: Progress) -> dict[str, tuple[Adapter, list[int]]]:
    """Heal by one objective after the other: starting the processes takes longer than either."""
    return {
        objective: heal_sharded(
            folder, folder / objective, progress=progress, objective=objective, dropped=dropped
        )
        for objective, dropped in DROPPED.items()
    }


@pytest.fixture(scope="module")
def experts(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with experts in some of its layers, the text, and folders for what is made of them."""
    experts = tmp_path_factory.mktemp("sharded")
    for name in (*DROPPED, *(f"{objective} alone" for objective in DROPPED)):
        (experts / name).mkdir()
    save_family(experts / "model", "qwen3_moe", mlp_only_layers=[0, 3])
    shutil.copy(folder / "text.txt", experts)
    return experts


@pytest.fixture(scope="module")
def sharded(experts: Path) -> dict[str, tuple[Adapter, list[int]]]:
    """What two processes make that divide the model between them, by objective."""
    return spread(partial(heal_sharded_by_each, experts), processes=2, case="fsdp", progress=ignore)


@pytest.mark.parametrize("objective", DROPPED)
def test_a_sharded_model_is_healed_as_a_whole_one_is(
    experts: Path, sharded: dict[str, tuple[Adapter, list[int]]], objective: str
) -> None:
    adapter, held = sharded[objective]
    assert adapter.experts
    assert adapter.target_modules
    how = {"objective": objective, "dropped": DROPPED[objective], "num_steps": SHARDED_STEPS}
    check_same_adapter(adapter, heal_it(experts, experts / f"{objective} alone", progress=ignore, **how))
    assert held[0] == pytest.approx(held[1] / 2, rel=0.01)


def test_a_model_whose_four_bit_weights_do_not_fit_is_to_be_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    trains_in_nf4 = partial(trains_on_one, four_bit=True)
    assert trains_in_nf4(10**12, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (80 * 10**9, 80 * 10**9))
    assert trains_in_nf4(70 * 10**9, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (24 * 10**9, 24 * 10**9))
    assert trains_in_nf4(13 * 10**9, torch.device("cuda"))
    assert not trains_in_nf4(70 * 10**9, torch.device("cuda"))
    assert not trains_on_one(13 * 10**9, torch.device("cuda"), four_bit=False)
    assert not trains_in_nf4(13 * 10**9, torch.device("cuda"), num_unpacked=8 * 10**9)


@pytest.mark.parametrize("case", ["cpu", "gpus", "fsdp"])
def test_each_shipped_configuration_is_one_that_accelerate_reads(case: str) -> None:
    read = load_config_from_file(str(ACCELERATE_CONFIGS / f"{case}.yaml"))
    assert read.distributed_type == {"fsdp": "FSDP"}.get(case, "MULTI_GPU")
    assert read.use_cpu == (case == "cpu")
    assert read.main_process_port == 0


def test_what_the_main_process_tells_arrives_here_and_an_error_in_one_ends_all() -> None:
    told: list[str] = []
    with pytest.raises(DataError, match="'x' is no text") as raised:
        spread(fail_in_the_second, processes=2, progress=ignore, tell=told.append)
    assert raised.value.hint == "give some"
    assert told == ["2 of us, 0"]


@pytest.mark.parametrize("work", [vanish, vanish_while_a_library_waits])
def test_a_process_that_is_gone_is_an_error_with_a_way_on(work: Callable[..., None]) -> None:
    with pytest.raises(WorkerError, match="died") as raised:
        spread(work, processes=2, progress=ignore)
    assert "`processes=1`" in raised.value.hint


def test_processes_end_when_the_one_that_started_them_is_killed(tmp_path: Path) -> None:
    program = (
        "from functools import partial; from pathlib import Path\n"
        "from factory.parallel.launch import spread; from tests import workers\n"
        f"work = partial(workers.write_number_and_wait, Path({str(tmp_path)!r}))\n"
        "spread(work, processes=2, progress=print)"
    )
    started = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    until(lambda: len(list(tmp_path.iterdir())) == 2)
    started.kill()
    started.wait()
    numbers = [int(path.name) for path in tmp_path.iterdir()]
    until(lambda: not any(Path(f"/proc/{number}").exists() for number in numbers))


def test_shares_put_together_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for count in range(1, 6):
        for length in range(12):
            items, found = list(range(length)), list[int]()
            for index in range(count):
                monkeypatch.setattr(processes, "count", lambda count=count: count)
                monkeypatch.setattr(processes, "index", lambda index=index: index)
                mine = processes.share(items)
                assert len(mine) in (length // count, length // count + 1)
                found += mine
            assert found == items


def test_portions_are_the_whole_and_cost_about_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = [(7 * place) % 31 for place in range(40)]
    for count in range(1, 6):
        portions = []
        for index in range(count):
            monkeypatch.setattr(processes, "count", lambda count=count: count)
            monkeypatch.setattr(processes, "index", lambda index=index: index)
            portions.append(processes.portion(costs))
        assert sorted(place for portion in portions for place in portion) == list(range(40))
        totals = [sum(costs[place] for place in portion) for portion in portions]
        assert max(totals) - min(totals) <= max(costs)


def test_more_processes_than_cores_are_refused() -> None:
    assert num_processes(None) == max(torch.cuda.device_count(), 1)
    with pytest.raises(UsageError, match=r"`processes=1000` is more than the [0-9]+ (cores|GPUs) here"):
        num_processes(1000)


def test_the_command_itself_under_accelerate_launch_is_refused_once() -> None:
    told = [
        subprocess.run(
            [sys.executable, "-m", "factory", "build", "demo", "--drop", "0.3"],
            env=os.environ | {"LOCAL_RANK": rank, "WORLD_SIZE": "2"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=HUNG_SECONDS,
        )
        for rank in ("0", "1")
    ]
    assert [done.returncode for done in told] == [2, 0]
    assert told[0].stderr.splitlines() == [
        "error: factory under `accelerate launch` with 2 processes: it starts them itself",
        "hint: run `factory build … --processes 2`, without `accelerate launch`",
    ]
    assert told[1].stdout + told[1].stderr == ""
