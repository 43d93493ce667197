"""Make, find and resume stage folders, with locks and manifests. A folder with its final name is complete."""

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
FETCHED = ".fetched"  # before PARTIAL: being fetched from elsewhere


def home_folder(given: Path | None = None) -> Path:
    """Return the given folder, `$FACTORY_HOME`, or the platform's user cache directory, as absolute."""
    usual = os.environ.get("FACTORY_HOME") or platformdirs.user_cache_dir("factory")
    return (given or Path(usual)).absolute()


@dataclass(frozen=True)
class StageResult:
    """A complete stage folder."""

    key: str
    folder: Path
    reused: bool
    seconds: float  # wall time of making it, over all attempts
    digest: str = ""  # of its files: equal bytes, equal digest
    in_use: IO[bytes] | None = None  # while this is open, `factory gc` keeps the folder


class Elsewhere(Protocol):
    """A second place that keeps stages, so that another machine can resume from them."""

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
        """Return the folder of a complete stage of this spec, whether it exists or not."""
        return self.home / "stages" / spec.stage / spec.key

    def find(self, spec: StageSpec, *, made_from: Mapping[str, str] | None = None) -> StageResult | None:
        """Return the complete stage of this spec, fetched from elsewhere if need be, or None.

        Args:
            made_from: Key → digest of its input stages. A stage made from other bytes under these keys
                counts as missing: not every stage produces the same bytes when made again.
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
        """Return the complete stage of this spec on this machine; None if files have other sizes."""
        folder = self.folder(spec)
        manifest = _manifest_of(folder)
        if manifest is None or not _is_whole(folder, manifest):
            return None
        if not _is_made_from(manifest, made_from or {}):
            return None
        seconds, digest = manifest["seconds"], _digest(manifest.get("sha256", {}))
        return StageResult(spec.key, folder, reused=True, seconds=seconds, digest=digest)

    def _brought(self, spec: StageSpec, made_from: Mapping[str, str] | None) -> StageResult | None:
        """Fetch the complete stage of this spec from elsewhere; None if it is missing or damaged there."""
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
            _take_place(arriving, folder)  # an existing folder is damaged, or it would have been found
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

        `work` gets the partial folder, which is emptied first unless the stage is `resumable`, and returns
        the checksums that it has already computed. If `work` fails or is killed, the partial folder never
        gets the final name. A finished stage is made again with `rerun`, or if it has changed since. For
        `made_from` see `find`.

        Raises:
            StoreError: The folder cannot be written, or the stage to make again is in use.
        """
        folder = self.folder(spec)
        partial = folder.with_name(folder.name + PARTIAL)
        with writing(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(folder.name + ".lock"), on_wait=on_wait):
            if rerun and is_held(folder / MANIFEST):  # nothing else can hold it while we have the lock
                raise StoreError(
                    f"another build is using {spec.stage} {spec.key}, which `rerun` would make again",
                    hint="run the same command when that build is done",
                )
            with writing(folder.parent):
                _drop_old(folder)
                if not rerun and not self._here(spec, made_from) and _is_complete(partial, made_from or {}):
                    _take_place(partial, folder)  # an earlier run was killed just before this step
            found = self._here(spec, made_from)
            if found is None and not rerun:
                found = self._brought(spec, made_from)
            if found and not rerun and is_intact(folder):
                with suppress(OSError):
                    os.utime(found.folder)  # `garbage` keeps it for another day
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
        """Yield the manifests of all complete stages, with `folder` and `size_bytes` added."""
        for manifest in sorted((self.home / "stages").glob(f"*/*/{MANIFEST}")):
            folder = manifest.parent
            value = _manifest_of(folder) if folder.suffix != PARTIAL else None
            if value is not None:
                yield {**value, "folder": folder, "size_bytes": folder_bytes(folder)}


def damage(folder: Path) -> list[str]:
    """List the files of a stage that have changed since it was made; the manifest, if it has no checksums."""
    manifest = _manifest_of(folder) or {}
    return changed_files(folder, manifest["sha256"]) if "sha256" in manifest else [MANIFEST]


def _timed(work: Callable[[Path], Mapping[str, str]], partial: Path) -> tuple[float, Mapping[str, str]]:
    """Run the work, and return its wall time, including interrupted attempts, and checksums."""
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
                hint="`factory gc` removes unused stages; then the same command resumes from here",
            ) from error
        raise
    finally:
        seconds = before + time.monotonic() - start
        with suppress(OSError):  # on a full disk, only the time of this attempt is lost
            clock.write_text(f"{seconds:.3f}")
    clock.unlink(missing_ok=True)
    return round(seconds, 3), known


def _seconds_of(clock: Path) -> float:
    """Return the wall time of earlier attempts; 0 if they were killed before writing it."""
    try:
        return float(clock.read_text())
    except (OSError, ValueError):
        return 0.0


def _sums_of(folder: Path, *, known: Mapping[str, str]) -> dict[str, str]:
    """Return the sha256 of all files below a folder by name; `known` holds those already computed."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    names -= {MANIFEST, MANIFEST + PARTIAL}  # left if an attempt was killed while writing the manifest
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
    """Give a complete folder its final name, then remove the damaged or outdated folder that had it.

    A kill in between leaves both; `make` takes the complete one.
    """
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}{OLD}-{time.time_ns()}{PARTIAL}"))
    whole.rename(folder)
    sync_folder(folder.parent)
    _drop_old(folder)


def _drop_old(folder: Path) -> None:
    """Remove folders that had this final name before, except those that a build still uses."""
    for old in folder.parent.glob(f"{folder.name}{OLD}-*{PARTIAL}"):
        if not is_held(old / MANIFEST):
            shutil.rmtree(old)


def _is_complete(partial: Path, made_from: Mapping[str, str]) -> bool:
    """Return whether a partial folder lacks only its final name: its manifest is written last."""
    manifest = _manifest_of(partial)
    return manifest is not None and _is_made_from(manifest, made_from) and not damage(partial)


def _is_made_from(manifest: Mapping[str, Any], made_from: Mapping[str, str]) -> bool:
    """Return whether none of these stages had another digest when that one was made."""
    were = manifest.get("made_from", {})
    return all(were.get(key, digest) == digest for key, digest in made_from.items())


def _manifest_of(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a stage folder; None if it is missing or malformed."""
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
    """Return whether every file exists with the size that it had when the stage was completed."""
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size_bytes
        for name, size_bytes in manifest["files"].items()
    )
