"""Publish a folder in one commit that holds everything, or not at all."""

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import CommitInfo, ModelInfo, RepoFile
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from huggingface_hub.utils.sha import git_hash

from factory.artifacts import Build, Publication, canonical_json
from factory.checkpoint.read import WEIGHTS
from factory.config.references import HUB_NAME
from factory.errors import HubError, UsageError
from factory.hub.client import account_name, hub_api, patiently
from factory.hub.errors import AGAIN, CLIENT_ERRORS, endpoint, explain, hub_errors, is_unknown, not_logged_in
from factory.hub.source_card import README
from factory.store.files import sha256_once, visible_files

THE_HUBS_OWN = {".gitattributes"}  # created with every repository


def label(build: Build) -> str:
    """Return the build's name and a short hash of its weights: other settings can give the same name."""
    return f"{build.name} {sha256(canonical_json(build.files).encode()).hexdigest()[:8]}"


def full_name(repo_id: str) -> str:
    """Return `owner/name`; the owner of `name` and `~/name` is the account that is logged in.

    Raises:
        HubError: The name is invalid, the user is not logged in, or the Hub cannot be reached.
    """
    owner, _, name = repo_id.rpartition("/")
    is_own = "/" not in repo_id or owner == "~"
    _check_name(repo_id, f"{'me' if is_own else owner}/{name}")
    if get_token() is None:
        raise not_logged_in()
    if not is_own:
        return repo_id
    with hub_errors(repo_id, writing=True):
        return f"{account_name()}/{name}"


def _check_name(given: str, repo_id: str) -> None:
    """Refuse, before anything is written, a name that the Hub would refuse."""
    try:
        validate_repo_id(repo_id)
        valid = bool(HUB_NAME.fullmatch(repo_id))
    except HFValidationError:
        valid = False
    if not valid:
        raise HubError(
            f"{given[:200]!r} is not a repository name",
            hint="give owner/name: letters, digits and - _ . between them, 96 characters at most",
        )


def push(
    folder: Path,
    *,
    repo_id: str,
    private: bool = True,
    revision: str | None = None,
    create_pr: bool = False,
    pull_request: int | None = None,
    message: str,
    named: str = "",
    force: bool = False,
) -> Publication:
    """Publish a folder exactly as it is, in one commit, and compare it with what the Hub then holds.

    The card is checked before the first byte is uploaded. Files that the Hub already has are not sent again;
    if it has all of them, nothing is committed. Weight files of an earlier build that this one lacks are
    deleted in the same commit; in a repository that the factory did not create, nothing is deleted.

    Args:
        folder: A build's `model/`.
        repo_id: `owner/name`; `name` and `~/name` mean the account that is logged in.
        private: Make a new repository private; if an existing one is public, refuse it.
        revision: Branch to commit to, created from `main` if it is new; None: `main`.
        create_pr: Propose the commit as a pull request, or add it to your own one that is still open.
        pull_request: Number of the pull request that an earlier push opened.
        message: Commit message; a pull request with this title also counts as one of an earlier push.
        named: Text that such a title must contain.
        force: Overwrite a repository that the factory did not create.

    Raises:
        HubError: The Hub refused something; either everything was published or nothing.
        UsageError: A pull request was requested for another branch than main.
    """
    if create_pr and revision not in (None, "main"):
        raise UsageError(
            f"a pull request goes to main, not to {revision!r}", hint="remove `revision` or `create_pr`"
        )
    repo_id = full_name(repo_id)
    api = hub_api()
    _check_card(folder, repo_id=repo_id)
    local = _local_files(folder)
    with hub_errors(repo_id, revision=revision, writing=True):
        info, new_branch = _open_repository(api, repo_id, private=private, revision=revision)
        target = _Target(revision, str(info.sha), _remote_files(api, repo_id, commit=str(info.sha)))
        others = _others_files(target.files, repo_id=repo_id, commit=target.head)
        if others:
            _check_others(others, local, repo_id=repo_id, accepted=force or create_pr)
        if private and not info.private:
            raise _public(repo_id, create_pr=create_pr)
        if new_branch:
            api.create_branch(repo_id, branch=new_branch, revision=target.head)
        theirs = target.files.keys() if others else ()
        if create_pr:
            target = _pull_request(api, repo_id, target, known=pull_request, title=message, named=named)
    changed = _differing(folder, local, target.files)
    stale = [n for n in target.files if _is_weight(n) and n not in local and n not in theirs]
    commit, number = target.head, target.pull_request
    if stale or changed:
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, folder / name) for name in changed),
            *(CommitOperationDelete(name) for name in stale),
        ]
        request = {
            "commit_message": message,
            "revision": target.revision,
            "create_pr": create_pr and number is None,
            "parent_commit": target.head,
        }
        commit, opened = _commit(api, repo_id, operations, request, folder=folder, local=local)
        number = opened or number
    page = f"{endpoint()}/{repo_id}"
    return Publication(
        repo_id=repo_id,
        url=f"{page}/discussions/{number}" if number else page,
        commit=commit,
        private=bool(info.private),
        files=local,
        pull_request=number,
    )


