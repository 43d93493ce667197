"""The comparison page as people meet it: in Chromium, with a mouse, on a phone, with a keyboard alone."""

import copy
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from factory.resources import DEMO_MODEL
from tests.compare import CHAT, app, pair

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="NO BROWSER TEST WAS RUN: there is no Chromium (apt-get install chromium)"
)
PROMPT = "def read_lines(path):\n    "
SHORT, LONG = 16, 64  # tokens of a reply
PATIENCE_MS = 300_000  # for whatever the page is to do: a busy machine is no fault
CARD = """# it

## Results

| | source | this model | ratio, of which much could be said |
|---|--:|--:|--:|
| loss, nats per token, and some more words | 1.000 | 2.000 | 2.00 × |

## Why

![A map](figures/one.png)
"""
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8cfc000"
    "000003010100c9fe92ef0000000049454e44ae426082"
)
Models = tuple[Any, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The embedded model twice, once under another name and with a card."""
    folder = tmp_path_factory.mktemp("space") / "short"
    shutil.copytree(DEMO_MODEL, folder)
    (folder / "README.md").write_text(CARD)
    (folder / "figures").mkdir()
    (folder / "figures" / "one.png").write_bytes(PIXEL)
    found: Models = pair.load_pair({"SOURCE_MODEL": str(DEMO_MODEL), "PRUNED_MODEL": str(folder)})
    return found


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., str]]:
    pages = []

    def started(loaded: Models, *, tokens: int) -> str:
        demo = app.page(loaded, most_tokens=tokens)
        pages.append(demo)
        _, url, _ = demo.launch(**app.LOOK, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
        return str(url)

    yield started
    for demo in pages:
        demo.close()


@pytest.fixture(scope="module")
def base_url(serve: Callable[..., str], models: Models) -> str:
    return serve(models, tokens=SHORT)


@pytest.fixture(scope="module")
def chat_url(serve: Callable[..., str], models: Models) -> str:
    chatting = tuple(replace(model, tokenizer=copy.deepcopy(model.tokenizer)) for model in models)
    for model in chatting:
        model.tokenizer.chat_template = CHAT
    return serve(chatting, tokens=SHORT)


@pytest.fixture(scope="module")
def hurry() -> threading.Event:
    """Lets the models of `long_url` write as fast as they can."""
    return threading.Event()


@pytest.fixture(scope="module")
def long_url(serve: Callable[..., str], models: Models, hurry: threading.Event) -> str:
    """A page whose models take a minute for a reply: time enough to stop them, on a busy machine as well."""

    def linger(*_: Any) -> None:
        hurry.wait(60 / LONG)

    tardy = tuple(replace(model, model=copy.deepcopy(model.model)) for model in models)
    for model in tardy:
        model.model.register_forward_hook(linger)
    return serve(tardy, tokens=LONG)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        # Chromium's sandbox does not run as root, as which machines that test often work.
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page; in the end, no error was logged and nothing outside this machine was asked for."""
    contexts, wrong = [], []

    def opened(url: str, *, width: int = 1280, scheme: str = "light") -> Page:
        phone = width < 600
        context = browser.new_context(
            viewport={"width": width, "height": 844}, color_scheme=scheme, is_mobile=phone, has_touch=phone
        )
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.on("request", lambda asked: wrong.append(asked.url) if _is_foreign(asked.url) else None)
        page.goto(url)
        expect(box(page)).to_be_focused()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def _is_foreign(url: str) -> bool:
    return not url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:"))


def box(page: Page) -> Locator:
    return page.get_by_role("textbox", name=re.compile("Message|Text to be continued"))


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name, exact=True)


def pane(page: Page, side: str) -> Locator:
    return page.get_by_role("region", name=f"{side} text")


def texts(page: Page) -> list[str]:
    return [pane(page, side).inner_text() for side in ("Left", "Right")]


def facts(page: Page) -> list[str]:
    return page.locator(".facts dd").all_inner_texts()


def status(page: Page) -> Locator:
    return page.locator(".status[role=status]")


def done(page: Page) -> None:
    expect(status(page)).to_contain_text("Both have written.")
    expect(button(page, "Stop")).to_be_disabled()


def send(page: Page, text: str = PROMPT) -> None:
    box(page).fill(text)
    button(page, "Send").click()
    expect(box(page)).to_have_value("")  # it has started
    done(page)


# What it does -------------------------------------------------------------------------------------


