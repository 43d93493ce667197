"""`factory completion`: let the shell complete commands, options and models."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import click
from click.shell_completion import get_completion_class

from factory.cli.click_options import CONTEXT, Command
from factory.errors import StoreError, UsageError

Shell = Literal["bash", "zsh", "fish"]
SHELLS: tuple[Shell, ...] = get_args(Shell)
PROGRAM, VARIABLE = "factory", "_FACTORY_COMPLETE"
# zsh completes nothing before its `compinit` has run; most configurations run it.
ZSH_FIRST = "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }\n"


@dataclass(frozen=True)
class Places:
    """Where a shell looks for completions."""

    script: Path
    startup: Path | None  # file that must source the script; None: the shell finds it by itself


@click.command(cls=Command, context_settings=CONTEXT)
@click.option("--shell", type=click.Choice(SHELLS), help="Shell to complete in.  [default: by $SHELL]")
@click.option("--install", is_flag=True, help="Install the script for new shells of this account.")
@click.pass_context
def completion(context: click.Context, shell: Shell | None, install: bool) -> None:
    """Complete commands and options in the shell.

    Prints the script that the shell needs. With --install, the script is written to a file of this account,
    which the startup file of bash or zsh then reads; each changed file is named.
    """
    shell = shell or _own_shell()
    script = _script(context.find_root().command, shell)
    if not install:
        click.echo(script, nl=False)
        return
    places = _places(shell)
    changed = []
    try:
        if _replace(places.script, script):
            changed.append(f"wrote {places.script}")
        if places.startup and _append(places.startup, f'. "{places.script}"\n'):
            changed.append(f"added a line to {places.startup}")
    except OSError as error:
        raise StoreError(
            f"cannot write {error.filename}: {error.strerror}",
            hint=f"factory completion --shell {shell} prints the script",
        ) from error
    for line in changed or [f"already installed: {places.script}"]:
        click.echo(line)
    if changed:
        click.echo(f"a new {shell} completes `factory`")


def _own_shell() -> Shell:
    path = os.environ.get("SHELL", "")
    for shell in SHELLS:
        if Path(path).name == shell:
            return shell
    problem = f"no completion for the shell {path!r}" if path else "the variable SHELL is not set"
    raise UsageError(problem, hint=f"--shell {SHELLS[0]}, or {' or '.join(SHELLS[1:])}")


def _script(program: click.Command, shell: Shell) -> str:
    """Return click's script for a shell."""
    kind = get_completion_class(shell)
    assert kind
    script = kind(program, {}, PROGRAM, VARIABLE).source().strip() + "\n"
    return ZSH_FIRST + script if shell == "zsh" else script


def _places(shell: Shell) -> Places:
    home = Path.home()
    if shell == "fish":
        config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
        return Places(config / "fish" / "completions" / f"{PROGRAM}.fish", None)
    data = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    startup = Path(os.environ.get("ZDOTDIR") or home) / ".zshrc" if shell == "zsh" else home / ".bashrc"
    return Places(data / PROGRAM / f"completion.{shell}", startup)


def _replace(path: Path, text: str) -> bool:
    """Make this the text of a file, and return whether it was another."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return True


def _append(path: Path, line: str) -> bool:
    """Append a line to a file that lacks it, and return whether it did."""
    known = path.read_bytes() if path.is_file() else b""
    if line.encode() in known:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:  # in place: the file may be a link
        file.write(line if known.endswith(b"\n") or not known else f"\n{line}")
    return True
