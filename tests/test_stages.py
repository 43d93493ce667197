"""Finished work stays valid: stage keys never change by themselves, and an earlier store is reused."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from factory.artifacts import Checkpoint, DataSource, PruningPlan, Source
from factory.config.settings import BuildConfig, EvaluateSettings, HealSettings, MeasureSettings, PlanSettings
from factory.pipeline import choosing, stages
from factory.pipeline.run import Missing, Run
from factory.store.stage import STAGES, Stage, StageSpec
from factory.store.store import Store, damage
from factory.text.text import Text, Texts
from tests.builders.builds import an_adapter

STORE = Path(__file__).parent / "golden" / "store"  # written before there was a table of stages
SOURCE = Source(
    name="tiny",
    commit="1" * 40,
    model_type="llama",
    architecture="LlamaForCausalLM",
    config={"model_type": "llama", "num_hidden_layers": 4},
    num_layers=4,
    num_parameters=1000,
    layer_parameters=(200,) * 4,
    size_bytes=2000,
    layer_bytes=(400,) * 4,
    vocab_size=257,
    dtype="bfloat16",
)
MEASURED = {"measure": "a" * 16, "prune": "b" * 16, "heal": "c" * 16, "merge": "d" * 16}


def text(name: str) -> Text:
    return Text(DataSource(name=name, version="1"), lambda: iter(()))


TEXTS = Texts(text("calibration"), text("healing"), text("evaluation"))
CONFIG = BuildConfig(
    reference="tiny",
    drop=0.25,
    measure=MeasureSettings(num_samples=4, sequence_length=32),
    plan=PlanSettings(num_documents=8, sequence_length=32),
    heal=HealSettings(num_steps=10, warmup_steps=1, sequence_length=32),
    evaluate=EvaluateSettings(num_documents=4, sequence_length=32, tasks=()),
)
PLAN = PruningPlan(criterion="angular", num_layers=4, dropped=(1,))
CHECKPOINT = Checkpoint(folder=Path(), num_layers=3, num_parameters=800, size_bytes=1600, files={})


class Silent:
    """A reporter that keeps which stages were reused."""

    def __init__(self) -> None:
        self.reused: dict[str, bool] = {}

    def started(self, stage: str) -> None: ...
    def progressed(self, stage: str, done: int, total: int, note: str) -> None: ...
    def waiting(self, stage: str) -> None: ...
    def damaged(self, stage: str, file: str) -> None: ...

    def finished(self, stage: str, summary: str, seconds: float, reused: bool) -> None:
        self.reused[stage] = reused


@dataclass(frozen=True)
class Empty(Store):
    """A store without stages that keeps what it was asked for."""

    asked: list[StageSpec] = field(default_factory=list)

    def find(self, spec: StageSpec, *, made_from: Mapping[str, str] | None = None) -> None:
        self.asked.append(spec)


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions of libraries that no installation changes."""
    for module in ("run", "stages"):
        monkeypatch.setattr(f"factory.pipeline.{module}.version", lambda library: f"{library} 1.0")


def plan(run: Run, **settings: Any) -> None:
    run.config = CONFIG.model_copy(update={"plan": CONFIG.plan.model_copy(update=settings)})
    choosing.plan_stage(run, SOURCE, None)  # type: ignore[arg-type]  # nothing is computed


def heal(run: Run, **settings: Any) -> None:
    run.config = CONFIG.model_copy(update={"heal": CONFIG.heal.model_copy(update=settings)})
    stages.heal_stage(run, SOURCE, None, CHECKPOINT)  # type: ignore[arg-type]


def evaluate(run: Run, **settings: Any) -> None:
    run.config = CONFIG.model_copy(update={"evaluate": CONFIG.evaluate.model_copy(update=settings)})
    stages.evaluate_stage(run, "source", SOURCE)


KEYS: dict[str, tuple[Callable[[Run], object], str]] = {
    "measure": (lambda run: choosing.measure_stage(run, SOURCE), "5672d9ab5a8ece94"),
    "angular": (lambda run: plan(run), "bd0dae067ca69af5"),
    "deepest": (lambda run: plan(run, criterion="deepest"), "f2760f792fc7c975"),
    "block-influence": (lambda run: plan(run, criterion="block-influence"), "fb6a4681a7274e4d"),
    "chosen layers": (lambda run: plan(run, layers=(1, 2)), "2c57c277916e84c8"),
    "loss": (lambda run: plan(run, criterion="loss"), "6d1fe1b2f4a7fb3b"),
    "greedy": (lambda run: plan(run, criterion="greedy"), "971ca5aecbf18716"),
    "compare": (lambda run: choosing.compare_stage(run, SOURCE, [(1,), (2,)]), "4470563b28b1fd11"),
    "prune": (lambda run: stages.prune_stage(run, SOURCE, PLAN), "64314756f3c97db9"),
    "heal by sft": (lambda run: heal(run, objective="sft"), "cba49682a26cf2bd"),
    "heal by distill": (lambda run: heal(run, objective="distill", bits=16), "cf68b5b34cea26b5"),
    "merge": (lambda run: stages.merge_stage(run, CHECKPOINT, an_adapter()), "c5e2c9e2a8eb4098"),
    "evaluate source": (lambda run: evaluate(run), "7539e4f8df83e285"),
    "evaluate by vllm": (lambda run: evaluate(run, backend="vllm"), "7828b79cc7ebc579"),
    "evaluate healed": (lambda run: stages.evaluate_stage(run, "healed", CHECKPOINT), "3c2339f75ddeef09"),
    "speed": (lambda run: stages.speed_stage(run, SOURCE, CHECKPOINT, "pruned"), "a301e84ebb81fdc5"),
}


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("case", KEYS)
def test_equal_settings_inputs_and_libraries_give_the_key_that_they_always_gave(
    case: str, tmp_path: Path
) -> None:
    look, key = KEYS[case]
    store = Empty(tmp_path)
    run = Run(CONFIG, store, Silent(), TEXTS, only_look=True, keys=dict(MEASURED))
    with pytest.raises(Missing):
        look(run)
    assert [spec.key for spec in store.asked] == [key]


@pytest.mark.usefixtures("libraries")
def test_a_store_that_an_earlier_version_filled_is_reused(tmp_path: Path) -> None:
    shutil.copytree(STORE, tmp_path / "home")
    reporter = Silent()
    run = Run(CONFIG, Store(tmp_path / "home"), reporter, TEXTS)
    profile = choosing.measure_stage(run, SOURCE)
    assert choosing.plan_stage(run, SOURCE, profile).dropped == (0,)
    assert stages.evaluate_stage(run, "source", SOURCE).loss.num_documents == 4
    assert reporter.reused == {"measure": True, "plan": True, "evaluate source": True}
    assert [damage(folder) for folder in run.folders.values()] == [[], [], []]


@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda stage: stage.name)
def test_a_row_of_the_table_names_a_value_and_lists_its_local_files_as_scratch(stage: Stage[Any]) -> None:
    assert stage.artifact.file_name.endswith(".json")
    assert set(stage.local) <= set(stage.scratch)
