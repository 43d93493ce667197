"""Load and check a model's tokenizer, and encode texts as sequences of tokens that the model knows."""

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

MAX_GROWTH = 64  # output characters per input character; Unicode's longest normal forms take 33 bytes
MAX_SPECIAL_TOKENS = 64  # around each text
PROBES = ("text", "A", "1", "я", "文")  # reveal the tokens around a text; some tokenizers know few letters


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
        """Encode each text without special tokens.

        Raises:
            ModelError: The model's embedding has no row for a token.
        """
        if not texts:
            return []
        found: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False).input_ids
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
        return [*self.prefix, *tokens[: length - len(self.prefix)]] if tokens else []

    def windows(self, tokens: Sequence[int], *, length: int) -> Iterator[list[int]]:
        """Split a text's tokens into consecutive pieces of at most `length` tokens, each with the prefix.

        A last piece with nothing to predict is left out.
        """
        step = max(length - len(self.prefix), 1)
        for start in range(0, len(tokens), step):
            piece = [*self.prefix, *tokens[start : start + step]]
            if len(piece) > self.num_given:
                yield piece

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
