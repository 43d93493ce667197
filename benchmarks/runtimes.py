"""Claim: where `factory plan` says that a pruned model runs right, it does; what runs wrongly is told.

    python benchmarks/runtimes.py [OTHER/bin/python ...] [--model FOLDER ...] [--families "Llama;Gemma 3"]

Each interpreter has transformers 4, mlx-lm, CTranslate2 or optimum-onnx, as for `readers.py`; llama.cpp is
the one of the llama-cpp-python beside this program, from a GGUF by `factory export`. Compares logits in 32
bits with the transformers here, on a text of several windows: of the whole model with both forms of
config.json, of a cut that keeps the period of its layers, and of one that does not. A cell is the largest
difference of logits and the share of next tokens that are the same; "told" where the verdict says wrong,
"unknown" where it says nothing. Exits with 1 if a cell is wrong although the verdict says right.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from readers import FAMILIES as SOURCES
from readers import NUM_ROWS, read, write_source
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from factory.artifacts import PruningPlan, Verdict
from factory.checkpoint.auxiliary import copy_auxiliary_files
from factory.errors import FactoryError
from factory.hub.resolve import resolve
from factory.pruning.config_forms import with_older_forms
from factory.pruning.prune import prune
from factory.serving import llama_cpp
from factory.serving.gguf_check import compare
from factory.serving.gguf_write import Facts, check_convertible, write_gguf
from factory.serving.runtimes import verdicts

NUM_TOKENS = 48  # several windows of the tiny models
BEYOND = NUM_ROWS  # tokens after the window of a real model
WRONG = 0.02  # deviations; rounding stays below, mixed-up layers far above
CUTS = ("whole", "keeps the period", "free")
# Family of readers.py → the layers of two cuts of its 12.
TINY: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "Llama": ((4, 5), (3, 7)),
    "Llama, llama3": ((4, 5), (3, 7)),
    "Llama, linear": ((4, 5), (3, 7)),
    "Llama, yarn": ((4, 5), (3, 7)),
    "Mistral": ((4, 5), (3, 7)),
    "Mistral with a window": ((4, 5), (3, 7)),
    "Qwen2": ((4, 5), (3, 7)),
    "Qwen3": ((4, 5), (3, 7)),
    "Qwen3-MoE": ((4, 5), (3, 7)),
    "Phi-3": ((4, 5), (3, 7)),
    "Phi-3, longrope": ((4, 5), (3, 7)),
    "SmolLM3": ((4, 5, 6, 7), (3, 5)),
    "OLMo 2": ((4, 5), (3, 7)),
    "OLMo 3": ((4, 5, 6, 7), (3, 5)),
    "Gemma": ((4, 5), (3, 7)),
    "Gemma 2": ((4, 5), (3, 6)),
    "Gemma 3, period 6": ((0, 1, 2, 3, 4, 5), (1, 7, 8)),
    "Cohere 2, period 4": ((4, 5, 6, 7), (1, 4)),
    "EXAONE 4, no period": ((4, 5, 6, 7), (1, 4)),
    "GPT-NeoX": ((4, 5), (3, 7)),
    "GLM-4": ((4, 5), (3, 7)),
    "GPT-OSS": ((4, 5), (3, 6)),
}  # fmt: skip
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}}
MORE = {"Qwen2": ("qwen2", PLAIN), "OLMo 2": ("olmo2", PLAIN), "Gemma": ("gemma", PLAIN)}
SIZES = {"intermediate_size": 64, "vocab_size": 260}


@dataclass
class Case:
    """One pruned folder, and what each reader made of it."""

    name: str
    cut: str
    folder: Path
    config: dict[str, Any]  # of the source
    dropped: tuple[int, ...]
    tokens: Path
    expected: Any = None
    found: dict[str, Any] = field(default_factory=dict)  # reader → logits [1, s, V], or its error


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes with one merge, which a GGUF needs."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(["<|end|>", "a", "b", *alphabet, "th"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|end|>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def cut_all(source_folder: Path, cuts: Sequence[tuple[int, ...]], *, name: str, root: Path) -> list[Case]:
    """Write the whole model and its cuts, and one text for all of them."""
    source = resolve(str(source_folder))
    window = source.config.get("sliding_window")
    length = NUM_TOKENS if source.vocab_size == SIZES["vocab_size"] else (window or 0) + BEYOND
    place = Path(tempfile.mkdtemp(dir=root))
    tokens = root / f"{source.vocab_size}-{length}.npy"  # one text for all models that it fits
    np.save(tokens, np.random.default_rng(0).integers(3, source.vocab_size - 1, (1, length)))
    cases = []
    for cut, dropped in zip(CUTS, ((), *cuts), strict=True):
        folder = place / cut.replace(" ", "-")
        if dropped:
            folder.mkdir()
            prune(source, PruningPlan(criterion="benchmark", num_layers=source.num_layers, dropped=dropped),
                  folder=folder)  # fmt: skip
        else:
            shutil.copytree(source_folder, folder)
            copy_auxiliary_files(source_folder, folder)
            (folder / "config.json").write_text(json.dumps(with_older_forms(source.config)))
        cases.append(Case(name, cut, folder, source.config, dropped, tokens))
    return cases


def real_cuts(folder: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return a cut of one period in the middle, and a scattered one."""
    kinds = json.loads((folder / "config.json").read_text()).get("layer_types") or []
    period = kinds.index("full_attention") + 1 if "sliding_attention" in kinds else 2
    return tuple(range(period, 2 * period)), (1, period + 1)


