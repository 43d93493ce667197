"""Stage folders: keys, resumption, locks, manifests. A folder with its final name is complete."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol

import platformdirs
from safetensors import SafetensorError

from factory.artifacts import canonical_json
from factory.errors import DiskSpaceError, StoreError
from factory.store.capacity import folder_bytes, no_room
from factory.store.files import (
    OLD,
    PARTIAL,
    changed_files,
    sha256_of_file,
    sync_files,
    sync_folder,
    write_atomically,
)
from factory.store.locks import hold, is_held, locked, writing
from factory.store.stage import StageSpec

MANIFEST = "stage.json"
FETCHED = ".fetched"  # before PARTIAL: arriving from elsewhere


def default_home() -> Path:
    """`$FACTORY_HOME`, else the platform's user cache directory."""
    return Path(os.environ.get("FACTORY_HOME") or platformdirs.user_cache_dir("factory"))


@dataclass(frozen=True)
class StageResult:
    """A complete stage folder."""

    key: str
    folder: Path
    reused: bool
    seconds: float  # wall time when it was made, over all attempts
    digest: str = ""  # of its files: equal bytes, equal digest
    in_use: IO[bytes] | None = None  # while this is open, `factory gc` leaves the folder


class Elsewhere(Protocol):
    """Where stages are kept besides this machine, so that another one can go on."""

    def fetch(self, stage: str, key: str, folder: Path) -> bool: ...
    def keep(self, stage: str, key: str, folder: Path) -> None: ...
    def fetch_partial(self, stage: str, key: str, folder: Path) -> None: ...
    def keep_partial(self, stage: str, key: str, folder: Path) -> None: ...


@dataclass(frozen=True)
class Store:
    """The stages under one home folder, shared by all builds."""

    home: Path
    elsewhere: Elsewhere | None = None

    def folder(self, spec: StageSpec) -> Path:
        """Where a complete stage of this spec lies, whether it is there or not."""
        return self.home / "stages" / spec.stage / spec.key

    def find(self, spec: StageSpec, *, made_from: Mapping[str, str] | None = None) -> StageResult | None:
        """The complete stage of this spec, or None; one that is only elsewhere is brought here.

        Args:
            made_from: Key → digest of the stages that it is to be made from. One that was made from others
                of these keys is absent too: not every stage comes out with the same bytes again.
        """
        found = self._here(spec, made_from)
        if found is None and self.elsewhere:
            folder = self.folder(spec)
            with writing(folder.parent):
                folder.parent.mkdir(parents=True, exist_ok=True)
            with locked(folder.with_name(folder.name + ".lock"), on_wait=None):
                return self._here(spec, made_from) or self._brought(spec, made_from)
        return found

    def _here(self, spec: StageSpec, made_from: Mapping[str, str] | None) -> StageResult | None:
        """The complete stage of this spec on this machine; one whose files have other sizes is absent."""
        folder = self.folder(spec)
        manifest = _manifest_of(folder)
        if manifest is None or not _is_whole(folder, manifest):
            return None
        if not _is_made_from(manifest, made_from or {}):
            return None
        seconds, digest = manifest["seconds"], _digest(manifest.get("sha256", {}))
        return StageResult(spec.key, folder, reused=True, seconds=seconds, digest=digest)

    def _brought(self, spec: StageSpec, made_from: Mapping[str, str] | None) -> StageResult | None:
        """The complete stage of this spec from elsewhere; None if it is not there, or not as it was made."""
        if self.elsewhere is None:
            return None
        folder = self.folder(spec)
        arriving = folder.with_name(f"{folder.name}{FETCHED}{PARTIAL}")
        with writing(folder.parent):
            shutil.rmtree(arriving, ignore_errors=True)
            arriving.mkdir()
            fetched = self.elsewhere.fetch(spec.stage, spec.key, arriving)
            if not fetched or damage(arriving):
                shutil.rmtree(arriving)
                return None
            _take_place(arriving, folder)  # what is there is damaged, or it would have been found
        return self._here(spec, made_from)

    def make(
        self,
        spec: StageSpec,
        work: Callable[[Path], Mapping[str, str]],
        *,
        made_from: Mapping[str, str] | None = None,
        resumable: bool = False,
        rerun: bool = False,
        on_wait: Callable[[], None] | None = None,
        is_intact: Callable[[Path], bool] = lambda folder: not damage(folder),
    ) -> StageResult:
        """Return the complete stage of this spec, running `work` in a partial folder if need be.

        `work` gets the partial folder, and returns the sha256 of those of its files that it has taken. The
        folder is emptied first unless the stage is `resumable`. If `work` fails or is killed the partial
        folder never takes the final name. `rerun` makes it again, and so does a finished one that is not
        what it was when it was made. For `made_from` see `find`.

        Raises:
            StoreError: The folder cannot be written, or what is to be made again is in use.
        """
        folder = self.folder(spec)
        partial = folder.with_name(folder.name + PARTIAL)
        with writing(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(folder.name + ".lock"), on_wait=on_wait):
            if rerun and is_held(folder / MANIFEST):  # nobody comes to hold it while the lock is held
                raise StoreError(
                    f"another build is using {spec.stage} {spec.key}, which `rerun` would make again",
                    hint="run the same command once that build is done",
                )
            with writing(folder.parent):
                _drop_old(folder)
                if not rerun and not self._here(spec, made_from) and _is_complete(partial, made_from or {}):
                    _take_place(partial, folder)  # killed just before that
            found = self._here(spec, made_from)
            if found is None and not rerun:
                found = self._brought(spec, made_from)
            if found and not rerun and is_intact(folder):
                with suppress(OSError):
                    os.utime(found.folder)  # in use: `garbage` leaves it for a day
                return replace(found, in_use=hold(found.folder / MANIFEST))
            with writing(partial):
                if partial.exists() and (rerun or not resumable or (partial / MANIFEST).exists()):
                    shutil.rmtree(partial)
                if self.elsewhere and resumable and not rerun and not partial.exists():
                    self.elsewhere.fetch_partial(spec.stage, spec.key, partial)
                partial.mkdir(exist_ok=True)
                seconds, known = _timed(work, partial)
                sums = _sums_of(partial, known=known)
                _complete(partial, folder, spec=spec, seconds=seconds, sums=sums, made_from=made_from or {})
            if self.elsewhere:
                self.elsewhere.keep(spec.stage, spec.key, folder)
            in_use = hold(folder / MANIFEST)
        return StageResult(spec.key, folder, False, seconds, digest=_digest(sums), in_use=in_use)

    def stages(self) -> Iterator[dict[str, Any]]:
        """Manifests of all complete stages, with `folder` and `size_bytes` added."""
        for manifest in sorted((self.home / "stages").glob(f"*/*/{MANIFEST}")):
            folder = manifest.parent
            value = _manifest_of(folder) if folder.suffix != PARTIAL else None
            if value is not None:
                yield {**value, "folder": folder, "size_bytes": folder_bytes(folder)}


