"""The comparison Space: both models write at once, apart from each other, and the command ends cleanly."""

import ast
import copy
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from gradio_client import Client

from factory.artifacts import Build
from factory.builds.space import HOST, _held_back, free_port, pair_environment, serve
from factory.errors import FactoryError, HubError, ModelError, UsageError
from factory.hub.resolve import resolve
from factory.resources import DEMO_MODEL
from tests.builders.builds import demo_healed, healing_discarded
from tests.builders.models import END, byte_encoder, byte_tokenizer, save_llama
from tests.compare import CHAT, SPACE, app, pair, terminal
from tests.compare import session as display
from tests.waiting import HUNG_SECONDS

GREEDY = pair.Sampling(max_new_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("tiny") / "model", num_layers=2)


@pytest.fixture(scope="module")
def models(tiny: Path) -> tuple[Any, Any]:
    loaded: tuple[Any, Any] = pair.load_pair({"SOURCE_MODEL": str(DEMO_MODEL), "PRUNED_MODEL": str(tiny)})
    return loaded


@pytest.fixture
def chatting(models: tuple[Any, Any]) -> Iterator[tuple[Any, Any]]:
    for model in models:
        model.tokenizer.chat_template = CHAT
    yield models
    for model in models:
        model.tokenizer.chat_template = None


def unhurried(models: tuple[Any, Any]) -> tuple[Any, ...]:
    """The same models, which take half a second per token: time enough to see them write on any machine."""
    slow = tuple(replace(model, model=copy.deepcopy(model.model)) for model in models)
    for model in slow:
        model.model.register_forward_hook(lambda *_: time.sleep(0.5))
    return slow


def ask(text: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}]] * 2


def last(models: Any, text: str, sampling: Any) -> tuple[Any, ...]:
    return list(pair.stream(models, ask(text), sampling))[-1]


def desk_for(models: Any) -> Any:
    def generate(conversations: Any, sampling: Any, in_step: bool) -> Iterator[Any]:
        yield from pair.stream(models, conversations, sampling, in_step=in_step)

    return app.Desk(models, generate)


def answer(desk: Any, session: Any, text: str, *, blind: bool = False) -> list[bool]:
    return list(desk.answer(session, text, GREEDY, blind=blind))


# The models ---------------------------------------------------------------------------------------


def test_a_missing_variable_is_named() -> None:
    with pytest.raises(SystemExit, match="PRUNED_MODEL not set"):
        pair.load_pair({"SOURCE_MODEL": "owner/name"})


def test_a_length_that_is_no_number_is_named() -> None:
    assert app.most_tokens_of({}) == 512
    assert app.most_tokens_of({"MAX_NEW_TOKENS": "64"}) == 64
    for text in ("many", "0", "-5", "1.5"):
        with pytest.raises(SystemExit, match=f"MAX_NEW_TOKENS is '{text}'"):
            app.most_tokens_of({"MAX_NEW_TOKENS": text})


def test_ticking_blind_takes_no_prompt_away_that_was_sent_right_after(models: tuple[Any, Any]) -> None:
    def generate(*_: Any) -> Iterator[Any]:
        yield pair.Reply("a"), pair.Reply("b")

    desk, session = app.Desk(models, generate), app.Session()
    run = desk.answer(session, "import", GREEDY, blind=True)
    assert next(run)
    desk.hide(session, True)  # the server gets to it late
    assert list(run)[-1] is False
    assert [turn.prompt for turn in session.turns] == ["import"]
    desk.hide(session, False)
    assert not session.turns


def test_a_prompt_that_is_cut_begins_as_a_text_does_and_does_not_end(models: tuple[Any, Any]) -> None:
    model = replace(models[1], tokenizer=byte_tokenizer(f"{END} $A {END}"))
    (text,) = byte_encoder().encode(["the end"])
    assert pair.encode(model, [{"role": "user", "content": "the end"}], 100)[0] == [0, *text]
    assert pair.encode(model, [{"role": "user", "content": "to the end"}], 8)[0] == [0, *text]


def test_models_know_their_name_and_size(models: tuple[Any, Any], tiny: Path) -> None:
    source, pruned = models
    assert (source.role, source.name, source.num_parameters) == ("Source", "demo", 2_118_240)
    assert source.size_bytes // source.num_parameters == 4
    assert (pruned.role, pruned.name) == ("Smaller", tiny.parent.name)


