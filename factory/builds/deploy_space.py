"""Create or update the comparison Space of a published build on the Hub."""

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
from factory.builds.space import TERMINAL, check_loadable
from factory.errors import HubError, UsageError
from factory.hub.client import files_of, hub_api, patiently
from factory.hub.errors import endpoint, hub_errors
from factory.hub.push import full_name
from factory.resources import SPACE

USUAL_HARDWARE = "zero-a10g"  # a GPU, and free for two Spaces per account
MARK = "hf-factory"  # tag that marks the factory's Spaces
README = "README.md"
THE_HUBS_OWN = {".gitattributes", README}  # files of every new Space


@dataclass(frozen=True)
class Deployment:
    """Outcome of a deployment."""

    url: str
    changed: bool  # whether the Space or the card changed
    keeps_card: bool  # the card was edited by hand, so it may not link to the Space
    secret_for: tuple[str, ...]  # models that the Space can read only with its own token
    is_hidden: bool  # the Space is private although the model is public


def deploy(folder: Path, *, name: str | None, hardware: str | None) -> Deployment:
    """Put the comparison page of a published build on the Hub, and link it from the model's card.

    The order is Space, card, then the Space's variables, which name the card's commit; the files come last
    and in one commit, so that the Space starts once, with everything it needs. Files already there are not
    sent again. The Space of a private model is made private, even later; a private Space of a public model
    stays private, since its owner may want that.

    Args:
        folder: Build folder.
        name: `owner/name` of the Space; None keeps its name, or uses the model's name plus `-compare`.
        hardware: The Hub's hardware name; None keeps the present hardware, or uses ZeroGPU for a new Space.

    Raises:
        UsageError: The source is not on the Hub.
        ModelError: The models need their own code.
        HubError: The build was not published, or the Hub refused a request.
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
        build,
        folder,
        published.repo_id,
        before=published,
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
    """Return the files of a Space: the comparison page, with a README that names the two models."""
    paths = [path for path in sorted(SPACE.glob("[!.]*")) if path.is_file() and path.name != TERMINAL]
    files = {path.name: path.read_bytes() for path in paths}
    _, front, body = files[README].decode().split("---\n", 2)
    fields = yaml.safe_load(front) | {
        "title": f"{build.source.name} and {publication.repo_id.split('/')[-1]}",
        "models": [build.source.repo_id, publication.repo_id],
        "tags": [MARK],
    }
    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    return files | {README: f"---\n{text}---\n{body}".encode()}


def _publication(folder: Path) -> Publication:
    found = Publication.find(folder)
    if found is None:
        raise HubError(
            f"{folder} has not been published, but a Space loads its models from the Hub",
            hint=f"factory push {folder}",
        )
    return found


def _source_on_the_hub(build: Build) -> str:
    if build.source.repo_id is None:
        raise UsageError(
            f"a Space cannot load the source of {build.name}, {build.source.name!r}: it is not on the Hub",
            hint="publish the source and build from there; without `deploy` the page runs on this machine",
        )
    check_loadable(build)
    return build.source.repo_id


def _model_with_this_build(api: HfApi, folder: Path, published: Publication) -> ModelInfo:
    """Return the published repository, which must still contain this very build."""
    repo_id = published.repo_id
    with hub_errors(repo_id):
        info = patiently(lambda: api.model_info(repo_id))
        found = patiently(lambda: api.get_paths_info(repo_id, [Build.file_name], revision=info.sha))
    here = git_hash((folder / "model" / Build.file_name).read_bytes())
    if not any(isinstance(file, RepoFile) and file.blob_id == here for file in found):
        raise HubError(
            f"the main branch of {repo_id} does not contain this build",
            hint=f"factory push {folder} {repo_id}",
        )
    return info


def _open_space(api: HfApi, repo_id: str, *, private: bool, hardware: str | None) -> tuple[SpaceInfo, bool]:
    """Return the Space on the requested hardware, created if need be, and whether anything changed."""
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
        api.request_space_hardware(repo_id, cast(SpaceHardware, hardware))  # the Hub may offer newer kinds
        return info, True


def _check_ours(info: SpaceInfo) -> None:
    """Refuse a Space that was made for something else."""
    others = files_of(info).keys() - THE_HUBS_OWN
    tags = (info.card_data.get("tags") or ()) if info.card_data else ()
    if others and MARK not in tags:
        raise HubError(
            f"the Space {info.id} has other files: {', '.join(sorted(others)[:3])}",
            hint="nothing was deployed; choose another name with `deploy=OWNER/NAME`",
        )


@contextmanager
def _payment_explained(repo_id: str, hardware: str) -> Iterator[None]:
    """Explain a 402 (payment required), and name the alternatives."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code != 402:
            raise
        free = f"`hardware={USUAL_HARDWARE}` is free for two Spaces per account"
        if hardware == USUAL_HARDWARE:
            free = "an account without PRO may have two Spaces on ZeroGPU: delete one"
        raise HubError(
            f"the Hub requires payment to run {repo_id} on {hardware} (402): {error.server_message}",
            hint=f"{free}, or see {endpoint()}/pricing; without `deploy` the same page runs on this machine",
        ) from error


def _set_variables(api: HfApi, repo_id: str, variables: dict[str, str]) -> bool:
    """Set missing or differing variables, each of which restarts a running Space; return whether any did."""
    present = patiently(lambda: api.get_space_variables(repo_id))
    differing = {
        key: value for key, value in variables.items() if key not in present or present[key].value != value
    }
    for key, value in differing.items():
        api.add_space_variable(repo_id, key, value)
    return bool(differing)


def _commit(api: HfApi, space: SpaceInfo, files: dict[str, bytes]) -> bool:
    """Commit missing or differing files to the Space in one commit; return whether there were any."""
    entries = api.list_repo_tree(space.id, repo_type="space", revision=space.sha)
    present = {entry.path: entry.blob_id for entry in entries if isinstance(entry, RepoFile)}
    differing = [name for name, content in files.items() if present.get(name) != git_hash(content)]
    if differing:
        api.create_commit(
            space.id,
            [CommitOperationAdd(name, files[name]) for name in differing],
            repo_type="space",
            commit_message="Compare a model with its pruned copy",
            parent_commit=space.sha,
        )
    return bool(differing)
