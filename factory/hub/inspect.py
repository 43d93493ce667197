"""Describe a model from its file names, configuration and headers."""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from factory.artifacts import Source
from factory.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from factory.checkpoint.auxiliary import WEIGHTS_INDEX, check_json
from factory.checkpoint.header import TensorInfo
from factory.checkpoint.read import WEIGHTS
from factory.errors import UNTRUSTED, CheckpointError, ModelError, UnsupportedArchitectureError, UsageError
from factory.hub.remote_code import class_references
from factory.hub.source_card import base_models_of, languages_of, licenses_of, short_text, texts_of
from factory.model.architecture import locate, num_weights
from factory.model.config_fields import vocab_size

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# safetensors' name of a type → transformers'
DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "I32": "int32",
}
MAX_LAYERS = 10_000
Progress = Callable[[int, int], None]


def _check_names(names: Collection[str], *, where: str, card: Mapping[str, Any] | None = None) -> None:
    """Refuse a repository or folder whose file names show that transformers could not load it.

    Args:
        card: Front matter of its card, which may name what a GGUF was converted from.
    """
    for name in names:
        if not name.isprintable():  # its checksum could not be written as a line
            raise CheckpointError(f"{where} has a file named {ascii(name)[:80]}", hint="rename or remove it")
    if WEIGHTS not in names and WEIGHTS_INDEX not in names:
        pickles = sorted(name for name in names if "/" not in name and name.endswith(PICKLES))
        ggufs = sorted(name for name in names if name.endswith(".gguf"))
        if ADAPTER_CONFIG in names:
            raise CheckpointError(
                f"{where} is an adapter itself, not a model",
                hint="merge the adapters into one model first, and give that",
            )
        if pickles:
            raise CheckpointError(
                f"{where} has only pickled weights ({_some(pickles)}), which can run code when read",
                hint="choose a repository with safetensors, or convert it with transformers' save_pretrained",
            )
        if ggufs:
            named = ", ".join(base_models_of((card or {}).get("base_model"))[:1])
            raise CheckpointError(
                f"{where} has only GGUF weights ({_some(ggufs)})",
                hint="choose the repository they were converted from"
                + f", by its card {named}" * bool(named),
            )
        raise CheckpointError(
            f"{where} has neither {WEIGHTS} nor {WEIGHTS_INDEX}", hint="give a model with safetensors weights"
        )
    if CONFIG not in names:
        raise CheckpointError(f"{where} has no {CONFIG}", hint="give a model that transformers can load")
    if ADAPTER_CONFIG in names:
        raise CheckpointError(
            f"{where} has an adapter ({ADAPTER_CONFIG}) beside its weights, which transformers would attach "
            "to them",
            hint=f"merge the adapter into the weights, or give a copy without {ADAPTER_CONFIG}",
        )


def is_adapter(names: Collection[str]) -> bool:
    """Return whether a repository or folder holds an adapter and no whole weights beside it."""
    return ADAPTER_CONFIG in names and not {WEIGHTS, WEIGHTS_INDEX} & set(names)


def check_adapter_names(names: Collection[str], *, where: str) -> None:
    """Refuse an adapter without weights in safetensors.

    Raises:
        CheckpointError: They are missing, or pickled.
    """
    if ADAPTER_WEIGHTS in names:
        return
    pickles = sorted(name for name in names if "/" not in name and name.endswith(PICKLES))
    if "adapter_model.bin" in pickles:
        raise CheckpointError(
            f"{where} is an adapter with pickled weights (adapter_model.bin), which can run code when read",
            hint="save it again with peft's save_pretrained, which writes safetensors",
        )
    raise CheckpointError(
        f"{where} is an adapter without {ADAPTER_WEIGHTS}", hint="the upload is incomplete: give a whole one"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_config(path: Path) -> dict[str, Any]:
    """Read and check config.json."""
    check_json(path.parent, [path.name])
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(config, ensure_ascii=False).encode("utf-8")  # JSON can contain lone surrogates
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is damaged: {error}", hint="download it again") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"{path.name} has no model_type", hint="give a model that transformers can load"
        )
    _check_values(config, name=path.name)
    # A path on its author's disk: the configuration is recorded and published.
    return {key: value for key, value in config.items() if key != "_name_or_path"}


def _needs_code(config: dict[str, Any], *, trusted: bool, pin: str | None = None) -> bool:
    """Return whether only code in the model's own repository knows its model type.

    Args:
        trusted: Whether that code may be run.
        pin: Reference to the same model at its commit; None if the commit was given.

    Raises:
        UnsupportedArchitectureError: The model type is unknown, or its code is not trusted.
        UsageError: The code is trusted without a commit.
    """
    # Not `transformers.CONFIG_MAPPING`: it imports torch, which a build that reuses all stages never needs.
    from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES

    model_type = config["model_type"]
    if model_type in CONFIG_MAPPING_NAMES:
        return False
    if not config.get("auto_map"):
        raise UnsupportedArchitectureError(
            f"model type {model_type!r} is unknown to transformers",
            hint="try a newer transformers, or choose another model",
        )
    classes = ", ".join(class_references(config).values())
    if not trusted:
        raise UnsupportedArchitectureError(
            f"model type {model_type!r} needs its own code ({classes})",
            hint=f"read that code; to run it, give {pin or 'the same model'} with `trust_remote_code`",
        )
    if pin:
        raise UsageError(
            f"`trust_remote_code` without a commit would also run later changes to the code ({classes})",
            hint=f"read the code, then give {pin}",
        )
    return True


