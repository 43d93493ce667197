"""What the real Hub holds for a build of Mistral 7B, in its own layout and at a size for tests."""

import gzip
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import torch
import yaml
from lm_eval import tasks
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import MistralConfig, MistralForCausalLM

from factory.text.text import SHUFFLE_BUFFER
from tests.loopback_hub import Hub

MODEL = "mistralai/Mistral-7B-v0.1"
C4 = "allenai/c4"
WIKIPEDIA = "wikimedia/wikipedia"
MMLU = "cais/mmlu"
BOOLQ = "aps/super_glue"
GSM8K = "openai/gsm8k"

NUM_LAYERS = 10
TRAIN_SHARDS, VALIDATION_SHARDS = 1024, 8  # as many as there are
WHO = ["the river", "a doctor", "our town", "the school", "my brother", "every farmer", "the council"]
DOES = ["sells", "opens", "repairs", "paints", "visits", "remembers", "measures", "describes"]
WHAT = ["bread", "the bridge", "new windows", "a letter", "seven boats", "the garden", "warm coats", "maps"]
SPECIAL = ["<unk>", "<s>", "</s>"]


def stock(hub: Hub, folder: Path) -> dict[str, str]:
    """Put the model and its data sets on a Hub; returns repository → commit.

    Args:
        hub: Empty.
        folder: For the model's files on their way.
    """
    return {
        MODEL: hub.put_model(MODEL, save_mistral(folder)),
        C4: hub.put_dataset(C4, c4_files()),
        WIKIPEDIA: hub.put_dataset(WIKIPEDIA, wikipedia_files()),
        MMLU: hub.put_dataset(MMLU, mmlu_files()),
        BOOLQ: hub.put_dataset(BOOLQ, boolq_files()),
        GSM8K: hub.put_dataset(GSM8K, gsm8k_files()),
    }


def sentences(count: int, *, seed: int) -> str:
    """English of a kind: enough regularity for a tiny model, enough variety for a tokenizer."""
    draw = random.Random(seed)
    parts = (f"{draw.choice(WHO)} {draw.choice(DOES)} {draw.choice(WHAT)}." for _ in range(count))
    return " ".join(part.capitalize() for part in parts)


# The model --------------------------------------------------------------------------------------


def save_mistral(folder: Path) -> Path:
    """A random Mistral as its repository lays it out: two shards, old configuration, pickles beside them."""
    torch.manual_seed(0)
    tokenizer = _train_tokenizer()
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": 32768,
    }
    model = MistralForCausalLM(MistralConfig(**sizes, bos_token_id=1, eos_token_id=2)).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="150KB")
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, value in _settings(sizes).items():
        (folder / name).write_text(json.dumps(value, indent=2))
    for number in (1, 2):
        (folder / f"pytorch_model-0000{number}-of-00002.bin").write_bytes(b"\x80\x02}." + bytes(10_000))
    (folder / "README.md").write_text(
        "---\nlibrary_name: transformers\nlanguage:\n- en\nlicense: apache-2.0\ntags:\n- pretrained\n"
        "inference: false\nextra_gated_description: none\n---\n# Model Card for Mistral-7B-v0.1\n"
    )
    return folder


def _settings(sizes: dict[str, int]) -> dict[str, Any]:
    """The JSON files beside the weights, written as transformers 4.34 did."""
    config = {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": "mistral",
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0",
        "use_cache": True,
    }
    added = {
        str(index): {"content": token, "special": True, "normalized": False, "lstrip": False, "rstrip": False}
        for index, token in enumerate(SPECIAL)
    }
    tokenizer_config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": added,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": True,
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": None,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    return {
        "config.json": config | sizes,
        "generation_config.json": {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2},
        "tokenizer_config.json": tokenizer_config,
        "special_tokens_map.json": dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True)),
    }


