"""What is kept between builds: `factory ls` and `gc`."""

from pathlib import Path

import click

from factory.commands.options import CONTEXT, Command, home_option


@click.command("ls", cls=Command, context_settings=CONTEXT)
@home_option
def list_stages(home: Path | None) -> None:
    """List finished stages and the builds that use them."""
    from factory.screen import console, show_stages
    from factory.store import Store, default_home

    store = Store((home or default_home()).absolute())
    show_stages(console(), list(store.stages()), store.builds())


@click.command("gc", cls=Command, context_settings=CONTEXT)
@home_option
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option("--all", "recent", is_flag=True, help="Also what was made or used within a day.")
def collect_garbage(home: Path | None, dry_run: bool, recent: bool) -> None:
    """Remove stages that no build uses and what killed runs left behind, once they are a day old."""
    from factory.disk import size
    from factory.screen import printable
    from factory.store import Store, default_home

    store = Store((home or default_home()).absolute())
    freed = 0
    for folder, size_bytes in store.collect_garbage(recent=recent, dry_run=dry_run):
        freed += size_bytes
        click.echo(printable(f"{'would remove' if dry_run else 'removed'} {folder}"))
    click.echo(f"{size(freed)} {'could be' if dry_run else ''} freed".replace("  ", " "))
