"""Publishing a build: its card names the repository, then everything goes up in one commit."""

from pathlib import Path
from typing import Any

from factory.artifacts import Build, Publication, Source
from factory.errors import ModelError


def publish(
    folder: Path, repository: str | None, *, space: str | None = None, **options: Any
) -> tuple[Publication, bool]:
    """Publish a finished build: its card names the repository, then everything goes up in one commit.

    A card that somebody has edited is published as it is.

    Args:
        folder: The build.
        repository: `owner/name`; None: the build's name, under who is logged in.
        space: The comparison Space that the card links to; None: the one it links to already, if any.
        options: Of `hub.push`.

    Returns:
        What lies on the Hub, and whether the card is an edited one.
    """
    from factory.builds.integrity import check_nothing_added, check_whole
    from factory.hub.push import full_name, label, push
    from factory.report.card import renewed_card

    build = Build.read(folder)
    check_nothing_added(folder)
    check_whole(build, folder)
    repo_id = full_name(build.name if repository is None else repository)
    known = Publication.read(folder) if (folder / Publication.file_name).is_file() else None
    pull_request = None
    if known and known.repo_id == repo_id:
        space, pull_request = space or known.space, known.pull_request
    with renewed_card(build, folder / "model", repo_id=repo_id, space=space) as is_edited:
        pushed = push(
            folder / "model", repo_id=repo_id, pull_request=pull_request, named=label(build), **options
        )
    publication = pushed.model_copy(update={"space": space})
    publication.write(folder)
    return publication, is_edited


def check_publishable(source: Source, *, accepted: bool) -> str | None:
    """Refuse what may not, or could not, be published.

    Args:
        accepted: The user says that they may share what the licence forbids sharing.

    Returns:
        What the licence asks for, where that is worth a note.

    Raises:
        LicenseError: The licence forbids sharing what is made from the model.
        ModelError: The result needs code that is not on the Hub.
    """
    from factory.hub.source_card import check_license, remark

    if source.remote_code and not source.repo_id:
        raise ModelError(
            f"what is made from the folder {source.name!r} needs its code, which is not on the Hub",
            hint="publish the source with its code first, and build from there",
        )
    check_license(source, accepted=accepted)
    return remark(source)
