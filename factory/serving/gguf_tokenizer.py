"""Write a Hugging Face tokenizer into a GGUF file, in the terms of llama.cpp."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factory.errors import ModelError
from factory.model.tokenizer import Encoder, load_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

SPACE = "▁"  # stands for a space in SentencePiece's vocabularies
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LETTERS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASES = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{LETTERS}*{SMALL}+|[^\r\n\p{{L}}\p{{N}}]?{LETTERS}+{SMALL}*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How texts are split before merging, and whether whole words skip the merging → llama.cpp's name of it.
SPLITS: Mapping[tuple[tuple[str, ...], bool], str] = {
    (("gpt-2",), False): "gpt-2",
    (("digits", "gpt-2"), False): "smollm",
    ((WORDS + r"\p{N}{1,3}" + REST,), True): "llama-bpe",
    ((WORDS + r"\p{N}{1,3}" + REST,), False): "dbrx",  # the same expression; merges every word
    ((WORDS + r"\p{N}" + REST,), False): "qwen2",
    ((CASES,), True): "tekken",
    ((CASES,), False): "tekken",
}


def add_tokenizer(writer: "GGUFWriter", folder: Path, *, num_rows: int) -> None:
    """Write the vocabulary, merges, special tokens and chat template of a model folder's tokenizer.

    Args:
        num_rows: Rows of the embedding; rows without a token get an unused one.

    Raises:
        ModelError: llama.cpp has no such tokenizer; says which part.
    """
    tokenizer = load_tokenizer(folder)
    parts = _parts(tokenizer, folder)
    model = parts["model"]
    tokens, types = _vocabulary(parts, num_rows=num_rows)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, model["merges"]))
        writer.add_add_space_prefix(_adds_space(tokenizer))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_name_of_split(parts))
        writer.add_token_merges([" ".join(part.replace(" ", "Ġ") for part in pair) for pair in _pairs(model)])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_special(writer, Encoder(tokenizer, vocab_size=num_rows))


def check_tokenizer_of(folder: Path) -> None:
    """Refuse, before anything is written, a tokenizer that llama.cpp does not know.

    Raises:
        ModelError: As for `add_tokenizer`.
    """
    _parts(load_tokenizer(folder), folder)


def is_known(folder: Path) -> bool:
    """Return whether llama.cpp is known to have the tokenizer of a folder, by its tokenizer.json alone.

    Without that file, or with a damaged one, nothing speaks against it.
    """
    try:
        parts = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        return _what_is_unknown(parts) is None
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return True  # loading the tokenizer reports the damage


def _parts(tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Return the contents of tokenizer.json.

    Raises:
        ModelError: llama.cpp is not known to have this tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts: dict[str, Any] = json.loads(backend.to_str()) if backend else {"model": {"type": "Python code"}}
    if unknown := _what_is_unknown(parts):
        raise ModelError(
            f"the tokenizer of {folder} is none that llama.cpp is known to have: {unknown}",
            hint="give llama.cpp's own converter with `converter`; newer versions know more tokenizers",
        )
    return parts


def _what_is_unknown(parts: Mapping[str, Any]) -> str | None:
    """Return which part of a tokenizer.json llama.cpp is not known to have; None without any."""
    model = parts["model"]
    if model["type"] != "BPE":
        return f"its vocabulary is of type {model['type']}, not BPE"
    if not model["merges"]:
        return "it merges nothing"
    if model.get("byte_fallback") or _name_of_split(parts):
        return None
    return f"it splits texts by {(' then '.join(_split(parts)) or 'not at all')[:200]}"


def _vocabulary(parts: Mapping[str, Any], *, num_rows: int) -> tuple[list[str], list[int]]:
    """Return the text and the type of each token, by its number."""
    from gguf import TokenType

    tokens = [f"[PAD{number}]" for number in range(num_rows)]
    types = [TokenType.UNUSED] * num_rows
    model = parts["model"]
    for text, number in model["vocab"].items():
        if number < num_rows:
            is_byte = model.get("byte_fallback") and text.startswith("<0x") and len(text) == len("<0x00>")
            tokens[number], types[number] = text, TokenType.BYTE if is_byte else TokenType.NORMAL
            if text == model.get("unk_token"):
                types[number] = TokenType.UNKNOWN
    for added in parts["added_tokens"]:
        if (number := added["id"]) < num_rows and types[number] != TokenType.UNKNOWN:
            types[number] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
            tokens[number] = added["content"].replace(SPACE, " ")
    return tokens, [int(kind) for kind in types]


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [tuple(pair.split(" ", 1) if isinstance(pair, str) else pair) for pair in model["merges"]]


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Return scores by which llama.cpp merges in the order of the merges, the first one into each token."""
    order: dict[str, int] = {}
    for rank, (left, right) in enumerate(_pairs({"merges": merges})):
        order.setdefault(left + right, rank)
    return [-float(order.get(token, len(merges))) for token in tokens]


def _adds_space(tokenizer: Any) -> bool:
    """Return whether a text gets a space before it."""
    bare = tokenizer.convert_ids_to_tokens(tokenizer("text", add_special_tokens=False).input_ids)
    return bool(bare) and bare[0].startswith(SPACE)


def _name_of_split(parts: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name of the way in which texts are split into words before merging."""
    prefixed = any(step.get("add_prefix_space") for step in _steps(parts))
    return None if prefixed else SPLITS.get((_split(parts), bool(parts["model"].get("ignore_merges"))))


def _steps(parts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    step = parts.get("pre_tokenizer") or {}
    steps: list[Mapping[str, Any]] = step.get("pretokenizers", [step])
    return steps


def _split(parts: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(name for name in map(_name_of_step, _steps(parts)) if name)


def _name_of_step(step: Mapping[str, Any]) -> str:
    if step.get("type") == "ByteLevel":
        return "gpt-2" if step.get("use_regex", True) else ""
    if step.get("type") == "Digits" and step.get("individual_digits"):
        return "digits"
    if step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return str(step["pattern"].get("Regex", ""))
    return str(step.get("type"))


def _add_special(writer: "GGUFWriter", encoder: Encoder) -> None:
    tokenizer = encoder.tokenizer
    for kind in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{kind}_token_id")
        if number is not None and number < encoder.vocab_size:
            getattr(writer, f"add_{kind}_token_id")(number)
    around = len(tokenizer("text").input_ids) - len(tokenizer("text", add_special_tokens=False).input_ids)
    writer.add_add_bos_token(tokenizer.bos_token_id in encoder.prefix)
    writer.add_add_eos_token(around > len(encoder.prefix))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