def ask_llama(case: Case) -> Any:
    """Return llama.cpp's logits [1, s, V] of a case, or the class of the error."""
    path = case.folder / "model.gguf"
    tokens = np.load(case.tokens)[0].tolist()
    try:
        check_convertible(case.folder)
        # Not by the family: llama.cpp asks a model named Phi-3 for the tokens of Phi-3.
        write_gguf(case.folder, path, kind="F16", facts=Facts("tiny"))
        return llama_cpp.ask(path, texts=[], runs=[(tokens, range(len(tokens))[-NUM_ROWS:])]).logits[0][None]
    except FactoryError as error:
        sys.stderr.write(f"{case.name}, {case.cut}: {error}\n")
        return type(error).__name__
    finally:
        path.unlink(missing_ok=True)


def cell(case: Case, reader: str) -> tuple[str, bool]:
    """Return the text of a cell, and whether its verdict says right of what is wrong."""
    found, verdict = case.found[reader], verdict_of(case, reader)
    told = {None: " unknown", False: " told"}.get(verdict.runs if verdict else None, "")
    if isinstance(found, str):
        return f"{found}{told}", False
    rows = case.config.get("sliding_window") if verdict and verdict.runs and verdict.reason else None
    one = compare([found[0, :rows]], [case.expected[0, :rows]])
    wrong = one.apart > WRONG
    shown = f"{one.largest:.1g}, {one.same_next:.0%}"
    missed = wrong and not told
    return f"**{shown}**{' MISSED' * missed}{told}" if wrong else f"{shown}{told}", missed


def verdict_of(case: Case, reader: str) -> Verdict | None:
    """Return what the table says of a reader; None for a version that it does not name."""
    keys = {"transformers 4": "transformers-4", "mlx-lm": "mlx", "CTranslate2": "ctranslate2",
            "optimum-onnx": "onnx", "llama.cpp": "llama.cpp"}  # fmt: skip
    key = next((key for name, key in keys.items() if reader.startswith(name)), None)
    return next((one for one in verdicts(case.config, case.dropped) if one.runtime == key), None)


def all_cases(families: Sequence[str], folders: Sequence[Path], *, root: Path) -> list[Case]:
    """Write every model."""
    cases = []
    for number, family in enumerate(families):
        model_type, fields, *_ = {**SOURCES, **MORE}[family]
        folder = root / f"{number}"
        write_source(folder, model_type, {**SIZES, **fields})
        save_tokenizer(folder)
        cases += cut_all(folder, TINY[family], name=family, root=root)
    for folder in folders:
        cases += cut_all(folder, real_cuts(folder), name=folder.name, root=root)
    return cases


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pythons", nargs="*", metavar="PYTHON")
    parser.add_argument("--families", type=lambda text: text.split(";") if text else [], default=list(TINY))
    parser.add_argument("--model", type=Path, nargs="+", default=[], metavar="FOLDER")
    arguments = parser.parse_args()
    missed = 0
    with tempfile.TemporaryDirectory(prefix="factory-benchmark-") as name:
        cases = all_cases(arguments.families, arguments.model, root=Path(name))
        readers = []
        for python in (sys.executable, *arguments.pythons):
            for tokens in dict.fromkeys(case.tokens for case in cases):
                mine = [case for case in cases if case.tokens == tokens]
                reader, found = read(python, [case.folder for case in mine], tokens=tokens)
                for case in mine:
                    case.found[reader] = found[case.folder]
            readers.append(reader)
        here, *readers = readers
        if llama_cpp.is_installed():
            readers.append(f"llama.cpp (llama-cpp-python {llama_cpp.version()})")
        for case in cases:
            case.expected = case.found[here]
            if readers and readers[-1].startswith("llama.cpp"):
                case.found[readers[-1]] = ask_llama(case)
        print(f"| {here}: model | cut | {' | '.join(readers)} |\n|---|---|{'--:|' * len(readers)}")
        for case in cases:
            cells = [cell(case, reader) for reader in readers]
            missed += sum(is_missed for _, is_missed in cells)
            print(f"| {case.name} | {case.cut} | {' | '.join(text for text, _ in cells)} |")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