# Replies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_greedy_text_is_what_generate_gives(models: tuple[Any, Any], index: int) -> None:
    model, prompt = models[index], "def read(path):\n    "
    reply = last(models, prompt, GREEDY)[index]
    ids = model.tokenizer(prompt, return_tensors="pt")
    out = model.model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert reply.text == model.tokenizer.decode(out, skip_special_tokens=True).rstrip("\ufffd")
    assert reply.num_tokens == len(out)


def test_both_replies_grow_while_they_are_written(models: tuple[Any, Any]) -> None:
    sampling = pair.Sampling(max_new_tokens=80, temperature=1.0)
    seen: list[Any] = []
    stream = pair.stream(unhurried(models), ask("import os"), sampling)
    while len({replies[0].num_tokens for replies in seen}) < 3 or not seen[-1][1].text:
        seen.append(next(stream))
    stream.close()
    for index in (0, 1):
        counts = [snapshot[index].num_tokens for snapshot in seen]
        assert counts == sorted(counts)
        assert seen[-1][index].text
        assert seen[-1][index].first_token_seconds > 0


def test_the_same_seed_draws_the_same_text_and_another_seed_another(models: tuple[Any, Any]) -> None:
    sampling = pair.Sampling(max_new_tokens=30, temperature=1.0, seed=3)
    first, again = last(models, "import", sampling), last(models, "import", sampling)
    assert [reply.text for reply in first] == [reply.text for reply in again]
    assert first[0].text != last(models, "import", replace(sampling, seed=4))[0].text


def test_in_step_no_reply_runs_ahead(models: tuple[Any, Any]) -> None:
    sampling = pair.Sampling(max_new_tokens=60, temperature=1.0)
    counts = [
        [reply.num_tokens for reply in seen] for seen in pair.stream(models, ask("a"), sampling, in_step=True)
    ]
    shorter = min(counts[-1])
    assert all(left == right or min(left, right) == shorter for left, right in counts)


def test_a_model_that_fails_says_so_and_the_other_goes_on(models: tuple[Any, Any]) -> None:
    broken = replace(models[0], tokenizer=models[1].tokenizer, model=object())
    failed, fine = last((broken, models[1]), "once", GREEDY)
    assert failed.error.startswith("AttributeError: ")
    assert failed.text == ""
    assert fine.error == ""
    assert fine.num_tokens > 0


def test_closing_the_stream_halts_both_models(models: tuple[Any, Any]) -> None:
    stream = pair.stream(models, ask("import os"), pair.Sampling(max_new_tokens=120, temperature=1.0))
    next(stream)
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


def test_a_long_text_keeps_its_end_with_a_notice(models: tuple[Any, Any]) -> None:
    ids, notice = pair.encode(models[1], [{"role": "user", "content": "x" * 300 + "end"}], 100)
    assert len(ids) == 100
    assert models[1].tokenizer.decode(ids).endswith("xend")
    assert notice == "Cut to its last 100 of 303 tokens."
    assert "Cut to its last" in last(models, "word " * 900, GREEDY)[0].notice


def test_a_short_text_is_not_cut(models: tuple[Any, Any]) -> None:
    assert pair.encode(models[1], [{"role": "user", "content": "end"}], 100)[1] == ""


def test_a_long_conversation_loses_its_oldest_turns_then_the_head_of_the_message(
    chatting: tuple[Any, Any],
) -> None:
    turns = [
        {"role": role, "content": letter * 40}
        for role, letter in zip(("user", "assistant") * 2, "abcd", strict=True)
    ]
    turns.append({"role": "user", "content": "last " * 4})
    tokenizer = chatting[1].tokenizer
    ids, notice = pair.encode(chatting[1], turns, 150)
    text = tokenizer.decode(ids)
    assert "a" * 40 not in text
    assert text.startswith("<user>" + "c" * 40)
    assert text.endswith("last <assistant>")
    assert notice.startswith("Cut to its last ")
    ids, _ = pair.encode(chatting[1], [{"role": "user", "content": "x" * 200 + "end"}], 60)
    assert len(ids) <= 60
    assert tokenizer.decode(ids).startswith("<user>x")
    assert tokenizer.decode(ids).endswith("end<assistant>")


# The page's behaviour -----------------------------------------------------------------------------


