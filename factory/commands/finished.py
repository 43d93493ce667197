"""What is done with a finished build: `factory push`, `show` and `space`."""

from pathlib import Path
from typing import Any

import click

from factory.commands.options import CONTEXT, build_folder
from factory.commands.publishing import check_publishable, license_option, publish


@click.command(context_settings=CONTEXT)
@click.argument("folder", type=click.Path(path_type=Path), metavar="BUILD")
@click.argument("repository", required=False, metavar="[OWNER/NAME]")
@click.option("--private/--public", default=True, help="Who can see it.  [default: private]")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--revision", help="Branch to commit to.  [default: main]")
@click.option("--message", help="Commit message.")
@click.option("--force", is_flag=True, help="Also into a repository that holds other content.")
@license_option
def push(folder: Path, repository: str | None, **options: Any) -> None:
    """Publish a finished BUILD on the Hub, in one commit.

    OWNER/NAME is, unless it is given, the source's name and the fraction under your account. The
    repository is private unless --public is said; one that is there already stays as it is.
    """
    from factory.artifacts import Build

    message = options.pop("message") or "Publish a model without some of its layers"
    check_publishable(Build.read(build_folder(folder)).source, accepted=options.pop("accept_license"))
    click.echo(publish(folder, repository, message=message, **options).url)


@click.command(context_settings=CONTEXT)
@click.argument("folder", type=click.Path(path_type=Path), metavar="BUILD")
def show(folder: Path) -> None:
    """Show the result of a finished BUILD again."""
    from factory.artifacts import Build, DistanceProfile
    from factory.plots import terminal_heatmap
    from factory.screen import console, show_result

    found = Build.read(build_folder(folder))
    screen = console()
    profile = DistanceProfile.read(folder)
    screen.print(terminal_heatmap(profile, found.plan, width=min(screen.width, 100)), soft_wrap=True)
    show_result(screen, found, folder=folder, url=None)


@click.command(context_settings=CONTEXT)
@click.argument("folder", type=click.Path(path_type=Path), metavar="BUILD")
@click.option("--port", type=click.IntRange(1, 65535), help="Of the page.  [default: one that is free]")
@click.option(
    "--source", type=click.Path(path_type=Path), help="Folder of the model that BUILD was made from."
)
@click.option("--no-browser", is_flag=True, help="Only print the address.")
def space(folder: Path, port: int | None, source: Path | None, no_browser: bool) -> None:
    """Compare both models of a BUILD side by side, in the browser, without network; Ctrl-C ends it."""
    from factory.space import serve

    def ready(url: str) -> None:
        click.echo(f"{url}  (Ctrl-C ends it)")
        if not no_browser:
            click.launch(url)

    serve(build_folder(folder), source=source, port=port, ready=ready)
