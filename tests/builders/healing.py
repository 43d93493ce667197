"""A healing of a tiny model, and its settings."""

from collections.abc import Callable
from pathlib import Path

from factory.artifacts import Adapter, Checkpoint, PruningPlan
from factory.config.settings import HealSettings
from factory.healing.heal import heal
from factory.hub.resolve import resolve
from factory.pruning.prune import prune
from tests.builders.texts import rhymes, text_of

SETTINGS = HealSettings(
    data="x", learning_rate=1e-2, rank=4, num_steps=12, warmup_steps=1, batch_size=2, sequence_length=64
)


def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(folder=folder, num_layers=4, num_parameters=1, size_bytes=1, files={})


def cut(source: Path, folder: Path, *, dropped: tuple[int, ...]) -> Checkpoint:
    """What pruning leaves of a source without these layers."""
    found = resolve(str(source))
    plan = PruningPlan(criterion="angular", num_layers=found.num_layers, dropped=dropped)
    return prune(found, plan, folder=folder, progress=quiet)


def quiet(_done: int, _total: int, _note: str = "") -> None: ...


def run(
    model: Path,
    folder: Path,
    *,
    settings: HealSettings = SETTINGS,
    progress: Callable[[int, int, str], None] = quiet,
    documents: list[str] | None = None,
    source: Path | None = None,
    dropped: tuple[int, ...] = (),
) -> Adapter:
    folder.mkdir(exist_ok=True)
    text = text_of(rhymes(60) if documents is None else documents)
    return heal(
        checkpoint(model),
        text,
        source_folder=source or model,
        dropped=dropped,
        settings=settings,
        seed=0,
        folder=folder,
        progress=progress,
    )
