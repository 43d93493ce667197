"""Read the files of a LoRA adapter in peft's format, and refuse what a merge would get wrong."""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from factory.checkpoint.auxiliary import (
    VOCABULARIES,
    auxiliary_files,
    check_json,
    copy_auxiliary_files,
    is_auxiliary,
    is_legal,
)
from factory.errors import CheckpointError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # before the name of the module in the model
# Fields that the merge reads, or that only affect training. Any other field that is set is refused by
# name, so that a future variant of LoRA is not merged as if it were plain.
KNOWN_FIELDS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "target_modules", "target_parameters", "task_type", "use_rslora",
}  # fmt: skip
# Other initialisations also change the base weights, so that B·A does not match those on disk.
PLAIN_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")
NOT_OF_TOKENIZER = ("generation_config.json", "preprocessor_config.json", "processor_config.json")
DAMAGED = "the adapter's files are damaged: make or download them again"


def read_adapter_config(path: Path) -> dict[str, Any]:
    """Read an adapter_config.json, of which only plain LoRA is accepted.

    Raises:
        CheckpointError: The file is damaged, or the adapter is of another kind; names the reason.
    """
    try:
        check_json(path.parent, [path.name])
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {str(error)[:200]}", hint=DAMAGED) from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        what = f"is of type {str(kind)[:40]}" if kind else "names no peft_type"
        raise CheckpointError(f"{path} {what}, not LORA", hint="only LoRA adapters can be merged")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise CheckpointError(f"{path} has r {str(rank)[:40]}, lora_alpha {str(alpha)[:40]}", hint=DAMAGED)
    _check_plain(config)
    return config


def _check_plain(config: Mapping[str, Any]) -> None:
    unsupported = [name for name, value in config.items() if value and name not in KNOWN_FIELDS]
    if config.get("bias", "none") != "none":
        unsupported.append(f"bias={config['bias']}")
    if config.get("init_lora_weights", True) not in PLAIN_INITIALISATIONS:
        unsupported.append(f"init_lora_weights={config['init_lora_weights']}")
    if unsupported:
        raise CheckpointError(
            f"the adapter uses {', '.join(unsupported)[:200]}, which cannot be merged here",
            hint="train plain LoRA, or merge it with peft's merge_and_unload and give the merged model",
        )


def adapted_modules(stored: Mapping[str, Any]) -> list[str]:
    """Return the names of the adapted modules; every stored tensor must be half of a LoRA pair.

    Raises:
        CheckpointError: A tensor is something else, or there are none.
    """
    modules = []
    for name in stored:
        module, side, _ = name.rpartition(".lora_A.weight")
        pair = {f"{module}.lora_A.weight", f"{module}.lora_B.weight"}
        if side and module.startswith(PEFT_PREFIX) and pair <= stored.keys():
            modules.append(module.removeprefix(PEFT_PREFIX))
        elif not name.endswith(".lora_B.weight") or name.replace(".lora_B.", ".lora_A.") not in stored:
            raise CheckpointError(
                f"the adapter contains {name[:200]!r}, which is not half of a LoRA pair",
                hint="train plain LoRA on linear layers only, or merge with peft's merge_and_unload",
            )
    if not modules:
        raise CheckpointError(f"{ADAPTER_WEIGHTS} has no LoRA tensors", hint=DAMAGED)
    return modules


def brings_tokenizer(names: Collection[str]) -> bool:
    """Return whether an adapter comes with a whole tokenizer, in place of its base's."""
    return "tokenizer_config.json" in names and any(
        name in VOCABULARIES or name == "vocab.txt" or name.startswith("tokenizer.model") for name in names
    )


def needed_of_adapter(sizes: Mapping[str, int]) -> set[str]:
    """Return the names of an adapter's files that a merge reads: not its card, and nothing of its training.

    Args:
        sizes: Size of each file in bytes.
    """
    whole = brings_tokenizer(sizes)
    return {
        name
        for name, size_bytes in sizes.items()
        if name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
        or is_legal(name, size_bytes)
        or (whole and is_auxiliary(name, size_bytes) and name not in NOT_OF_TOKENIZER)
    }


def copy_files_beside(base: Path, adapter: Path, folder: Path) -> None:
    """Copy what accompanies merged weights: all of the base's, but a tokenizer of the adapter's own.

    Licence texts of both apply; one of the adapter's under a name of the base's is called `adapter-NAME`.

    Raises:
        CheckpointError: A file is a link to somewhere else.
    """
    added = auxiliary_files(adapter)
    whole = brings_tokenizer(added)
    for name in copy_auxiliary_files(base, folder):
        if whole and not is_legal(name, 0) and name not in NOT_OF_TOKENIZER:
            (folder / name).unlink()
    taken = needed_of_adapter({name: path.stat().st_size for name, path in added.items()})
    for name in sorted(taken & added.keys()):
        place, path = folder / name, added[name]
        if place.is_file() and place.read_bytes() != path.read_bytes():
            place = place.with_name(f"adapter-{place.name}")
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)
