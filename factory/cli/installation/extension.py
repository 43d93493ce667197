"""`factory extension`: let the `hf` command run this program."""

import sysconfig
from pathlib import Path

import click

from factory.cli.click_options import CONTEXT, Command
from factory.errors import StoreError

NAME = "factory"
OWNER = "(installed here)"  # not a valid account name, so that `hf` finds no updates


@click.command("extension", cls=Command, context_settings=CONTEXT)
def extension() -> None:
    """Make `hf factory …` run this program.

    `hf extensions install` would install a second copy with all its libraries; this command registers the
    existing installation. Undo it with `hf extensions remove factory`.
    """
    from datetime import UTC, datetime

    from huggingface_hub.cli.extensions import EXTENSIONS_ROOT, ExtensionManifest

    from factory import __version__

    program = Path(sysconfig.get_path("scripts")) / f"hf-{NAME}"
    if not program.exists() and not program.with_suffix(".exe").exists():
        raise StoreError(f"{program} does not exist", hint="in a clone of the repository: pip install .")
    manifest = ExtensionManifest(
        owner=OWNER,
        repo=f"hf-{NAME}",
        repo_id=f"hf-{NAME} {__version__}",
        short_name=NAME,
        executable_path=str(program if program.exists() else program.with_suffix(".exe")),
        type="python",
        installed_at=datetime.now(UTC),
        description="Make a language model smaller, heal the cut, measure, publish.",
    )
    folder = EXTENSIONS_ROOT.expanduser() / f"hf-{NAME}"
    try:
        manifest.save(folder)
    except OSError as error:
        raise StoreError(f"cannot write to {folder}: {error.strerror}", hint="make it writable") from error
    click.echo(f"hf factory runs {manifest.executable_path}")
