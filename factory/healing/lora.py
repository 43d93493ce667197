"""Choose the modules and layers that LoRA adapts, and write the adapter's files in peft's format."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from factory.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PEFT_PREFIX
from factory.errors import UnsupportedArchitectureError
from factory.model.config_fields import packing, packing_method
from factory.model.config_proof import on_meta
from factory.model.experts import adaptable_experts, fused_experts
from factory.model.layers import decoder_layers
from factory.model.tokenizer import Answered, as_row, of_row

GUARD = "guard.json"  # held-out sequences, stored beside the adapter
ROUTERS = {"gate", "router", "shared_expert_gate"}
TOKEN_MIXERS = ("att", "mixer", "mamba", "conv", "temporal", "lstm")  # in names of modules
Modules = Literal["ffn", "all-linear"]


def save_guard(folder: Path, guard: Sequence[list[int]]) -> None:
    """Write the held-out sequences; of conversations, with the tokens of the answers marked."""
    rows = [as_row(sequence) if isinstance(sequence, Answered) else sequence for sequence in guard]
    (folder / GUARD).write_text(json.dumps(rows), encoding="utf-8")


def read_guard(folder: Path) -> list[list[int]]:
    """Read the sequences that `save_guard` wrote."""
    rows = json.loads((folder / GUARD).read_text(encoding="utf-8"))
    return [of_row(row) if isinstance(row, dict) else row for row in rows]


@dataclass(frozen=True)
class Targets:
    """What LoRA adapts in a layer, as names relative to it: "mlp.down_proj"."""

    modules: list[str]  # linear modules
    experts: list[str]  # parameters that fuse all experts
    left_out: list[str]  # fused experts that LoRA does not adapt


def find_targets(model: Any, which: Modules) -> Targets:
    """Find what to adapt in a model's layers.

    "ffn" takes linear modules outside attention, "all-linear" those of attention too. Neither adapts
    routers, nor experts that are fused in a way that LoRA is not known to support.

    Raises:
        UnsupportedArchitectureError: There is nothing to adapt, or "ffn" would need such experts.
    """
    experts = adaptable_experts(model)
    left_out = [name for name in fused_experts(model) if name not in experts]
    if which == "ffn" and left_out:
        raise UnsupportedArchitectureError(
            f"{model.config.model_type}: no known LoRA fits its experts, a single parameter ({left_out[0]})",
            hint="`heal_modules=all-linear` adapts attention; or build without healing: `no_heal`",
        )
    names: set[str] = set()
    for layer in decoder_layers(model):
        for name, module in layer.named_modules():
            wanted = which == "all-linear" or not _mixes_tokens(name)
            routes = not ROUTERS.isdisjoint(name.split("."))  # also "mlp.gate.wg", in Hunyuan
            if isinstance(module, torch.nn.Linear | Conv1D) and wanted and not routes:
                names.add(name)
    if not names and not experts:
        raise UnsupportedArchitectureError(
            f"{model.config.model_type}: no linear modules ({which}) for LoRA to adapt",
            hint="build without healing: `no_heal`",
        )
    return Targets(sorted(names), experts, left_out)


def feed_forward(model: Any) -> list[str]:
    """Return the linear modules outside attention and routers, relative to a layer."""
    return [name for name in find_targets(model, "all-linear").modules if not _mixes_tokens(name)]


def _mixes_tokens(name: str) -> bool:
    """Return whether a module belongs to attention or to its replacement."""
    return any(mixer in name.lower() for mixer in TOKEN_MIXERS)


def check_targets(config: dict[str, Any], which: Modules) -> None:
    """Check by config.json alone, before there are weights, that there are modules to adapt.

    Raises:
        UnsupportedArchitectureError: `find_targets` refuses the model, or its weights are packed.
    """
    _check_unpacked(config)
    find_targets(on_meta(config), which)


def check_feed_forward(config: dict[str, Any]) -> None:
    """Check by config.json alone that a layer has a linear module outside attention, to be fitted.

    Raises:
        UnsupportedArchitectureError: It has none, or the weights are packed.
    """
    _check_unpacked(config)
    if not feed_forward(on_meta(config)):
        raise UnsupportedArchitectureError(
            f"`heal_start=seam-fit`: {config['model_type']} has no linear module outside attention to fit",
            hint="remove `heal_start`",
        )


def _check_unpacked(config: dict[str, Any]) -> None:
    if packing(config):
        method = packing_method(config)
        raise UnsupportedArchitectureError(
            f"{config['model_type']}: its weights are packed ({method}), so LoRA cannot be merged into them",
            hint="start from the unquantised model, or build without healing: `no_heal`",
        )


def lora_config(targets: Targets, layers: Mapping[str, Any], *, rank: int, dropout: float) -> Any:
    """Return peft's LoraConfig: plain, with α = r, and without dropout if there are fused experts.

    Args:
        layers: Layers to adapt, by name.
    """
    from peft import LoraConfig  # imported late, so that `check_targets` stays fast

    def full(names: Sequence[str]) -> list[str]:
        return [
            f"{prefix}.{name}"
            for prefix, layer in layers.items()
            for name, _ in (*layer.named_modules(), *layer.named_parameters())
            if name in names
        ]

    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0 if targets.experts else dropout,
        target_modules=full(targets.modules),
        target_parameters=full(targets.experts) or None,
        bias="none",
        task_type="CAUSAL_LM",
    )


@contextmanager
def as_named() -> Iterator[None]:
    """Make peft adapt exactly the named modules while active.

    peft 0.21 takes names like "gate_proj" for those of experts before transformers 5: instead of a dense
    layer or a shared expert it would adapt the experts of all layers, at twice the rank.
    """
    from peft.utils import transformers_weight_conversion

    names = transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING
    kept = dict(names)
    names.clear()
    try:
        yield
    finally:
        names.update(kept)


def first_adapted(kept: Sequence[int], dropped: Sequence[int], *, seam: bool) -> int:
    """Return the source's index of the first layer with LoRA: with `seam`, the last one before the cut.

    Nothing below it is trained, so the backward pass stops there.

    Args:
        kept: Kept layers, ascending, by the source's indices.
        dropped: Dropped layers, by the source's indices.
    """
    before = [index for index in kept if index < min(dropped, default=0)]
    return before[-1] if seam and before else kept[0]


def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return the trained tensors by name; if the model is sharded, every process must call this."""
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
    targets: Targets,
    new_names: Mapping[str, str],
) -> None:
    """Write peft's two files for the pruned checkpoint, without the local path of the base model.

    Args:
        tensors: Trained tensors from `adapter_tensors`.
        new_names: Prefix of a module's name in the trained model → in the pruned checkpoint.
    """
    model.save_pretrained(folder, state_dict=dict(tensors))
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / ADAPTER_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {
        "base_model_name_or_path": None,
        "target_modules": targets.modules,
        "target_parameters": targets.experts or None,
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    weights = folder / ADAPTER_WEIGHTS
    renamed = {}
    for name, tensor in load_file(weights).items():
        old = next(old for old in new_names if f"{PEFT_PREFIX}{old}" in name)
        renamed[name.replace(old, new_names[old], 1)] = tensor
    save_file(renamed, weights, metadata={"format": "pt"})
