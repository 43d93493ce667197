"""Keep texts apart: no evaluated document is also measured or healed on, whatever its file is called."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b, sha256
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy
from numpy.typing import NDArray

from factory.artifacts import DataSource
from factory.text.text import Text

Hashes = NDArray[numpy.uint64]  # [n], of documents: sorted, unique
MAX_LEFT_OUT = 0.75  # share of a text; beyond it, the shared documents are divided between both texts
# A crawl's pages lack headings and lines without end punctuation, so they never equal a dump's articles.
UNRELATED = frozenset({"allenai/c4", "wikimedia/wikipedia"})
NONE: Hashes = numpy.empty(0, dtype=numpy.uint64)


@dataclass(frozen=True)
class Contents:
    """The documents of a text, as far as it was read, as 8-byte hashes."""

    hashes: Hashes
    num_documents: int
    num_bytes: int  # of the documents in UTF-8
    num_empty: int  # rows without text, which are skipped
    is_whole: bool = True  # False: the text has more documents


def look(text: Text, *, most: int | None = None) -> Contents:
    """Read a text, or its first `most` documents.

    Raises:
        DataError: The text is empty, or has a fault; the message names the line.
    """
    num_bytes = num_empty = 0

    def hashes() -> Iterator[int]:
        nonlocal num_bytes, num_empty
        for row in text.rows():
            if row is None:
                num_empty += 1
            else:
                num_bytes += len(row.encode("utf-8", "surrogatepass"))
                yield hash_of(row)

    found = numpy.fromiter(islice(hashes(), most), dtype=numpy.uint64)
    return Contents(numpy.unique(found), len(found), num_bytes, num_empty, is_whole=len(found) != most)


def hash_of(document: str) -> int:
    """Hash a document's words to 64 bits, ignoring white space."""
    words = " ".join(document.split()).encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(words, digest_size=8).digest(), "little")


Look = Callable[[Text], Hashes]


@dataclass(frozen=True)
class Apart:
    """The texts of a build without common documents, and remarks on how they were separated."""

    evaluation: Text
    others: tuple[Text, ...]
    remarks: tuple[str, ...] = ()


def distinct(evaluations: Sequence[Text], *, look: Look) -> tuple[list[Text], list[str]]:
    """Return each different evaluation text once, and remarks on the others and on shared documents.

    Args:
        evaluations: Texts in the order in which they were given.
        look: Function that returns the hashes of a text's documents, as for `keep_apart`.
    """
    kept: list[Text] = []
    remarks: list[str] = []
    for text in evaluations:
        name = text.data.name
        shared = {earlier.data: _num_shared(text, earlier, look=look) for earlier in kept}
        if same := next((data for data, number in shared.items() if number is None), None):
            what = "named twice" if same == text.data else f"the same text as {same.name}"
            remarks.append(f"{name} is {what}: it is evaluated once")
            continue
        kept.append(text)
        remarks += [
            f"{number:,} documents of {name} are also in {earlier.name}: both losses include them"
            for earlier, number in shared.items()
            if number
        ]
    return kept, remarks


def _num_shared(text: Text, earlier: Text, *, look: Look) -> int | None:
    """Return how many documents two evaluation texts share; None if they are the same text."""
    one, other = text.data, earlier.data
    is_same = _is_same(one, other)
    if is_same and not one.hub_id:
        return None
    if not is_same and _are_apart(one, other):
        return 0
    hashes, others = look(text), look(earlier)
    if not (one.hub_id or other.hub_id) and numpy.array_equal(hashes, others):
        return None
    return len(numpy.intersect1d(hashes, others, assume_unique=True))


