"""Write the generated parts of the documentation: two pages, the criteria, and the list of modules.

python scripts/write_docs.py                   write them
python scripts/write_docs.py --check           fail if a page is out of date
python scripts/write_docs.py --outcomes FILE   import a table that benchmarks/architectures.py printed
"""

import argparse
import ast
import importlib
import json
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
OUTCOMES = DOCS / "supported-models.json"
HELP_WIDTH = 90  # columns
COMMAND_LINE_MODULES = ("factory.cli.main", "factory.cli")  # the first that exists
NOTICE = "<!-- Written by scripts/write_docs.py. Change the source of the text, then run the script. -->"
OWN_NAMES = ("__init__.py", "__main__.py")  # told by their folder
FOLDERS = [  # from the command line down
    f"factory/{name}".rstrip("/")
    for name in (
        *(
            "cli",
            "api",
            "jobs",
            "pipeline",
            "builds",
            "pruning",
            "healing",
            "evaluation",
            "report",
            "serving",
        ),
        *("demo", "parallel", "text", "hub", "model", "checkpoint", "store", "config", ""),
    )
]
VERDICTS = ("exact", "exact, or refused", "to rounding", "refused", "unbuilt", "wrong")  # in the page's order

CLI_HEAD = f"""{NOTICE}

# Command line

Every command with its options, as `--help` prints them. The exit code is 0 on success, 1 if something
failed, 2 for a usage error, 70 for a fault of the program, 130 after Ctrl-C, and 141 if the reader of the
output left before everything was printed. Errors are two lines on standard error: what is wrong, and what to
do about it. With `--json`, the result goes to standard output and progress to standard error.

`eval "$(_FACTORY_COMPLETE=bash_source factory)"` completes commands and options in bash; in zsh, write
`zsh_source` instead of `bash_source`.

| environment variable | meaning |
|---|---|
| `FACTORY_HOME` | folder of finished stages; the user's cache folder by default |
| `HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE` | the Hub's cache, token, address and offline mode |
| `CUDA_VISIBLE_DEVICES` | GPUs that a build may use |
"""

SUPPORTED_HEAD = f"""{NOTICE}

# Supported models

The factory prunes decoder-only language models that transformers supports, from safetensors weights.
A model with its own code needs `--trust-remote-code` and a pinned commit.

`benchmarks/architectures.py` tries every model type that transformers knows as a causal language model. It
makes a tiny random model of each type, prunes it on disk, loads the result, and compares logits and cached
generation with the source, run with the same layers skipped. It does this for a block of layers and for a
scattered set."""


def command_group() -> click.Group:
    """Return the group that holds every command of the program."""
    for name in COMMAND_LINE_MODULES:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not name.startswith(str(error.name)):
                raise
            continue
        for value in vars(module).values():
            if isinstance(value, click.Group) and "build" in value.list_commands(click.Context(value)):
                return value
    raise SystemExit(f"none of {', '.join(COMMAND_LINE_MODULES)} has a group with the command `build`")


