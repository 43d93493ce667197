"""Record which stages finished builds use, and remove those that no build uses."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from factory.builds.swap import leftovers, lock_of, whole_beside
from factory.errors import StoreError
from factory.store.capacity import folder_bytes
from factory.store.files import OLD, write_atomically
from factory.store.locks import is_held, unless_locked, writing
from factory.store.stage import KEY, STAGES
from factory.store.store import MANIFEST

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


def registered_builds(home: Path) -> list[Path]:
    """Return registered build folders that still exist."""
    folders = [Path(root["build"]) for root in _roots(home)]
    return [folder for folder in folders if (folder / "build.json").is_file()]


def collect_garbage(home: Path, *, recent: bool = False, dry_run: bool = False) -> Iterator[tuple[Path, int]]:
    """Remove what no build uses and no process is working on; yield each folder with its size in bytes.

    This covers stages, finished or partial, and leftovers of interrupted writing beside a build.

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
    return found


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
