"""What is done with a finished build: `factory push`, `show`, `verify` and `space`."""

from pathlib import Path
from typing import Any

import click

from factory.commands.options import CONTEXT, Command, Place, build_folder, home_option
from factory.commands.publishing import check_publishable, license_option, publish
from factory.errors import UsageError

USUAL_NAME = "~/"  # no name that anybody can give: --deploy without one


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("folder", type=Place(), metavar="BUILD")
@click.argument("repository", required=False, metavar="[OWNER/NAME]")
@click.option("--private/--public", default=True, help="Who can see it.  [default: private]")
@click.option("--create-pr", is_flag=True, help="Propose it: open a pull request, or update yours.")
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
    from factory.publish import label

    build = Build.read(build_folder(folder))
    message = options.pop("message") or f"Publish {label(build)}"
    check_publishable(build.source, accepted=options.pop("accept_license"))
    click.echo(publish(folder, repository, message=message, **options).url)


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("folder", type=Place(), metavar="BUILD")
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


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("folder", type=Place(), metavar="BUILD")
@home_option
@click.option("--accept", is_flag=True, help="Take the files as they are now: you changed them yourself.")
def verify(folder: Path, home: Path | None, accept: bool) -> None:
    """Compare every file of a BUILD, and of the stages that it was made from, with its checksum.

    The card may be edited; the weights may not, also with --accept.
    """
    from factory.artifacts import Build
    from factory.layout import accept as take
    from factory.screen import console, show_verified
    from factory.store import Store, default_home
    from factory.verify import changed_in, check_all

    build = Build.read(build_folder(folder))
    if accept:
        take(build, folder)
    found = changed_in(build, folder, store=Store((home or default_home()).absolute()))
    show_verified(console(), found)
    check_all(found)


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("folder", type=Place(), metavar="BUILD")
@click.option("--port", type=click.IntRange(1, 65535), help="Of the page.  [default: one that is free]")
@click.option("--source", type=Place(), help="Folder of the model that BUILD was made from.")
@click.option("--no-browser", is_flag=True, help="Only print the address.")
@click.option(
    "--deploy",
    is_flag=False,
    flag_value=USUAL_NAME,
    metavar="[OWNER/NAME]",
    help="Put the page on the Hub, as a Space.  [default: the model's name and -compare]",
)
@click.option("--hardware", help="Of the Space.  [default: zero-a10g for a new one]")
def space(folder: Path, deploy: str | None, hardware: str | None, **options: Any) -> None:
    """Compare both models of a BUILD side by side, in the browser, without network; Ctrl-C ends it.

    With --deploy the page goes to the Hub instead, or is brought up to date there; BUILD must have been
    pushed, and its source must be on the Hub.
    """
    build_folder(folder)
    if deploy is not None:
        if any(options.values()):
            raise UsageError("--deploy runs nothing on this machine", hint="leave out all but --hardware")
        deploy_space(folder, name=None if deploy == USUAL_NAME else deploy, hardware=hardware)
    elif hardware is not None:
        raise UsageError("--hardware without --deploy", hint="add --deploy, or leave it out")
    else:
        serve_page(folder, **options)


def serve_page(folder: Path, *, port: int | None, source: Path | None, no_browser: bool) -> None:
    """Run the page here until it is interrupted."""
    from factory.space import serve

    def ready(url: str) -> None:
        click.echo(f"{url}  (Ctrl-C ends it)")
        if not no_browser:
            click.launch(url)

    serve(folder, source=source, port=port, ready=ready)


def deploy_space(folder: Path, *, name: str | None, hardware: str | None) -> None:
    """Deploy the page; print its address, and on standard error what is left to do."""
    from factory.deploy import deploy
    from factory.screen import printable

    deployed = deploy(folder, name=name, hardware=hardware)
    if not deployed.changed:
        click.echo("note: it was up to date", err=True)
    if deployed.keeps_card:
        click.echo("note: the edited card was kept; link the Space from it yourself", err=True)
    if deployed.is_hidden:
        told = f"the Space is private, the model public: {deployed.url}/settings makes it public"
        click.echo(f"note: {told}", err=True)
    if deployed.secret_for:
        models = printable(" and ".join(deployed.secret_for))
        told = f"not everybody may read {models}: give the Space a secret HF_TOKEN that may"
        click.echo(f"note: {told}, at {deployed.url}/settings", err=True)
    click.echo(deployed.url)