@dataclass(frozen=True)
class _Target:
    """The branch or pull request that a commit goes to, as it is now."""

    revision: str | None  # branch, or ref of a pull request; None: main
    head: str
    files: dict[str, RepoFile]
    pull_request: int | None = None


def _public(repo_id: str, *, create_pr: bool) -> HubError:
    shown = ", so what is proposed there would be public, too" if create_pr else ""
    return HubError(
        f"{repo_id} already exists and is public{shown}",
        hint="nothing was published; add `public` to publish there, or choose another name",
    )


def _check_card(folder: Path, *, repo_id: str) -> None:
    """Have the Hub check the card's front matter, which it would otherwise refuse after the upload."""
    path = folder / README
    if not path.is_file():
        raise HubError(f"{folder} has no {README}", hint="publish the model folder of a finished build")
    try:
        card = ModelCard.load(path)
        with hub_errors(repo_id, writing=True):
            patiently(card.validate)
    except (ValueError, yaml.YAMLError) as error:
        raise HubError(
            f"the Hub refuses the card {path}: {_reasons(str(error))}",
            hint="nothing was published; correct the card",
        ) from error


def _reasons(body: str) -> str:
    """Return the Hub's objections to a card in one line."""
    try:
        errors = json.loads(body)["errors"]
        return "; ".join(str(error["message"]) for error in errors)
    except (ValueError, KeyError, TypeError):
        return body.splitlines()[0] if body else "no reason given"


