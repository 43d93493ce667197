"""Record which stages finished builds use, list both, and remove stages that no build uses."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from factory.artifacts import Build
from factory.builds.swap import leftovers, lock_of, whole_beside
from factory.errors import FactoryError, StoreError
from factory.store.capacity import folder_bytes
from factory.store.files import OLD, write_atomically
from factory.store.locks import is_held, unless_locked, writing
from factory.store.stage import KEY, LOGS, PACES, STAGES
from factory.store.store import MANIFEST, Store

RECENT_SECONDS = 24 * 3600


def register(home: Path, build: Path, keys: Mapping[str, str]) -> None:
    """Record that the build in this folder uses these stages, so that `collect_garbage` keeps them."""
    place = str(build.resolve())
    root = {"build": place, "keys": sorted(keys.values())}
    name = hashlib.sha256(os.fsencode(place)).hexdigest()[:16]
    roots = home / "builds"
    with writing(roots):
        roots.mkdir(parents=True, exist_ok=True)
        write_atomically(roots / f"{name}.json", json.dumps(root))


def registered_builds(home: Path) -> dict[Path, list[str]]:
    """Return registered build folders that still exist, each with the keys of its stages."""
    found = {Path(root["build"]): root["keys"] for root in _roots(home)}
    return {folder: keys for folder, keys in found.items() if (folder / "build.json").is_file()}


def contents(store: Store) -> dict[str, Any]:
    """Return the builds and the finished stages of a store, as `factory ls --json` prints them.

    Sizes are in bytes; times are when something was made, in UTC. A build that cannot be read has no model.
    """
    builds = registered_builds(store.home)
    stages = []
    for manifest in store.stages():
        folder = manifest["folder"]
        stages.append(
            {name: manifest[name] for name in ("stage", "key", "seconds", "size_bytes")}
            | {
                "folder": str(folder),
                "made": _made(folder / MANIFEST),
                "builds": [str(build) for build, keys in builds.items() if manifest["key"] in keys],
            }
        )
    return {
        "home": str(store.home),
        "builds": [_described(folder) for folder in builds],
        "stages": stages,
        "size_bytes": sum(stage["size_bytes"] for stage in stages),
        "unused_bytes": sum(stage["size_bytes"] for stage in stages if not stage["builds"]),
    }


def _described(folder: Path) -> dict[str, Any]:
    try:
        build = Build.read(folder)
    except FactoryError:  # by another version, or damaged: `factory show` says which
        build = None
    return {
        "folder": str(folder),
        "model": build and (build.source.repo_id or build.source.name),
        "dropped": build and list(build.dropped),
        "num_layers": build and build.plan.num_layers,
        "made": _made(folder / Build.file_name),
        "size_bytes": folder_bytes(folder),
    }


def _made(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")


def collect_garbage(home: Path, *, recent: bool = False, dry_run: bool = False) -> Iterator[tuple[Path, int]]:
    """Remove what no build uses and no process is working on; yield each folder with its size in bytes.

    This covers stages, finished or partial, leftovers of interrupted writing beside a build, the times that
    estimates start from, and logs.

    Args:
        recent: Also remove what was made or used within a day, and may still be wanted.
        dry_run: Remove nothing.
    """
    registered, unused = _registered(home), _unused(home)
    for folder, lock in unused:
        try:
            if not recent and abs(time.time() - folder.stat().st_mtime) < RECENT_SECONDS:
                continue
            with unless_locked(lock, passing=True) as free, writing(folder):
                if registered != (registered := _registered(home)):
                    unused = _unused(home)
                if not free or is_held(folder / MANIFEST) or (folder, lock) not in unused:
                    continue  # in use, perhaps by a build registered in the meantime
                size_bytes = folder_bytes(folder)
                if not dry_run:
                    shutil.rmtree(folder)
        except FileNotFoundError:  # renamed or removed in the meantime
            continue
        yield folder, size_bytes


def _registered(home: Path) -> int:
    """Return a number that changes whenever a build is registered."""
    roots = home / "builds"
    return roots.stat().st_mtime_ns if roots.is_dir() else 0


def _unused(home: Path) -> list[tuple[Path, Path]]:
    """Return folders that no finished build uses, each with the lock held by work on it."""
    used = {key for root in _roots(home) for key in root["keys"]}
    found = []
    for folder in sorted((home / "stages").glob("*/*")):
        key = folder.name.partition(".")[0]
        ours = folder.parent.name in STAGES and KEY.fullmatch(key)
        if ours and folder.is_dir() and not folder.is_symlink() and (key not in used or OLD in folder.name):
            found.append((folder, folder.with_name(f"{key}.lock")))
    for path in sorted((home / "builds").glob("*.json")):
        build = Path(_read_root(path)["build"])
        if build.exists() or not whole_beside(build):
            found += [(folder, lock_of(build)) for folder in leftovers(build)]
    beside = [name for name in (PACES, LOGS) if (home / name).is_dir()]
    return found + [(home / name, home / f"{name}.lock") for name in beside]


def _roots(home: Path) -> list[dict[str, Any]]:
    """Read what builds use that are finished, or whose only copy an interrupted swap left beside them."""
    roots = []
    for path in sorted((home / "builds").glob("*.json")):
        root = _read_root(path)
        build = Path(root["build"])
        if (build / "build.json").is_file() or whole_beside(build):
            roots.append(root)
    return roots


def _read_root(path: Path) -> dict[str, Any]:
    """Read what `register` wrote; a damaged file is an error, since ignoring it would cost used stages."""
    try:
        root: Any = json.loads(path.read_text(encoding="utf-8"))
        return {"build": str(root["build"]), "keys": [str(key) for key in root["keys"]]}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StoreError(f"{path} is damaged", hint="delete it, and rerun the builds made here") from error
