"""Webpage: a model card as one HTML file, much as the Hub would show it, to look at before publishing."""

import base64
import html
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from markdown_it import MarkdownIt

KINDS = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg"}
STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --dim: #59636e; --back: #fff; --soft: #f6f8fa;
  --line: #d1d9e0; --link: #0969da; }
@media (prefers-color-scheme: dark) { :root { --text: #f0f6fc; --dim: #9198a1; --back: #0d1117;
  --soft: #151b23; --line: #3d444d; --link: #4493f8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif; overflow-wrap: break-word; }
main { max-width: 960px; margin: 0 auto; padding: 32px 24px; }
h1, h2 { line-height: 1.25; margin: 1.5em 0 .6em; padding-bottom: .3em;
  border-bottom: 1px solid var(--line); }
h1 { margin-top: 0; }
a { color: var(--link); }
table { display: block; width: max-content; max-width: 100%; overflow-x: auto; border-collapse: collapse;
  margin: 0 0 16px; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { border: 1px solid var(--line); padding: 6px 13px; text-align: left; vertical-align: top; }
tbody tr:nth-child(2n) { background: var(--soft); }
code { background: var(--soft); padding: .2em .4em; border-radius: 6px; }
code, pre { font: 85% ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { background: var(--soft); padding: 16px; border-radius: 6px; overflow-x: auto; line-height: 1.45; }
pre code { background: none; padding: 0; font-size: 100%; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
details { margin-bottom: 32px; color: var(--dim); font-size: 14px; }
summary { cursor: pointer; }
details > table { margin-top: 12px; }
details table table { margin: 0; }
@media (max-width: 600px) { main { padding: 16px; } th, td { padding: 5px 8px; } }
"""


def webpage(folder: Path) -> str:
    """The card in a model folder as one HTML page without script that loads nothing from anywhere.

    The metadata is a table, closed at first; figures that lie in the folder are in the page. HTML in the
    card's text is shown, not run.
    """
    matter, body = _divided((folder / "README.md").read_text(encoding="utf-8"))
    reader = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    tokens = reader.parse(body)
    for token in tokens:
        for part in token.children or []:
            if part.type == "image":
                part.attrs["src"] = _embedded(folder, str(part.attrs["src"]))
    shown = reader.renderer.render(tokens, reader.options, {})
    title = next((after.content for head, after in pairwise(tokens) if head.tag == "h1"), "")
    metadata = f"<details><summary>Metadata</summary>{_table(matter)}</details>" if matter else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{metadata}\n{shown}</main>\n</body>\n</html>\n"
    )


def _divided(card: str) -> tuple[Any, str]:
    """Front matter, None if there is none, and body."""
    if not card.startswith("---\n"):
        return None, card
    matter, _, body = card.removeprefix("---\n").partition("\n---\n")
    return yaml.safe_load(matter), body


def _table(value: Any) -> str:
    """Nested values as nested tables."""
    if isinstance(value, dict):
        rows = (
            f"<tr><th>{html.escape(str(key))}</th><td>{_table(item)}</td></tr>" for key, item in value.items()
        )
        return f"<table>{''.join(rows)}</table>"
    if isinstance(value, list):
        return ("" if any(isinstance(item, dict) for item in value) else ", ").join(map(_table, value))
    return html.escape(str(value))


def _embedded(folder: Path, address: str) -> str:
    """An image of this folder as a data address; any other as it is."""
    path = (folder / address).resolve()
    if path.suffix not in KINDS or not path.is_relative_to(folder.resolve()) or not path.is_file():
        return address
    return f"data:{KINDS[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
