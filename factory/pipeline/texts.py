"""Open the texts of a run, keep them apart and check them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

from factory.artifacts import DataSource, Source
from factory.config.choices import STANDARD_LIBRARY
from factory.config.references import OF_THE_HUB, local_data, share_of
from factory.config.settings import BuildConfig
from factory.errors import DataError, HubError
from factory.store.stage import STAGES
from factory.text.overlap import Contents, Hashes, distinct, keep_apart, look
from factory.text.text import NOTHING, SHUFFLE_BUFFER, Text, Texts, mixed, open_text

FEW = 32  # documents read of a data set on the Hub, to see whether it can be read and how long they are
SPARE = 1_000  # documents
SPLITS = ("of 1984, 12345 and 3.1415926", "x  =  [\n\n\t½,  é, 不要]", "it's THE CamelCase snake_case")
RENDERED = 1_000  # conversations of a file, to see whether the chat template can render them
LOOKED_AT: dict[tuple[DataSource, int | None], Contents] = {}  # per process: equal texts are read once


def open_texts(
    config: BuildConfig, *, measures: bool = True, heals: bool = True, evaluates: bool = True
) -> Texts:
    """Open the texts that a run reads, so that a missing or unknown one is an error before any work.

    Files are read once in full; of a data set on the Hub that may share documents with another text, the
    first documents are read.

    Args:
        measures: Whether the run reads the calibration set.
        heals: Whether the run reads the healing text; ignored if healing is off.
        evaluates: Whether the run reads the evaluation text. If that is a file, or also the calibration
            set, it is opened anyway, so that documents are divided as in a build.
    """
    heals = heals and config.has_adapter
    names, shares = zip(*map(share_of, config.heal.data), strict=True)
    wanted = {
        "calibration_data": [config.measure.data] if measures else [],
        "heal_data": list(names) if heals else [],
        "eval_data": [
            data
            for data in config.evaluate.data
            if evaluates or (measures and (_is_here(data) or data == config.measure.data))
        ],
    }
    with _explained(wanted if evaluates else {**wanted, "eval_data": []}):  # for which there is no option
        evaluations = [open_text(data, split="validation") for data in wanted["eval_data"]]
        calibration = next(
            (open_text(data, split="validation") for data in wanted["calibration_data"]), NOTHING
        )
        healings = [open_text(name, split="train") for name in wanted["heal_data"]] or [NOTHING]
    # The most that an evaluation can read if half of a data set is excluded, and some to spare.
    maximum = 2 * (SHUFFLE_BUFFER + config.evaluate.num_documents) + SPARE
    look_at = partial(_hashes, maximum=maximum)
    evaluations, remarks = distinct(evaluations, look=look_at)
    _check_names(evaluations)
    whole = (calibration, *healings, *evaluations)
    others: tuple[Text, ...] = (calibration, *healings)
    separated: list[Text] = []
    for evaluation in evaluations or [NOTHING]:
        apart = keep_apart(evaluation, others, look=look_at)
        others = apart.others
        separated.append(apart.evaluation)
        remarks += apart.remarks
    measured, *sources = others
    first, *also = separated
    several = tuple(sources) if len(sources) > 1 else ()
    healed = mixed(sources, shares) if several else sources[0]
    return Texts(measured, healed, first, tuple(remarks), whole, tuple(also), several)


@contextmanager
def _explained(wanted: Mapping[str, Sequence[str]]) -> Iterator[None]:
    """Say in an error of the Hub which data sets cannot be read, and which options name others.

    Args:
        wanted: Option → references to texts.
    """
    try:
        yield
    except HubError as error:
        remote = {data: option for option, texts in wanted.items() for data in texts if not _is_here(data)}
        named = [data for data in remote if OF_THE_HUB.split(data)[0] in error.message]
        which = "" if named else f"cannot read {' and '.join(remote)}: "
        options = [f"`{option}`" for option, texts in wanted.items() if {*texts} & {*(named or remote)}]
        raise HubError(
            f"{which}{error.message}",
            hint=f"{error.hint}; or give a text on this machine with {', '.join(options)}",
        ) from error


def _is_here(data: str) -> bool:
    return data in STANDARD_LIBRARY or local_data(data) is not None


def _check_names(texts: Sequence[Text]) -> None:
    """Refuse two different evaluation texts that no table could tell apart."""
    names = [text.data.name for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"`eval_data`: two texts are called {name}", hint="rename one of the files")


def check_kinds(source: Source, texts: Texts) -> str | None:
    """Refuse conversations for a model without a chat template.

    Returns:
        A note if a chat model is to be healed on plain text.

    Raises:
        DataError: The source has no chat template, and a text holds conversations.
    """
    chats = [text.data.name for text in texts.whole if text.data.is_chat]
    if chats and not source.has_chat_template:
        raise DataError(
            f"{chats[0]} holds conversations, and {source.name} has no chat template to render them",
            hint="give plain text, as another column with DATA#column, or the chat version of the model",
        )
    if source.has_chat_template and texts.healing is not NOTHING and not texts.healing.data.is_chat:
        what = f"{source.name} is a chat model to be healed on plain text, {texts.healing.data.name}"
        return f"{what}: `heal_data` takes conversations"
    return None


def check_rendering(source: Source, texts: Texts) -> None:
    """Render the first conversations of each text by the source's chat template, before weights are here.

    Raises:
        DataError: The chat template fails.
        ModelError: The tokenizer cannot be loaded, or the embedding lacks a token.
    """
    chats = [text for text in texts.whole if text.data.is_chat]
    if not chats:
        return
    from factory.hub.pull import tokenizer_folder
    from factory.model.tokenizer import load_encoder

    if folder := tokenizer_folder(source):
        encoder = load_encoder(folder)
        for text in chats:
            encoder.encode(list(islice(text.documents(), FEW)))


def check_tokens(source: Source, texts: Texts, config: BuildConfig, *, note: Callable[[str], None]) -> None:
    """Refuse local texts with a token that the source's embedding lacks; Hub data fails when it is read.

    Of conversations, the first are rendered by the source's chat template.

    Args:
        note: Callback that receives a line on a tokenizer that does not do as its file says, and on
            conversations that are too long to be used.

    Raises:
        DataError: The chat template fails.
        ModelError: The embedding lacks a token, which is named, or the tokenizer cannot be loaded.
    """
    from factory.model.tokenizer import load_encoder

    encoder = load_encoder(source.local_folder)
    if found := split_otherwise(source.local_folder, encoder.tokenizer):
        note(
            f"transformers splits {found!r} otherwise than the model's tokenizer.json says; its tokens, on "
            "which the model may not have been trained, are used throughout"
        )
    for text, length in (
        (texts.calibration, None),
        *((healing, config.heal.sequence_length) for healing in texts.healings),
        *((evaluation, config.evaluate.sequence_length) for evaluation in texts.evaluations),
    ):
        if text.data.is_chat:
            most = FEW if text.data.hub_id else RENDERED
            chats = [encoder.encode([chat])[0] for chat in islice(text.documents(), most)]
            unused = sum(not any(encoder.windows(chat, length=length)) for chat in chats) if length else 0
            if unused:
                among = f"{unused:,} of the first {len(chats):,} conversations of {text.data.name}"
                note(f"{among} have no answer in {length:,} tokens and are not used")
        if not text.data.hub_id:
            encoder.check(text.documents())


def split_otherwise(folder: Path, tokenizer: Any) -> str | None:
    """Return a text that a loaded tokenizer splits otherwise than the folder's tokenizer.json, if any.

    transformers 5 makes a named class's way of splitting anew, and drops the file's. The first piece is left
    out of the comparison: tokenizer_config.json may change it on purpose. Only the parts that split are
    tried, since nothing else of an untrusted file has been checked.
    """
    from tokenizers import Tokenizer

    path, loaded = folder / "tokenizer.json", getattr(tokenizer, "backend_tokenizer", None)
    if not path.is_file() or loaded is None:
        return None
    written = Tokenizer.from_file(str(path))
    return next((text for text in SPLITS if _pieces(written, text)[1:] != _pieces(loaded, text)[1:]), None)


def _pieces(tokenizer: Any, text: str) -> list[str]:
    splitter = tokenizer.pre_tokenizer
    return [piece for piece, _ in splitter.pre_tokenize_str(text)] if splitter else [text]


def _hashes(text: Text, *, maximum: int) -> Hashes:
    return _look(text, maximum=maximum if text.data.hub_id else None).hashes


def _look(text: Text, *, maximum: int | None) -> Contents:
    key = (text.data, maximum)
    if key not in LOOKED_AT:
        LOOKED_AT[key] = look(text, most=maximum)
    return LOOKED_AT[key]


def contents(text: Text) -> Contents:
    """Return facts about a whole file, or about the first documents of a data set on the Hub."""
    return _look(text, maximum=FEW if text.data.hub_id else None)


def reads_text(pending: Sequence[str]) -> bool:
    """Return whether a pending stage reads text."""
    return any(stage.reads_text for name, stage in STAGES.items() if name in pending)


class Known(TypedDict, total=False):
    """Facts about the texts that `preview` takes."""

    calibration: Contents
    evaluations: tuple[Contents, ...]


def known_lengths(texts: Texts, pending: Sequence[str]) -> Known:
    """Return facts about the documents if pending stages read them; `check_texts` has read them already."""
    if not reads_text(pending):
        return {}
    evaluations = texts.whole[-len(texts.evaluations) :]
    return {
        "calibration": contents(texts.whole[0]),
        "evaluations": tuple(contents(evaluation) for evaluation in evaluations),
    }


def check_texts(texts: Texts) -> tuple[str, ...]:
    """Read whole files and the first documents of data sets, so that faults show before the work.

    Returns:
        Notes on rows without text.

    Raises:
        DataError: A text cannot be read, or is empty.
    """
    remarks = []
    for text in {text.data: text for text in texts.whole if text is not NOTHING}.values():
        if num_empty := contents(text).num_empty:
            among = f" among the first of {text.data.name}" if text.data.hub_id else f" of {text.data.name}"
            lacks = "answer" if text.data.is_chat else "text"
            remarks.append(f"{num_empty:,} rows{among} have no {lacks} and are skipped")
    return tuple(remarks)