def test_one_prompt_goes_to_both_and_their_facts_are_shown(base_url: str, visit: Callable[..., Page]) -> None:
    page = visit(base_url)
    expect(page.get_by_role("heading", name="Source · demo")).to_be_visible()
    expect(page.get_by_role("heading", name="Smaller · short")).to_be_visible()
    send(page)
    assert all(text.startswith(PROMPT) and len(text) > len(PROMPT) for text in texts(page))
    assert page.locator(".facts dt").all_inner_texts() == [
        "tokens/s", "first token", "parameters", "memory"
    ] * 2  # fmt: skip
    rate, first, parameters, memory = facts(page)[:4]
    assert re.fullmatch(r"[\d.]+", rate)
    assert re.fullmatch(r"[\d,]+ ms", first)
    assert (parameters, memory) == ("2.12 M", "8.47 MB")


def test_both_stream_at_the_same_time_and_stop_halts_both(
    long_url: str, hurry: threading.Event, visit: Callable[..., Page]
) -> None:
    page = visit(long_url)
    box(page).fill(PROMPT)
    box(page).press("Enter")
    page.wait_for_function(
        """least => {
            const lengths = [...document.querySelectorAll('.text')].map(text => text.innerText.length)
            return lengths.length == 2 && lengths.every(length => length > least)
        }""",
        arg=len(PROMPT),
    )
    expect(button(page, "Stop")).to_be_enabled()
    first = texts(page)
    page.wait_for_function(
        """first => [...document.querySelectorAll('.text')].every((text, i) => text.innerText != first[i])""",
        arg=first,
    )
    button(page, "Stop").click()
    done(page)
    halted = texts(page)
    hurry.set()
    send(page)
    hurry.clear()
    whole = texts(page)
    for start, stopped, all_of_it in zip(first, halted, whole, strict=True):
        assert len(start) < len(stopped) < len(all_of_it)
        assert all_of_it.startswith(stopped.rstrip())


def test_a_new_prompt_ends_the_run_under_way(long_url: str, visit: Callable[..., Page]) -> None:
    page = visit(long_url)
    box(page).fill(PROMPT)
    box(page).press("Enter")
    expect(button(page, "Stop")).to_be_enabled()
    box(page).fill("import re")
    box(page).press("Enter")
    for side in ("Left", "Right"):
        expect(pane(page, side)).to_contain_text("import re")
    button(page, "Stop").click()
    done(page)
    assert all(text.startswith("import re") for text in texts(page))


def test_retry_takes_the_next_seed_and_clear_empties_both(base_url: str, visit: Callable[..., Page]) -> None:
    page = visit(base_url)
    empty = texts(page)
    page.get_by_role("button", name="Sampling, the same for both").click()
    seed = page.get_by_label("Seed")
    send(page)
    first = texts(page)
    box(page).fill("half written")
    button(page, "Retry").click()
    expect(seed).to_have_value("1")
    done(page)
    assert all(new != old and new.startswith(PROMPT) for new, old in zip(texts(page), first, strict=True))
    expect(box(page)).to_have_value("half written")
    button(page, "Clear").click()
    expect(pane(page, "Left")).to_have_text(empty[0])
    expect(pane(page, "Right")).to_have_text(empty[1])


def test_blind_hides_the_names_until_the_vote_which_is_counted(
    base_url: str, visit: Callable[..., Page]
) -> None:
    page = visit(base_url)
    votes = [button(page, f"{side} is better") for side in ("Left", "Right")] + [
        button(page, "No difference")
    ]
    page.get_by_role("checkbox", name="Blind").check()
    expect(page.get_by_role("heading", name="Left")).to_be_visible()
    assert not any(vote.is_visible() for vote in votes)
    send(page)
    assert facts(page) == ["?"] * 8
    assert page.get_by_text(re.compile("Source|Smaller|chose")).filter(visible=True).all_inner_texts() == []
    votes[0].click()
    heads = page.locator(".pane h2")
    expect(heads.first).to_have_text(re.compile("Source · demo|Smaller · short"))
    winner = heads.first.inner_text().split()[0].lower()
    counts = {"source": 0, "smaller": 0, "no difference": 0} | {winner: 1}
    told = ", ".join(f"{name} {count}" for name, count in counts.items())
    expect(status(page)).to_contain_text(f"Your votes: {told}.")
    told = "demo, the source" if winner == "source" else "short, the smaller model"
    expect(status(page)).to_contain_text(f"You chose {told}")
    assert not any(vote.is_visible() for vote in votes)
    send(page)
    expect(page.get_by_role("heading", name="Right")).to_be_visible()
    votes[2].click()
    expect(status(page)).to_contain_text("no difference 1")