def test_an_empty_prompt_does_nothing(models: tuple[Any, Any]) -> None:
    session = app.Session()
    desk = desk_for(models)
    assert list(desk.send(session, " \n", 0, False, 8, 0.0, 1.0)) == [app.UNCHANGED]
    assert list(desk.retry(session, "typed", 0, False, 8, 0.0, 1.0)) == [app.UNCHANGED]
    assert len(app.UNCHANGED) == len(desk.view(session, False)) + 2
    assert session.turns == []


def test_a_base_model_continues_each_text_alone_and_a_chat_remembers(
    models: tuple[Any, Any], chatting: tuple[Any, Any]
) -> None:
    desk, session = desk_for(chatting), app.Session()
    assert desk.chats
    answer(desk, session, "one")
    answer(desk, session, "two")
    said = [message["content"] for message in session.messages(0) if message["role"] == "user"]
    assert said == ["one", "two"]
    for model in models:
        model.tokenizer.chat_template = None
    assert not desk.chats
    answer(desk, session, "three")
    assert [turn.prompt for turn in session.turns] == ["three"]


def test_retry_takes_the_last_prompt_with_the_next_seed_and_leaves_the_box(models: tuple[Any, Any]) -> None:
    desk, session = desk_for(models), app.Session()
    answer(desk, session, "import os")
    updates = list(desk.retry(session, "half written", 5, False, 8, 0.0, 1.0))
    assert updates[0][-2:] == ["half written", 6]
    assert all(update[-2:] == app.UNCHANGED[:2] for update in updates[1:])
    assert [turn.prompt for turn in session.turns] == ["import os"]


def test_a_retry_after_the_vote_is_a_new_round(models: tuple[Any, Any]) -> None:
    desk, session = desk_for(models), app.Session()
    answer(desk, session, "import os", blind=True)
    desk.vote(session, 2)
    assert list(desk.retry(session, "", 0, True, 8, 0.0, 1.0))
    assert [turn.prompt for turn in session.turns] == ["import os"]
    assert session.hides


def test_a_gpu_that_is_not_lent_leaves_the_page_as_it_was(models: tuple[Any, Any]) -> None:
    def refused(*_: Any) -> Iterator[Any]:
        raise app.gr.Error("No GPU was available")
        yield

    desk, session = app.Desk(models, refused), app.Session()
    run = desk.answer(session, "import os", GREEDY, blind=False)
    assert [next(run), next(run)] == [True, False]
    with pytest.raises(app.gr.Error, match="No GPU"):
        next(run)
    assert session.turns == []
    assert session.halt is None


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}", "takes over 2 s"),
        ("{{ 'x' * 10**11 }}", "MemoryError"),
        ("{{ 'xy' * 2**20 }}", "makes 2,097,152 characters"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{% for i in [1] %}" * 25 + "{% endfor %}" * 25, "SyntaxError: too many statically nested blocks"),
    ],
)
def test_a_template_that_is_no_good_fails_alone_and_within_its_bounds(
    chatting: tuple[Any, Any], template: str, told: str
) -> None:
    chatting[1].tokenizer.chat_template = template
    good, bad = last(chatting, "hello", GREEDY)
    assert good.num_tokens
    assert not good.error
    assert told in bad.error
    chatting[1].tokenizer.chat_template = CHAT
    assert last(chatting, "hello", GREEDY)[1].num_tokens


def test_stop_keeps_what_was_written(models: tuple[Any, Any]) -> None:
    desk, session = desk_for(unhurried(models)), app.Session()
    sampling = pair.Sampling(max_new_tokens=120, temperature=1.0)
    run = desk.answer(session, "import os", sampling, blind=False)
    while not session.turns or not session.turns[0].replies[0].num_tokens:
        next(run)
    desk.stop(session)
    assert list(run)[-1] is False
    assert 0 < session.turns[0].replies[0].num_tokens < 120
    assert session.halt is None


def test_blind_hides_everything_until_the_vote_which_counts_once(models: tuple[Any, Any]) -> None:
    desk, session = desk_for(models), app.Session()
    desk.vote(session, 0)
    assert session.tally == [0, 0, 0]
    answer(desk, session, "import os", blind=True)
    shown = " ".join(str(part) for side in (0, 1) for part in desk.side(session, side))
    assert not re.search(r"Source|Pruned|demo|tokens/s</dt><dd>[0-9]| M<", shown)
    desk.vote(session, 1)
    desk.vote(session, 1)
    assert sum(session.tally) == 1
    assert session.tally[session.order[1]] == 1
    heads = {desk.side(session, side)[0] for side in (0, 1)}
    assert any("Source · demo" in head for head in heads)
    answer(desk, session, "import re", blind=True)
    assert session.hides