def help_pages(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    """Yield the full name and help text of a command and of all its sub-commands."""
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None and not below.hidden:
                yield from help_pages(below, _context(below, name=name, parent=context))


def _context(command: click.Command, *, name: str, parent: click.Context | None = None) -> click.Context:
    settings = {**command.context_settings, "terminal_width": HELP_WIDTH}
    return click.Context(command, info_name=name, parent=parent, **settings)


def cli_page() -> str:
    """Return docs/cli.md: one section per command."""
    group = command_group()
    pages = help_pages(group, _context(group, name="factory"))
    sections = [f"## {name}\n\n```text\n{text.rstrip()}\n```\n" for name, text in pages]
    return "\n".join([CLI_HEAD, *sections])


def supported_page(known: dict[str, Any]) -> str:
    """Return docs/supported-models.md.

    Args:
        known: The transformers version, and for each model type its verdict and the reason.
    """
    outcomes: list[list[str]] = known["outcomes"]
    counts = Counter(verdict for _, verdict, _ in outcomes)
    exact = ", ".join(f"`{name}`" for name, verdict, _ in outcomes if verdict == "exact")
    others = sorted(
        (one for one in outcomes if one[1] != "exact"), key=lambda one: (VERDICTS.index(one[1]), one[0])
    )
    rows = "\n".join(f"| `{name}` | {verdict} | {why} |" for name, verdict, why in others)
    total, version = len(outcomes), known["transformers"]
    by_verdict = (
        f"{counts['exact']} are exact, {counts['wrong']} wrong and {counts['refused']} refused by name"
    )
    return f"""{SUPPORTED_HEAD}

Of the {total} types of transformers {version}, {by_verdict}.

"Exact" is a claim about transformers alone. Other runtimes read some configurations differently:
[Where the result runs](runtimes.md) lists what is known.

## Exact

Equal to the last bit, for both cuts:

{textwrap.fill(exact, 118, break_on_hyphens=False)}

## Not exact

| model type | result | why |
|---|---|---|
{rows}

- *exact, or refused*: the result depends on which layers are dropped.
- *to rounding*: equal in exact arithmetic.
- *refused*: an error names the reason before any work.
- *unbuilt*: the tiny model cannot be made or run, so the result is unknown.
"""


def with_criteria(page: str) -> str:
    """Return a page with the current table of criteria."""
    from factory.config.criteria import CRITERIA, DEFAULT_CRITERION

    rows = ["| criterion | drops |", "|---|---|"]
    for criterion in CRITERIA.values():
        drops = re.sub(r"arXiv ([\d.]+)", r"[arXiv \1](https://arxiv.org/abs/\1)", criterion.summary)
        default = "; the default" if criterion is DEFAULT_CRITERION else ""
        rows.append(f"| `{criterion.name}` | {drops}{default} |")
    return _filled(page, "criteria", "\n".join(rows))


def with_modules(page: str) -> str:
    """Return a page with the current list of modules, by folder, each with its first line."""
    lines = ["```text"]
    for folder in FOLDERS:
        inside = sorted(path for path in (ROOT / folder).rglob("*.py") if path.name not in OWN_NAMES)
        if folder == "factory":
            inside = [path for path in inside if path.parent == ROOT / folder]
        lines += ["", f"{folder}/   {_first_line(ROOT / folder / '__init__.py')}"]
        names = [str(path.relative_to(ROOT / folder)) for path in inside]
        width = max(map(len, names))
        for name, path in zip(names, inside, strict=True):
            about = f"  {name.ljust(width)}  {_first_line(path)}"
            lines += textwrap.wrap(about, 118, subsequent_indent=" " * (width + 4), break_on_hyphens=False)
    return _filled(page, "modules", "\n".join(["```text", *lines[2:], "```"]))


def _first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.splitlines()[0].rstrip(".") if docstring else ""


def _filled(page: str, name: str, text: str) -> str:
    """Return a page with other text between the comments that mark a generated part."""
    return re.sub(
        rf"(<!-- {name}: .*? -->\n\n).*?(\n\n<!-- end of {name} -->)",
        lambda found: found[1] + text + found[2],
        page,
        flags=re.DOTALL,
    )


def read_printed(path: Path) -> dict[str, Any]:
    """Read a table that benchmarks/architectures.py printed, with each reason shortened for readers."""
    lines = path.read_text(encoding="utf-8").splitlines()
    version = re.match(r"transformers ([\w.]+)", lines[0]) if lines else None
    if version is None:
        raise SystemExit(f"{path} does not begin with the version of transformers")
    rows = [line.strip("| ").split(" | ", 2) for line in lines if line.startswith("| ")]
    found = [[*row, "", ""][:3] for row in rows if row[0] != "model type"]
    return {"transformers": version[1], "outcomes": [[n, v.rstrip(" |"), _short(w, n)] for n, v, w in found]}


def _short(why: str, model_type: str) -> str:
    """Drop the cut, the class of the error and the model type from a reason."""
    why = re.sub(r"^\[[\d, ]+\]: ", "", re.sub(r"\b\w+Error: ", "", why.strip("| ")))
    return why.removeprefix(f"{model_type}: ")


def write_outcomes(known: dict[str, Any]) -> None:
    """Write docs/supported-models.json, one model type per line."""
    rows = ",\n".join("    " + json.dumps(one, ensure_ascii=False) for one in sorted(known["outcomes"]))
    text = f'{{\n  "transformers": {json.dumps(known["transformers"])},\n  "outcomes": [\n{rows}\n  ]\n}}\n'
    OUTCOMES.write_text(text, encoding="utf-8")


def pages() -> dict[Path, str]:
    """Return every page that is generated in full or in part, with its content."""
    known = json.loads(OUTCOMES.read_text(encoding="utf-8"))
    choosing, architecture = DOCS / "choosing-layers.md", DOCS / "architecture.md"
    return {
        DOCS / "cli.md": cli_page(),
        DOCS / "supported-models.md": supported_page(known),
        choosing: with_criteria(choosing.read_text(encoding="utf-8")),
        architecture: with_modules(architecture.read_text(encoding="utf-8")),
    }


def main() -> None:
    """Write the pages, or check that they are current."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    parser.add_argument("--outcomes", type=Path, help="output of benchmarks/architectures.py to import")
    arguments = parser.parse_args()
    if arguments.outcomes:
        write_outcomes(read_printed(arguments.outcomes))
    old = [path for path, text in pages().items() if not path.is_file() or path.read_text("utf-8") != text]
    if arguments.check and old:
        names = ", ".join(str(path.relative_to(ROOT)) for path in old)
        raise SystemExit(f"out of date: {names}; run `python scripts/write_docs.py`")
    for path in old:
        path.write_text(pages()[path], encoding="utf-8")
        sys.stdout.write(f"wrote {path.relative_to(ROOT)}\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
