"""Publish a build: name the repository on its card, then upload everything in one commit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from factory.artifacts import Build, Publication, Source
from factory.errors import ModelError


def publish(
    build: Build,
    folder: Path,
    repository: str | None,
    *,
    before: Publication | None,
    space: str | None = None,
    **options: Any,
) -> tuple[Publication, bool]:
    """Publish a finished build: name the repository on its card, then upload everything in one commit.

    A card edited by hand is published unchanged.

    Args:
        folder: Folder of the build.
        repository: `owner/name`; None uses the build's name in the account that is logged in.
        before: Its last publication.
        space: Comparison Space that the card links to; None keeps the present link, if any.
        options: Keyword arguments of `hub.push`.

    Returns:
        The record of the publication, and whether the card was edited by hand.
    """
    from factory.builds.integrity import check_nothing_added, check_whole
    from factory.hub.push import full_name, label, push
    from factory.report.card import renewed_card

    check_nothing_added(folder)
    check_whole(build, folder)
    repo_id = full_name(build.name if repository is None else repository)
    pull_request = None
    if before and before.repo_id == repo_id:
        space, pull_request = space or before.space, before.pull_request
    with renewed_card(build, folder / "model", repo_id=repo_id, space=space) as is_edited:
        pushed = push(
            folder / "model", repo_id=repo_id, pull_request=pull_request, named=label(build), **options
        )
    publication = pushed.model_copy(update={"space": space})
    publication.write(folder)
    return publication, is_edited


def publish_with_notes(
    folder: Path,
    repository: str | None,
    *,
    note: Callable[[str], None],
    accept_license: bool | None = None,
    message: str | None = None,
    **options: Any,
) -> Publication:
    """Publish a finished build, and note what its licence asks and what differs from a first publication.

    Args:
        note: Receives each note.
        accept_license: See `check_publishable`; None if that has been called.
        message: Commit message; None names the build and its weights.
        options: Passed on to `publish`.
    """
    from factory.hub.push import label

    build = Build.read(folder)
    if accept_license is not None and (limits := check_publishable(build.source, accepted=accept_license)):
        note(limits)
    options["message"] = message or f"Publish {label(build)}"
    before = Publication.find(folder)
    publication, is_edited = publish(build, folder, repository, before=before, **options)
    if publication == before:
        note("already up to date")
    if is_edited:
        note(f"the edited card was kept; its model id may be stale (`factory card {folder}` rewrites it)")
    return publication


def check_publishable(source: Source, *, accepted: bool) -> str | None:
    """Refuse a result that may not, or cannot, be published.

    Args:
        accepted: Whether the user claims permission to share derived models that the licence forbids.

    Returns:
        A note on the licence's conditions, if it has any.

    Raises:
        LicenseError: The licence forbids sharing derived models.
        ModelError: The result needs code that is not on the Hub.
    """
    from factory.hub.source_card import check_license, remark

    if source.remote_code and not source.repo_id:
        raise ModelError(
            f"models derived from the folder {source.name!r} need its code, which is not on the Hub",
            hint="publish the source with its code first, and build from there",
        )
    check_license(source, accepted=accepted)
    return remark(source)
