"""Compare a GGUF in llama.cpp with its model in transformers: logits and tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from factory.artifacts import GgufCheck
from factory.errors import VerificationError
from factory.model.config_fields import read_config
from factory.model.tokenizer import Encoder, load_encoder
from factory.serving import llama_cpp
from factory.serving.gguf_settings import settings_of
from factory.text.standard_library import documents

if TYPE_CHECKING:
    from torch import Tensor

NUM_POSITIONS = 128  # whose logits are compared, spread over a run
SHORT, BEYOND = 160, 64  # tokens: of the short run; after the window, of the long one
NO_LIMIT = 1 << 30
# For each type: what rounding explains. The first number is the root mean square of the differences of
# logits over the deviation of the logits; the second the share of next tokens that are the same. A Gemma 3
# whose windows were in the wrong layers was 0.12 apart: only 16 bits show that for certain.
BOUNDS: Mapping[str, tuple[float, float]] = {"F16": (0.01, 0.95), "Q8_0": (0.2, 0.5), "Q4_K_M": (0.5, 0.3)}
PROBES = (
    "The quick brown fox jumps over the lazy dog, and it's 3.14159 times as fast as 1234567 others.",
    "def f(x):\n    return [y ** 2 for y in x]  # squares\n\n\nprint(f(range(10)))\n",
    "  two  spaces, a\ttab,\r\na line, and\n\n\nthree more   ",
    "Größe, naïve, Ærø, Привет, 你好世界, こんにちは, 한국어, العربية, हिन्दी",
    "🙂👩‍👩‍👧‍👦 ½ ﬁ é \u00a0 “quotes” — dashes…",
    "I'LL don't WE'VE they're",
)


Run = tuple[list[int], list[int]]  # tokens, and positions to compare


@dataclass(frozen=True)
class Reference:
    """What transformers makes of texts with the model that a GGUF is made from."""

    texts: tuple[str, ...]
    tokens: tuple[list[int], ...]  # of each text
    runs: tuple[Run, ...]
    logits: "tuple[np.ndarray[Any, Any], ...]"  # [positions, V] of each run, computed in 32 bits


def reference(folder: Path, *, has_window: bool = True) -> Reference:
    """Run a short text in transformers, and one longer than the window if there is one.

    Args:
        has_window: Whether llama.cpp has the model's window; if not, texts stay within it.
    """
    import torch

    from factory.model.loading import load_model

    encoder, values = load_encoder(folder), settings_of(read_config(folder))
    runs, texts = _runs(encoder, values, has_window=has_window), _texts(encoder)
    model = load_model(folder).float()  # a GPU would round by more than the file does
    with torch.no_grad():
        logits = [_rows(model, tokens, positions) for tokens, positions in runs]
    tokens = [list(encoder.tokenizer(text).input_ids) for text in texts]
    return Reference(tuple(texts), tuple(tokens), tuple(runs), tuple(logits))


def check_gguf(path: Path, expected: Reference, *, kind: str) -> GgufCheck:
    """Compare what llama.cpp makes of the same texts.

    Args:
        path: File made from the model of the reference.
        kind: A key of `BOUNDS`.

    Raises:
        VerificationError: Logits or tokens differ by more than rounding explains.
        ModelError: llama.cpp cannot load or run the file.
    """
    answer = llama_cpp.ask(path, texts=expected.texts, runs=expected.runs)
    _check_tokens(expected, answer.tokens, name=path.name)
    found = compare(answer.logits, expected.logits)
    limit, agreement = BOUNDS[kind]
    if not (found.apart <= limit and found.same_next >= agreement):
        raise VerificationError(
            f"llama.cpp computes something else from {path.name}: logits {found.apart:.3f} deviations apart, "
            f"{found.same_next:.0%} of next tokens the same; {kind} explains {limit} and {agreement:.0%}",
            hint="no file was kept; please report this model",
        )
    return GgufCheck(
        largest=found.largest,
        apart=found.apart,
        same_next=found.same_next,
        num_positions=sum(len(positions) for _, positions in expected.runs),
        longest=max(len(tokens) for tokens, _ in expected.runs),
        num_texts=len(expected.texts),
        llama=llama_cpp.version(),
    )


def _runs(encoder: Encoder, values: Mapping[str, Any], *, has_window: bool) -> list[Run]:
    """Return a short run, and one longer than the window if there is one."""
    window = values.get("sliding_window") if values.get("use_sliding_window") is not False else None
    most = values.get("max_position_embeddings") or NO_LIMIT
    if window and not has_window:
        most = min(most, window)
    sizes = {min(SHORT, most), min(window + BEYOND if window else SHORT, most)}
    tokens: list[int] = []
    for text in documents("prose"):
        tokens += encoder.encode([text])[0]
        if len(tokens) >= max(sizes):
            break
    return [_run([*encoder.prefix, *tokens][:size]) for size in sorted(sizes)]


def _run(tokens: list[int]) -> Run:
    places = np.linspace(0, len(tokens) - 1, min(NUM_POSITIONS, len(tokens))).round().astype(int)
    return tokens, [int(place) for place in places]


def _rows(model: Any, tokens: Sequence[int], positions: Sequence[int]) -> "np.ndarray[Any, Any]":
    import torch

    ids = torch.tensor([tokens], device=model.device)
    logits: Tensor = model(ids, use_cache=False).logits[0, list(positions)]
    rows: np.ndarray[Any, Any] = logits.float().cpu().numpy()
    return rows


@dataclass(frozen=True)
class Difference:
    """How far logits are apart; the mean of a row, which no answer depends on, is taken off."""

    largest: float
    apart: float  # root mean square over the deviation of the expected logits
    same_next: float  # share of rows with the same largest logit


def compare(
    found: "Sequence[np.ndarray[Any, Any]]", expected: "Sequence[np.ndarray[Any, Any]]"
) -> Difference:
    """Compare logits [positions, V] of several runs; columns that only one side has are left out."""
    size = min(found[0].shape[1], expected[0].shape[1])
    one, other = (
        np.concatenate([rows[:, :size] for rows in side]).astype(np.float64) for side in (found, expected)
    )
    one -= one.mean(axis=1, keepdims=True)
    other -= other.mean(axis=1, keepdims=True)
    difference = np.abs(one - other)
    return Difference(
        largest=float(difference.max()),
        apart=float(np.sqrt((difference**2).mean()) / other.std()),
        same_next=float((one.argmax(axis=1) == other.argmax(axis=1)).mean()),
    )


def _texts(encoder: Encoder) -> list[str]:
    """Return texts to tokenise: prose, code, scripts, spaces, and a conversation if there is a template."""
    texts = list(PROBES)
    if isinstance(encoder.tokenizer.chat_template, str):
        turns = [{"role": "user", "content": "What is a glacier?"}, {"role": "assistant", "content": "Ice."}]
        prefix = encoder.tokenizer.decode(encoder.prefix) if encoder.prefix else ""
        shown = encoder.tokenizer.apply_chat_template(turns, tokenize=False)
        texts.append(shown.removeprefix(prefix))
    return texts


def _check_tokens(expected: Reference, found: Sequence[Sequence[int]], *, name: str) -> None:
    for text, tokens, right in zip(expected.texts, found, expected.tokens, strict=True):
        if list(tokens) != right:
            place = next(
                (n for n, pair in enumerate(zip(tokens, right, strict=False)) if pair[0] != pair[1]),
                min(len(tokens), len(right)),
            )
            raise VerificationError(
                f"llama.cpp splits {text[:40]!r} into other tokens by {name}: from token {place}, "
                f"{list(tokens[place : place + 3])} instead of {right[place : place + 3]}",
                hint="no file was kept; please report this tokenizer",
            )
