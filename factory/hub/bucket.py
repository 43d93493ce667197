"""Stages kept on the Hub as well, in a private bucket, so that another machine can go on from them."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import BucketFile, HfApi
from huggingface_hub.errors import BucketNotFoundError

from factory.errors import HubError
from factory.hub.client import hub_api, patiently
from factory.hub.errors import hub_errors
from factory.store.files import PARTIAL
from factory.store.stage import STAGES
from factory.store.store import MANIFEST

WHOLE = "whole.json"  # of a partial stage: which copy of it was uploaded completely
Listing = dict[str, tuple[int, int]]  # name → bytes, nanoseconds of its last change


@dataclass(frozen=True)
class StageBucket:
    """A bucket that holds stages under `stages/`, as a home does, and unfinished ones under `partial/`.

    A bucket takes files one by one, so whatever says that a folder is complete goes up last: the manifest
    of a stage; for an unfinished one, the name of the last copy of it that was uploaded whole.

    Args:
        remark: Told in a line what could not be kept: a build goes on without.
    """

    bucket_id: str  # owner/name
    remark: Callable[[str], None]
    kept: dict[Path, Listing] = field(default_factory=dict)  # by partial folder, as it was last uploaded

    def fetch(self, stage: str, key: str, folder: Path) -> bool:
        """Download a complete stage into a folder; False if there is none.

        Raises:
            HubError: No access, no connection.
        """
        place = f"stages/{stage}/{key}"
        with hub_errors(self.bucket_id):
            files = self._files(place)
            if MANIFEST not in files:
                return False
            self._download(files, folder)
        return True

    def keep(self, stage: str, key: str, folder: Path) -> None:
        """Upload a complete stage, and forget what was kept of it while it was unfinished."""
        place = f"stages/{stage}/{key}"
        with self._remarking(f"{stage} {key}"):
            api = hub_api()
            before = list(self._files(place))
            if MANIFEST in before:  # made again: until it is whole, there is none
                api.batch_bucket_files(self.bucket_id, delete=[f"{place}/{MANIFEST}"])
            names = [name for name in _listing(folder, stage) if name != MANIFEST]
            api.batch_bucket_files(self.bucket_id, add=[(folder / n, f"{place}/{n}") for n in names])
            api.batch_bucket_files(self.bucket_id, add=[(folder / MANIFEST, f"{place}/{MANIFEST}")])
            stale = [f"{place}/{name}" for name in before if name not in (*names, MANIFEST)]
            unfinished = f"partial/{stage}/{key}"
            self._delete(api, [*stale, *(f"{unfinished}/{name}" for name in self._files(unfinished))])

    def fetch_partial(self, stage: str, key: str, folder: Path) -> None:
        """Download the last whole copy of an unfinished stage into a new folder; nothing if there is none.

        Raises:
            HubError: No access, no connection.
        """
        place = f"partial/{stage}/{key}"
        with hub_errors(self.bucket_id):
            files = self._files(place)
            if WHOLE not in files:
                return
            # Beside it until it is whole: half a copy would count as something to resume from.
            coming = folder.with_name(f"{folder.stem}.coming{PARTIAL}")
            shutil.rmtree(coming, ignore_errors=True)
            coming.mkdir(parents=True)
            self._download({WHOLE: files[WHOLE]}, coming)
            copy = json.loads((coming / WHOLE).read_text())["copy"]
            (coming / WHOLE).unlink()
            inside = {n.removeprefix(f"{copy}/"): f for n, f in files.items() if n.startswith(f"{copy}/")}
            self._download(inside, coming)
            coming.rename(folder)
        self.kept[folder] = _listing(folder, stage)

    def keep_partial(self, stage: str, key: str, folder: Path) -> None:
        """Upload what an unfinished stage would resume from, if that has changed.

        A copy during which a file changed is not used: it would be none that any moment has seen.
        """
        listing = _listing(folder, stage)
        if not listing or self.kept.get(folder) == listing:
            return
        place, copy = f"partial/{stage}/{key}", f"{time.time_ns():x}"
        with self._remarking(f"{stage} {key}"):
            api = hub_api()
            before = list(self._files(place))
            api.batch_bucket_files(
                self.bucket_id, add=[(folder / name, f"{place}/{copy}/{name}") for name in listing]
            )
            if _listing(folder, stage) != listing:
                stale = [f"{copy}/{name}" for name in listing]
            else:
                whole = json.dumps({"copy": copy}).encode()
                api.batch_bucket_files(self.bucket_id, add=[(whole, f"{place}/{WHOLE}")])
                stale = [name for name in before if name != WHOLE]
                self.kept[folder] = listing
            self._delete(api, [f"{place}/{name}" for name in stale])

    def _files(self, place: str) -> dict[str, BucketFile]:
        """What lies below a place, by its name from there; the Hub's prefix may end within a name."""
        found = patiently(
            lambda: list(hub_api().list_bucket_tree(self.bucket_id, prefix=f"{place}/", recursive=True))
        )
        files = [item for item in found if isinstance(item, BucketFile) and item.path.startswith(f"{place}/")]
        return {file.path.removeprefix(f"{place}/"): file for file in files}

    def _download(self, files: dict[str, BucketFile], folder: Path) -> None:
        for name in files:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise HubError(f"{self.bucket_id} has a file named {name!r}", hint="use another bucket")
        pairs: list[tuple[str | BucketFile, str | Path]] = [
            (file, folder / name) for name, file in files.items()
        ]
        patiently(lambda: hub_api().download_bucket_files(self.bucket_id, pairs))

    def _delete(self, api: HfApi, paths: list[str]) -> None:
        if paths:
            api.batch_bucket_files(self.bucket_id, delete=paths)

    @contextmanager
    def _remarking(self, what: str) -> Iterator[None]:
        """What cannot be kept costs time later, not the build now."""
        try:
            with hub_errors(self.bucket_id, writing=True):
                yield
        except HubError as error:
            self.remark(f"{what} was not kept in {self.bucket_id}: {error.message}")
        except FileNotFoundError as error:
            self.remark(f"{what} was not kept in {self.bucket_id}: {error}")


def open_bucket(bucket_id: str, *, remark: Callable[[str], None]) -> StageBucket:
    """The bucket of that name, made private if it is new.

    Raises:
        HubError: No login, no access, or a bucket that everybody can read.
    """
    with hub_errors(bucket_id, writing=True):
        api = hub_api()
        api.create_bucket(bucket_id, private=True, exist_ok=True)
    look_at_bucket(bucket_id)
    return StageBucket(bucket_id, remark)


def look_at_bucket(bucket_id: str) -> None:
    """Refuse a bucket that cannot hold stages, and make none: one that is not there yet can.

    Raises:
        HubError: No login, no access, or a bucket that everybody can read.
    """
    with hub_errors(bucket_id):
        try:
            info: Any = patiently(lambda: hub_api().bucket_info(bucket_id))
        except BucketNotFoundError:
            return
    if not info.private:
        raise HubError(
            f"the bucket {bucket_id} is public", hint="make it private, or give another one: stages hold text"
        )


def _listing(folder: Path, stage: str) -> Listing:
    """Files of a stage folder; not those that are being written, as their names say, nor local ones."""
    found, local = {}, STAGES[stage].local
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not path.name.endswith(PARTIAL) and name.parts[0] not in local:
            state = path.stat()
            found[name.as_posix()] = (state.st_size, state.st_mtime_ns)
    return found
