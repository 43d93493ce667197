"""Claim: other versions of transformers, and mlx-lm, compute the same from a pruned folder as the one here.

    python benchmarks/readers.py OTHER/bin/python [...]

Each interpreter has transformers (and torch), mlx-lm, CTranslate2 or optimum-onnx. Writes a tiny random model
of each family as the transformers here saves it, prunes it, and compares logits in 32 bits, on a text longer
than the windows, with those of the transformers here. "a → b": a with the new form of config.json alone, b as
the factory writes it. An error is given by its class.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from factory.artifacts import PruningPlan
from factory.hub.resolve import resolve
from factory.model.architecture import prune_config
from factory.pruning.prune import prune

READER = """
import json, os, sys
from pathlib import Path
import numpy as np
tokens = np.load(sys.argv[1])
from importlib.metadata import version
from importlib.util import find_spec
if find_spec("mlx_lm"):
    import mlx.core as mx
    from mlx_lm.utils import load_model
    name = f"mlx-lm {version('mlx-lm')}"
    def logits(folder):
        model = load_model(Path(folder))[0]
        model.set_dtype(mx.float32)
        return model(mx.array(tokens))
elif find_spec("ctranslate2"):
    import ctranslate2
    from ctranslate2.converters import TransformersConverter
    name = f"CTranslate2 {version('ctranslate2')}"
    def logits(folder):
        TransformersConverter(folder).convert(f"{folder}/ctranslate2", force=True)
        model = ctranslate2.Generator(f"{folder}/ctranslate2", compute_type="float32")
        return model.forward_batch(tokens.tolist())
elif find_spec("optimum"):
    import torch, transformers
    from optimum.onnxruntime import ORTModelForCausalLM
    transformers.logging.set_verbosity_error()
    name = f"optimum-onnx {version('optimum-onnx')} (transformers {transformers.__version__})"
    def logits(folder):
        model = ORTModelForCausalLM.from_pretrained(folder, export=True)
        ids = torch.from_numpy(tokens)
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.numpy()
else:
    import torch, transformers
    transformers.logging.set_verbosity_error()
    name = f"transformers {transformers.__version__}"
    def logits(folder):
        if Path(folder, "tokenizer.json").is_file():  # without, there are tokens alone
            transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        with torch.no_grad():
            return model.float().eval()(torch.from_numpy(tokens)).logits.numpy()
errors = {}
for folder in sys.argv[3:]:
    try:
        np.save(f"{folder}/logits.npy", np.array(logits(folder))[:, -int(sys.argv[2]):])
    except Exception as error:  # whatever the reader raises is its result
        errors[folder] = type(error).__name__
        print(folder, type(error).__name__, str(error).strip().splitlines()[:1], file=sys.stderr)
print(json.dumps({"name": name, "errors": errors}))
"""
NUM_TOKENS = 48  # several windows
NUM_ROWS = 64  # of logits, at the end of a text
TINY: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 12, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 128,
    "sliding_window": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "query_pre_attn_scalar": 8,
}  # fmt: skip
THETA = {"rope_theta": 100_000.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, **THETA,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **THETA}
LINEAR = {"rope_type": "linear", "factor": 4.0, **THETA}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0], **THETA}
PLAIN = {"rope_type": "default", **THETA}
LLLG = [*["sliding_attention"] * 3, "full_attention"] * 3
GEMMA = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 1_000.0}}
OLMO = {"full_attention": YARN, "sliding_attention": PLAIN}
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "Llama": ("llama", {"rope_parameters": PLAIN}, (3, 7)),
    "Llama, llama3": ("llama", {"rope_parameters": LLAMA3}, (3, 7)),
    "Llama, linear": ("llama", {"rope_parameters": LINEAR}, (3, 7)),
    "Llama, yarn": ("llama", {"rope_parameters": YARN}, (3, 7)),
    "Mistral": ("mistral", {"rope_parameters": PLAIN, "sliding_window": None}, (3, 7)),
    "Mistral with a window": ("mistral", {"rope_parameters": PLAIN}, (3, 7)),
    "Qwen3": ("qwen3", {"rope_parameters": PLAIN}, (3, 7)),
    "Qwen3-MoE": (
        "qwen3_moe",
        {"rope_parameters": PLAIN, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        (3, 7),
    ),
    "Phi-3": ("phi3", {"rope_parameters": PLAIN, "sliding_window": None}, (3, 7)),
    "Phi-3, longrope": (
        "phi3",
        {"rope_parameters": LONG, "original_max_position_embeddings": 16, "sliding_window": None},
        (3, 7),
    ),
    "SmolLM3": ("smollm3", {"rope_parameters": PLAIN, "sliding_window": None}, (3, 5)),
    "OLMo 3": ("olmo3", {"rope_parameters": OLMO}, (3, 5)),
    "Gemma 2": ("gemma2", {"rope_parameters": PLAIN}, (3, 5)),
    "Gemma 3, period 6": ("gemma3_text", {"rope_parameters": GEMMA}, (0, 1, 2, 3, 4, 5)),
    "Gemma 3, period 5": ("gemma3_text", {"rope_parameters": GEMMA}, (0, 6)),
    "Gemma 3, no period": ("gemma3_text", {"rope_parameters": GEMMA}, (1, 7, 8)),
    "Cohere 2, period 4": ("cohere2", {"rope_parameters": PLAIN}, (4, 5, 6, 7)),
    "Cohere 2, period 3": ("cohere2", {"rope_parameters": PLAIN}, (0, 4, 8)),
    "Cohere 2, no period": ("cohere2", {"rope_parameters": PLAIN}, (1, 4)),
    "EXAONE 4, no period": (
        "exaone4",
        {"rope_parameters": PLAIN, "sliding_window_pattern": "LLLG", "layer_types": LLLG},
        (1, 4),
    ),
    "GPT-NeoX": (
        "gpt_neox",
        {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}, "intermediate_size": 128},
        (3, 7),
    ),
    "GLM-4": ("glm4", {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}, (3, 7)),
    "GPT-OSS": (
        "gpt_oss",
        {"rope_parameters": YARN, "num_local_experts": 4, "num_experts_per_tok": 2},
        (3, 5),
    ),
}  # fmt: skip


def write_source(folder: Path, model_type: str, fields: dict[str, Any]) -> None:
    """Write a random model whose logits are far from equal, in the form of the transformers here."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**TINY, **fields})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)


