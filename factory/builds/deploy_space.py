"""Deploy: the comparison Space of a published build, made or brought up to date on the Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, SpaceHardware
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo, RepoFile, SpaceInfo
from huggingface_hub.utils.sha import git_hash

from factory.artifacts import Build, Publication
from factory.builds.publish import publish
from factory.builds.space import check_loadable
from factory.errors import HubError, UsageError
from factory.hub.client import files_of, hub_api, patiently
from factory.hub.errors import endpoint, hub_errors
from factory.hub.push import full_name
from factory.resources import SPACE

USUAL_HARDWARE = "zero-a10g"  # a GPU, and free for two Spaces of any account
MARK = "hf-factory"  # the tag by which a Space that the factory made is known
README = "README.md"
THE_HUBS_OWN = {".gitattributes", README}  # comes with every new Space


@dataclass(frozen=True)
class Deployment:
    """What came of it."""

    url: str
    changed: bool  # the Space or the card
    keeps_card: bool  # somebody has edited the card, so that it may not link to the Space
    secret_for: tuple[str, ...]  # models that the Space can only read with a token of its own
    is_hidden: bool  # the Space is private, though the model is public


def deploy(folder: Path, *, name: str | None, hardware: str | None) -> Deployment:
    """Put the comparison page of a published build on the Hub, and link it from the model's card.

    First the Space, then the card, then the Space's variables, since these name the card's commit; the
    files come last and in one commit, so that the Space starts once, with everything it needs. What is
    there already is not sent again. The Space of a private model is made private, also later; one that is
    private beside a public model stays so, since its owner may want it.

    Args:
        folder: A build folder.
        name: `owner/name` of the Space; None: the one it has, or the model's name and `-compare`.
        hardware: The Hub's name for it; None: what the Space has, for a new one ZeroGPU.

    Raises:
        UsageError: The source is not on the Hub.
        ModelError: The models need code of their own.
        HubError: The build was not published, or the Hub refused something.
    """
    build = Build.read(folder)
    source, published = _source_on_the_hub(build), _publication(folder)
    repo_id = full_name(name or published.space or f"{published.repo_id}-compare")
    api = hub_api()
    model = _model_with_this_build(api, folder, published)
    with hub_errors(source, revision=build.source.commit):
        origin = patiently(lambda: api.model_info(source, revision=build.source.commit))
    space, changed = _open_space(api, repo_id, private=bool(model.private), hardware=hardware)
    publication, keeps_card = publish(
        folder,
        published.repo_id,
        space=repo_id,
        private=bool(model.private),
        message="Link the comparison Space",
    )
    variables = {
        "SOURCE_MODEL": source,
        "SOURCE_REVISION": build.source.commit,
        "PRUNED_MODEL": publication.repo_id,
        "PRUNED_REVISION": publication.commit,
    }
    with hub_errors(repo_id, writing=True):
        changed |= _set_variables(api, repo_id, variables)
        changed |= _commit(api, space, space_files(build, publication))
        closed = [repo for repo, info in ((source, origin), (model.id, model)) if info.private or info.gated]
        has_token = bool(closed) and "HF_TOKEN" in patiently(lambda: api.get_space_secrets(repo_id))
    return Deployment(
        url=f"{endpoint()}/spaces/{repo_id}",
        changed=changed or publication.commit != published.commit,
        keeps_card=keeps_card,
        secret_for=() if has_token else tuple(closed),
        is_hidden=bool(space.private) and not model.private,
    )


def space_files(build: Build, publication: Publication) -> dict[str, bytes]:
    """The files of a Space: those of the comparison page, with a README that names its two models."""
    files = {path.name: path.read_bytes() for path in sorted(SPACE.glob("[!.]*")) if path.is_file()}
    _, front, body = files[README].decode().split("---\n", 2)
    fields = yaml.safe_load(front) | {
        "title": f"{build.source.name} and {publication.repo_id.split('/')[-1]}",
        "models": [build.source.repo_id, publication.repo_id],
        "tags": [MARK],
    }
    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    return files | {README: f"---\n{text}---\n{body}".encode()}


def _publication(folder: Path) -> Publication:
    if not (folder / Publication.file_name).is_file():
        raise HubError(
            f"{folder} has not been published, and a Space loads its models from the Hub",
            hint=f"factory push {folder}",
        )
    return Publication.read(folder)


def _source_on_the_hub(build: Build) -> str:
    if build.source.repo_id is None:
        raise UsageError(
            f"{build.name} was made from {build.source.name!r}, which is not on the Hub: "
            "a Space could not load it",
            hint="publish the source and build from there; without `deploy` the page runs on this machine",
        )
    check_loadable(build)
    return build.source.repo_id


def _model_with_this_build(api: HfApi, folder: Path, published: Publication) -> ModelInfo:
    """The published repository, which must still hold this very build."""
    repo_id = published.repo_id
    with hub_errors(repo_id):
        info = patiently(lambda: api.model_info(repo_id))
        found = patiently(lambda: api.get_paths_info(repo_id, [Build.file_name], revision=info.sha))
    here = git_hash((folder / "model" / Build.file_name).read_bytes())
    if not any(isinstance(file, RepoFile) and file.blob_id == here for file in found):
        raise HubError(
            f"the main branch of {repo_id} does not hold this build", hint=f"factory push {folder} {repo_id}"
        )
    return info


def _open_space(api: HfApi, repo_id: str, *, private: bool, hardware: str | None) -> tuple[SpaceInfo, bool]:
    """The Space on the hardware that was asked for, made if it is new; and whether that changed anything."""
    with hub_errors(repo_id, writing=True), _payment_explained(repo_id, hardware or USUAL_HARDWARE):
        try:
            info = patiently(lambda: api.space_info(repo_id))
        except RepositoryNotFoundError:
            info = None
        if info is None:
            options: dict[str, Any] = {"space_sdk": "gradio", "space_hardware": hardware or USUAL_HARDWARE}
            api.create_repo(repo_id, repo_type="space", private=private, **options)
            return patiently(lambda: api.space_info(repo_id)), True
        _check_ours(info)
        is_open = private and not info.private
        if is_open:
            api.update_repo_settings(repo_id, repo_type="space", private=True)
        if hardware is None:
            return info, is_open
        if patiently(lambda: api.get_space_runtime(repo_id)).requested_hardware == hardware:
            return info, is_open
        api.request_space_hardware(repo_id, cast(SpaceHardware, hardware))  # the Hub may know more of them
        return info, True


def _check_ours(info: SpaceInfo) -> None:
    """Refuse a Space that somebody made for something else."""
    others = files_of(info).keys() - THE_HUBS_OWN
    tags = (info.card_data.get("tags") or ()) if info.card_data else ()
    if others and MARK not in tags:
        raise HubError(
            f"the Space {info.id} holds something else: {', '.join(sorted(others)[:3])}",
            hint="nothing was deployed; choose another name with `deploy=OWNER/NAME`",
        )


@contextmanager
def _payment_explained(repo_id: str, hardware: str) -> Iterator[None]:
    """Say what a 402 means here, and what else is possible."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code != 402:
            raise
        free = f"`hardware={USUAL_HARDWARE}` is free for two Spaces of any account"
        if hardware == USUAL_HARDWARE:
            free = "without PRO an account may have two Spaces on ZeroGPU: delete one"
        raise HubError(
            f"the Hub asks for money to run {repo_id} on {hardware} (402): {error.server_message}",
            hint=f"{free}, or see {endpoint()}/pricing; without `deploy` the same page runs on this machine",
        ) from error


def _set_variables(api: HfApi, repo_id: str, variables: dict[str, str]) -> bool:
    """Set those that are missing or differ, each of which restarts a running Space; whether any did."""
    there = patiently(lambda: api.get_space_variables(repo_id))
    differing = {
        key: value for key, value in variables.items() if key not in there or there[key].value != value
    }
    for key, value in differing.items():
        api.add_space_variable(repo_id, key, value)
    return bool(differing)


def _commit(api: HfApi, space: SpaceInfo, files: dict[str, bytes]) -> bool:
    """Commit the files that the Space does not hold with this content, at once; whether there were any."""
    entries = api.list_repo_tree(space.id, repo_type="space", revision=space.sha)
    there = {entry.path: entry.blob_id for entry in entries if isinstance(entry, RepoFile)}
    differing = [name for name, content in files.items() if there.get(name) != git_hash(content)]
    if differing:
        api.create_commit(
            space.id,
            [CommitOperationAdd(name, files[name]) for name in differing],
            repo_type="space",
            commit_message="Compare a model with its pruned copy",
            parent_commit=space.sha,
        )
    return bool(differing)
