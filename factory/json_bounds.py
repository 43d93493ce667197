"""How large files beside the weights may be, and of how many parts, before anybody parses them."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from factory.errors import UNTRUSTED, CheckpointError

# Larger ones are no model's. The largest index known, of 70,000 tensors, takes a third of its limit; the
# largest tokenizer.json a seventh.
VOCABULARIES = ("tokenizer.json", "vocab.json", "tekken.json")
WEIGHTS_INDEX = "model.safetensors.index.json"
MOST_BYTES = {"README.md": 2**24, WEIGHTS_INDEX: 2**26}
MOST_JSON_BYTES = 2**24  # of any other JSON
MOST_OTHER_BYTES = 2**28
# Each part of a JSON stands beside one of these, and takes up to 80 bytes once parsed, however few it takes
# here. A tensor in an index has two of them, a merge in a tokenizer.json three: the largest, of 262,000
# tokens, has 2.2 million.
MARKS = (b"{", b"[", b":", b",")
MOST_MARKS, MOST_VOCABULARY_MARKS = 2**20, 2**23
BLOCK_BYTES = 2**20


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Refuse files beside the weights that no model has in such a size, before they are downloaded.

    Raises:
        CheckpointError: Names the file.
    """
    for name, size_bytes in sizes.items():
        is_other = name in VOCABULARIES or not name.endswith(".json")
        most = MOST_BYTES.get(name, MOST_OTHER_BYTES if is_other else MOST_JSON_BYTES)
        if size_bytes > most:
            raise CheckpointError(
                f"{name} has {size_bytes:,} bytes; no model needs more than {most:,} of it", hint=UNTRUSTED
            )


def check_json(folder: Path, names: Iterable[str]) -> None:
    """Refuse those of a model's files that are JSON of more parts than any model has.

    Raises:
        CheckpointError: Names the file.
    """
    for name in names:
        if not name.endswith(".json"):
            continue
        most = MOST_VOCABULARY_MARKS if name in VOCABULARIES else MOST_MARKS
        count = 0
        with (folder / name).open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                count += sum(map(block.count, MARKS))
        if count > most:
            raise CheckpointError(
                f"{name} has {count:,} brackets, colons and commas; no model needs more than {most:,} of it",
                hint=UNTRUSTED,
            )
