"""A data set on the Hub is read by the split and column it has; what it lacks is said with what there is."""

import json
from collections.abc import Iterator

import pytest

from factory.config.references import check_data
from factory.errors import DataError
from tests.loopback_hub import Hub
from tests.loopback_hub.client import Answer, Client

NAME = "acme/text"
CONFIGS = b"""---
configs:
- config_name: one
  data_files: one.jsonl
- config_name: two
  data_files:
  - split: validation
    path: two.jsonl
---
"""


@pytest.fixture(scope="module")
def client(served_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(served_hub, tmp_path_factory.mktemp("home"), HURRY="1")
    yield client
    client.close()


def lines(**columns: list[object]) -> bytes:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def opened(client: Client, reference: str, split: str = "validation") -> Answer:
    return client.call("open_text", reference, split, token=None)


def test_a_data_set_without_a_validation_split_gives_its_training_split(hub: Hub, client: Client) -> None:
    hub.put_dataset(NAME, {"train.jsonl": lines(text=["a", "b"])})
    for split in ("train", "validation"):
        value = opened(client, NAME, split).value
        assert (value["name"], value["split"], value["documents"]) == (NAME, "train", ["a", "b"])


def test_one_with_a_validation_split_gives_that(hub: Hub, client: Client) -> None:
    hub.put_dataset(NAME, {"train.jsonl": lines(text=["a"]), "validation.jsonl": lines(text=["b"])})
    for reference in (NAME, f"{NAME}#text"):
        value = opened(client, reference).value
        assert (value["name"], value["split"], value["documents"]) == (NAME, "validation", ["b"])


def test_the_only_column_of_strings_is_read_and_becomes_part_of_the_name(hub: Hub, client: Client) -> None:
    commit = hub.put_dataset(NAME, {"train.jsonl": lines(content=["a", "", None, "b"], stars=[1, 2, 3, 4])})
    for reference in (NAME, f"{NAME}#content", f"{NAME}#content@{commit}", f"{NAME}@main"):
        value = opened(client, reference).value
        assert (value["name"], value["version"]) == (f"{NAME}#content", commit)
        assert value["documents"] == ["a", "b"]


@pytest.mark.parametrize(
    ("reference", "message", "hint"),
    [
        (NAME, "has no column 'text'; it has title, body, stars", f"give {NAME}#title or {NAME}#body"),
        (f"{NAME}#nix", "has no column 'nix'; it has title, body, stars", f"{NAME}#title or {NAME}#body"),
        (f"{NAME}#stars", "holds int64 in column 'stars'", f"{NAME}#title or {NAME}#body"),
    ],
)
def test_a_column_that_is_not_there_or_not_the_only_one_is_refused_with_those_there_are(
    hub: Hub, client: Client, reference: str, message: str, hint: str
) -> None:
    hub.put_dataset(NAME, {"train.jsonl": lines(title=["a"], body=["b"], stars=[1])})
    answer = opened(client, reference)
    assert answer.error == "DataError"
    assert message in answer.message
    assert hint in answer.hint
    assert opened(client, f"{NAME}#body").value["documents"] == ["b"]


def test_a_split_that_is_not_there_is_refused_with_those_there_are(hub: Hub, client: Client) -> None:
    hub.put_dataset(NAME, {"test.jsonl": lines(text=["a"])})
    answer = opened(client, NAME)
    assert answer.message == f"data set '{NAME}' has no split train or validation, only test"
    assert opened(client, NAME, "train").message == f"data set '{NAME}' has no split train, only test"


def test_a_split_can_be_named_and_is_part_of_the_name_where_it_is_not_the_usual_one(
    hub: Hub, client: Client
) -> None:
    hub.put_dataset(NAME, {f"{split}.jsonl": lines(text=[split], body=["b"]) for split in ("train", "test")})
    value = opened(client, f"{NAME}[test]").value
    assert (value["name"], value["split"], value["documents"]) == (f"{NAME}[test]", "test", ["test"])
    assert opened(client, f"{NAME}[test]#body").value["name"] == f"{NAME}[test]#body"
    assert opened(client, f"{NAME}[test]#body@main").value["documents"] == ["b"]
    assert opened(client, f"{NAME}[train]").value["name"] == NAME
    answer = opened(client, f"{NAME}[nix]")
    assert answer.message == f"data set '{NAME}' has no split nix, only train, test"
    assert answer.hint == f"give {NAME}[train] or {NAME}[test]"


@pytest.mark.parametrize("more", [{}, {"tools": [1]}], ids=["one form", "mixed forms"])
@pytest.mark.parametrize("reference", [NAME, f"{NAME}#messages"])
def test_conversations_on_the_hub_are_read_as_such(
    hub: Hub, client: Client, reference: str, more: dict[str, object]
) -> None:
    asked, answered = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}
    rows = [[asked, answered | more], [asked], [asked, answered]]
    hub.put_dataset(NAME, {"train.jsonl": lines(messages=rows, source=["x"] * 3)})
    value = opened(client, reference).value
    assert (value["name"], value["is_chat"]) == (f"{NAME}#messages", True)
    assert list(map(json.loads, value["documents"])) == [[asked, answered | more], [asked, answered]]
    assert opened(client, f"{NAME}#source").value["documents"] == ["x"] * 3