def keep_apart(evaluation: Text, others: tuple[Text, ...], *, look: Look) -> Apart:
    """Separate the evaluation text from the others, so that no document serves both.

    A block chosen, or a model trained, on the documents that it is evaluated on looks better than it is.
    A text that serves both is halved by the hashes of its documents. The evaluation keeps all documents that
    two texts share, unless they are most of the other text: then it keeps half, by their hashes.

    Args:
        look: Function that returns the hashes of a text's documents; of a Hub data set, of as many as the
            evaluation may read.
    """
    is_same = [_is_same(other.data, evaluation.data) for other in others]
    judged = _half(evaluation, 1) if any(is_same) else evaluation
    remarks: list[str] = []
    kept, left_out = [], NONE
    for other, same in zip(others, is_same, strict=True):
        if same:
            kept.append(_half(other, 0))
            if other.data.name != evaluation.data.name:
                remarks.append(
                    f"{other.data.name} is {evaluation.data.name} under another name: divided by document"
                )
            continue
        if _are_apart(evaluation.data, other.data):
            kept.append(other)
            continue
        divided = _divide(judged, other, hashes=look(judged), others=look(other))
        left_out = numpy.union1d(left_out, divided.from_evaluation)
        kept.append(divided.other)
        remarks += [divided.remark] if divided.remark else []
    return Apart(without(judged, left_out), tuple(kept), tuple(dict.fromkeys(remarks)))


def _is_same(one: DataSource, other: DataSource) -> bool:
    """Return whether two texts are the same: one split of a data set in any configuration, or equal files."""
    if one.hub_id or other.hub_id:
        return (one.hub_id, one.version, one.split) == (other.hub_id, other.version, other.split)
    return one.version == other.version and Path(one.name).suffix == Path(other.name).suffix


def _are_apart(one: DataSource, other: DataSource) -> bool:
    """Return whether two texts surely share no document: splits of one data set, or of Python's library."""
    if one.hub_id:
        if one.hub_id != other.hub_id and {one.hub_id, other.hub_id} <= UNRELATED:
            return True
        return (one.hub_id, one.version) == (other.hub_id, other.version)
    return one.name.startswith("stdlib:") and other.name.startswith("stdlib:")


class _Divided(NamedTuple):
    other: Text
    from_evaluation: Hashes = NONE  # what the evaluation leaves out
    remark: str = ""


def _divide(evaluation: Text, other: Text, *, hashes: Hashes, others: Hashes) -> _Divided:
    """Divide the documents that two texts share.

    Args:
        hashes: Hashes of the evaluation's documents.
        others: Hashes of the other text's documents; of a stream, of its first ones.
    """
    shared = numpy.intersect1d(hashes, others, assume_unique=True)
    is_stream = other.data.hub_id is not None
    name = evaluation.data.name
    if not len(shared):
        return _Divided(without(other, hashes) if is_stream else other)
    message = f"{len(shared):,} documents of {other.data.name} are also in the evaluation text {name}"
    possible = hashes if is_stream else shared  # a stream may hold more of them further on
    if len(shared) <= MAX_LEFT_OUT * len(others):
        return _Divided(without(other, possible), remark=f"{message}: they are left out")
    is_odd = possible % 2 == 1
    return _Divided(
        without(other, possible[is_odd]),
        from_evaluation=possible[~is_odd],
        remark=f"{message}: each of them serves one use",
    )


def without(text: Text, hashes: Hashes) -> Text:
    """Return the text without the documents that have these hashes; its `part` identifies them."""
    if not len(hashes):
        return text
    digest = sha256(hashes.astype("<u8").tobytes()).hexdigest()[:16]
    part = f"without any of {len(hashes):,} documents that serve another use ({digest})"
    part = f"{text.data.part}, {part}" if text.data.part else part
    return Text(text.data.model_copy(update={"part": part}), partial(_rows_without, text, hashes))


def _rows_without(text: Text, hashes: Hashes) -> Iterator[str | None]:
    return (row for row in text.rows() if row is None or not _is_among(row, hashes))


def _is_among(document: str, hashes: Hashes) -> bool:
    key = numpy.uint64(hash_of(document))
    place = int(numpy.searchsorted(hashes, key))
    return place < len(hashes) and bool(hashes[place] == key)


def _half(text: Text, number: int) -> Text:
    data = text.data.model_copy(update={"part": f"{number + 1} of 2"})
    return Text(data, partial(_rows_of_half, text, number))


def _rows_of_half(text: Text, number: int) -> Iterator[str | None]:
    for row in text.rows():
        if row is None or hash_of(row) % 2 == number:
            yield row
