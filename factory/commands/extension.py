"""`factory extension`: the Hub's own command line runs this one, as `hf factory`."""

import sysconfig
from pathlib import Path

import click

from factory.commands.options import CONTEXT, Command
from factory.errors import StoreError

NAME = "factory"
NOBODY = "(installed here)"  # where `hf` looks for updates; no account can be called so


@click.command("extension", cls=Command, context_settings=CONTEXT)
def extension() -> None:
    """Let the Hub's command line run this program: `hf factory build …`.

    `hf extensions install` would install it a second time, with all its libraries; this names the
    installation that there is. `hf extensions remove factory` forgets it.
    """
    from datetime import UTC, datetime

    from huggingface_hub.cli.extensions import EXTENSIONS_ROOT, ExtensionManifest

    from factory import __version__

    program = Path(sysconfig.get_path("scripts")) / f"hf-{NAME}"
    if not program.exists() and not program.with_suffix(".exe").exists():
        raise StoreError(f"there is no {program}", hint="pip install hf-factory")
    manifest = ExtensionManifest(
        owner=NOBODY,
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
