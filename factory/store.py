"""Stage folders: keys, resumption, locks, manifests. A folder with its final name is complete."""

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from factory.artifacts import canonical_json
from factory.disk import no_room
from factory.errors import DiskSpaceError, StoreError

MANIFEST = "stage.json"
PARTIAL = ".partial"
STAGES = ("measure", "plan", "search", "compare", "prune", "heal", "merge", "evaluate", "speed")
KEY = re.compile("[0-9a-f]{16}")
RECENT_SECONDS = 24 * 3600


def default_home() -> Path:
    """`$FACTORY_HOME`, else the platform's user cache directory."""
    return Path(os.environ.get("FACTORY_HOME") or platformdirs.user_cache_dir("factory"))


@dataclass(frozen=True)
class StageSpec:
    """What decides the result of a stage: equal specs give equal keys on every machine."""

    stage: str
    version: int  # raised when the stage's code gives other results
    parameters: Mapping[str, Any]  # JSON values that change the result
    inputs: Mapping[str, str]  # name → key or commit of what goes in

    @property
    def key(self) -> str:
        """First 16 hex digits of sha256 over the canonical JSON of the spec."""
        value = {
            "stage": self.stage,
            "version": self.version,
            "parameters": dict(self.parameters),
            "inputs": dict(self.inputs),
        }
        return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class StageResult:
    """A complete stage folder."""

    key: str
    folder: Path
    reused: bool
    seconds: float  # wall time when it was made, over all attempts


@dataclass(frozen=True)
class Store:
    """The stages under one home folder, shared by all builds."""

    home: Path

    def folder(self, spec: StageSpec) -> Path:
        """Where a complete stage of this spec lies, whether it is there or not."""
        return self.home / "stages" / spec.stage / spec.key

    def find(self, spec: StageSpec) -> StageResult | None:
        """The complete stage of this spec, or None; a stage whose files have other sizes is absent."""
        folder = self.folder(spec)
        manifest = _manifest_of(folder)
        if manifest is None or not _is_whole(folder, manifest):
            return None
        return StageResult(spec.key, folder, reused=True, seconds=manifest["seconds"])

    def make(
        self,
        spec: StageSpec,
        work: Callable[[Path], None],
        *,
        resumable: bool = False,
        rerun: bool = False,
        on_wait: Callable[[], None] | None = None,
    ) -> StageResult:
        """Return the complete stage of this spec, running `work` in a partial folder if need be.

        `work` gets the partial folder. It is emptied first unless the stage is `resumable`. If `work`
        fails or is killed the partial folder never takes the final name. `rerun` makes it again.

        Raises:
            StoreError: The folder cannot be written.
        """
        folder = self.folder(spec)
        partial = folder.with_name(folder.name + PARTIAL)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(folder.parent, error) from error
        with _locked(folder.with_name(folder.name + ".lock"), on_wait=on_wait):
            found = self.find(spec)
            if found and not rerun:
                with suppress(OSError):
                    os.utime(found.folder)  # in use: `garbage` leaves it for a day
                return found
            if partial.exists() and (rerun or not resumable):
                shutil.rmtree(partial)
            partial.mkdir(exist_ok=True)
            seconds = _timed(work, partial)
            _complete(partial, folder, spec=spec, seconds=seconds)
        return StageResult(spec.key, folder, reused=False, seconds=seconds)

    def stages(self) -> Iterator[dict[str, Any]]:
        """Manifests of all complete stages, with `folder` and `size_bytes` added."""
        for manifest in sorted((self.home / "stages").glob(f"*/*/{MANIFEST}")):
            folder = manifest.parent
            value = _manifest_of(folder) if folder.suffix != PARTIAL else None
            if value is not None:
                yield {**value, "folder": folder, "size_bytes": folder_bytes(folder)}

    def register(self, build: Path, keys: Mapping[str, str]) -> None:
        """Remember that the build in this folder uses these stages, so that `garbage` leaves them."""
        root = {"build": str(build.resolve()), "keys": sorted(keys.values())}
        write_atomically(self._root(build).with_suffix(".json"), json.dumps(root))

    @contextmanager
    def laying_out(self, build: Path) -> Iterator[None]:
        """Hold the lock of one build folder: two builds into it take turns."""
        with _locked(self._root(build).with_suffix(".lock"), on_wait=None):
            yield

    def _root(self, build: Path) -> Path:
        roots = self.home / "builds"
        roots.mkdir(parents=True, exist_ok=True)
        return roots / hashlib.sha256(str(build.resolve()).encode()).hexdigest()[:16]

    def builds(self) -> list[Path]:
        """Build folders that were registered and are still there."""
        return [Path(root["build"]) for root in self._roots()]

    def garbage(self, *, recent: bool = False) -> list[Path]:
        """Stage folders, whole or partial, that no build uses and nobody is working on.

        Args:
            recent: Also those made or used within a day: a build under way registers only at its end.
        """
        used = {key for root in self._roots() for key in root["keys"]}
        found = []
        for folder in sorted((self.home / "stages").glob("*/*")):
            ours = folder.parent.name in STAGES and KEY.fullmatch(folder.name.removesuffix(PARTIAL))
            if not ours or not folder.is_dir():
                continue  # somebody else's
            if not recent and time.time() - folder.stat().st_mtime < RECENT_SECONDS:
                continue
            if folder.name.removesuffix(PARTIAL) not in used and not _is_locked(folder):
                found.append(folder)
        return found

    def _roots(self) -> list[dict[str, Any]]:
        roots = []
        for path in sorted((self.home / "builds").glob("*.json")):
            root = _read_root(path)
            if (Path(root["build"]) / "build.json").is_file():
                roots.append(root)
        return roots


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is either the old or the new one, whatever happens."""
    draft = path.with_name(path.name + PARTIAL)
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file where the file system allows it, else copy it."""
    try:
        os.link(source.resolve(), target)  # the Hub's cache holds symlinks: link what they point to
    except OSError:
        shutil.copyfile(source, target)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _timed(work: Callable[[Path], None], partial: Path) -> float:
    """Run the work; its wall time in seconds adds to that of attempts that were cut short."""
    clock = partial / "seconds"
    before = float(clock.read_text()) if clock.exists() else 0.0
    start = time.monotonic()
    try:
        work(partial)
        sync_files(partial)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = no_room(error)
        if reason:
            raise DiskSpaceError(
                f"{reason}, while writing {partial}",
                hint="`factory gc` removes what no build uses; then the same command goes on from here",
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS):
            raise _unwritable(partial, error) from error
        raise
    finally:
        seconds = before + time.monotonic() - start
        with suppress(OSError):  # on a full disk only the time of this attempt is lost
            clock.write_text(f"{seconds:.3f}")
    clock.unlink(missing_ok=True)
    return round(seconds, 3)


