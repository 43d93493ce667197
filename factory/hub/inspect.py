"""Check what the file names and the configuration of a model say."""

import json
from collections.abc import Collection, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import Any

from huggingface_hub import hf_hub_download

from factory.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from factory.checkpoint.auxiliary import CONFIG, WEIGHTS_INDEX, check_json, is_auxiliary
from factory.checkpoint.read import WEIGHTS, is_shard_name
from factory.errors import CheckpointError, UnsupportedArchitectureError, UsageError
from factory.hub.remote_code import class_references
from factory.hub.source_card import README, base_models_of

TOKENIZER_CONFIG = "tokenizer_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def check_names(names: Collection[str], *, where: str, card: Mapping[str, Any] | None = None) -> None:
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
        if pickles:
            raise CheckpointError(
                f"{where} has only pickled weights ({some(pickles)}), which can run code when read",
                hint="choose a repository with safetensors, or convert it with transformers' save_pretrained",
            )
        if ggufs:
            named = ", ".join(base_models_of((card or {}).get("base_model"))[:1])
            raise CheckpointError(
                f"{where} has only GGUF weights ({some(ggufs)})",
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


def weight_files(repo_id: str, *, commit: str, names: Collection[str]) -> list[str]:
    """Return the safetensors files that transformers would load, sorted."""
    if WEIGHTS in names:
        return [WEIGHTS]
    path = Path(hf_hub_download(repo_id, WEIGHTS_INDEX, revision=commit))
    check_json(path.parent, [path.name])
    try:
        weights = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{WEIGHTS_INDEX} of {repo_id} is damaged", hint="choose another revision"
        ) from error
    strange = [name for name in weights if not is_shard_name(name)]
    if strange:
        raise CheckpointError(
            f"{WEIGHTS_INDEX} of {repo_id} names {str(strange[0])[:80]!r}, not a safetensors file beside it",
            hint="do not use this repository unless you trust its origin",
        )
    missing = [name for name in weights if name not in names]
    if missing or not weights:
        raise CheckpointError(
            f"{repo_id} lacks {some(missing) or 'weights'}, named in its {WEIGHTS_INDEX}",
            hint="the upload is incomplete: choose another revision",
        )
    return weights


def needed_files(sizes: Mapping[str, int], weights: Collection[str], *, code: bool = False) -> set[str]:
    """Return the names of weights, configuration, tokenizer, templates, licence texts, card and code.

    Args:
        sizes: Size of each file in bytes.
        weights: Names of the weight files to include.
        code: Include the model's own Python.
    """
    always = {CONFIG, WEIGHTS_INDEX, README, *weights} - ({WEIGHTS_INDEX} if WEIGHTS in weights else set())
    return {
        name
        for name, size_bytes in sizes.items()
        if name in always
        or is_auxiliary(name, size_bytes)
        or (code and name.endswith(".py") and "/" not in name)
    }


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


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@cache
def known_types() -> Collection[str]:
    """Return the model types that transformers knows.

    Reads its list alone: the package takes a second to import, and a build that only reuses stages needs no
    more of it.
    """
    package = find_spec("transformers")
    assert package is not None
    assert package.origin is not None
    listed = run_path(str(Path(package.origin).parent / "models" / "auto" / "auto_mappings.py"))
    return frozenset(listed["CONFIG_MAPPING_NAMES"])


def needs_code(config: dict[str, Any], *, trusted: bool, pin: str | None = None) -> bool:
    """Return whether only code in the model's own repository knows its model type.

    Args:
        trusted: Whether that code may be run.
        pin: Reference to the same model at its commit; None if the commit was given.

    Raises:
        UnsupportedArchitectureError: The model type is unknown, or its code is not trusted.
        UsageError: The code is trusted without a commit.
    """
    model_type = config["model_type"]
    if model_type in known_types():
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
