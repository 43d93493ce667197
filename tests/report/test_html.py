"""`factory card` writes the card again; its preview shows what the Hub would show, and loads nothing."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from factory.artifacts import Publication
from factory.cli.main import cli
from factory.errors import UsageError
from factory.report.card import render
from factory.report.html import webpage
from tests.builders.builds import chat_with_other_licence

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Seen(HTMLParser):
    """Tags with their attributes, and the text outside of style sheets."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.inside.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag, "every element is closed where it was opened"

    def handle_data(self, data: str) -> None:
        if self.inside[-1:] != ["style"]:
            self.text += data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a build leaves, as far as its card goes."""
    figures = tmp_path / "model" / "figures"
    figures.mkdir(parents=True)
    for name in ("angular-distance.png", "healing.png"):
        (figures / name).write_bytes(PIXEL)
    chat_with_other_licence().write(tmp_path)
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(
        cli, ["card", *map(str, arguments)], catch_exceptions=False, standalone_mode=False
    )


def test_the_card_is_written_again_from_the_build(folder: Path) -> None:
    assert run(folder).output.split() == [str(folder / "model" / "README.md")]
    card = (folder / "model" / "README.md").read_text()
    assert card == render(chat_with_other_licence(), has_healing_figure=True)
    assert not (folder / "card.html").exists()


def test_the_card_of_a_published_build_goes_on_naming_its_repository(folder: Path) -> None:
    place = {"repo_id": "me/smaller", "url": "u", "commit": "c", "private": True, "files": {}}
    Publication.model_validate(place).write(folder)
    run(folder)
    assert 'model="me/smaller"' in (folder / "model" / "README.md").read_text()


def test_the_preview_holds_the_whole_card_and_its_figures(folder: Path) -> None:
    run(folder, "--preview", "--no-browser")
    seen = Seen((folder / "card.html").read_text())
    card = (folder / "model" / "README.md").read_text()
    words = re.findall(r"[\w.,]{3,}", re.sub(r"\]\([^)]*\)|```\w+", "", card.replace("\\", "")))
    shown = seen.text + " ".join(attributes.get("alt") or "" for _, attributes in seen.tags)
    assert [word for word in words if word not in shown] == []
    images = [attributes["src"] or "" for tag, attributes in seen.tags if tag == "img"]
    assert [base64.b64decode(image.removeprefix("data:image/png;base64,")) for image in images] == [PIXEL] * 2
    assert seen.inside == []


def test_the_preview_loads_nothing_and_runs_nothing(folder: Path) -> None:
    (folder / "model" / "README.md").write_text(
        "---\nlicense: <script>1</script>\n---\n# T\n<script>2</script>\n<img src=x onerror=3>\n"
        "[a](javascript:alert(4)) ![b](../build.json) ![c](https://example.com/c.png)\n"
    )
    page = webpage(folder / "model")
    tags = Seen(page).tags
    assert not [tag for tag, attributes in tags if tag in ("script", "link") or "onerror" in attributes]
    assert not [
        attributes for _, attributes in tags if (attributes.get("href") or "").startswith("javascript")
    ]
    assert "default-src 'none'; img-src data:" in page
    assert "1</script>" not in page


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=80))
def test_no_text_breaks_out_of_the_page(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("card")
    (folder / "README.md").write_text(f"# T\n\n{text}\n", encoding="utf-8", errors="replace")
    assert {tag for tag, _ in Seen(webpage(folder)).tags} & {
        "script",
        "iframe",
        "object",
        "form",
        "link",
    } == set()


def test_no_browser_without_a_preview_means_nothing(folder: Path) -> None:
    with pytest.raises(UsageError, match="--no-browser without --preview"):
        run(folder, "--no-browser")
    with pytest.raises(UsageError, match="is no build folder"):
        run(folder / "model")
