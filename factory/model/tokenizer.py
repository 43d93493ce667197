"""A model's tokenizer: loaded and checked, and texts as sequences of tokens that the model knows."""

import base64
import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing

from factory.errors import UNTRUSTED, ModelError
from factory.model.config_fields import vocab_size

MAX_GROWTH = 64  # letters for one; the longest that Unicode's own forms make of one take 33 bytes
MAX_SPECIAL_TOKENS = 64  # around each text
PROBES = ("text", "A", "1", "я", "文")  # show what a tokenizer puts around a text; some know few letters


class Encoder:
    """Turns texts into token sequences that each begin as the tokenizer begins a text.

    A window in the middle of a document needs the beginning as much as the first one: Gemma reads a window
    without its BOS as noise (lm-evaluation-harness#2382). What a tokenizer puts behind a text is left to
    those who train on whole documents: behind a text that is cut off it would be wrong.

    Args:
        tokenizer: As transformers loads it.
        vocab_size: Rows of the model's embedding.
    """

    def __init__(self, tokenizer: Any, *, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size

    @cached_property
    def open_ended(self) -> Any:
        """The tokenizer without what it puts behind a text: a task's answer follows its question.

        Raises:
            ModelError: One in Python that puts tokens behind a text, which cannot be told not to.
        """
        if not self._around[1]:
            return self.tokenizer
        tokenizer = copy.deepcopy(self.tokenizer)
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ModelError(
                f"the tokenizer puts {self._around[1]} behind each text, also behind a task's question",
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
            f"cannot tell what the tokenizer puts around a text: of {probe!r} it makes {whole}, and {bare} "
            "without special tokens",
            hint="give a model whose tokenizer adds special tokens around a text only",
        )

    @property
    def prefix(self) -> list[int]:
        """Tokens that the tokenizer puts in front of a text: usually BOS, or none."""
        return self._around[0]

    @property
    def end(self) -> list[int]:
        """Tokens behind a whole document: those that the tokenizer adds, with one end token among them."""
        added, end = self._around[1], self.tokenizer.eos_token_id
        return added if end is None or end in added else [*added, end]

    @property
    def pad_token_id(self) -> int:
        """A token that the embedding has, for padding that is masked."""
        return int(self.tokenizer.pad_token_id or 0)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, with nothing around them.

        Raises:
            ModelError: A token that the model's embedding has no row for.
        """
        if not texts:
            return []
        found: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False).input_ids
        for tokens in found:
            if tokens and max(tokens) >= self.vocab_size:
                raise self._without_row(max(tokens))
        return found

    def check(self, texts: Iterable[str]) -> None:
        """Refuse tokens that were added to the tokenizer, but not to the model, around or in these texts.

        The texts are read only for a tokenizer that has such tokens.

        Raises:
            ModelError: Names the token.
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
        """The beginning of a text as one sequence of at most `length` tokens, with the prefix."""
        (tokens,) = self.encode([text])
        return [*self.prefix, *tokens[: length - len(self.prefix)]] if tokens else []

    def windows(self, tokens: Sequence[int], *, length: int) -> Iterator[list[int]]:
        """Consecutive pieces of a text's tokens, of at most `length` tokens with the prefix before each.

        A last piece with nothing to predict is left out.
        """
        step = max(length - len(self.prefix), 1)
        for start in range(0, len(tokens), step):
            piece = [*self.prefix, *tokens[start : start + step]]
            if len(piece) > self.num_given:
                yield piece

    @property
    def num_given(self) -> int:
        """Tokens at the start of a sequence that are not predicted: the prefix, or the first token."""
        return max(len(self.prefix), 1)

    def _without_row(self, number: int, place: str = "a text holds") -> ModelError:
        token = self.tokenizer.convert_ids_to_tokens(number)
        return ModelError(
            f"{place} {token!r}, token {number:,}, but the model's embedding has {self.vocab_size:,} rows",
            hint="it was added to the tokenizer alone: resize the embedding, or remove it from the text",
        )


def load_encoder(folder: Path) -> Encoder:
    """Load the tokenizer of a checkpoint, to encode texts for its model.

    Raises:
        ModelError: See `load_tokenizer`.
    """
    return Encoder(load_tokenizer(folder), vocab_size=_vocab_size(folder))


def load_tokenizer(folder: Path) -> Any:
    """Load a checkpoint's tokenizer as transformers does, with a padding token that the embedding has.

    Where it has none, or one that was added without a row in the embedding, its end token serves, or else
    token 0: padding is masked.

    Raises:
        ModelError: No tokenizer, a damaged one, or one that would make so much of a text that no memory
            holds it.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # all that tokenizers raises for a damaged file is a plain one
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
    return "give a model with a whole tokenizer"


def _has_row(token: int | None, vocab_size: int) -> bool:
    return token is not None and token < vocab_size


def _vocab_size(folder: Path) -> int:
    """Rows of the embedding of the model in a folder; some configurations leave them to their class."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (size := vocab_size(config)) is not None:
        return size
    from transformers import AutoConfig

    whole = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return int(whole.get_text_config(decoder=True).vocab_size)


def check_tokenizer(tokenizer: Any, *, name: str) -> None:
    """Refuse a tokenizer that makes far more of a text than it is.

    Args:
        tokenizer: As transformers loads it.
        name: Of the model, for the error.

    Raises:
        ModelError: Says what it does.
    """
    special = tokenizer.num_special_tokens_to_add()
    if special > MAX_SPECIAL_TOKENS:
        raise _refused(name, f"puts {special:,} tokens around each text")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    for part in ("normalizer", "decoder"):
        found = getattr(backend, part, None)
        growth = _growth(json.loads(found.__getstate__())) if found is not None else 1
        if growth > MAX_GROWTH:
            raise _refused(name, f"makes {growth:,.0f} letters of one in its {part}")


def _growth(step: dict[str, Any]) -> float:
    """How many letters a step makes of one, at most: a text of such letters becomes as many times longer."""
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
        made = table[
            4 + int.from_bytes(table[:4], "little") :
        ]  # behind the trie: texts with a zero after each
        return max(1.0, *map(len, made.split(b"\0")))
    return 1.0


def _refused(name: str, what: str) -> ModelError:
    return ModelError(
        f"the tokenizer of {name} {what}",
        hint=UNTRUSTED,
    )