def prune_both(source_folder: Path, dropped: tuple[int, ...], *, new_form: Path, both_forms: Path) -> None:
    """Write the pruned model as the factory does, and once with the new form of config.json alone."""
    source = resolve(str(source_folder))
    both_forms.mkdir()
    plan = PruningPlan(criterion="benchmark", num_layers=source.num_layers, dropped=dropped)
    prune(source, plan, folder=both_forms)
    shutil.copytree(both_forms, new_form)
    (new_form / "config.json").write_text(json.dumps(prune_config(source.config, kept=plan.kept)))


def read(python: str, folders: list[Path], *, tokens: Path) -> tuple[str, dict[Path, Any]]:
    """Return a reader's name, and of each folder its last logits [1, s, V] or the class of its error."""
    done = subprocess.run(
        [python, "-c", READER, tokens, str(NUM_ROWS), *folders], stdout=subprocess.PIPE, text=True, check=True
    )
    report = json.loads(done.stdout.splitlines()[-1])
    errors = report["errors"]
    found = {
        folder: errors[str(folder)] if str(folder) in errors else np.load(folder / "logits.npy")
        for folder in folders
    }
    return report["name"], found


def difference(found: Any, expected: Any) -> str:
    """Return the largest difference of logits."""
    return found if isinstance(found, str) else f"{np.abs(found - expected).max():.1g}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pythons", nargs="+", metavar="PYTHON")
    parser.add_argument("--families", type=lambda text: text.split(";"), default=list(FAMILIES))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="factory-benchmark-") as name:
        root = Path(name)
        tokens = root / "tokens.npy"
        np.save(tokens, np.random.default_rng(0).integers(3, TINY["vocab_size"], (1, NUM_TOKENS)))
        pairs: list[tuple[Path, Path]] = []
        for number, family in enumerate(arguments.families):
            model_type, fields, dropped = FAMILIES[family]
            new, both = root / f"{number}-new", root / f"{number}-both"
            write_source(root / f"{number}", model_type, fields)
            prune_both(root / f"{number}", dropped, new_form=new, both_forms=both)
            pairs.append((new, both))
        folders = [folder for pair in pairs for folder in pair]
        here, expected = read(sys.executable, folders, tokens=tokens)
        readers = [read(python, folders, tokens=tokens) for python in arguments.pythons]
    print(f"| family | {here}, deviation | {' | '.join(reader for reader, _ in readers)} |")
    print(f"|---|--:|{'--:|' * len(readers)}")
    for family, (new, both) in zip(arguments.families, pairs, strict=True):
        assert np.array_equal(expected[new], expected[both])
        cells = [
            f"{difference(found[new], expected[new])} → {difference(found[both], expected[new])}"
            for _, found in readers
        ]
        print(f"| {family} | {expected[new].std():.2f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