def _train_tokenizer() -> Tokenizer:
    """A byte-pair tokenizer of the model's kind: ▁ for spaces, bytes for what it does not know."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=[*SPECIAL, *bytes_], show_progress=False)
    text = [f"{word} " for word in sentences(400, seed=0).split()]
    tokenizer.train_from_iterator(text, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < len(SPECIAL)]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


# The data sets ----------------------------------------------------------------------------------


def c4_files() -> dict[str, bytes]:
    """`en` and the start of a second configuration.

    The first training shard holds more than a shuffle buffer, so that a short healing reads no other.
    """
    files = {"README.md": _card(_c4_configurations())}
    for split, count, rest in (("train", TRAIN_SHARDS, 1), ("validation", VALIDATION_SHARDS, 350)):
        for shard in range(count):
            name = f"c4-{split}.{shard:05d}-of-{count:05d}.json.gz"
            many = SHUFFLE_BUFFER + 400 if name.startswith("c4-train.00000") else rest
            files[f"en/{name}"] = _json_lines(split, first_seed=shard * 100_000, count=many)
        files[f"en.noclean/c4-{split}.00000-of-07168.json.gz"] = _json_lines(split, first_seed=0, count=1)
    return files


def _c4_configurations() -> list[dict[str, Any]]:
    splits = ("train", "validation")
    return [
        {
            "config_name": name,
            "data_files": [{"split": split, "path": f"{name}/c4-{split}.*.json.gz"} for split in splits],
        }
        for name in ("en", "en.noclean")
    ]


def wikipedia_files() -> dict[str, bytes]:
    """One edition of a dump: training rows alone."""
    articles = [
        {
            "id": str(seed),
            "url": f"https://en.wikipedia.org/wiki/{seed}",
            "title": f"Article {seed}",
            "text": f"Article {seed}\n\n{sentences(6, seed=seed)}",
        }
        for seed in range(5_000_000, 5_000_000 + 300)
    ]
    return _parquet_files({"20231101.en": {"train": articles}})


def _json_lines(split: str, *, first_seed: int, count: int) -> bytes:
    rows = (
        {
            "text": f"{split.capitalize()} {seed}. {sentences(40 if seed % 16 == 0 else 4, seed=seed)}",
            "timestamp": "2019-04-25T12:57:54Z",
            "url": f"https://example.org/{split}/{seed}",
        }
        for seed in range(first_seed, first_seed + count)
    )
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    return gzip.compress(lines.encode(), compresslevel=1, mtime=0)


BOOLQ_FEATURES = [
    {"name": "question", "dtype": "string"},
    {"name": "passage", "dtype": "string"},
    {"name": "idx", "dtype": "int32"},
    {"name": "label", "dtype": {"class_label": {"names": {"0": "False", "1": "True"}}}},
]


def mmlu_subjects() -> list[str]:
    """The configurations that lm-eval's own `mmlu` asks for."""
    folder = Path(tasks.__file__).parent / "mmlu" / "default"
    return [yaml.safe_load(path.read_text())["dataset_name"] for path in sorted(folder.glob("mmlu_*.yaml"))]


def mmlu_files() -> dict[str, bytes]:
    """Two questions and five examples a subject."""
    sizes = {"test": 2, "validation": 1, "dev": 5}
    tables = {
        subject: {split: list(mmlu_questions(subject, split, count)) for split, count in sizes.items()}
        for subject in mmlu_subjects()
    }
    return _parquet_files(tables)


def mmlu_questions(subject: str, split: str, count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        draw = random.Random(f"{subject} {split} {number}")
        yield {
            "question": f"What {draw.choice(DOES)} {draw.choice(WHO)}?",
            "subject": subject,
            "choices": draw.sample(WHAT, 4),
            "answer": draw.randrange(4),
        }


def boolq_files() -> dict[str, bytes]:
    """Questions with and, in the test split as on the Hub, without answers."""
    rows = {
        split: [
            {
                "question": f"does the passage name {WHAT[number % len(WHAT)]}",
                "passage": sentences(4, seed=number),
                "idx": number,
                "label": -1 if split == "test" else int(number % 4 > 0),
            }
            for number in range(count)
        ]
        for split, count in (("train", 4), ("validation", 12), ("test", 2))
    }
    sizes = [{"name": split, "num_examples": len(rows[split]), "num_bytes": 0} for split in rows]
    info = {"config_name": "boolq", "features": BOOLQ_FEATURES, "splits": sizes}
    return _parquet_files({"boolq": rows}, dataset_info=[info])


def gsm8k_files() -> dict[str, bytes]:
    """Examples, and two questions to be answered freely: `main` and the start of a second configuration."""
    tables = {
        split: [
            {
                "question": f"{WHO[number].capitalize()} has {number} maps and {number + 2} more. How many?",
                "answer": f"There are {number}+{number + 2}=<<{number}+{number + 2}={2 * number + 2}>>"
                f"{2 * number + 2} maps.\n#### {2 * number + 2}",
            }
            for number in range(count)
        ]
        for split, count in (("train", 7), ("test", 2))
    }
    return _parquet_files({"main": tables, "socratic": tables})


def _parquet_files(tables: dict[str, dict[str, list[dict[str, Any]]]], **more: Any) -> dict[str, bytes]:
    """Configuration → split → rows, as `push_to_hub` lays them out; `more` goes into the card."""
    configurations = [
        {
            "config_name": config,
            "data_files": [{"split": split, "path": f"{config}/{split}-*"} for split in splits],
        }
        for config, splits in tables.items()
    ]
    files = {
        f"{config}/{split}-00000-of-00001.parquet": _parquet(rows)
        for config, splits in tables.items()
        for split, rows in splits.items()
    }
    return files | {"README.md": _card(configurations, **more)}


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    stream = io.BytesIO()
    table = pyarrow.Table.from_pylist(rows)
    if "idx" in table.schema.names:
        table = table.set_column(table.schema.get_field_index("idx"), "idx", table["idx"].cast("int32"))
    parquet.write_table(table, stream)
    return stream.getvalue()


def _card(configurations: list[dict[str, Any]], **more: Any) -> bytes:
    front_matter = yaml.safe_dump({"license": "odc-by", **more, "configs": configurations}, sort_keys=False)
    return f"---\n{front_matter}---\n# Data\n".encode()
