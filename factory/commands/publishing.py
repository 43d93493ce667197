"""What the commands that publish share: the licence is told before anything goes up."""

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from factory.artifacts import Source

license_option = click.option(
    "--accept-license", is_flag=True, help="Publish although the source's licence forbids to share it."
)


def say_license(source: "Source", *, accepted: bool) -> None:
    """Say, on standard error, what the source's licence asks of whoever publishes; silence if nothing.

    Raises:
        LicenseError: It forbids to share what is made from the model, and nobody accepted that.
    """
    from factory.licenses import check_license, remark

    check_license(source, accepted=accepted)
    told = remark(source)
    if told:
        click.echo(f"note: {told}", err=True)
