"""Several processes give what one gives, and none outlives the one that started them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from factory import processes
from factory.artifacts import Adapter, Checkpoint, DistanceProfile, Evaluation
from factory.config import BuildConfig, EvaluateSettings, HealSettings, MeasureSettings
from factory.errors import DataError, UsageError, WorkerError
from factory.evaluate import evaluate
from factory.heal import heal
from factory.resolve import resolve
from factory.run import Run, open_texts
from factory.significance import LOSSES, read_answers, read_losses
from factory.spread import num_processes, spread
from factory.stages import measure_stage
from factory.store import Store
from factory.texts import open_text
from tests.test_evaluate import questions, save_task
from tests.tiny import rhymes, save_llama

ROOT = Path(__file__).parent.parent
HEALING = HealSettings(
    data="x", learning_rate=1e-2, rank=4, num_steps=12, warmup_steps=1, batch_size=4, sequence_length=64
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


def measured(folder: Path, home: Path, *, with_processes: int) -> tuple[DistanceProfile, str, Heard]:
    """The profile, its stage key, and what was reported."""
    text = str(folder / "text.txt")
    config = BuildConfig(
        reference=str(folder / "model"),
        drop=0.5,
        measure=MeasureSettings(data=text, num_samples=90, sequence_length=64),
        evaluate=EvaluateSettings(data="stdlib:held-out", tasks=()),
    )
    heard = Heard()
    texts = open_texts(config, heals=False, evaluates=False)
    run = Run(config, Store(home), heard, texts, processes=with_processes)
    source = resolve(str(folder / "model")).model_copy(update={"folder": folder / "model"})
    return measure_stage(run, source), run.keys["measure"], heard


def evaluate_and_heal(folder: Path, into: Path, *, progress: Progress) -> tuple[Evaluation, Adapter]:
    settings = EvaluateSettings(num_documents=70, sequence_length=64, tasks=(str(folder / "rhyme.yaml"),))
    text = open_text(str(folder / "text.txt"), split="validation")
    evaluation = evaluate(folder / "model", text, settings=settings, into=into, progress=ignore)
    adapter = heal(
        Checkpoint(folder=folder / "model", num_layers=4, num_parameters=1, size_bytes=1, files={}),
        text,
        source_folder=folder / "model",
        dropped=(),
        settings=HEALING,
        seed=0,
        folder=into,
        progress=progress,
    )
    return evaluation, adapter


def test_two_processes_measure_what_one_does_under_the_same_key(folder: Path, tmp_path: Path) -> None:
    one, key, _ = measured(folder, tmp_path / "one", with_processes=1)
    two, same_key, heard = measured(folder, tmp_path / "two", with_processes=2)
    assert key == same_key
    assert two.model_copy(update={"mean": one.mean, "stderr": one.stderr}) == one
    assert torch.allclose(torch.tensor(two.mean), torch.tensor(one.mean), atol=1e-6)
    assert torch.allclose(torch.tensor(two.stderr), torch.tensor(one.stderr), atol=1e-6)
    assert heard.progress[-1][0] == one.num_samples


class Cut(Exception): ...  # noqa: N818


def cut_at_7(done: int, _total: int, _note: str) -> None:
    if done == 7:
        raise Cut


def test_two_processes_evaluate_as_one_does_and_finish_what_one_began_to_heal(
    folder: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    evaluation, adapter = evaluate_and_heal(folder, one, progress=ignore)
    two.mkdir()
    with pytest.raises(Cut):
        evaluate_and_heal(folder, two, progress=cut_at_7)
    for kept in (*two.glob("task-*.json"), two / LOSSES):
        kept.unlink()  # that is measured anew
    steps: list[int] = []
    same_evaluation, same_adapter = spread(
        partial(evaluate_and_heal, folder, two),
        processes=2,
        progress=lambda done, _total, _note: steps.append(done),
    )
    assert same_evaluation.loss.nats == pytest.approx(evaluation.loss.nats, abs=1e-6)
    assert same_evaluation.tasks == evaluation.tasks
    losses, same_losses = read_losses(one), read_losses(two)
    assert [count for count, _ in same_losses] == [count for count, _ in losses]
    assert [nats for _, nats in same_losses] == pytest.approx([nats for _, nats in losses], abs=1e-3)
    assert read_answers(two, 0) == read_answers(one, 0)

    assert steps[0] > 1  # it did not begin anew
    assert same_adapter.num_tokens == adapter.num_tokens
    assert same_adapter.guard_loss_before == pytest.approx(adapter.guard_loss_before, abs=1e-6)
    assert same_adapter.guard_loss_after == pytest.approx(adapter.guard_loss_after, abs=1e-4)
    curve = [point.loss for point in adapter.curve]
    assert [point.loss for point in same_adapter.curve] == pytest.approx(curve, abs=1.1e-4)
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())


def fail_in_the_second(progress: Progress) -> int:
    if processes.is_main():
        processes.gather([0])  # waits for the other
    raise DataError("'x' is no text", hint="give some")


def test_an_error_in_one_process_ends_all_and_is_raised_here() -> None:
    with pytest.raises(DataError, match="'x' is no text") as raised:
        spread(fail_in_the_second, processes=2, progress=ignore)
    assert raised.value.hint == "give some"


def vanish(progress: Progress) -> None:
    if not processes.is_main():
        os.kill(os.getpid(), signal.SIGKILL)
    processes.gather([0])


def test_a_process_that_is_gone_is_an_error_with_a_way_on() -> None:
    with pytest.raises(WorkerError, match="is gone") as raised:
        spread(vanish, processes=2, progress=ignore)
    assert "--processes 1" in raised.value.hint


def write_number_and_wait(folder: Path, *, progress: Progress) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(100)


def test_processes_end_when_the_one_that_started_them_is_killed(tmp_path: Path) -> None:
    program = (
        "from functools import partial; from pathlib import Path; from tests import test_spread as t\n"
        f"work = partial(t.write_number_and_wait, Path({str(tmp_path)!r}))\n"
        "t.spread(work, processes=2, progress=t.ignore)"
    )
    started = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    started.kill()
    started.wait()
    numbers = [int(path.name) for path in tmp_path.iterdir()]
    wait_until(lambda: not any(Path(f"/proc/{number}").exists() for number in numbers))


def wait_until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.1)


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


def test_more_processes_than_cores_are_refused() -> None:
    assert num_processes(None) == max(torch.cuda.device_count(), 1)
    with pytest.raises(UsageError, match=r"--processes 1000 is more than the [0-9]+ (cores|GPUs) here"):
        num_processes(1000)


def test_the_command_itself_under_accelerate_launch_is_refused_once() -> None:
    told = [
        subprocess.run(
            [sys.executable, "-m", "factory", "build", "demo", "--drop", "0.3"],
            env=os.environ | {"LOCAL_RANK": rank, "WORLD_SIZE": "2"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        for rank in ("0", "1")
    ]
    assert [done.returncode for done in told] == [2, 0]
    assert told[0].stderr.splitlines() == [
        "error: factory under `accelerate launch` with 2 processes: it starts them itself",
        "hint: run `factory build … --processes 2`, without `accelerate launch`",
    ]
    assert told[1].stdout + told[1].stderr == ""