def test_text_of_a_model_cannot_become_markup(models: tuple[Any, Any]) -> None:
    session = app.Session(turns=[app.Turn("<b>", (pair.Reply("<script>"), pair.Reply(error="<i>")))])
    shown = app.completion(session, 0) + app.facts(models, session, 1)
    assert "&lt;script&gt;" in shown
    assert not re.search("<script|<b>|<i>", shown)


def test_the_figures_below_the_title_of_a_card_come_first_on_the_page() -> None:
    card = "# it\n\n| −26% | +0.3 |\n|:-:|:-:|\n| parameters: 2 → 1 | loss on a\\_b &lt;c |\n\nThis is\n"
    shown = display.headline(card)
    assert "<dd>−26%</dd><dt>parameters: 2 → 1</dt>" in shown
    assert "<dd>+0.3</dd><dt>loss on a_b &lt;c</dt>" in shown
    assert display.headline("# it\n\nThis is\n\n| a |\n|---|\n| b |\n") == ""


def test_while_the_first_token_is_to_come_the_pane_shows_that_it_waits(models: tuple[Any, Any]) -> None:
    session = app.Session(turns=[app.Turn("a", (pair.Reply(), pair.Reply("b")))])
    assert 'class="waits"' not in app.completion(session, 0)
    session.halt = threading.Event()
    assert 'class="waits"' in app.completion(session, 0)
    assert 'class="waits"' not in app.completion(session, 1)
    assert app.conversation(session, 0)[-1]["content"][0]["text"] == "…"
    assert session.messages(0)[-1]["role"] == "user"  # the model does not read it


def test_the_card_gives_results_and_figures(models: tuple[Any, Any], tmp_path: Path) -> None:
    assert app.card_page(models) is None
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "one.png").write_bytes(b"png")
    card = (
        "# m\n\n## Results\n\n| a | b |\n\n## Why\n\n![A map](figures/one.png)\n![Gone](figures/gone.png)\n"
    )
    (tmp_path / "README.md").write_text(card)
    shown = app.card_page((models[0], replace(models[1], reference=str(tmp_path))))
    assert shown.startswith('<div class="scroll" tabindex="0">\n\n| a | b |\n\n</div>\n\n<figure>')
    assert 'alt="A map" src="data:image/png;base64,cG5n"' in shown
    assert "Gone" not in shown


@pytest.mark.parametrize("conversation", [False, True])
def test_the_page_can_be_built(models: tuple[Any, Any], chatting: Any, conversation: bool) -> None:
    for model in models:
        model.tokenizer.chat_template = CHAT if conversation else None
    kinds = {part["type"] for part in app.page(models, most_tokens=64).config["components"]}
    assert ("chatbot" in kinds) == conversation


def test_the_front_matter_is_what_a_space_needs() -> None:
    fields = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert fields["sdk"] == "gradio"
    assert (SPACE / fields["app_file"]).is_file()
    assert len(fields["short_description"]) <= 60
    assert {"title", "emoji", "colorFrom", "colorTo", "license"} <= fields.keys()
    constraints = (SPACE.parent.parent / "constraints.txt").read_text(encoding="utf-8").split()
    assert f"gradio=={fields['sdk_version']}" in constraints
    assert fields["python_version"] == "3.12"  # the default, 3.10, is too old for transformers


def test_the_files_import_nothing_but_what_the_requirements_name() -> None:
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").split()
    named = {re.split("[<>=]", line)[0] for line in lines} | {"chat_template", "pair", "session"}
    imported = set()
    for path in SPACE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    assert imported - sys.stdlib_module_names <= named
    assert "torch" in lines  # the Space's hardware decides which one


# Many at once -------------------------------------------------------------------------------------


def generated(model: Any, messages: list[dict[str, str]], num_tokens: int) -> str:
    """What `model.generate` makes of a conversation by itself."""
    ids = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    start = ids["input_ids"].shape[1]
    out = model.model.generate(**ids, max_new_tokens=num_tokens, do_sample=False)[0, start:]
    return str(model.tokenizer.decode(out, skip_special_tokens=True)).rstrip("\ufffd")