def test_a_model_that_fails_says_so_while_the_other_writes(
    serve: Callable[..., str], models: Models, visit: Callable[..., Page]
) -> None:
    class Broken:
        """Stands for weights on a device that gave up."""

        config, device = models[1].model.config, models[1].model.device
        num_parameters, get_memory_footprint = (
            models[1].model.num_parameters,
            models[1].model.get_memory_footprint,
        )

        def generate(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("out of memory\nat length")

    page = visit(serve((models[0], replace(models[1], model=Broken())), tokens=SHORT))
    send(page)
    expect(page.get_by_role("alert")).to_have_text("This model failed. RuntimeError: out of memory")
    left, right = texts(page)
    assert len(left) > len(PROMPT)
    assert right.rstrip() == PROMPT.rstrip()


def test_a_conversation_goes_on_without_empty_prompts_and_is_cleared_on_both_sides(
    chat_url: str, visit: Callable[..., Page]
) -> None:
    page = visit(chat_url)
    box(page).fill("  ")
    button(page, "Send").click()
    for text in ("first words", "second words"):
        send(page, text)
    for side in ("Left", "Right"):
        log = page.get_by_role("group", name=side).get_by_role("log")
        expect(log.get_by_test_id("user")).to_have_text(["first words", "second words"])
        expect(log.get_by_test_id("bot")).to_have_count(2)
    page.locator(".composer").get_by_role("button", name="Clear").click()
    expect(page.get_by_text("first words")).to_have_count(0)


# Whom it is for -----------------------------------------------------------------------------------


def test_the_keyboard_alone_sends_votes_and_reads(base_url: str, visit: Callable[..., Page]) -> None:
    page = visit(base_url)

    def reach(target: Locator, key: str = "Tab") -> None:
        for _ in range(30):
            if target.evaluate("it => it == document.activeElement"):
                return
            page.keyboard.press(key)
        raise AssertionError(f"{target} cannot be reached")

    reach(page.get_by_role("checkbox", name="Blind"))
    page.keyboard.press("Space")
    expect(page.get_by_role("heading", name="Left")).to_be_visible()
    reach(box(page), "Shift+Tab")
    page.keyboard.type("import os")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("import re")
    page.keyboard.press("Enter")
    expect(box(page)).to_have_value("")
    done(page)
    assert all(text.startswith("import os\nimport re") for text in texts(page))
    reach(button(page, "No difference"), "Shift+Tab")
    page.keyboard.press("Enter")
    expect(status(page)).to_contain_text("no difference 1")
    reach(pane(page, "Left"), "Shift+Tab")
    reach(page.get_by_role("tab", name="Measurements"), "Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("table")).to_be_visible()


@pytest.mark.parametrize(("kind", "scheme"), [("base", "light"), ("chat", "dark")])
def test_axe_finds_nothing_serious(
    request: pytest.FixtureRequest, visit: Callable[..., Page], kind: str, scheme: str
) -> None:
    page = visit(request.getfixturevalue(f"{kind}_url"), scheme=scheme)
    found = []

    def look(where: str) -> None:
        for violation in Axe().run(page).response["violations"]:
            if violation["impact"] in ("serious", "critical"):
                found.append((where, violation["id"], [node["html"] for node in violation["nodes"]]))

    page.get_by_role("checkbox", name="Blind").check()
    send(page)
    look("before the vote")
    button(page, "No difference").click()
    expect(status(page)).to_contain_text("no difference 1")
    page.get_by_role("button", name="Sampling, the same for both").click()
    expect(page.get_by_label("Seed")).to_be_visible()
    look("after the vote")
    page.get_by_role("tab", name="Measurements").click()
    expect(page.get_by_role("table")).to_be_visible()
    look("measurements")
    assert found == []


@pytest.mark.parametrize("kind", ["base", "chat"])
def test_a_phone_never_scrolls_sideways(
    request: pytest.FixtureRequest, visit: Callable[..., Page], kind: str
) -> None:
    page = visit(request.getfixturevalue(f"{kind}_url"), width=390)

    def widest() -> int:
        """Of the page and of everything in it that does not lie in a box with a scroll bar of its own."""
        return int(
            page.evaluate(
                """() => {
                    const scrolls = it => /auto|scroll/.test(getComputedStyle(it).overflowX)
                    const held = it => it && (scrolls(it) || held(it.parentElement))
                    const all = [...document.querySelectorAll("main *")]
                    const free = all.filter(it => !held(it.parentElement))
                    const ends = free.map(it => Math.ceil(it.getBoundingClientRect().right))
                    return Math.max(document.documentElement.scrollWidth, ...ends)
                }"""
            )
        )

    page.get_by_role("checkbox", name="Blind").check()
    send(page, "x" * 300)
    assert widest() == 390
    expect(button(page, "No difference")).to_be_visible()
    page.evaluate("scrollTo(0, 0)")
    expect(box(page)).to_be_in_viewport(ratio=1)
    page.get_by_role("button", name="Sampling, the same for both").click()
    expect(page.get_by_label("Seed")).to_be_visible()
    assert widest() == 390
    page.get_by_role("tab", name="Measurements").click()
    expect(page.get_by_role("table")).to_be_visible()
    expect(page.get_by_role("img", name="A map")).to_be_visible()
    assert widest() == 390
