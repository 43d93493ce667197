"""Test which architectures are pruned correctly: a tiny random model of each type, on disk and in memory.

For every model type that transformers can load as a causal language model: make a tiny random model,
prune a block and a scattered set of layers on disk, load the result, and compare logits (fp32) and cached
generation with the original model whose dropped layers pass on their input. The reference is independent of
the surgery. Prints a Markdown table; exits with 1 if any result is wrong.

    python benchmarks/architectures.py [TYPE ...] [--verbose]
"""

import argparse
import copy
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import factory.model.config_proof  # loaded once, before the forks
import factory.pruning.prune
from factory.artifacts import PruningPlan
from factory.errors import FactoryError
from factory.hub.resolve import resolve
from factory.model.architecture import prune_config
from factory.model.completeness import check_source
from factory.model.layers import skip_layers

NUM_LAYERS = 8
CUTS = ((3, 4), (1, 3, 6))
MEMORY_BYTES = 12 << 30
SECONDS = 240  # per model type
VOCABULARY = 120
GENERATE = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
NOISE = 0.1  # added to every weight, so that no layer is close to the identity

# Sizes by the names that configurations use; names that a class lacks are skipped.
TINY: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "embedding_size", "emb_dim", "dim", "word_embed_proj_dim"), 64
    ),
    **dict.fromkeys(
        (
            "intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner",
            "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size", "d_ff",
            "shared_intermediate_size", "feed_forward_size", "dense_intermediate_size",
        ),
        96,
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers",
            "decoder_layers", "num_blocks",
        ),
        NUM_LAYERS,
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
         "encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"),
        4,
    ),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "context_length"), 128),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"), 4
    ),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "window_size"), 4),
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
# What else a type needs to be buildable, small, and to have layers of every kind.
ENCODER = {"is_decoder": True, "type_vocab_size": 2}
SEQ2SEQ = {"encoder_layers": NUM_LAYERS, "num_encoder_layers": NUM_LAYERS, "is_encoder_decoder": False}
HYBRID = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
QWEN4 = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}  # fmt: skip
DBRX = {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8}
GEMMA4 = {
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 16,
    "layer_types": HYBRID,
}  # fmt: skip
ASSISTANT = {
    **GEMMA4, "model_type": "gemma4_text", "num_hidden_layers": NUM_LAYERS, "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": NUM_LAYERS,
}  # fmt: skip
DOTS3 = {
    "n_shared_experts": 1, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32, "swa_head_dim": 32, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
            "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta",
            "xlm-roberta-xl", "xmod",
        ),
        ENCODER,
    ),
    **dict.fromkeys(
        (
            "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus",
            "plbart", "prophetnet", "whisper",
        ),
        SEQ2SEQ,
    ),
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), GEMMA4),
    "gemma4_assistant": {"text_config": ASSISTANT},
    "gemma4": {"text_config": GEMMA4},
    "gemma4_unified": {"text_config": GEMMA4},
    "bamba": {"attn_layer_indices": [2, 5, 7]},
    "big_bird": {**ENCODER, "attention_type": "original_full"},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"layer_types": HYBRID, "rope_parameters": dict.fromkeys(HYBRID, ROPE)},
    "dbrx": {"attn_config": DBRX, "ffn_config": {"ffn_hidden_size": 96}},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention", "mamba"] * 2},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"text_config": DOTS3},
    "dots3_note_text": DOTS3,
    "fuyu": {"patch_size": 4},
    "gemma3n_text": {"layer_types": HYBRID, "num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 4]]},
    "gptj": {"rotary_dim": 8},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 4},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mlp"] * 2},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "xlstm": {"hidden_size": 128},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 2},
    "mamba2": {"num_heads": 8, "expand": 2},
    "moshi": {"audio_vocab_size": 64},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"] * 4},
    "xmod": {**ENCODER, "languages": ["en_XX"], "default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "mamba"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

# Start and end of the table in the README.
START, END = "<!-- support-table -->", "<!-- /support-table -->"

# Equal only in exact arithmetic: logits may differ by 1e-5 of the largest.
ROUNDED = {"rwkv": "states are halved after every 6th layer (rescale_every), which is now another one"}


@dataclass(frozen=True)
class Outcome:
    """The outcome for one model type."""

    model_type: str
    verdict: str  # a word of the table
    note: str


def tiny_config(model_type: str) -> Any:
    """Make a configuration of the type with eight narrow layers."""
    return CONFIG_MAPPING[model_type](**_tiny_fields(CONFIG_MAPPING[model_type], SPECIAL.get(model_type, {})))


def _tiny_fields(config_class: type, special: dict[str, Any]) -> dict[str, Any]:
    known = set(getattr(config_class, "__dataclass_fields__", ())) | set(config_class.attribute_map)
    small = {name: value for name, value in TINY.items() if name in known}
    for alias, name in config_class.attribute_map.items():
        if alias in small and name in small:
            del small[alias]
    if "kv_lora_rank" in known and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
    try:
        default = config_class()
    except StrictDataclassError:  # it has no defaults
        default = None
    parts = {name: getattr(default, name, None) for name in config_class.sub_configs}
    for name, part in parts.items():
        if part is not None:
            fields = _tiny_fields(type(part), special.get(name, {}))
            small[name] = {"model_type": part.model_type, **fields}
    return {**small, **{name: copy.deepcopy(value) for name, value in special.items() if not parts.get(name)}}


def tiny_model(model_type: str) -> Any:
    """Make a random fp32 model of the type, in which every layer changes its input."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        tiny_config(model_type), dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(NOISE * torch.randn_like(parameter))
    return model.eval()


def load(folder: Path) -> Any:
    """Load a checkpoint as an fp32 model in evaluation mode, with its weights aligned alike.

    Sums over weights with another offset from a cache line may be rounded differently.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


@torch.no_grad()
def why_unbuilt(model: Any) -> str | None:
    """Return why the original cannot run forward or generate with a cache, or None."""
    tokens, prompt = _inputs()
    try:
        logits = model(tokens).logits
        model.generate(**prompt, **GENERATE)
    except Exception as error:  # noqa: BLE001  whatever a model raises is its outcome
        return _reason(error)
    return None if bool(torch.isfinite(logits).all()) else "its logits are not finite"


def _inputs() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tokens = torch.randint(3, VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(1))  # [b, s]
    return tokens, {"input_ids": tokens[:, :12], "attention_mask": torch.ones_like(tokens[:, :12])}


@torch.no_grad()
def compare(original: Path, pruned: Path, dropped: tuple[int, ...], *, limit: float) -> str | None:
    """Return how the pruned checkpoint differs from the original with its layers skipped, or None."""
    source, result = load(original), load(pruned)
    tokens, prompt = _inputs()
    whole = source(tokens).logits  # [b, s, V]
    with skip_layers(source, dropped):
        expected = source(tokens).logits
        words = source.generate(**prompt, **GENERATE)
    actual = result(tokens).logits
    if float((whole - expected).abs().max()) < 1e-4:
        return "the dropped layers do nothing, so this proves nothing"
    difference = float((actual - expected).abs().max())
    if not difference <= limit * float(expected.abs().max()):
        return f"logits differ by {difference:.2g}"
    if not torch.equal(result.generate(**prompt, **GENERATE), words):
        return "cached generation differs"
    return None


def examine(model_type: str) -> Outcome:
    """Make, prune, reload and compare one type."""
    with tempfile.TemporaryDirectory() as folder:
        original = Path(folder) / "original"
        try:
            tiny_model(model_type).save_pretrained(original)
            if _config_type(original) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:  # of the text part alone
                tiny_config(model_type).save_pretrained(original)
            reason = why_unbuilt(load(original))
        except Exception as error:  # noqa: BLE001  whatever a model raises is its outcome
            return _refusal(model_type) or Outcome(model_type, "unbuilt", _reason(error))
        limit = 1e-5 if model_type in ROUNDED else 0.0
        notes: list[str] = []
        for number, dropped in enumerate(CUTS):
            pruned = Path(folder) / f"pruned-{number}"
            pruned.mkdir()
            plan = PruningPlan(criterion="benchmark", num_layers=NUM_LAYERS, dropped=dropped)
            try:
                source = resolve(str(original))
                check_source(source)
                factory.pruning.prune.prune(source, plan, folder=pruned)
                wrong = None if reason else compare(original, pruned, dropped, limit=limit)
            except FactoryError as error:
                notes.append(f"{list(dropped)}: {type(error).__name__}: {error.message} ({error.hint})")
                if type(error).__name__ == "VerificationError":
                    return Outcome(model_type, "wrong", notes[-1])
                continue
            except Exception as error:  # noqa: BLE001  whatever a model raises is its outcome
                return Outcome(model_type, "unbuilt" if reason else "wrong", reason or _reason(error))
            if wrong:
                return Outcome(model_type, "wrong", wrong)
    if reason and not notes:
        return Outcome(model_type, "unbuilt", reason)
    if not notes:
        return Outcome(model_type, "to rounding" if limit else "exact", ROUNDED.get(model_type, ""))
    return Outcome(model_type, "refused" if len(notes) == len(CUTS) else "exact, or refused", notes[0])


def _config_type(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text())["model_type"])


