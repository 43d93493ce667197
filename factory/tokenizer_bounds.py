"""What a tokenizer may make of a text: its file can ask for more than any memory holds, in few words."""

import base64
import json
from math import prod
from typing import Any

from factory.errors import UNTRUSTED, ModelError

MOST_GROWTH = 64  # letters for one; the longest that Unicode's own forms make of one take 33 bytes
MOST_SPECIAL_TOKENS = 64  # around each text


def check_tokenizer(tokenizer: Any, *, name: str) -> None:
    """Refuse a tokenizer that makes far more of a text than it is.

    Args:
        tokenizer: As transformers loads it.
        name: Of the model, for the error.

    Raises:
        ModelError: Says what it does.
    """
    special = tokenizer.num_special_tokens_to_add()
    if special > MOST_SPECIAL_TOKENS:
        raise _refused(name, f"puts {special:,} tokens around each text")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    for part in ("normalizer", "decoder"):
        found = getattr(backend, part, None)
        growth = _growth(json.loads(found.__getstate__())) if found is not None else 1
        if growth > MOST_GROWTH:
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