def test_a_configuration_that_is_not_there_is_refused_with_those_there_are(hub: Hub, client: Client) -> None:
    files = {"one.jsonl": lines(text=["1"]), "two.jsonl": lines(text=["2"]), "README.md": CONFIGS}
    hub.put_dataset(NAME, files)
    missing, wrong = opened(client, NAME), opened(client, f"{NAME}:nix")
    assert missing.message == f"data set '{NAME}' has several configurations"
    assert wrong.message == f"data set '{NAME}' has no configuration 'nix'"
    assert missing.hint == wrong.hint == f"give {NAME}:one or {NAME}:two"
    split = opened(client, f"{NAME}:train")
    assert split.message == f"data set '{NAME}' has no configuration 'train'"
    assert split.hint == f"{missing.hint}; a split is written {NAME}[train]"
    assert opened(client, f"{NAME}:one").value["documents"] == ["1"]
    assert opened(client, f"{NAME}:two#text").value["documents"] == ["2"]


@pytest.mark.parametrize(
    "files",
    [{"README.md": b"nothing else"}, {"text.py": b"import datasets\n"}, {"train.jsonl": lines(n=[1])}],
)
def test_a_data_set_without_text_is_one_line_before_any_work(
    hub: Hub, client: Client, files: dict[str, bytes]
) -> None:
    hub.put_dataset(NAME, files)
    answer = opened(client, NAME)
    assert answer.error == "DataError", answer.message
    assert answer.hint.startswith("use another data set")


def test_a_gated_data_set_and_a_wrong_revision_name_the_page_of_the_data_set(
    hub: Hub, client: Client
) -> None:
    hub.put_dataset(NAME, {"train.jsonl": lines(text=["a"]), "README.md": b"# Text\n"})
    page = f"{hub.url}/datasets/{NAME}"
    assert opened(client, f"{NAME}@v9").hint == f"see its commits: {page}/commits"
    hub.repository(NAME, kind="dataset").gated_to = {"alice"}
    assert opened(client, NAME).hint.startswith(f"accept its terms at {page}, ")


@pytest.mark.parametrize(
    "card",
    [
        "configs: [5]",
        "configs: [[5]]",
        "dataset_info: {features: 5}",
        "dataset_info: [5]",
        "dataset_info: {features: [{name: text, dtype: nonsense}]}",
        "configs: [{config_name: default, data_files: '*.csv', names: 7}]",
        "configs: [{config_name: default, data_files: '*.csv', encoding: nonsense}]",
        "configs: [{config_name: default, data_files: '*.csv', chunksize: abc}]",
    ],
)
def test_a_card_whose_settings_make_no_sense_is_an_error_of_one_line(
    hub: Hub, client: Client, card: str
) -> None:
    hub.put_dataset(NAME, {"a.csv": b"text\none\n", "README.md": f"---\n{card}\n---\n".encode()})
    answer = opened(client, NAME)
    assert answer.error == "DataError", answer.message
    assert answer.message.startswith(f"cannot read data set '{NAME}': "), answer.message
    assert "\n" not in answer.message


@pytest.mark.parametrize("reference", ["a/b#", "a/b#@main", "a/b:c#", "a#b", "#b"])
def test_a_column_without_a_name_or_a_data_set_is_no_reference(reference: str) -> None:
    with pytest.raises(DataError, match="does not exist") as caught:
        check_data(reference)
    assert "owner/name:config[split]#column@revision" in caught.value.hint
