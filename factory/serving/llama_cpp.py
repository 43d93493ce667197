"""Run llama.cpp, by llama-cpp-python, in a process of its own, which a failed assertion there would end.

python -m factory.serving.llama_cpp FOLDER reads FOLDER/order.json and writes FOLDER/answer.json and logits.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from factory.errors import ModelError

PACKAGE = "llama-cpp-python"
ORDER, ANSWER = "order.json", "answer.json"
SPARE_TOKENS = 8


@dataclass(frozen=True)
class Answer:
    """What llama.cpp made of a file."""

    tokens: list[list[int]]  # of each text, with the special tokens that it adds
    logits: list["np.ndarray[Any, Any]"]  # [positions, V] of each run


def is_installed() -> bool:
    """Return whether llama-cpp-python is there; it is not imported."""
    return find_spec("llama_cpp") is not None


def version() -> str:
    """Return the version of llama-cpp-python, which decides that of llama.cpp."""
    return metadata.version(PACKAGE)


def ask(path: Path, *, texts: Sequence[str], runs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Answer:
    """Load a GGUF in llama.cpp on the CPU, and read texts as tokens, and tokens as logits.

    Args:
        texts: Are tokenised; text that names a special token becomes that token.
        runs: The tokens of each run, and the positions whose logits are returned.

    Raises:
        ModelError: llama.cpp cannot load or run the file; says what it printed last.
    """
    with tempfile.TemporaryDirectory(prefix="factory-llama-") as name:
        order = {
            "path": str(path.resolve()),
            "texts": list(texts),
            "runs": [list(map(list, r)) for r in runs],
        }
        answer = _run(Path(name), order, path=path)
        return Answer(answer["tokens"], [np.load(Path(name, f"{n}.npy")) for n in range(len(runs))])


def quantize(path: Path, out: Path, *, kind: str) -> None:
    """Quantise the matrices of a GGUF with llama.cpp's own code.

    Args:
        kind: llama.cpp's name of the type: "Q4_K_M".

    Raises:
        ModelError: llama.cpp cannot do it.
    """
    with tempfile.TemporaryDirectory(prefix="factory-llama-") as name:
        _run(Path(name), {"path": str(path.resolve()), "out": str(out.resolve()), "kind": kind}, path=path)


def _run(folder: Path, order: dict[str, Any], *, path: Path) -> dict[str, Any]:
    (folder / ORDER).write_text(json.dumps(order), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(folder)], capture_output=True, text=True, errors="replace"
    )
    if done.returncode or not (folder / ANSWER).is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        told = [line for line in lines if "error" in line.lower() or "assert" in line.lower()]
        reason = (told or lines or [f"exit code {done.returncode}"])[0][:300]
        raise ModelError(f"llama.cpp cannot use {path.name}: {reason}", hint="try a newer llama-cpp-python")
    answer: dict[str, Any] = json.loads((folder / ANSWER).read_text(encoding="utf-8"))
    return answer


def _serve(folder: Path) -> None:
    """Carry out the order in a folder."""
    order = json.loads((folder / ORDER).read_text(encoding="utf-8"))
    if "out" in order:
        answer: dict[str, Any] = _quantized(order)
    else:
        with _loaded(order["path"]) as model:
            tokens = [_tokens(model, text) for text in order["texts"]]
            for number, (run, positions) in enumerate(order["runs"]):
                np.save(folder / f"{number}.npy", _logits(model, run, positions))
        answer = {"tokens": tokens}
    (folder / ANSWER).write_text(json.dumps(answer), encoding="utf-8")


def _quantized(order: dict[str, Any]) -> dict[str, Any]:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{order['kind']}")
    params.nthread = os.cpu_count() or 1
    paths = (order["path"].encode(), order["out"].encode())
    if code := llama_cpp.llama_model_quantize(*paths, ctypes.byref(params)):
        raise RuntimeError(f"error {code} in llama_model_quantize")
    return {}


@contextmanager
def _loaded(path: str) -> Iterator[Any]:
    import llama_cpp

    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise RuntimeError("error: the file was not loaded")
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


def _tokens(model: Any, text: str) -> list[int]:
    import llama_cpp

    raw = text.encode()
    room = len(raw) + SPARE_TOKENS
    found = (llama_cpp.llama_token * room)()
    vocab = llama_cpp.llama_model_get_vocab(model)
    count = llama_cpp.llama_tokenize(vocab, raw, len(raw), found, room, True, True)
    return list(found[: max(count, 0)])


def _logits(model: Any, tokens: Sequence[int], positions: Sequence[int]) -> "np.ndarray[Any, Any]":
    """Return the logits at these positions of one pass, [positions, V]; the cache is in 32 bits."""
    import llama_cpp

    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = len(tokens) + SPARE_TOKENS
    params.n_threads = params.n_threads_batch = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("error: no context of this length")
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        wanted = set(positions)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = place in wanted
        if code := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"error {code} in llama_decode")
        size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        rows = [llama_cpp.llama_get_logits_ith(context, place) for place in positions]
        return np.stack([np.ctypeslib.as_array(row, (size,)).copy() for row in rows])
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
