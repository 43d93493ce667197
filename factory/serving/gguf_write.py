"""Write a model folder as one GGUF file, tensor by tensor, with the `gguf` package."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from factory.checkpoint.header import TensorInfo
from factory.checkpoint.read import read_checkpoint, read_tensor_bytes
from factory.errors import CheckpointError, UnsupportedArchitectureError
from factory.model.config_fields import read_config
from factory.serving.gguf_settings import (
    CONVERTER,
    FAMILIES,
    Family,
    add_settings,
    check_settings,
    rope_of,
    settings_of,
)
from factory.serving.gguf_tokenizer import add_tokenizer, check_tokenizer_of

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter, TensorNameMap

Progress = Callable[[int, int], None]
HEAD = "lm_head.weight"
COMPUTED = "rotary_emb.inv_freq"  # in checkpoints of old, with what RoPE computes anyway
READABLE = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Facts:
    """What a file's header says of its origin."""

    name: str
    licenses: tuple[str, ...] = ()
    repo_id: str | None = None  # of the model that was pruned


def check_convertible(folder: Path) -> None:
    """Refuse, before anything is written, a model whose GGUF cannot be written here.

    Raises:
        UnsupportedArchitectureError: The family is none of `FAMILIES`.
        UnsupportedFieldError: A setting has no place in the file.
        ModelError: llama.cpp does not know the tokenizer.
        CheckpointError: The weights are packed.
    """
    config = read_config(folder)
    model_type = str(config.get("model_type"))
    family = FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedArchitectureError(
            f"the GGUF of a {model_type} cannot be written; known are {', '.join(FAMILIES)}", hint=CONVERTER
        )
    check_settings(family, settings_of(config), model_type=model_type)
    for tensor in read_checkpoint(folder).values():
        if tensor.dtype not in READABLE:
            raise CheckpointError(
                f"{tensor.name} is stored as {tensor.dtype}, not in 16 or 32 bits", hint=CONVERTER
            )
    check_tokenizer_of(folder)


def write_gguf(
    folder: Path, out: Path, *, kind: str, facts: Facts, progress: Progress = lambda *_: None
) -> None:
    """Write a model folder that `check_convertible` accepts.

    Args:
        kind: "F16" or "Q8_0". Norms stay in 32 bits, and matrices whose rows do not divide into blocks of 32
            in 16.
        progress: Receives (tensors written, tensors).
    """
    import gguf

    config = read_config(folder)
    family, values = FAMILIES[config["model_type"]], settings_of(config)
    writer = gguf.GGUFWriter(out, family.arch)
    try:
        _add_facts(writer, facts)
        add_settings(writer, family, values)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_tokenizer(writer, folder, num_rows=values["vocab_size"])
        _write_tensors(writer, list(_tensors(folder, family, values)), kind=kind, progress=progress)
    finally:
        writer.close()


def _add_facts(writer: "GGUFWriter", facts: Facts) -> None:
    writer.add_name(facts.name)
    if facts.licenses:
        writer.add_license(" and ".join(facts.licenses))
    if repo_id := facts.repo_id:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, repo_id.rpartition("/")[2])
        writer.add_base_model_organization(0, repo_id.rpartition("/")[0])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{repo_id}")


Values = Callable[[], "np.ndarray[Any, Any]"]


def _tensors(
    folder: Path, family: Family, values: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[int, ...], Values]]:
    """Yield the name and shape of each tensor of the file, and a function that reads its values."""
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    names = gguf.get_tensor_name_map(arch, values["num_hidden_layers"])
    tied = values.get("tie_word_embeddings")
    for tensor in read_checkpoint(folder).values():
        if not (tensor.name == HEAD and tied) and not tensor.name.endswith(COMPUTED):
            yield _name(names, tensor), tensor.shape, _reader(tensor, family, values)
    for name, factors in _rope_factors(values).items():
        yield name, factors.shape, partial(np.copy, factors)


def _name(names: "TensorNameMap", tensor: TensorInfo) -> str:
    name: str | None = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise CheckpointError(f"GGUF has no name for the tensor {tensor.name}", hint=CONVERTER)
    return name


def _reader(tensor: TensorInfo, family: Family, values: Mapping[str, Any]) -> Values:
    """Return a function that reads a tensor, with the rows and offsets that llama.cpp expects."""
    heads = {"q_proj": values["num_attention_heads"], "k_proj": values.get("num_key_value_heads")}
    part = next((part for part in heads if f".{part}." in tensor.name), None)

    def read() -> "np.ndarray[Any, Any]":
        found = _as_floats(tensor)
        if tensor.name.endswith("norm.weight"):
            found = found + np.float32(family.norm_offset)
        if family.neighbours and part:
            found = _interleave(found, num_heads=heads[part] or values["num_attention_heads"])
        return found

    return read


def _as_floats(tensor: TensorInfo) -> "np.ndarray[Any, Any]":
    raw = read_tensor_bytes(tensor)
    if tensor.dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").reshape(tensor.shape)
    return np.frombuffer(raw, {"F16": "<f2", "F32": "<f4"}[tensor.dtype]).astype("<f4").reshape(tensor.shape)


def _interleave(rows: "np.ndarray[Any, Any]", *, num_heads: int) -> "np.ndarray[Any, Any]":
    """Bring the rows that RoPE turns together side by side: 0, h/2, 1, h/2 + 1, … of each head."""
    pairs = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _rope_factors(values: Mapping[str, Any]) -> dict[str, "np.ndarray[Any, Any]"]:
    """Return what RoPE's frequencies are divided by, where the format stores it as tensors."""
    rope = rope_of(values)
    kind = rope.get("rope_type")
    if kind == "longrope":
        return {
            f"rope_factors_{name}.weight": np.array(rope[f"{name}_factor"], np.float32)
            for name in ("long", "short")
        }
    return {"rope_freqs.weight": _llama3_factors(values)} if kind == "llama3" else {}


def _llama3_factors(values: Mapping[str, Any]) -> "np.ndarray[Any, Any]":
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from factory.model.config_proof import text_config

    config = text_config(dict(values))
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].double().numpy()
    num_pairs = len(scaled)
    plain = rope_of(values)["rope_theta"] ** -(np.arange(num_pairs) / num_pairs)
    factors: np.ndarray[Any, Any] = (plain / scaled).astype(np.float32)
    return factors


def _write_tensors(
    writer: "GGUFWriter",
    tensors: list[tuple[str, tuple[int, ...], Values]],
    *,
    kind: str,
    progress: Progress,
) -> None:
    """Write the header with every tensor's shape, then the tensors one after another."""
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import quantize

    for name, shape, _ in tensors:
        stored = _stored_as(shape, kind)
        block, block_bytes = GGML_QUANT_SIZES[stored]
        size = math.prod(shape) // block * block_bytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for count, (_, shape, read) in enumerate(tensors):
        progress(count, len(tensors))
        writer.write_tensor_data(quantize(read(), _stored_as(shape, kind)))
    progress(len(tensors), len(tensors))


def _stored_as(shape: tuple[int, ...], kind: str) -> "GGMLQuantizationType":
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    wanted = GGMLQuantizationType[kind]
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType.F16 if shape[-1] % GGML_QUANT_SIZES[wanted][0] else wanted
