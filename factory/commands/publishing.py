"""What the commands that publish share: what would be wrong to publish is told before anything goes up."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from factory.errors import ModelError

if TYPE_CHECKING:
    from factory.artifacts import Publication, Source

license_option = click.option(
    "--accept-license", is_flag=True, help="Publish although the source's licence forbids to share it."
)


def check_publishable(source: "Source", *, accepted: bool) -> None:
    """Refuse what may not, or could not, be published; say on standard error what the licence asks for.

    Args:
        accepted: The user says that they may share what the licence forbids to share.

    Raises:
        LicenseError: It forbids to share what is made from the model.
        ModelError: The result needs code that is nowhere on the Hub.
    """
    from factory.licenses import check_license, remark
    from factory.screen import printable

    if source.remote_code and not source.repo_id:
        raise ModelError(
            f"what is made from the folder {source.name!r} needs its code, which is not on the Hub",
            hint="publish the source with its code first, and build from there",
        )
    check_license(source, accepted=accepted)
    told = remark(source)
    if told:
        click.echo(f"note: {printable(told)}", err=True)


def publish(folder: Path, repository: str | None, **options: Any) -> "Publication":
    """Publish a finished build; say on standard error if its card is not the one that would be written.

    Args:
        repository: `owner/name`, or None for the usual one.
        options: Of `pipeline.publish`.
    """
    from factory import pipeline
    from factory.artifacts import Publication
    from factory.screen import printable

    before = Publication.read(folder) if (folder / Publication.file_name).is_file() else None
    publication, is_edited = pipeline.publish(folder, repository, **options)
    if publication == before:
        click.echo("note: it was up to date", err=True)
    if is_edited:
        told = "the edited card was kept; its model id may be stale"
        click.echo(f"note: {told} (`factory card {printable(str(folder))}` writes it anew)", err=True)
    return publication
