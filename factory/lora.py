"""Where LoRA is laid: which modules of which layers; and the adapter's files, in peft's format."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from factory.decoder import decoder_layers
from factory.decoder_proof import on_meta
from factory.errors import UnsupportedArchitectureError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # before the name of the module in the model
GUARD = "guard.json"  # beside the adapter: the sequences that it was not trained on

Modules = Literal["ffn", "all-linear"]


def linear_modules(model: Any, which: Modules) -> list[str]:
    """Names, relative to a layer, of the linear modules to adapt: ["mlp.down_proj", …].

    "ffn" takes those outside attention, "all-linear" attention's too; routers stay as they are in both, and
    experts that are one parameter in "all-linear".

    Raises:
        UnsupportedArchitectureError: There are none, or "ffn" is asked of experts that are one parameter.
    """
    if which == "ffn" and (fused := fused_experts(model)):
        raise UnsupportedArchitectureError(
            f"{model.config.model_type}: its experts are one parameter ({fused[0]}), which no LoRA adapts",
            hint="--heal-modules all-linear adapts attention; or build it without healing: --no-heal",
        )
    names: set[str] = set()
    for layer in decoder_layers(model):
        for name, module in layer.named_modules():
            wanted = which == "all-linear" or not _mixes_tokens(name)
            routes = name.split(".")[-1] == "gate" or "router" in name.split(".")
            if isinstance(module, torch.nn.Linear | Conv1D) and wanted and not routes:
                names.add(name)
    if not names:
        raise UnsupportedArchitectureError(
            f"{model.config.model_type}: no linear modules ({which}) for LoRA to adapt",
            hint="build it without healing: --no-heal",
        )
    return sorted(names)


def _mixes_tokens(name: str) -> bool:
    """Whether a module belongs to attention or to what stands in its place."""
    return any("att" in part.lower() or "mixer" in part.lower() for part in name.split("."))


def fused_experts(model: Any) -> list[str]:
    """Names, relative to a layer, of parameters that hold all its experts at once, [experts, …]."""
    parameters = (item for layer in decoder_layers(model) for item in layer.named_parameters())
    return sorted({name for name, parameter in parameters if parameter.ndim == 3 and "expert" in name})


def check_modules(config: dict[str, Any], which: Modules) -> None:
    """Find the modules to adapt by config.json alone, before there are weights.

    Raises:
        UnsupportedArchitectureError: As `linear_modules`.
    """
    linear_modules(on_meta(config), which)


def first_adapted(kept: Sequence[int], dropped: Sequence[int], *, seam: bool) -> int:
    """The source's number of the first layer that gets LoRA: with `seam`, the last one before the cut.

    Below it nothing is trained: the backward pass stops there.

    Args:
        kept: Layers that stay, ascending, in the source's numbers.
        dropped: Layers that go.
    """
    before = [index for index in kept if index < min(dropped, default=0)]
    return before[-1] if seam and before else kept[0]


def module_names(layers: Any, modules: Sequence[str], *, prefix: str, indices: Sequence[int]) -> list[str]:
    """Full names of the modules that LoRA adapts in some layers."""
    return [
        f"{prefix}.{index}.{name}"
        for index in indices
        for name, _ in layers[index].named_modules()
        if name in modules
    ]


def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    """What was trained, by name; of a sharded model put together, for which every process must ask."""
    return {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().cpu()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def save_adapter(
    model: Any,
    tensors: Mapping[str, torch.Tensor],
    folder: Path,
    *,
    modules: Sequence[str],
    new_names: Mapping[str, str],
) -> None:
    """peft's two files, for the pruned checkpoint and without the local path that peft writes as its base.

    Args:
        tensors: As `adapter_tensors` gives them.
        new_names: Beginning of a module's name in the trained model → in the pruned checkpoint.
    """
    model.save_pretrained(folder, state_dict=dict(tensors))
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / ADAPTER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": None, "target_modules": list(modules)}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    weights = folder / ADAPTER_WEIGHTS
    renamed = {}
    for name, tensor in load_file(weights).items():
        old = next(old for old in new_names if f"{PEFT_PREFIX}{old}" in name)
        renamed[name.replace(old, new_names[old], 1)] = tensor
    save_file(renamed, weights, metadata={"format": "pt"})
