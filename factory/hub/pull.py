"""Download the files of a resolved source, and verify their checksums."""

import glob
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from huggingface_hub import HfApi, get_cached_repo_tree, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.sha import git_hash
from huggingface_hub.utils.tqdm import tqdm

from factory.artifacts import Source
from factory.checkpoint.adapter import needed_of_adapter
from factory.checkpoint.auxiliary import check_json
from factory.errors import HubError
from factory.hub.client import files_of, hub_api, patiently
from factory.hub.errors import AGAIN, UNREACHABLE, endpoint, hub_errors
from factory.hub.inspect import needed_files, weight_files
from factory.hub.source_card import README
from factory.store.files import sha256_of_file

Progress = Callable[[int, int], None]


def cache_demand(source: Source) -> tuple[Path, str, int]:
    """Return the folder that a pull writes to, the variable that sets it, and the bytes to download."""
    return Path(HF_HUB_CACHE), "HF_HOME", source.download_bytes


def pull(source: Source, *, progress: Progress | None = None) -> Source:
    """Download what a build needs of a source into the Hub's cache, and compare every checksum.

    Never downloaded: pickled weights, GGUF, untrusted code, second copies of the weights. A file that is
    already in the cache is read once for its checksum and not downloaded again.

    Args:
        source: Resolved source; one of a folder is returned unchanged.
        progress: Called with the bytes done and the total bytes.

    Returns:
        The source with `folder` set; of an adapter, the folders of its parts.

    Raises:
        HubError: The Hub cannot be reached or accessed, or a file has the wrong checksum; that file is
            removed from the cache.
        CheckpointError: A JSON file has more parts than any model's.
        DiskSpaceError: The disk is full.
    """
    if unmerged := source.unmerged:
        origin = source.lineage.adapter if source.lineage else None
        folder = unmerged.folder
        if folder is None and origin and origin.repo_id:
            folder = _fetched(origin.repo_id, commit=origin.commit, needed=_needed_of_adapter)
        base = pull(unmerged.base, progress=progress)
        return source.model_copy(
            update={"unmerged": unmerged.model_copy(update={"base": base, "folder": folder})}
        )
    repo_id = source.repo_id
    if repo_id is None:
        return source

    def needed(sizes: Mapping[str, int]) -> set[str]:
        weights = weight_files(repo_id, commit=source.commit, names=sizes)
        return needed_files(sizes, weights, code=source.remote_code)

    folder = _fetched(repo_id, commit=source.commit, needed=needed, progress=progress)
    return source.model_copy(update={"folder": folder})


def tokenizer_folder(source: Source) -> Path | None:
    """Return a folder with a source's configuration and tokenizer; on the Hub, only these are downloaded.

    None for an adapter, whose tokenizer is not beside a configuration until it is merged.

    Raises:
        HubError: As for `pull`.
    """
    if source.repo_id is None or source.folder is not None:
        return source.folder
    return _fetched(source.repo_id, commit=source.commit, needed=lambda sizes: needed_files(sizes, ()))


def _needed_of_adapter(sizes: Mapping[str, int]) -> set[str]:
    return needed_of_adapter(sizes) | ({README} & sizes.keys())


def _fetched(
    repo_id: str,
    *,
    commit: str,
    needed: Callable[[Mapping[str, int]], set[str]],
    progress: Progress | None = None,
) -> Path:
    """Download the needed files of a repository into the Hub's cache, and return their folder.

    Args:
        needed: Function that chooses among the names of the files, with their sizes in bytes.
    """
    with hub_errors(repo_id, revision=commit):
        api = hub_api()
        files = patiently(lambda: _repository_files(api, repo_id, commit=commit))
        sizes = {name: file.size or 0 for name, file in files.items()}
        names = sorted(needed(sizes))
        total = sum(sizes[name] for name in names)
        folder = Path(
            patiently(  # a retry resumes: complete files are not downloaded again
                lambda: snapshot_download(
                    repo_id,
                    revision=commit,
                    allow_patterns=names,
                    tqdm_class=_counting_bar(progress, total=total) if progress else None,
                )
            )
        )
    _check_all_came(folder, names, repo_id=repo_id)
    for name in names:
        _verify(folder / name, files[name], repo_id=repo_id)
        _remove_begun(folder / name)
    check_json(folder, names)
    if progress:
        progress(total, total)
    return folder


def _repository_files(api: HfApi, repo_id: str, *, commit: str) -> dict[str, RepoSibling]:
    """Return the files at a commit; offline, from the cache, without checksums of large files.

    The tree call is avoided: without a connection it retries for 23 s.
    """
    try:
        return files_of(api.model_info(repo_id, revision=commit, files_metadata=True))
    except UNREACHABLE as error:
        try:
            tree = get_cached_repo_tree(repo_id, revision=commit)
        except CachedRepoTreeNotFoundError:
            raise error from None
    return {file.path: RepoSibling(file.path, size=file.size, blob_id=file.blob_id) for file in tree}


def _check_all_came(folder: Path, names: list[str], *, repo_id: str) -> None:
    """Refuse an incomplete snapshot: the client keeps a commit's file list for good, even a short one."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        (folder.parents[1] / "trees" / f"{folder.name}.json").unlink(missing_ok=True)
        raise HubError(
            f"{endpoint()} lists {repo_id} without {missing[0]}",
            hint=f"the list was removed from the cache; check HF_ENDPOINT and proxies, then {AGAIN}",
        )


def _verify(path: Path, file: RepoSibling, *, repo_id: str) -> None:
    """Compare a downloaded file with the Hub's checksum: the client compares only the size."""
    blob = path.resolve()
    if file.lfs or len(blob.name) == 64:  # the cache names a large file by its sha256
        actual, expected = sha256_of_file(path), file.lfs.sha256 if file.lfs else blob.name
    elif path.suffix == ".safetensors":
        return  # offline, in a cache without links: its checksum is unknown
    else:
        actual, expected = git_hash(path.read_bytes()), str(file.blob_id)
    if actual != expected:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise HubError(
            f"{file.rfilename} of {repo_id} arrived damaged: checksum {actual[:12]}…, not {expected[:12]}…",
            hint=f"it was removed from the cache; {AGAIN}",
        )


def _remove_begun(path: Path) -> None:
    """Remove what killed downloads of a file left in the cache: no later attempt resumes from it.

    Each attempt writes its own file, under the lock of the blob, until the blob exists.
    """
    blob = path.resolve()
    for begun in blob.parent.glob(f"{glob.escape(blob.name)}.*.incomplete"):
        begun.unlink(missing_ok=True)


def _counting_bar(progress: Progress, *, total: int) -> type[tqdm]:
    """Return a progress bar class that draws nothing and reports bytes; the client accepts only classes."""
    lock = Lock()
    done = 0

    class CountingBar(tqdm):
        def __init__(self, *args: Any, name: str | None = None, **kwargs: Any) -> None:
            # The client creates three bars: bytes on disk, bytes from the network, files.
            self.counts = name == "huggingface_hub.snapshot_download"
            super().__init__(*args, **kwargs | {"disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal done
            if self.counts:
                with lock:
                    done = min(done + int(n or 0), total)
                    progress(done, total)
            return None

    return CountingBar
