"""The texts of a run: opened, kept apart and checked."""

from collections.abc import Sequence
from typing import TypedDict

from factory.artifacts import DataSource, Source
from factory.config.choices import STANDARD_LIBRARY
from factory.config.references import local_path
from factory.config.settings import BuildConfig
from factory.store.stage import STAGES
from factory.text.overlap import Contents, Hashes, keep_apart, look
from factory.text.text import NOTHING, SHUFFLE_BUFFER, Text, Texts, open_text

FEW = 32  # documents of a data set on the Hub, to see whether it can be read and how long they are
SPARE = 1_000  # documents
LOOKED_AT: dict[tuple[DataSource, int | None], Contents] = {}  # in this process: equal texts are read once


def open_texts(
    config: BuildConfig, *, measures: bool = True, heals: bool = True, evaluates: bool = True
) -> Texts:
    """Open the texts that a run reads; a missing or unknown one is an error here, before any work.

    Files are read once from end to end, and so are the first documents of a data set on the Hub that could
    share some with another text.

    Args:
        measures: Whether it reads the calibration text.
        heals: Whether it reads the healing text; one that does not heal opens none.
        evaluates: Whether it reads the evaluation text. A file, and one that is also measured on, is opened
            all the same: the documents are divided as a build divides them.
    """
    heals = heals and config.heal_enabled
    data = config.evaluate.data
    is_here = data in STANDARD_LIBRARY or local_path(data).is_file()
    evaluates = evaluates or (measures and (is_here or data == config.measure.data))
    evaluation = open_text(data, split="validation") if evaluates else NOTHING
    calibration = open_text(config.measure.data, split="validation") if measures else NOTHING
    healing = open_text(config.heal.data, split="train") if heals else NOTHING
    # All that an evaluation can come to read where half of a data set is left out, and some to spare.
    most = 2 * (SHUFFLE_BUFFER + config.evaluate.num_documents) + SPARE
    apart = keep_apart(evaluation, (calibration, healing), look=lambda text: _hashes(text, most=most))
    whole = (calibration, healing, evaluation)
    measured, healed = apart.others
    return Texts(measured, healed, apart.evaluation, remarks=apart.remarks, whole=whole)


def check_tokens(source: Source, texts: Texts) -> None:
    """Refuse local texts with a token that the source's embedding lacks; one on the Hub fails as it is read.

    Raises:
        ModelError: Names the token; or the tokenizer cannot be loaded.
    """
    from factory.model.tokenizer import load_encoder

    encoder = load_encoder(source.local_folder)
    for text in (texts.calibration, texts.healing, texts.evaluation):
        if not text.data.hub_id:
            encoder.check(text.documents())


def _hashes(text: Text, *, most: int) -> Hashes:
    return _look(text, most=most if text.data.hub_id else None).hashes


def _look(text: Text, *, most: int | None) -> Contents:
    key = (text.data, most)
    if key not in LOOKED_AT:
        LOOKED_AT[key] = look(text, most=most)
    return LOOKED_AT[key]


def contents(text: Text) -> Contents:
    """What a file holds, and the first documents of a data set on the Hub."""
    return _look(text, most=FEW if text.data.hub_id else None)


def reads_text(pending: Sequence[str]) -> bool:
    """Whether a stage that is still to be made reads text."""
    return any(stage.reads_text for name, stage in STAGES.items() if name in pending)


class Known(TypedDict, total=False):
    """What `preview` takes of the texts."""

    calibration: Contents
    evaluation: Contents


def known_lengths(texts: Texts, pending: Sequence[str]) -> Known:
    """How long the documents are, where stages that read them are pending: `check_texts` has read them."""
    if not reads_text(pending):
        return {}
    calibration, _, evaluation = texts.whole
    return {"calibration": contents(calibration), "evaluation": contents(evaluation)}


def check_texts(texts: Texts) -> tuple[str, ...]:
    """Read files through, and the first documents of data sets: a fault in them shows before the work.

    Returns:
        Remarks on rows without text.

    Raises:
        DataError: A text that cannot be read, or holds none.
    """
    remarks = []
    for text in {text.data: text for text in texts.whole if text is not NOTHING}.values():
        if num_empty := contents(text).num_empty:
            among = f" among the first of {text.data.name}" if text.data.hub_id else f" of {text.data.name}"
            remarks.append(f"{num_empty:,} rows{among} hold no text and are passed over")
    return tuple(remarks)