def _complete(partial: Path, folder: Path, *, spec: StageSpec, seconds: float) -> None:
    """Write the manifest last, sync, and give the folder its final name."""
    manifest = {
        "stage": spec.stage,
        "key": spec.key,
        "version": spec.version,
        "parameters": dict(spec.parameters),
        "inputs": dict(spec.inputs),
        "seconds": seconds,
        "files": {
            path.relative_to(partial).as_posix(): path.stat().st_size
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        },
    }
    write_atomically(partial / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    sync_folder(partial)
    if folder.exists():  # damaged, or made again: it stayed until its successor was whole
        shutil.rmtree(folder)
    partial.rename(folder)
    sync_folder(folder.parent)


def sync_files(folder: Path) -> None:
    """Make all files below a folder, and their names, outlast a power cut."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir() or path.is_file():
            sync_folder(path)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _manifest_of(folder: Path) -> dict[str, Any] | None:
    """The manifest of a stage folder; None if it is missing or not what `_complete` writes."""
    try:
        manifest: Any = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    needed = {"stage": str, "key": str, "seconds": int | float, "files": dict}
    if not isinstance(manifest, dict):
        return None
    return manifest if all(isinstance(manifest.get(name), kind) for name, kind in needed.items()) else None


def _is_whole(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether every file is there with the size that it had when the stage was completed."""
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size_bytes
        for name, size_bytes in manifest["files"].items()
    )


def _read_root(path: Path) -> dict[str, Any]:
    """What `register` wrote. A damaged one is an error: without it `garbage` would take a build's stages."""
    try:
        root: Any = json.loads(path.read_text(encoding="utf-8"))
        return {"build": str(root["build"]), "keys": [str(key) for key in root["keys"]]}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StoreError(
            f"{path} is damaged", hint="delete it, and run the builds made here again"
        ) from error


def _unwritable(folder: Path, error: OSError) -> StoreError:
    return StoreError(
        f"cannot write to {folder}: {error.strerror}", hint="give another folder with --home or FACTORY_HOME"
    )


def _is_locked(folder: Path) -> bool:
    lock = FileLock(folder.with_name(folder.name.removesuffix(PARTIAL) + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


@contextmanager
def _locked(path: Path, *, on_wait: Callable[[], None] | None) -> Iterator[None]:
    """Hold the lock of one stage; the operating system frees it when its holder dies."""
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if on_wait:
                on_wait()
            lock.acquire()
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    try:
        yield
    finally:
        lock.release()