def _check_values(config: dict[str, Any], *, name: str) -> None:
    """Refuse values that later steps could not handle."""
    architectures = config.get("architectures")
    nested = config.get("text_config")
    wrong = []
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(item, str) for item in architectures)
    ):
        wrong.append(("architectures", architectures))
    if nested is not None and not isinstance(nested, dict):
        wrong.append(("text_config", nested))
    for part in (config, nested if isinstance(nested, dict) else {}):
        for field in ("num_hidden_layers", "vocab_size"):
            value = part.get(field)
            if value is not None and (type(value) is not int or value < 1):
                wrong.append((field, value))
        if type(part.get("num_nextn_predict_layers") or 0) is not int:
            wrong.append(("num_nextn_predict_layers", part["num_nextn_predict_layers"]))
    if "device_map" in config:  # transformers would use it as a loading option
        wrong.append(("device_map", config["device_map"]))
    if wrong:
        field, value = wrong[0]
        raise CheckpointError(
            f"{name} has {field} {str(value)[:60]!r}", hint="give a model that transformers can load"
        )


def _source(
    *,
    name: str,
    repo_id: str | None,
    commit: str,
    config: dict[str, Any],
    tensors: Mapping[str, TensorInfo],
    size_bytes: int,
    card: Mapping[str, Any],
    has_chat_template: bool,
    remote_code: bool,
) -> Source:
    stack = locate(config, list(tensors))
    _check_weights(config, tensors, prefix=stack.tensor_prefix, num_layers=stack.num_layers)
    layers = _by_layer(tensors, prefix=stack.tensor_prefix, num_layers=stack.num_layers)
    dtypes: Counter[str] = Counter()
    for tensor in tensors.values():
        dtypes[tensor.dtype] += tensor.num_elements
    dtype = dtypes.most_common(1)[0][0]
    return Source(
        name=name,
        repo_id=repo_id,
        commit=commit,
        model_type=config["model_type"],
        architecture=(config.get("architectures") or [""])[0],
        config=config,
        tensors={name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()},
        num_layers=stack.num_layers,
        num_parameters=max(1, sum(num_weights(t, config) for t in tensors.values())),
        layer_parameters=tuple(sum(num_weights(t, config) for t in layer) for layer in layers),
        size_bytes=size_bytes,
        layer_bytes=tuple(sum(t.size_bytes for t in layer) for layer in layers),
        vocab_size=_vocab_size(config),
        dtype=DTYPES.get(dtype, dtype.lower()),
        license=licenses_of(card.get("license")),
        license_name=", ".join(texts_of(card.get("license_name"))) or None,
        license_link=short_text(card.get("license_link")),
        base_models=base_models_of(card.get("base_model")),
        languages=languages_of(card.get("language")),
        has_chat_template=has_chat_template,
        remote_code=remote_code,
    )


def _by_layer(tensors: Mapping[str, TensorInfo], *, prefix: str, num_layers: int) -> list[list[TensorInfo]]:
    """Return the tensors of each decoder layer."""
    if num_layers > MAX_LAYERS:
        raise CheckpointError(
            f"{CONFIG} says {num_layers:,} layers; no model has more than {MAX_LAYERS:,}", hint=UNTRUSTED
        )
    layers: dict[str, list[TensorInfo]] = {str(index): [] for index in range(num_layers)}
    for name, tensor in tensors.items():
        index, dot, _ = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and dot and index in layers:
            layers[index].append(tensor)
    return list(layers.values())


def _check_weights(
    config: dict[str, Any], tensors: Mapping[str, TensorInfo], *, prefix: str, num_layers: int
) -> None:
    """Refuse weights that do not match the configuration: more layers, or embeddings of another width."""
    part = config.get("text_config") or config
    found = {name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)}
    numbers = [int(index) for index in found if re.fullmatch("[0-9]{1,9}", index)]
    on_disk = 1 + max(numbers, default=-1)
    if on_disk > num_layers + (part.get("num_nextn_predict_layers") or 0):
        raise CheckpointError(
            f"the weights have {on_disk} layers, {CONFIG} says {num_layers}",
            hint="they belong to two different models; download both again",
        )
    width = part.get("word_embed_proj_dim") or part.get("hidden_size")  # OPT's embedding may be narrower
    name = f"{prefix.removesuffix('layers.')}embed_tokens.weight"
    tensor = tensors.get(name)
    # Packed weights are narrower than the model.
    if tensor and width and tensor.dtype in ("BF16", "F16", "F32") and tensor.shape[-1:] != (width,):
        raise CheckpointError(
            f"{name} has shape {list(tensor.shape)}, {CONFIG} says hidden_size {width}",
            hint="they belong to two different models; download both again",
        )


def _vocab_size(config: Mapping[str, Any]) -> int:
    if (stated := vocab_size(config)) is not None:
        return stated
    from factory.model.config_proof import text_config

    size = getattr(text_config(dict(config)), "vocab_size", None)
    if isinstance(size, int):
        return size
    raise ModelError(f"{CONFIG} has no vocab_size", hint="give a text model that transformers can load")


def _has_chat_template(names: Collection[str], tokenizer_config: Path) -> bool:
    if any(name.startswith("chat_template.") for name in names):
        return True
    return tokenizer_config.is_file() and '"chat_template"' in tokenizer_config.read_text(encoding="utf-8")