def _local_files(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below the folder, except hidden ones."""
    return {path.relative_to(folder).as_posix(): sha256_once(path) for path in visible_files(folder)}


def _open_repository(
    api: HfApi, repo_id: str, *, private: bool, revision: str | None
) -> tuple[ModelInfo, str | None]:
    """Return the repository, created if it is new, at the commit to build on, and the branch to create."""
    try:
        info = patiently(lambda: api.model_info(repo_id))
    except RepositoryNotFoundError:
        info = None
    if info is None:  # `exist_ok` would hide that it was created in between, and fails on some 409 answers
        api.create_repo(repo_id, private=private)
        info = patiently(lambda: api.model_info(repo_id))
    if revision is None:
        return info, None
    try:
        return patiently(lambda: api.model_info(repo_id, revision=revision)), None
    except RevisionNotFoundError:
        return info, revision


def _pull_request(
    api: HfApi, repo_id: str, target: _Target, *, known: int | None, title: str, named: str
) -> _Target:
    """Return the account's still open pull request from an earlier push, or `target` if there is none.

    It is the recorded one or, as a record can be lost, the latest one with this title that names the build.
    """
    author = patiently(lambda: api.whoami(cache=True))["name"]
    found = patiently(
        lambda: list(
            api.get_repo_discussions(
                repo_id, author=author, discussion_type="pull_request", discussion_status="open"
            )
        )
    )
    numbers = [each.num for each in found if each.num == known or (each.title == title and named in title)]
    if not numbers:
        return target
    number = known if known in numbers else max(numbers)
    revision = f"refs/pr/{number}"
    head = str(patiently(lambda: api.model_info(repo_id, revision=revision)).sha)
    return _Target(revision, head, _remote_files(api, repo_id, commit=head), number)


def _remote_files(api: HfApi, repo_id: str, *, commit: str) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(repo_id, revision=commit, recursive=True)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _others_files(remote: dict[str, RepoFile], *, repo_id: str, commit: str) -> list[str]:
    """Return the files of a repository that the factory did not create; none if it is empty or a build's."""
    if Build.file_name in remote:
        path = Path(hf_hub_download(repo_id, Build.file_name, revision=commit))
        try:
            value: Any = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and "factory_version" in value:
            return []
    return sorted(remote.keys() - THE_HUBS_OWN)


def _check_others(others: list[str], local: dict[str, str], *, repo_id: str, accepted: bool) -> None:
    """Refuse other content in a repository unless accepted, or if it would be loaded instead of the build."""
    if not accepted:
        raise HubError(
            f"{repo_id} has content that is not from a build: "
            f"{', '.join(others[:3])}{', …' * (len(others) > 3)}",
            hint="nothing was published; choose another name, add `create_pr`, or overwrite it with `force`",
        )
    if WEIGHTS in others and WEIGHTS not in local:
        raise HubError(
            f"{repo_id} has its own {WEIGHTS}, which would be loaded instead of the build's shards",
            hint="nothing was published; choose another name, or remove that file first",
        )


def _is_weight(name: str) -> bool:
    return "/" not in name and name.endswith((".safetensors", ".safetensors.index.json", ".gguf"))


def _differing(folder: Path, local: dict[str, str], remote: dict[str, RepoFile]) -> list[str]:
    """Return the local files that the Hub lacks or holds with other content."""
    return [
        name
        for name, digest in local.items()
        if name not in remote or not _is_same(folder / name, digest, remote[name])
    ]


def _is_same(path: Path, digest: str, file: RepoFile) -> bool:
    if file.lfs:
        return file.lfs.sha256 == digest
    return file.size == path.stat().st_size and file.blob_id == git_hash(path.read_bytes())


def _commit(
    api: HfApi,
    repo_id: str,
    operations: list[CommitOperationAdd | CommitOperationDelete],
    request: dict[str, Any],
    *,
    folder: Path,
    local: dict[str, str],
) -> tuple[str, int | None]:
    """Make the commit and compare every file with what the Hub then holds.

    Returns:
        The commit's hash, and the number of the pull request if it opened one.
    """
    opened = None
    try:
        made: CommitInfo = api.create_commit(repo_id, operations, **request)
        commit, opened = made.oid, made.pr_num
    except CLIENT_ERRORS as error:
        # The commit may have succeeded although the answer was lost.
        landed = is_unknown(error) and _landed(api, repo_id, request, folder=folder, local=local)
        if not landed:
            explained = explain(error, repo_id=repo_id, revision=request["revision"], writing=True)
            if explained is None:
                raise
            raise explained from error
        commit = landed
    try:
        remote = _remote_files(api, repo_id, commit=commit)
    except CLIENT_ERRORS as error:
        raise HubError(
            f"{repo_id} was published as {commit[:12]}, but could not be read back from the Hub",
            hint=f"{AGAIN}: it compares the files and uploads nothing twice",
        ) from error
    for name, digest in local.items():
        if name not in remote or not _is_same(folder / name, digest, remote[name]):
            raise HubError(
                f"{name} on {repo_id} at {commit[:12]} is not what was uploaded",
                hint=f"{AGAIN}; if it happens twice, report it",
            )
    return commit, opened


def _landed(
    api: HfApi, repo_id: str, request: dict[str, Any], *, folder: Path, local: dict[str, str]
) -> str | None:
    """Return the head of the branch if it holds every local file; None if it does not.

    Raises:
        HubError: The state of the repository cannot be determined.
    """
    page = f"{endpoint()}/{repo_id}"
    if request["create_pr"]:
        raise HubError(
            f"the connection was lost while a pull request to {repo_id} was being sent",
            hint=f"look at {page}/discussions, or {AGAIN}: it continues the one that is open there",
        )
    try:
        head = str(patiently(lambda: api.model_info(repo_id, revision=request["revision"])).sha)
        return None if _differing(folder, local, _remote_files(api, repo_id, commit=head)) else head
    except CLIENT_ERRORS as error:
        raise HubError(
            f"the connection to the Hub was lost; whether {repo_id} was published is unknown",
            hint=f"check the network and {AGAIN}: it publishes what is missing, once",
        ) from error
