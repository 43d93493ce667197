"""`factory card`: render the card of a finished build again, and look at it."""

from pathlib import Path

import click

from factory.commands.options import CONTEXT, Command, Place, build_folder
from factory.errors import UsageError

PAGE = "card.html"


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("folder", type=Place(), metavar="BUILD")
@click.option("--preview", is_flag=True, help=f"Also write it as a page, BUILD/{PAGE}, and open that.")
@click.option("--no-browser", is_flag=True, help="With --preview: only print where the page is.")
def card(folder: Path, preview: bool, no_browser: bool) -> None:
    """Write the card of a finished BUILD again, from its build.json.

    The card of a build that was published goes on naming its repository; `factory push` puts it there.
    """
    from factory.artifacts import Build, Publication
    from factory.card import write_card

    if no_browser and not preview:
        raise UsageError("--no-browser without --preview", hint="add --preview, or leave it out")
    model = build_folder(folder) / "model"
    known = Publication.read(folder) if (folder / Publication.file_name).is_file() else None
    names = {"repo_id": known.repo_id, "space": known.space} if known else {}
    click.echo(write_card(Build.read(folder), model, **names))
    if not preview:
        return
    from factory.durable import write_atomically
    from factory.webpage import webpage

    write_atomically(folder / PAGE, webpage(model))
    click.echo(folder / PAGE)
    if not no_browser:
        click.launch(str((folder / PAGE).absolute()))
