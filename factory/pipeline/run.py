"""Run stages: compute their keys, reuse finished ones, and report progress."""

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from factory.artifacts import Artifact, Checkpoint
from factory.config.settings import BuildConfig
from factory.config.tracking import NO_TRACKING, Tracking
from factory.store.files import sync_files, write_atomically
from factory.store.stage import Stage, StageSpec
from factory.store.store import Store, damage
from factory.text.text import Texts

A = TypeVar("A", bound=Artifact)
LOG = logging.getLogger(__name__)


class Reporter(Protocol):
    """Receiver of a build's progress; only the command line prints."""

    def started(self, stage: str) -> None: ...
    def progressed(self, stage: str, done: int, total: int, note: str) -> None: ...
    def finished(self, stage: str, summary: str, seconds: float, reused: bool) -> None: ...
    def waiting(self, stage: str) -> None: ...
    def damaged(self, stage: str, file: str) -> None: ...
    def stop(self) -> None: ...  # nothing is running any more
    def note(self, message: str) -> None: ...  # worth knowing, but not an error


class Missing(Exception):  # noqa: N818  not an error: the answer to "what is left to do?"
    """Signal, while only looking, that a stage is not made yet."""

    def __init__(self, stage: str) -> None:
        super().__init__(stage)
        self.stage = stage


@dataclass
class Run:
    """A build in progress: its settings, store, reporter and texts, and the stages it has used."""

    config: BuildConfig
    store: Store
    reporter: Reporter
    texts: Texts
    rerun: frozenset[str] = frozenset()
    block_sizes: tuple[int, ...] = ()  # sizes that measuring must be certain about; empty: that of `drop`
    only_look: bool = False  # raise Missing instead of working
    processes: int = 1  # maximum for a stage; no result or key depends on it
    undivided: frozenset[str] = frozenset()  # stages too short to start several processes for
    verified: set[Path] = field(default_factory=set)  # stage folders whose checksums were compared
    remade: set[str] = field(default_factory=set)  # keys whose dependents are made again too
    keys: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)  # key → digest of the stage's result
    folders: dict[str, Path] = field(default_factory=dict)  # of the stages in `keys`
    in_use: list[IO[bytes] | None] = field(default_factory=list)  # open files keep `factory gc` away
    seconds: dict[str, float] = field(default_factory=dict)
    tracking: Tracking = NO_TRACKING
    unfinished: tuple[StageSpec, Path] | None = None  # the resumable stage in progress, and its folder

    def stage(
        self,
        stage: Stage[A],
        work: Callable[[Path], Artifact],
        *,
        parameters: Mapping[str, Any],
        inputs: Mapping[str, str],
        summary: Callable[[A], str],
        label: str = "",
    ) -> A:
        """Reuse or make one stage; `work` returns the artefact, which is stored with its files."""
        name = f"{stage.name} {label}".strip()
        libraries = {library: version(library) for library in stage.libraries}
        spec = StageSpec(stage.name, stage.version, {**parameters, "libraries": libraries}, inputs)
        LOG.debug("%s: %s", name, self.store.folder(spec))
        rerun = stage.name in self.rerun or not self.remade.isdisjoint(inputs.values())
        made_from = {key: self.digests[key] for key in inputs.values() if key in self.digests}
        found = None if rerun else self.store.find(spec, made_from=made_from)
        if self.only_look and not (found and self._is_intact(name, found.folder)):
            raise Missing(stage.name)

        artifact = stage.artifact

        def make(folder: Path) -> Mapping[str, str]:
            self.reporter.started(name)
            if (folder / artifact.file_name).is_file():  # an attempt was interrupted after its work
                value: Artifact = artifact.read(folder)
            else:
                self.unfinished = (spec, folder) if stage.resumable else None
                value = work(folder)
                self.unfinished = None
                sync_files(folder)  # the value must not exist before the files it refers to
                write_atomically(folder / artifact.file_name, value.text())
            for path in [path for pattern in stage.scratch for path in folder.glob(pattern)]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            return value.files if isinstance(value, Checkpoint) else {}

        result = self.store.make(
            spec,
            make,
            made_from=made_from,
            resumable=stage.resumable,
            rerun=rerun,
            on_wait=lambda: self.reporter.waiting(name),
            is_intact=lambda folder: self._is_intact(name, folder),
        )
        self.verified.add(result.folder)
        self.in_use.append(result.in_use)
        if rerun:
            self.remade.add(result.key)
        value = artifact.read(result.folder)
        self.keys[name] = result.key
        self.digests[result.key] = result.digest
        self.folders[name] = result.folder
        self.seconds[name] = result.seconds
        if not self.only_look:
            self.reporter.finished(name, summary(value), result.seconds, result.reused)
        return value

    def release(self) -> None:
        """Allow others to remove or replace the stages that this run used."""
        for file in self.in_use:
            if file:
                file.close()
        self.in_use.clear()

    def _is_intact(self, name: str, folder: Path) -> bool:
        """Return whether a finished stage is undamaged; its files are read once per run."""
        changed = damage(folder) if folder not in self.verified else []
        if changed and not self.only_look:
            self.reporter.damaged(name, changed[0])
        if not changed:
            self.verified.add(folder)
        return not changed

    def ticks(self, stage: str, label: str = "") -> Callable[..., None]:
        """Return the progress callback of one stage."""
        name = f"{stage} {label}".strip()

        def tick(done: int, total: int, note: str = "") -> None:
            self.reporter.progressed(name, done, total, note)
            if self.store.elsewhere and self.unfinished:
                spec, folder = self.unfinished
                self.store.elsewhere.keep_partial(spec.stage, spec.key, folder)

        return tick
