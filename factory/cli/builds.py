"""Commands on finished builds: show, verify, push, export, space, card, ls, gc."""

import logging
import sys
from pathlib import Path
from typing import Any

import click
from annotated_types import Ge

from factory.cli.click_options import CONTEXT, Command, Number, Place, Whole, home_option
from factory.cli.console import print_json, remark
from factory.cli.log import WORK
from factory.config.references import build_folder
from factory.errors import UsageError

LOG = logging.getLogger(__name__)
USUAL_NAME = "~/"  # stands for --deploy without a name; not a valid repository name
license_option = click.option(
    "--accept-license",
    is_flag=True,
    help="Publish even if the source's licence forbids sharing derived models.",
)


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("folder", type=Place(), metavar="BUILD")
@click.argument("repository", required=False, metavar="[OWNER/NAME]")
@click.option("--private/--public", default=True, help="Visibility of the repository.  [default: private]")
@click.option("--create-pr", is_flag=True, help="Open a pull request, or update yours.")
@click.option("--revision", metavar="BRANCH", help="Branch to commit to.  [default: main]")
@click.option("--message", help="Commit message.")
@click.option("--force", is_flag=True, help="Publish even if the repository holds other content.")
@license_option
def push(folder: Path, repository: str | None, **options: Any) -> None:
    """Publish a finished build on the Hub.

    BUILD is published in one commit. OWNER/NAME defaults to the source's name and the fraction, under your
    account. A new repository is private unless --public is given; an existing one keeps its visibility.
    """
    from factory.cli.console import StageLines, console

    build_folder(folder)
    with StageLines(console(stderr=True)).busy("publish"):
        from factory.builds.publish import publish_with_notes

        published = publish_with_notes(folder, repository, note=remark, **options)
    LOG.info("published: %s", published.url, extra=WORK)
    click.echo(published.url)


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("folder", type=Place(), metavar="BUILD")
@click.option(
    "--gguf",
    "kind",
    is_flag=False,
    flag_value="Q8_0",
    required=True,
    metavar="[TYPE]",
    help="Write a GGUF: Q8_0, Q4_K_M or F16.  [default type: Q8_0]",
)
@click.option(
    "--converter",
    type=Place(),
    metavar="FILE",
    envvar="FACTORY_CONVERTER",
    help="llama.cpp's convert_hf_to_gguf.py, for other families.  [default: one on PATH]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def export(folder: Path, kind: str, converter: Path | None, as_json: bool) -> None:
    """Write a GGUF, for llama.cpp and Ollama.

    BUILD is the folder of a build, or one that `factory prune` made. The file is written beside its weights,
    with a Modelfile for Ollama, and named on the card; `factory push` publishes it with them. It is kept only
    if llama.cpp computes the same from it as transformers from the weights, within what its type rounds.
    """
    from factory.cli.console import StageLines, console

    reporter = StageLines(console(stderr=as_json))
    with reporter.busy("prepare"):
        from factory.builds.export import export as write
        from factory.cli.tables import show_exported

        exported = write(folder, kind=kind, converter=converter, reporter=reporter)
    if as_json:
        print_json(exported.record.model_dump(mode="json") | {"path": str(exported.path)})
    else:
        show_exported(reporter.out, exported)


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("folder", type=Place(), metavar="BUILD")
@click.option("--json", "as_json", is_flag=True, help="Print the build's record as JSON.")
def show(folder: Path, as_json: bool) -> None:
    """Show the result of a finished build again."""
    from factory.artifacts import BUILD_AGAIN, Build, DistanceProfile
    from factory.cli.console import console
    from factory.cli.tables import show_result
    from factory.report.figures import terminal_heatmap

    found = Build.read(build_folder(folder))
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        screen = console()
        profile = DistanceProfile.read(folder, again=BUILD_AGAIN)
        heatmap = terminal_heatmap(profile, found.plan, width=min(screen.width, 100))
        screen.print(heatmap, soft_wrap=True)
        show_result(screen, found, folder=folder, url=None)


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("folder", type=Place(), metavar="BUILD")
@home_option
@click.option("--accept", is_flag=True, help="Accept the files as they are now: the changes are yours.")
def verify(folder: Path, home: Path | None, accept: bool) -> None:
    """Compare a build's files with their checksums.

    The files of the stages that BUILD was made from are compared as well. The card may be edited; changed
    weights are never accepted, not even with --accept.
    """
    from factory.artifacts import Build
    from factory.builds.integrity import accept as take
    from factory.builds.integrity import changed_in, check_all
    from factory.cli.console import console
    from factory.cli.tables import show_verified
    from factory.store.store import Store, home_folder

    build = Build.read(build_folder(folder))
    if accept:
        take(build, folder)
    found = changed_in(build, folder, store=Store(home_folder(home)))
    show_verified(console(), found)
    check_all(found)


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("folder", type=Place(), metavar="BUILD")
@click.option("--port", type=Whole(1, 65535), metavar="N", help="Port of the page.  [default: a free one]")
@click.option("--source", type=Place(), metavar="FOLDER", help="Folder of the source model.")
@click.option("--no-browser", is_flag=True, help="Print the address without opening a browser.")
@click.option(
    "--deploy",
    is_flag=False,
    flag_value=USUAL_NAME,
    metavar="[OWNER/NAME]",
    help="Deploy the page to the Hub as a Space.  [default name: the model's and -compare]",
)
@click.option("--hardware", metavar="NAME", help="Hardware of the Space.  [default: zero-a10g for a new one]")
def space(folder: Path, deploy: str | None, hardware: str | None, **options: Any) -> None:
    """Compare source and result in the browser.

    Both models of BUILD answer the same prompt side by side, without a network. Ctrl-C stops the page.

    With --deploy, the page is created or updated on the Hub instead; BUILD must have been pushed, and its
    source must be on the Hub.
    """
    build_folder(folder)
    if deploy is not None:
        if any(options.values()):
            raise UsageError(
                "--deploy runs nothing on this machine", hint="remove all options but --hardware"
            )
        deploy_space(folder, name=None if deploy == USUAL_NAME else deploy, hardware=hardware)
    elif hardware is not None:
        raise UsageError("--hardware without --deploy", hint="add --deploy, or remove --hardware")
    else:
        serve_page(folder, **options)


def serve_page(folder: Path, *, port: int | None, source: Path | None, no_browser: bool) -> None:
    """Serve the page on this machine until it is interrupted."""
    from factory.builds.space import serve
    from factory.cli.console import StageLines, console

    reporter = StageLines(console(stderr=True))

    def ready(url: str) -> None:
        reporter.stop()
        LOG.info("serving: %s", url, extra=WORK)
        click.echo(f"{url}  (Ctrl-C stops it)")
        if not no_browser:
            click.launch(url)

    with reporter.busy("load both models"):
        serve(folder, source=source, port=port, ready=ready)


def deploy_space(folder: Path, *, name: str | None, hardware: str | None) -> None:
    """Deploy the page, and print its address, and on standard error what is left to do."""
    from factory.cli.console import StageLines, console, printable

    with StageLines(console(stderr=True)).busy("deploy"):
        from factory.builds.deploy_space import deploy

        deployed = deploy(folder, name=name, hardware=hardware)
    LOG.info("deployed: %s", deployed.url, extra=WORK)
    if not deployed.changed:
        click.echo("note: already up to date", err=True)
    if deployed.keeps_card:
        click.echo("note: the edited card was kept; link the Space from it yourself", err=True)
    if deployed.is_hidden:
        message = f"the Space is private, its model public: {deployed.url}/settings makes it public"
        click.echo(f"note: {message}", err=True)
    if deployed.secret_for:
        models = printable(" and ".join(deployed.secret_for))
        message = f"not everyone may read {models}: give the Space a secret HF_TOKEN that may"
        click.echo(f"note: {message}, at {deployed.url}/settings", err=True)
    click.echo(deployed.url)


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("folder", type=Place(), metavar="BUILD")
@click.option("--source", type=Place(), metavar="FOLDER", help="Folder of the source model.")
@click.option(
    "--max-tokens",
    type=Whole(1, 100_000),
    default=256,
    metavar="N",
    help="Most tokens of an answer.  [default: 256]",
)
@click.option(
    "--temperature",
    type=Number(Ge(0)),
    default=0.7,
    metavar="T",
    help="Of sampling; 0 takes the likeliest token.  [default: 0.7]",
)
def chat(folder: Path, **options: Any) -> None:
    """Talk to source and result in the terminal.

    Both models of BUILD answer each line, one after the other, without a network. A base model continues
    the line instead.
    """
    build_folder(folder)
    if sys.stderr.isatty():
        click.echo("loading both models", err=True)
    from factory.builds.space import talk

    talk(folder, **options)


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("folder", type=Place(), metavar="BUILD")
def card(folder: Path) -> None:
    """Write the card of a finished build again.

    It is written from BUILD's build.json. The card of a published build still names its repository;
    `factory push` uploads it.
    """
    from factory.artifacts import Build, Publication
    from factory.report.card import write_card

    model = build_folder(folder) / "model"
    known = Publication.find(folder)
    names = {"repo_id": known.repo_id, "space": known.space} if known else {}
    click.echo(write_card(Build.read(folder), model, **names))


@click.command("ls", cls=Command, context_settings=CONTEXT)
@home_option
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def list_stages(home: Path | None, as_json: bool) -> None:
    """List builds, finished stages and their sizes."""
    from factory.builds.garbage import contents
    from factory.cli.console import console
    from factory.cli.tables import show_contents
    from factory.store.store import Store, home_folder

    found = contents(Store(home_folder(home)))
    if as_json:
        print_json(found)
    else:
        show_contents(console(), found)


@click.command("gc", cls=Command, context_settings=CONTEXT)
@home_option
@click.option("--dry-run", is_flag=True, help="List what would be removed and stop.")
@click.option("--all", "recent", is_flag=True, help="Include what was made or used within the last day.")
@click.option("--json", "as_json", is_flag=True, help="Print the folders as JSON.")
def collect_garbage(home: Path | None, dry_run: bool, recent: bool, as_json: bool) -> None:
    """Remove stages that no build uses.

    What killed runs left behind is removed as well. Anything less than a day old is kept, unless --all is
    given.
    """
    from factory.builds import garbage
    from factory.cli.console import printable
    from factory.store.store import home_folder
    from factory.units import size

    home = home_folder(home)
    folders: list[dict[str, Any]] = []
    for folder, size_bytes in garbage.collect_garbage(home, recent=recent, dry_run=dry_run):
        folders.append({"folder": str(folder), "size_bytes": size_bytes})
        if not as_json:
            click.echo(printable(f"{'would remove' if dry_run else 'removed'} {folder}"))
    freed = sum(one["size_bytes"] for one in folders)
    if as_json:
        print_json({"dry_run": dry_run, "folders": folders, "freed_bytes": freed})
    else:
        click.echo(f"{size(freed)} could be freed" if dry_run else f"{size(freed)} freed")
