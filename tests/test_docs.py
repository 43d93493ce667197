"""The documentation: generated pages are current, links lead somewhere, quoted messages exist."""

import ast
import base64
import json
import re
from functools import cache
from pathlib import Path

import pytest

from scripts.write_docs import pages, read_printed
from tests.places import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")), *DOCS]
GENERATED = {"cli.md", "supported-models.md"}
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FOREIGN = re.compile(
    r"\b(?:anew|mend(?:s|ed)?|nobody|said|somebody|stands there|struck|told)\b", re.IGNORECASE
)


def without_code(text: str) -> str:
    """Return Markdown without fenced blocks and code spans."""
    return re.sub(r"`+[^`\n]+`+", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


@cache
def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@cache
def texts_of_the_program() -> list[str]:
    """Return every string of the source as it is shown, with a NUL where a value is filled in."""
    found = []
    for path in (ROOT / "factory").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
    return [as_shown(text) for text in found]


def as_shown(text: str) -> str:
    """Return a message with its options as the command line names them, whatever their values are."""
    return re.sub(
        r"`([a-z][a-z0-9_]*)(?:=([^`]*))?`",
        lambda option: f"--{option[1].replace('_', '-')}" + (f" {option[2]}" if option[2] else ""),
        text,
    )


def messages() -> list[str]:
    """Return the error messages in the tables of the troubleshooting page."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return [message for _, message in re.findall(r"^\| (`+)(.+?)\1 \|", text, re.MULTILINE)]


@pytest.mark.parametrize("name", [*sorted(GENERATED), "choosing-layers.md", "architecture.md"])
def test_a_generated_page_is_what_would_be_written_now(name: str) -> None:
    path = ROOT / "docs" / name
    assert path.read_text(encoding="utf-8") == pages()[path], "run `python scripts/write_docs.py`"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_to_a_file_or_heading_leads_there(path: Path) -> None:
    for target in LINK.findall(without_code(path.read_text(encoding="utf-8"))):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        page = (path.parent / name).resolve() if name else path
        assert page.exists(), target
        assert not anchor or anchor in anchors(page), target


def test_the_readme_is_short_and_names_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert any("make demo" in line for line in lines)
    assert any("make test" in line for line in lines)


@pytest.mark.parametrize("name", ["angular-distance.png", "healing.png"])
def test_a_figure_is_the_one_on_the_demo_card(name: str) -> None:
    figure = ROOT / "model_cards" / "demo-drop30" / "figures" / name
    assert (ROOT / "docs" / name).read_bytes() == figure.read_bytes(), f"copy {figure} to docs"


@pytest.mark.parametrize("message", messages())
def test_a_message_on_the_troubleshooting_page_is_one_of_the_program(message: str) -> None:
    parts = [part.strip() for part in message.split("…") if part.strip(" ,;:()")]
    assert any(all(part in text for part in parts) for text in texts_of_the_program())


@pytest.mark.parametrize("path", [p for p in PAGES if p.name not in GENERATED], ids=lambda path: path.name)
def test_a_page_is_in_plain_english(path: Path) -> None:
    assert FOREIGN.findall(without_code(path.read_text(encoding="utf-8"))) == []


def test_a_printed_table_of_architectures_becomes_the_outcomes(tmp_path: Path) -> None:
    (tmp_path / "printed").write_text(
        "transformers 9.9.9, torch 1.0, 8 layers, without [3, 4]\n\n"
        "| model type | result | why |\n|---|---|---|\n"
        "| llama | exact |  |\n| blt | refused | [3, 4]: DropError: blt: no layers (a hint) |\n\n1 exact\n"
    )
    assert read_printed(tmp_path / "printed") == {
        "transformers": "9.9.9",
        "outcomes": [["llama", "exact", ""], ["blt", "refused", "no layers (a hint)"]],
    }


def test_the_page_of_the_notebook_shows_each_of_its_cells_as_it_ran() -> None:
    text = (ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "notebook.md").read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    used = "\n".join("".join(cell["source"]) for cell in cells)
    assert {"preview", "plan", "build"} <= set(re.findall(r"factory\.(\w+)\(", used))
    for cell in cells:
        assert f"```python\n{''.join(cell['source'])}\n```" in page
        assert cell["outputs"]
        assert all(output["output_type"] != "error" for output in cell["outputs"])
    (image,) = re.findall(r'"image/png": "([^"]+)"', text)
    assert base64.b64decode(image.replace("\\n", "")) == (ROOT / "docs" / "notebook.png").read_bytes()
    assert len(text) < 150_000
    assert not re.search(r"/(tmp|home|root|work)/", page)