def test_many_visitors_at_once_each_have_their_own_conversation(chatting: tuple[Any, Any]) -> None:
    visitors, num_tokens = 10, 4
    demo = app.page(chatting, most_tokens=64)
    _, url, _ = demo.launch(**app.LOOK, server_name=HOST, prevent_thread_lock=True, quiet=True)

    def visit(number: int) -> list[str]:
        client = Client(url, verbose=False, httpx_kwargs={"timeout": HUNG_SECONDS})
        for turn in ("first", "second"):
            job = client.submit(f"{turn} of {number}", 0, False, num_tokens, 0.0, 1.0, api_name="/send")
            job.result()
        shown = job.outputs()[-1]
        return [message["content"][0]["text"] for side in (1, 4) for message in shown[side]]

    with ThreadPoolExecutor(visitors) as pool:
        seen = list(pool.map(visit, range(visitors)))
    demo.close()
    for number, texts in enumerate(seen):
        expected = []
        for model in chatting:
            said: list[dict[str, str]] = []
            for turn in ("first", "second"):
                said.append({"role": "user", "content": f"{turn} of {number}"})
                said.append({"role": "assistant", "content": generated(model, said, num_tokens)})
            expected += [message["content"] for message in said]
        assert texts == expected


@pytest.mark.skipif(torch.version.cuda is None, reason="ZeroGPU's client needs a torch built for CUDA")
def test_on_zerogpu_the_page_starts_with_its_models_on_the_device(tmp_path: Path, tiny: Path) -> None:
    class Lender(BaseHTTPRequestHandler):
        """Stands for the service that lends GPUs: it hears that the page has started."""

        def do_POST(self) -> None:
            heard.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    heard: list[str] = []
    with ThreadingHTTPServer((HOST, 0), Lender) as lender:
        threading.Thread(target=lender.serve_forever, daemon=True).start()
        variables = {
            "SPACES_ZERO_GPU": "true",
            "SPACES_ZERO_DEVICE_API_URL": f"http://{HOST}:{lender.server_port}",
            "SOURCE_MODEL": str(DEMO_MODEL),
            "PRUNED_MODEL": str(tiny),
            "GRADIO_SERVER_PORT": str(free_port(None)),
            "HOME": str(tmp_path),
        }
        with (tmp_path / "log").open("w") as log:
            page = subprocess.Popen(
                [sys.executable, str(SPACE / "app.py")],
                env={**os.environ, **variables},
                stdout=log,
                stderr=log,
            )
        while page.poll() is None and not heard:
            time.sleep(0.1)
        page.terminate()
        page.wait(timeout=HUNG_SECONDS)
        lender.shutdown()
    assert heard == ["/startup-report"], (tmp_path / "log").read_text()


# factory space ------------------------------------------------------------------------------------


def a_build_folder(folder: Path, build: Build, model: Path) -> Path:
    folder.mkdir()
    build.write(folder)
    shutil.copytree(model, folder / "model")
    return folder


def demo_build(**changes: Any) -> Build:
    source, layers = resolve(str(DEMO_MODEL)), demo_healed().plan.num_layers
    fewer = {name: getattr(source, name)[:layers] for name in ("layer_parameters", "layer_bytes")}
    source = source.model_copy(update={"name": "demo", "num_layers": layers, **fewer})
    return demo_healed().model_copy(update={"source": source, **changes})


def test_the_source_of_the_demo_is_the_embedded_model(tmp_path: Path, tiny: Path) -> None:
    build = a_build_folder(tmp_path / "b", demo_build(), tiny)
    variables = pair_environment(build, source=None)
    assert variables["SOURCE_MODEL"] == str(DEMO_MODEL.resolve())
    assert variables["PRUNED_MODEL"] == str(build / "model")


def test_a_folder_source_has_to_be_given_and_has_to_be_the_right_one(tmp_path: Path, tiny: Path) -> None:
    build = a_build_folder(tmp_path / "b", demo_build(reference="mine"), tiny)
    with pytest.raises(UsageError) as needed:
        pair_environment(build, source=None)
    assert "`source=FOLDER`" in needed.value.hint
    with pytest.raises(UsageError, match="is not the source of demo-drop30: content hash"):
        pair_environment(build, source=tiny)
    with pytest.raises(UsageError, match="is not a folder"):
        pair_environment(build, source=tmp_path / "gone")
    assert pair_environment(build, source=DEMO_MODEL)["SOURCE_MODEL"] == str(DEMO_MODEL.resolve())


