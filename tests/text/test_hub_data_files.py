"""A data set's card leads to files of its own alone: nothing else is asked or read in its name."""

import io
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from tests.loopback_hub import Hub
from tests.loopback_hub.client import Client

NAME = "acme/text"
LINES = b'{"text": "one"}\n{"text": "two"}\n'


@pytest.fixture(scope="module")
def client(served_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(served_hub, tmp_path_factory.mktemp("home"), HURRY="1")
    yield client
    client.close()


@pytest.fixture
def inside() -> Iterator[socket.socket]:
    """A service of this machine's network that nobody outside can reach."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield server


def is_asked(server: socket.socket) -> bool:
    try:
        server.accept()
    except BlockingIOError:
        return False
    return True


def put(hub: Hub, configuration: dict[str, object], *, card: str = "README.md") -> None:
    values = json.dumps({"configs": [{"config_name": "default"} | configuration]})  # JSON is YAML
    content = f"---\n{values}\n---\n" if card == "README.md" else values
    files = {"data/a.jsonl": LINES, "data/b.jsonl": b'{"text": "other"}\n'}
    hub.put_dataset(NAME, files | {card: content.encode()})


@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize("place", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "2130706433"])
def test_no_address_that_a_card_names_is_asked(
    hub: Hub, client: Client, inside: socket.socket, place: str, card: str
) -> None:
    address = f"http://{place}:{inside.getsockname()[1]}/x.jsonl"
    put(hub, {"data_files": address}, card=card)
    answer = client.call("read_text", NAME, token=None)
    assert (answer.error, address in answer.message) == ("DataError", True), answer.message
    assert not is_asked(inside)


@pytest.mark.parametrize(
    "configuration",
    [
        {"data_files": [{"split": "train", "path": ["data/a.jsonl", "http://10.0.0.1/x.jsonl"]}]},
        {"data_files": ["data/a.jsonl", "https://example.org/x.jsonl"]},
        {"data_files": "zip://*.jsonl::http://10.0.0.1/x.zip"},
        {"data_files": "HTTP://10.0.0.1/x.jsonl"},
        {"data_files": "hf://datasets/acme/text2/a.jsonl"},
        {"data_files": "hf://datasets/alice/private/a.jsonl"},
        {"data_files": "hf://datasets/acme/text/../private/a.jsonl"},
        {"data_files": "../private/a.jsonl"},
        {"data_files": "file:///tmp/*.jsonl"},
        {"data_dir": "../private"},
        {"data_dir": "http://10.0.0.1/"},
    ],
    ids=str,
)
def test_what_is_no_file_of_the_data_set_is_refused(
    hub: Hub, client: Client, configuration: dict[str, object]
) -> None:
    put(hub, configuration)
    answer = client.call("read_text", NAME, token=None)
    assert answer.error == "DataError"
    assert "not one of its own files" in answer.message


def test_no_file_of_this_machine_is_read(hub: Hub, client: Client, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_bytes(LINES)
    put(hub, {"data_files": str(tmp_path / "*.jsonl")})
    answer = client.call("read_text", NAME, token=None)
    assert (answer.error, str(tmp_path) in answer.message) == ("DataError", True)


@pytest.mark.parametrize(
    "configuration",
    [
        {"data_files": "data/a.jsonl"},
        {"data_files": "data/a*.jsonl"},
        {"data_files": "**/[a].jsonl"},
        {
            "data_files": [
                {"split": "train", "path": ["data/a.jsonl"]},
                {"split": "test", "path": "data/b.jsonl"},
            ]
        },
        {"data_files": "hf://datasets/acme/text@main/data/a.jsonl"},
    ],
    ids=str,
)
def test_files_of_the_data_set_are_read_however_its_card_names_them(
    hub: Hub, client: Client, configuration: dict[str, object]
) -> None:
    put(hub, configuration)
    answer = client.call("read_text", NAME, token=None)
    assert not answer.message
    assert answer.value == ["one", "two"]


def test_no_picture_that_a_row_names_is_asked_for(hub: Hub, client: Client, inside: socket.socket) -> None:
    address = f"http://127.0.0.1:{inside.getsockname()[1]}/x.png"
    rows = pyarrow.table({"text": ["one"], "image": [{"path": address, "bytes": None}]})
    stream = io.BytesIO()
    parquet.write_table(rows, stream)
    features = [{"name": "text", "dtype": "string"}, {"name": "image", "dtype": "image"}]
    card = f"---\ndataset_info: {json.dumps({'features': features})}\n---\n"
    hub.put_dataset(NAME, {"a.parquet": stream.getvalue(), "README.md": card.encode()})
    assert client.call("read_text", NAME, token=None).value == ["one"]
    assert not is_asked(inside)


@pytest.mark.parametrize(
    "card",
    [
        b"---\n- configs\n---\n",
        b"---\nconfigs: [a\n---\n",
        b"---\nconfigs: a\n---\n",
        b"---\nname: \xe9\n---\n",
        b"---\nx: &x {configs: a}\n<<: *x\n---\n",
        b"---\nconfigs:\n- config_name: a\n  data_files: &a [*a]\n---\n",
    ],
)
def test_a_card_that_cannot_be_read_is_an_error_of_one_line(hub: Hub, client: Client, card: bytes) -> None:
    hub.put_dataset(NAME, {"a.jsonl": LINES, "README.md": card})
    answer = client.call("read_text", NAME, token=None)
    assert answer.error == "DataError"
    assert "\n" not in answer.message


def test_questions_are_read_from_files_of_their_data_set_alone(
    hub: Hub, client: Client, inside: socket.socket, tmp_path: Path
) -> None:
    put(hub, {"data_files": f"http://127.0.0.1:{inside.getsockname()[1]}/x.jsonl"})
    task = tmp_path / "rhymes.yaml"
    task.write_text(f"task: rhymes\ndataset_path: {NAME}\ntest_split: train\noutput_type: loglikelihood\n")
    answer = client.call("load_task", str(task), token=None)
    assert (answer.error, "not one of its own files" in answer.message) == ("DataError", True), answer.message
    assert not is_asked(inside)


def test_a_settings_file_that_holds_a_list_is_an_error_of_one_line(hub: Hub, client: Client) -> None:
    hub.put_dataset(NAME, {"a.jsonl": LINES, ".huggingface.yaml": b"- configs\n"})
    answer = client.call("read_text", NAME, token=None)
    assert (answer.error, "of type list" in answer.message) == ("DataError", True), answer.message