def _refusal(model_type: str) -> Outcome | None:
    """Return the refusal of a type by its configuration, for a tiny model that does not run."""
    try:
        prune_config(tiny_config(model_type).to_dict(), kept=range(NUM_LAYERS - 1))
    except FactoryError as error:
        return Outcome(model_type, "refused", f"{type(error).__name__}: {error.message} ({error.hint})")
    except Exception:  # noqa: BLE001  whatever a model raises is its outcome
        return None
    return None


def _reason(error: Exception) -> str:
    if "--verbose" in sys.argv:
        traceback.print_exc()
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _examine_into(model_type: str, path: str) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    factory.pruning.prune.SMALL_PARAMETERS = 0  # the logits are compared here
    outcome = examine(model_type)
    Path(path).write_text(json.dumps([outcome.model_type, outcome.verdict, outcome.note]))


def examine_apart(model_type: str) -> Outcome:
    """Run `examine` in a separate process, so that a crash or a hang affects one type only."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcome.json"
        process = multiprocessing.get_context("fork").Process(
            target=_examine_into, args=(model_type, str(path))
        )
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            return Outcome(model_type, "unbuilt", f"not finished after {SECONDS} s")
        if not path.exists():
            return Outcome(model_type, "unbuilt", f"the process ended with {process.exitcode}")
        return Outcome(*json.loads(path.read_text()))


def examine_all(model_types: list[str]) -> list[Outcome]:
    """Examine each type in turn, and print its line immediately."""
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {NUM_LAYERS} layers, "
          f"without {' and without '.join(str(list(cut)) for cut in CUTS)}\n")  # fmt: skip
    print("| model type | result | why |\n|---|---|---|")
    outcomes = []
    for model_type in model_types:
        outcome = examine_apart(model_type)
        outcomes.append(outcome)
        print(f"| {model_type} | {outcome.verdict} | {outcome.note.replace('|', '/')} |", flush=True)
    return outcomes


def read_outcomes(path: Path) -> list[Outcome]:
    """Read the table that an earlier run printed."""
    rows = [line.strip("| \n").split(" | ", 2) for line in path.read_text().splitlines() if line[:2] == "| "]
    return [Outcome(*row, *[""] * (3 - len(row))) for row in rows if row[0] != "model type"]


def main() -> int:
    """Examine the requested types, or all; print a table and a summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types; default: all that transformers knows")
    parser.add_argument("--verbose", action="store_true", help="show the tracebacks of failures")
    parser.add_argument("--outcomes", type=Path, help="read the output of an earlier run instead of running")
    arguments = parser.parse_args()
    transformers.logging.disable_progress_bar()
    if arguments.outcomes:
        outcomes = read_outcomes(arguments.outcomes)
    else:
        outcomes = examine_all(arguments.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    verdicts = Counter(outcome.verdict for outcome in outcomes)
    print("\n" + ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common()))
    return 1 if verdicts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
