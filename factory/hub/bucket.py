"""Keep stages in a private Hub bucket as well, so that another machine can resume from them."""

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

WHOLE = "whole.json"  # names the copy of a partial stage that was uploaded completely
Listing = dict[str, tuple[int, int]]  # name → bytes, nanoseconds of its last change


@dataclass(frozen=True)
class StageBucket:
    """A bucket that holds stages under `stages/`, as a home does, and unfinished ones under `partial/`.

    A bucket takes files one by one, so the file that marks a folder as complete is uploaded last: the
    manifest of a stage, or `WHOLE` for an unfinished one.

    Args:
        remark: Called with one line about what could not be kept; the build continues without it.
    """

    bucket_id: str  # owner/name
    remark: Callable[[str], None]
    kept: dict[Path, Listing] = field(default_factory=dict)  # partial folder → its files as last uploaded

    def fetch(self, stage: str, key: str, folder: Path) -> bool:
        """Download a complete stage into a folder; return False if there is none.

        Raises:
            HubError: The bucket cannot be accessed or reached.
        """
        place = f"stages/{stage}/{key}"
        with hub_errors(self.bucket_id):
            files = self._files(place)
            if MANIFEST not in files:
                return False
            self._download(files, folder)
        return True

    def keep(self, stage: str, key: str, folder: Path) -> None:
        """Upload a complete stage, and delete what was kept of it while it was unfinished."""
        place = f"stages/{stage}/{key}"
        with self._remarking(f"{stage} {key}"):
            api = hub_api()
            before = list(self._files(place))
            if MANIFEST in before:  # a rerun: the stage must count as missing until its upload is complete
                api.batch_bucket_files(self.bucket_id, delete=[f"{place}/{MANIFEST}"])
            names = [name for name in _listing(folder, stage) if name != MANIFEST]
            api.batch_bucket_files(self.bucket_id, add=[(folder / n, f"{place}/{n}") for n in names])
            api.batch_bucket_files(self.bucket_id, add=[(folder / MANIFEST, f"{place}/{MANIFEST}")])
            stale = [f"{place}/{name}" for name in before if name not in (*names, MANIFEST)]
            unfinished = f"partial/{stage}/{key}"
            self._delete(api, [*stale, *(f"{unfinished}/{name}" for name in self._files(unfinished))])

    def fetch_partial(self, stage: str, key: str, folder: Path) -> None:
        """Download the last complete copy of an unfinished stage, if there is one, into a new folder.

        Raises:
            HubError: The bucket cannot be accessed or reached.
        """
        place = f"partial/{stage}/{key}"
        with hub_errors(self.bucket_id):
            files = self._files(place)
            if WHOLE not in files:
                return
            # Under another name until complete: a build would resume from half a copy.
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
        """Upload the files that an unfinished stage would resume from, if they have changed.

        A copy is discarded if a file changed during the upload: it would mix two states.
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
        """Return the files in a folder of the bucket by relative name; the Hub's prefix may end mid-name."""
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
        """Report a failed upload and carry on: it costs time later, not this build."""
        try:
            with hub_errors(self.bucket_id, writing=True):
                yield
        except HubError as error:
            self.remark(f"{what} was not kept in {self.bucket_id}: {error.message}")
        except FileNotFoundError as error:
            self.remark(f"{what} was not kept in {self.bucket_id}: {error}")


def open_bucket(bucket_id: str, *, remark: Callable[[str], None]) -> StageBucket:
    """Open a bucket, creating a private one if it is new.

    Raises:
        HubError: The user is not logged in or has no access, or the bucket is public.
    """
    with hub_errors(bucket_id, writing=True):
        api = hub_api()
        api.create_bucket(bucket_id, private=True, exist_ok=True)
    look_at_bucket(bucket_id)
    return StageBucket(bucket_id, remark)


def look_at_bucket(bucket_id: str) -> None:
    """Refuse a bucket that cannot hold stages; one that does not exist yet is accepted, not created.

    Raises:
        HubError: The user is not logged in or has no access, or the bucket is public.
    """
    with hub_errors(bucket_id):
        try:
            info: Any = patiently(lambda: hub_api().bucket_info(bucket_id))
        except BucketNotFoundError:
            return
    if not info.private:
        raise HubError(
            f"the bucket {bucket_id} is public", hint="make it private, or use another: stages contain text"
        )


def _listing(folder: Path, stage: str) -> Listing:
    """List the files of a stage folder, except local ones and those still being written."""
    found, local = {}, STAGES[stage].local
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not path.name.endswith(PARTIAL) and name.parts[0] not in local:
            state = path.stat()
            found[name.as_posix()] = (state.st_size, state.st_mtime_ns)
    return found