def test_a_hub_source_that_is_not_cached_is_an_error(tmp_path: Path, tiny: Path) -> None:
    build = a_build_folder(tmp_path / "b", healing_discarded(), tiny)
    with pytest.raises(HubError, match="is not in the Hub's cache"):
        pair_environment(build, source=None)


def test_models_that_need_code_of_their_own_are_refused(tmp_path: Path, tiny: Path) -> None:
    build = demo_build()
    foreign = build.source.model_copy(update={"remote_code": True})
    folder = a_build_folder(tmp_path / "b", build.model_copy(update={"source": foreign}), tiny)
    with pytest.raises(ModelError, match="demo needs its own code"):
        pair_environment(folder, source=None)


def test_a_taken_port_is_an_error() -> None:
    port = free_port(None)
    with socket.socket() as taken:
        taken.bind((HOST, port))
        taken.listen()
        with pytest.raises(UsageError, match=f"cannot use port {port}"):
            free_port(port)


def started(build: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "factory", "space", str(build), "--no-browser", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_command_serves_the_page_and_ends_it_on_ctrl_c(tmp_path: Path, tiny: Path) -> None:
    port = free_port(None)
    process = started(a_build_folder(tmp_path / "b", demo_build(), tiny), "--port", str(port))
    assert process.stdout is not None
    assert process.stdout.readline() == f"http://127.0.0.1:{port}  (Ctrl-C stops it)\n"
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=HUNG_SECONDS).read().decode()
    assert "b and its source" in page
    (child,) = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=HUNG_SECONDS)
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert not child.is_running()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=HUNG_SECONDS)


def test_a_command_ended_while_it_starts_leaves_no_process(tmp_path: Path, tiny: Path) -> None:
    process = started(a_build_folder(tmp_path / "b", demo_build(), tiny))
    while not (children := psutil.Process(process.pid).children()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=HUNG_SECONDS)
    assert process.returncode == 0
    assert not children[0].is_running()


def test_a_signal_while_a_process_starts_waits_until_it_is_known() -> None:
    known: list[str] = []

    def start() -> None:
        with _held_back():
            signal.raise_signal(signal.SIGINT)
            known.append("the process")

    with pytest.raises(KeyboardInterrupt):
        start()
    assert known


def test_a_page_that_cannot_start_is_an_error(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = a_build_folder(tmp_path / "b", demo_build(), tiny)
    (tmp_path / "gradio.py").write_text("raise SystemExit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(FactoryError, match="exited unexpectedly with code 3"):
        serve(build, source=None, port=None, ready=lambda url: None)


def talked(models: Any, *lines: str, **sampling: Any) -> str:
    """What the comparison in a terminal shows for these lines."""
    out, left = io.StringIO(), iter(lines)

    def ask(prompt: str) -> str:
        out.write(prompt)
        line = next(left, None)
        if line is None:
            raise EOFError
        return line

    terminal.talk(models, pair.Sampling(12, 0, **sampling), ask, out)
    return out.getvalue()


def test_in_a_terminal_each_line_goes_to_both_and_the_facts_follow(models: tuple[Any, Any]) -> None:
    shown = talked(models, "Once upon")
    for role, model in zip(("source", "result"), models, strict=True):
        (reply,) = list(pair.stream([model], ask("Once upon")[:1], GREEDY))[-1]
        assert f"\n{role}:\n{reply.text}\n({reply.num_tokens} tokens" in shown
    assert "base models" in shown


def test_in_a_terminal_chats_remember_until_an_empty_line(chatting: tuple[Any, Any]) -> None:
    remembered = talked(chatting, "one", "two").split("> ")[2]
    alone = talked(chatting, "two").split("> ")[1]
    forgotten = talked(chatting, "one", "", "two").split("> ")[3]
    text = [re.sub(r"\d+ tokens/s", "", part) for part in (remembered, alone, forgotten)]
    assert text[2].split("(")[0] == text[1].split("(")[0]
    assert text[0].split("(")[0] != text[1].split("(")[0]


def test_a_model_cannot_steer_the_terminal() -> None:
    assert "a\x1b[2J\x9b\r\tb\n".translate(terminal.HARMFUL) == "a[2J\tb\n"