def damage(folder: Path) -> list[str]:
    """Files of a complete stage that have changed since it was made: the manifest, if it has no sums."""
    manifest = _manifest_of(folder) or {}
    return changed_files(folder, manifest["sha256"]) if "sha256" in manifest else [MANIFEST]


def _timed(work: Callable[[Path], Mapping[str, str]], partial: Path) -> tuple[float, Mapping[str, str]]:
    """Run the work; its wall time in seconds adds to that of attempts that were cut short."""
    clock = partial / "seconds"
    before = _seconds_of(clock)
    start = time.monotonic()
    try:
        known = work(partial)
        sync_files(partial)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = no_room(error)
        if reason:
            raise DiskSpaceError(
                f"{reason}, while writing {partial}",
                hint="`factory gc` removes what no build uses; then the same command goes on from here",
            ) from error
        raise
    finally:
        seconds = before + time.monotonic() - start
        with suppress(OSError):  # on a full disk only the time of this attempt is lost
            clock.write_text(f"{seconds:.3f}")
    clock.unlink(missing_ok=True)
    return round(seconds, 3), known


def _seconds_of(clock: Path) -> float:
    """What earlier attempts took; nothing where they were killed before they could say."""
    try:
        return float(clock.read_text())
    except (OSError, ValueError):
        return 0.0


def _sums_of(folder: Path, *, known: Mapping[str, str]) -> dict[str, str]:
    """File name → sha256 of all files below a folder; `known` holds those that were taken already."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    names -= {MANIFEST, MANIFEST + PARTIAL}  # of an attempt that was killed while it wrote the manifest
    return {name: known.get(name) or sha256_of_file(folder / name) for name in sorted(names)}


def _digest(sums: Mapping[str, str]) -> str:
    return hashlib.sha256(canonical_json(dict(sums)).encode()).hexdigest()


def _complete(
    partial: Path,
    folder: Path,
    *,
    spec: StageSpec,
    seconds: float,
    sums: Mapping[str, str],
    made_from: Mapping[str, str],
) -> None:
    """Write the manifest last, sync, and give the folder its final name."""
    manifest = {
        "stage": spec.stage,
        "key": spec.key,
        "version": spec.version,
        "parameters": dict(spec.parameters),
        "inputs": dict(spec.inputs),
        "made_from": dict(made_from),
        "seconds": seconds,
        "files": {name: (partial / name).stat().st_size for name in sums},
        "sha256": dict(sums),
    }
    write_atomically(partial / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    sync_folder(partial)
    _take_place(partial, folder)


def _take_place(whole: Path, folder: Path) -> None:
    """Give a whole folder its final name; what had that name, damaged or made again, goes afterwards.

    A kill in between leaves both, of which `make` takes the whole one.
    """
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}{OLD}-{time.time_ns()}{PARTIAL}"))
    whole.rename(folder)
    sync_folder(folder.parent)
    _drop_old(folder)


def _drop_old(folder: Path) -> None:
    """Remove what had this final name before; what a build still holds is left for later."""
    for old in folder.parent.glob(f"{folder.name}{OLD}-*{PARTIAL}"):
        if not is_held(old / MANIFEST):
            shutil.rmtree(old)


def _is_complete(partial: Path, made_from: Mapping[str, str]) -> bool:
    """Whether a partial folder lacks its final name alone: its manifest is written last."""
    manifest = _manifest_of(partial)
    return manifest is not None and _is_made_from(manifest, made_from) and not damage(partial)


def _is_made_from(manifest: Mapping[str, Any], made_from: Mapping[str, str]) -> bool:
    """Whether none of these stages had another digest when that one was made."""
    were = manifest.get("made_from", {})
    return all(were.get(key, digest) == digest for key, digest in made_from.items())


def _manifest_of(folder: Path) -> dict[str, Any] | None:
    """The manifest of a stage folder; None if it is missing or not what `_complete` writes."""
    try:
        manifest: Any = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    needed = {"stage": str, "key": str, "seconds": int | float, "files": dict}
    if not isinstance(manifest, dict):
        return None
    well_formed = all(isinstance(manifest.get(name), kind) for name, kind in needed.items())
    later = all(isinstance(manifest.get(name, {}), dict) for name in ("sha256", "made_from"))
    return manifest if well_formed and later else None


def _is_whole(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether every file is there with the size that it had when the stage was completed."""
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size_bytes
        for name, size_bytes in manifest["files"].items()
    )
