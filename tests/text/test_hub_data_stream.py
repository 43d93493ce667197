"""Hub data sets are read as a stream: each document once and in order, whatever happens to the connection."""

import base64
import gzip
import io
import json
import random
from collections.abc import Iterator

import pyarrow
import pytest
from pyarrow import parquet

from tests.loopback_hub import Hub
from tests.loopback_hub.client import Client

NAME = "acme/text"
TRIES = 6  # of the Hub's client, for one range of a file
READS = 6  # of ours: the first, and one after each wait
# Incompressible, so that the first file takes several ranges of 5 MB and two steps of `datasets` of 10 MB.
DRAW = random.Random(0)
LARGE = [f"{n} {base64.b64encode(DRAW.randbytes(12_000)).decode()}" for n in range(920)]
SHARDS = [LARGE, [f"second {n}" for n in range(40)], [f"third {n}" for n in range(40)]]
DOCUMENTS = [document for shard in SHARDS for document in shard]


def encode(documents: list[str], ending: str) -> bytes:
    if ending == "parquet":
        stream = io.BytesIO()
        parquet.write_table(pyarrow.table({"text": documents}), stream, row_group_size=100)
        return stream.getvalue()
    lines = documents if ending.startswith("txt") else [json.dumps({"text": text}) for text in documents]
    content = "".join(f"{line}\n" for line in lines).encode()
    return gzip.compress(content, compresslevel=1, mtime=0) if ending.endswith("gz") else content


def put(hub: Hub, ending: str, shards: list[list[str]] = SHARDS) -> None:
    hub.put_dataset(NAME, {f"train-{n}.{ending}": encode(shard, ending) for n, shard in enumerate(shards)})


def content_of(hub: Hub, number: int) -> str:
    """Where the content of a shard is served, as a pattern."""
    files = hub.storage.repositories["dataset", NAME].find("main").files  # type: ignore[union-attr]
    path, file = next((path, file) for path, file in files.items() if path.startswith(f"train-{number}"))
    return f"/blobs/{file.sha256}" if file.lfs else f"/datasets/{NAME}/resolve/.*/{path}$"


@pytest.fixture(scope="module")
def client(served_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(served_hub, tmp_path_factory.mktemp("home"), HURRY="1")
    yield client
    client.close()


@pytest.mark.parametrize(("ending", "before"), [("jsonl.gz", 4), ("txt.gz", 2), ("parquet", 2)])
def test_breaks_longer_than_the_client_s_patience_cost_no_document(
    hub: Hub, client: Client, ending: str, before: int
) -> None:
    put(hub, ending)
    faults = [
        hub.fail("GET", content_of(hub, 0), truncate=True, skip=before, times=TRIES + 1),
        hub.fail("GET", content_of(hub, 1), status=503, times=TRIES + 1),
        hub.fail("GET", content_of(hub, 2), drop=True, times=2 * TRIES),
    ]
    answer = client.call("read_text", NAME, token=None)
    assert not answer.message
    assert answer.value == DOCUMENTS
    assert [fault.times for fault in faults] == [0, 0, 0]


def test_each_document_that_comes_gives_new_patience(hub: Hub, client: Client) -> None:
    shards = [[f"document {n}"] for n in range(READS + 2)]
    put(hub, "txt", shards)
    for number in range(len(shards)):
        hub.fail("GET", content_of(hub, number), status=503, times=TRIES)
    assert client.call("read_text", NAME, token=None).value == [text for shard in shards for text in shard]


@pytest.mark.parametrize(
    ("how", "message"), [({"drop": True}, "no connection to"), ({"status": 503}, "returned an error (503)")]
)
def test_a_break_for_good_is_an_error_after_so_many_reads(
    hub: Hub, client: Client, how: dict[str, object], message: str
) -> None:
    put(hub, "txt", SHARDS[1:])
    hub.fail("GET", content_of(hub, 1), **how)
    answer = client.call("read_text", NAME, token=None)
    assert (answer.error, message in answer.message) == ("HubError", True), answer.message
    assert "run the same command again" in answer.hint
    assert hub.count("GET", "train-1.txt") == READS * TRIES


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl", "parquet"])
def test_a_shard_cut_short_for_good_is_an_error_and_no_end(hub: Hub, client: Client, ending: str) -> None:
    whole = [encode(shard, ending) for shard in SHARDS[1:]]
    hub.put_dataset(NAME, {f"train-0.{ending}": whole[0], f"train-1.{ending}": whole[1][:-20]})
    answer = client.call("read_text", NAME, token=None)
    assert answer.error == "DataError"
    assert f"cannot read data set '{NAME}'" in answer.message
    assert "one of its files is damaged" in answer.hint
