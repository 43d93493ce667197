"""Load and check a model's tokenizer, and encode texts and conversations as tokens that the model knows."""

import base64
import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing

from factory.errors import UNTRUSTED, DataError, ModelError
from factory.model.config_fields import vocab_size

MAX_GROWTH = 64  # output characters per input character; Unicode's longest normal forms take 33 bytes
MAX_SPECIAL_TOKENS = 64  # around each text
PROBES = ("text", "A", "1", "я", "文")  # reveal the tokens around a text; some tokenizers know few letters
ASSISTANT = "assistant"
PROBE = "an answer"
OTHER_TEXT = "give text, as with another column, DATA#column, or another model"


class Conversation(str):
    """A conversation as a document: its messages as JSON, so that it is hashed, compared and sent as one."""

    __slots__ = ()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Return the messages as a chat template reads them, with `role` and `content`."""
        messages: list[dict[str, Any]] = json.loads(self)
        return messages


class Answered(list[int]):
    """Tokens of a conversation; only those of its answers carry loss."""

    def __init__(self, tokens: Sequence[int], answers: Sequence[int]) -> None:
        super().__init__(tokens)
        self.answers = list(answers)  # for each token: 1 in an answer, otherwise 0

    def first(self, length: int) -> "Answered":
        """Return the first tokens."""
        return Answered(self[:length], self.answers[:length])


def as_row(tokens: list[int]) -> dict[str, list[int]]:
    """Return a sequence as a row of a data set for TRL, which trains on what `assistant_masks` marks."""
    masks = {"assistant_masks": tokens.answers} if isinstance(tokens, Answered) else {}
    return {"input_ids": list(tokens), **masks}


def of_row(row: Mapping[str, list[int]]) -> list[int]:
    """Return the sequence that `as_row` made a row of."""
    tokens, masks = row["input_ids"], row.get("assistant_masks")
    return tokens if masks is None else Answered(tokens, masks)


class ChatTemplate:
    """A tokenizer's chat template, used as TRL does to train on the assistant's answers only.

    A template that marks the answers with `{% generation %}`, or of which TRL keeps a variant that does,
    tells their tokens itself. For any other, an answer is what follows the tokens of the messages before it
    with the template's invitation to answer, as TRL tells a completion from its prompt.

    Raises:
        DataError: The tokenizer has no chat template, or it fails.
    """

    def __init__(self, tokenizer: Any) -> None:
        from trl.chat_template_utils import get_training_chat_template, has_generation_markers

        if not tokenizer.chat_template:
            raise DataError("the model has no chat template, which conversations need", hint=OTHER_TEXT)
        self.tokenizer, self.variant = tokenizer, None
        self.marks = bool(
            getattr(tokenizer, "is_fast", False)
        )  # others cannot tell which tokens a part of the text became
        try:
            if self.marks and not has_generation_markers(tokenizer.chat_template):
                self.variant = get_training_chat_template(tokenizer)
        except _template_errors():  # ValueError: TRL knows no variant
            self.marks = False
        probe = [{"role": "user", "content": "1"}, {"role": ASSISTANT, "content": PROBE}]
        with _template_explained(probe):
            rendered = tokenizer.apply_chat_template(probe, tokenize=False, chat_template=self.variant)
        if PROBE not in rendered:  # templates for images take lists of parts, and drop plain text
            raise DataError("the model's chat template leaves out the words of an answer", hint=OTHER_TEXT)

    def encode(self, conversation: Conversation) -> Answered:
        """Encode a conversation, with no other special tokens than the template's.

        Raises:
            DataError: The template fails, or renders an answer otherwise once more messages follow.
        """
        messages = conversation.messages
        with _template_explained(messages):
            self._check_parts(messages)
            if not self.marks:
                return self._compared(messages)
            found = self._render(messages, chat_template=self.variant, return_assistant_tokens_mask=True)
            return Answered(found["input_ids"], found["assistant_masks"])

    def _check_parts(self, messages: Sequence[dict[str, Any]]) -> None:
        """Refuse contents in parts, `[{"type": "text", …}]`, that the template writes as Python does."""
        parts = [str(one["content"]) for one in messages if isinstance(one.get("content"), list)]
        if parts:
            rendered = self.tokenizer.apply_chat_template(
                messages, tokenize=False, chat_template=self.variant
            )
            if any(part in rendered for part in parts):
                raise ValueError("it takes a content that is a text, not a list of parts")

    def _render(self, messages: Sequence[dict[str, Any]], **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **options)

    def _compared(self, messages: Sequence[dict[str, Any]]) -> Answered:
        """Encode a conversation, and mark each answer by comparing it with the messages before it."""
        from trl.data_utils import common_prefix_length

        tokens = self._render(messages)["input_ids"]
        answers = [0] * len(tokens)
        for index, message in enumerate(messages):
            if message["role"] != ASSISTANT or not index:
                continue
            given = self._render(messages[:index], add_generation_prompt=True)["input_ids"]
            until = self._render(messages[: index + 1])["input_ids"]
            end = len(until)
            if tokens[:end] != until:
                raise ValueError("it renders an answer otherwise once more messages follow")
            start = common_prefix_length(given, until)
            answers[start:end] = [1] * (end - start)
        return Answered(tokens, answers)


def _template_errors() -> tuple[type[Exception], ...]:
    """Return what templates and their rendering raise: jinja's errors, and Python's inside expressions."""
    from jinja2 import TemplateError

    return (TemplateError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError)


@contextmanager
def _template_explained(messages: Sequence[dict[str, Any]]) -> Iterator[None]:
    try:
        yield
    except _template_errors() as error:
        raise DataError(
            f"the model's chat template fails on the conversation {json.dumps(messages)[:60]!r}: "
            f"{(str(error) or repr(error)).splitlines()[0][:120]}",
            hint="remove or change such conversations, or give text with another column",
        ) from error


class Encoder:
    """Encodes texts as token sequences that each start with the tokenizer's prefix.

    A window in the middle of a document needs the prefix as much as the first one: Gemma reads a window
    without BOS as noise (lm-evaluation-harness#2382). Tokens that a tokenizer puts after a text are left to
    training on whole documents: after a truncated text they would be wrong.

    Args:
        tokenizer: Tokenizer from transformers.
        vocab_size: Number of rows of the model's embedding.
    """

    def __init__(self, tokenizer: Any, *, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size

    @cached_property
    def open_ended(self) -> Any:
        """Return the tokenizer without tokens after a text, since a task's answer follows its question.

        Raises:
            ModelError: A tokenizer written in Python puts tokens after a text, which cannot be switched off.
        """
        if not self._around[1]:
            return self.tokenizer
        tokenizer = copy.deepcopy(self.tokenizer)
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ModelError(
                f"the tokenizer puts {self._around[1]} after each text, even after a task's question",
                hint="set add_eos_token to false in its tokenizer_config.json, or give `tasks=none`",
            )
        names = tokenizer.convert_ids_to_tokens(self.prefix)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=[*names, "$A"], special_tokens=list(set(zip(names, self.prefix, strict=True)))
        )
        return tokenizer

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        for probe in PROBES:
            whole = list(self.tokenizer(probe).input_ids)
            bare = list(self.tokenizer(probe, add_special_tokens=False).input_ids)
            for start in range(len(whole) - len(bare) + 1):
                if bare and whole[start : start + len(bare)] == bare:
                    return whole[:start], whole[start + len(bare) :]
        raise ModelError(
            f"cannot tell what the tokenizer puts around a text: it encodes {probe!r} as {whole}, and as "
            f"{bare} without special tokens",
            hint="give a model whose tokenizer adds special tokens only around a text",
        )

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    @property
    def prefix(self) -> list[int]:
        """Return the tokens that the tokenizer puts before a text: usually BOS, or none."""
        return self._around[0]

    @property
    def end(self) -> list[int]:
        """Return the tokens after a whole document: the tokenizer's, including an end token."""
        added, end = self._around[1], self.tokenizer.eos_token_id
        return added if end is None or end in added else [*added, end]

    @property
    def pad_token_id(self) -> int:
        """Return a token with a row in the embedding, for masked padding."""
        return int(self.tokenizer.pad_token_id or 0)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text without special tokens, and each conversation by the chat template.

        Raises:
            DataError: The chat template is missing, or fails.
            ModelError: The model's embedding has no row for a token.
        """
        if not texts:
            return []
        found: list[list[int]]
        if isinstance(texts[0], Conversation):  # then all documents of the text are
            found = [self._template.encode(Conversation(text)) for text in texts]
        else:
            found = self.tokenizer(list(texts), add_special_tokens=False).input_ids
        for tokens in found:
            if tokens and max(tokens) >= self.vocab_size:
                raise self._without_row(max(tokens))
        return found

    def check(self, texts: Iterable[str]) -> None:
        """Refuse tokens, around or in these texts, that were added to the tokenizer but not to the model.

        The texts are read only if the tokenizer has such tokens.

        Raises:
            ModelError: A text needs such a token; the message names it.
        """
        for number in (*self.prefix, *self.end):
            if number >= self.vocab_size:
                raise self._without_row(number, place="the tokenizer puts around a text")
        added = self.tokenizer.get_added_vocab().items()
        without_row = {token: number for token, number in added if number >= self.vocab_size}
        for text in texts if without_row else ():
            if any(token in text for token in without_row):
                self.encode([text])

    def beginning(self, text: str, *, length: int) -> list[int]:
        """Encode the beginning of a text as one sequence of at most `length` tokens, with the prefix."""
        (tokens,) = self.encode([text])
        if isinstance(tokens, Answered):  # the template has put its own
            return tokens[:length]
        return [*self.prefix, *tokens[: length - len(self.prefix)]] if tokens else []

    def windows(self, tokens: Sequence[int], *, length: int) -> Iterator[list[int]]:
        """Split a text's tokens into consecutive pieces of at most `length` tokens, each with the prefix.

        A last piece with nothing to predict is left out. Of a conversation only the first piece is kept,
        since no other begins as the template does, and none if it holds nothing of an answer.
        """
        if isinstance(tokens, Answered):
            first = tokens.first(length)
            yield from [first] if any(first.answers[1:]) else []
            return
        step = max(length - len(self.prefix), 1)
        for start in range(0, len(tokens), step):
            piece = [*self.prefix, *tokens[start : start + step]]
            if len(piece) > self.num_given:
                yield piece

    def ended(self, tokens: Sequence[int]) -> Sequence[int]:
        """Return a whole document's tokens with the end token; a conversation's template has put its own."""
        return tokens if isinstance(tokens, Answered) else [*tokens, *self.end]

    def without_prefix(self, tokens: Sequence[int]) -> list[int]:
        """Return a sequence's tokens after the prefix, which a chat template may lack."""
        start = len(self.prefix)
        return list(tokens[start:] if list(tokens[:start]) == self.prefix else tokens)

    @property
    def num_given(self) -> int:
        """Return how many tokens at the start of a sequence are not predicted: the prefix, or one."""
        return max(len(self.prefix), 1)

    def _without_row(self, number: int, place: str = "a text contains") -> ModelError:
        token = self.tokenizer.convert_ids_to_tokens(number)
        return ModelError(
            f"{place} {token!r}, token {number:,}, but the model's embedding has {self.vocab_size:,} rows",
            hint="it was added only to the tokenizer: resize the embedding, or remove it from the text",
        )


def load_encoder(folder: Path) -> Encoder:
    """Load the tokenizer of a checkpoint, to encode texts for its model.

    Raises:
        ModelError: As for `load_tokenizer`.
    """
    return Encoder(load_tokenizer(folder), vocab_size=_vocab_size(folder))


def load_tokenizer(folder: Path) -> Any:
    """Load a checkpoint's tokenizer as transformers does, with a padding token that the embedding has.

    If its own is missing or has no row in the embedding, the end token is used, or else token 0, since
    padding is masked.

    Raises:
        ModelError: The tokenizer is missing or damaged, or would expand a text beyond all memory.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a plain Exception for a damaged file
        known = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
        if type(error) is not Exception and not isinstance(error, known):
            raise
        raise ModelError(
            f"cannot load the tokenizer of {folder}: {(str(error) or repr(error)).splitlines()[0]}",
            hint=_what_is_missing(folder),
        ) from error
    check_tokenizer(tokenizer, name=str(folder))
    rows = _vocab_size(folder)
    if not _has_row(tokenizer.pad_token_id, rows):
        end = tokenizer.eos_token_id
        pad = end if _has_row(end, rows) else 0
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    return tokenizer


def _what_is_missing(folder: Path) -> str:
    only_sentencepiece = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    if only_sentencepiece and find_spec("sentencepiece") is None:
        return "its tokenizer.model needs sentencepiece: pip install sentencepiece"
    return "give a model with a complete tokenizer"


def _has_row(token: int | None, vocab_size: int) -> bool:
    return token is not None and token < vocab_size


def _vocab_size(folder: Path) -> int:
    """Return the vocabulary size of the model in a folder; some configurations leave it to their class."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (size := vocab_size(config)) is not None:
        return size
    from transformers import AutoConfig

    whole = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return int(whole.get_text_config(decoder=True).vocab_size)


def check_tokenizer(tokenizer: Any, *, name: str) -> None:
    """Refuse a tokenizer that makes a text far longer than it is.

    Args:
        tokenizer: Tokenizer from transformers.
        name: Name of the model, for the error.

    Raises:
        ModelError: The tokenizer would expand texts too much.
    """
    special = tokenizer.num_special_tokens_to_add()
    if special > MAX_SPECIAL_TOKENS:
        raise _refused(name, f"puts {special:,} tokens around each text")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    for part in ("normalizer", "decoder"):
        found = getattr(backend, part, None)
        growth = _growth(json.loads(found.__getstate__())) if found is not None else 1
        if growth > MAX_GROWTH:
            raise _refused(name, f"turns one character into {growth:,.0f} in its {part}")


def _growth(step: dict[str, Any]) -> float:
    """Return how many characters a step makes of one, at most."""
    kind = step.get("type")
    if kind == "Sequence":
        return prod(map(_growth, [*step.get("normalizers", ()), *step.get("decoders", ())]))
    if kind == "Replace":
        before, after = step["pattern"].get("String"), len(step["content"])
        return max(1.0, after / len(before)) if before else 1.0 + after  # a regex may match nothing
    if kind == "Prepend":
        return max(1.0, len(step["prepend"]))
    if kind == "Precompiled" and step["precompiled_charsmap"]:
        table = base64.b64decode(step["precompiled_charsmap"])
        made = table[4 + int.from_bytes(table[:4], "little") :]  # after the trie: zero-terminated texts
        return max(1.0, *map(len, made.split(b"\0")))
    return 1.0


def _refused(name: str, what: str) -> ModelError:
    return ModelError(f"the tokenizer of {name} {what}", hint=UNTRUSTED)
