"""Where LoRA is laid: on what of which layers; and the adapter's files, in peft's format."""

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

from factory.errors import UnsupportedArchitectureError
from factory.model.config_fields import packing, packing_method
from factory.model.config_proof import on_meta
from factory.model.experts import adaptable_experts, fused_experts
from factory.model.layers import decoder_layers

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # before the name of the module in the model
GUARD = "guard.json"  # beside the adapter: the sequences that it was not trained on
ROUTERS = {"gate", "router", "shared_expert_gate"}
TOKEN_MIXERS = ("att", "mixer", "mamba", "conv", "temporal", "lstm")  # in names of modules
Modules = Literal["ffn", "all-linear"]


@dataclass(frozen=True)
class Targets:
    """What LoRA adapts in a layer: names relative to it, as "mlp.down_proj"."""

    modules: list[str]  # linear ones
    experts: list[str]  # parameters that hold all experts at once
    left_out: list[str]  # those of them that no LoRA adapts


def find_targets(model: Any, which: Modules) -> Targets:
    """What of a model's layers to adapt.

    "ffn" takes what lies outside attention, "all-linear" attention's modules too; routers stay as they are in
    both, and in "all-linear" experts that are one parameter in a way that LoRA is not known to fit.

    Raises:
        UnsupportedArchitectureError: There is nothing, or "ffn" is asked of such experts.
    """
    experts = adaptable_experts(model)
    left_out = [name for name in fused_experts(model) if name not in experts]
    if which == "ffn" and left_out:
        raise UnsupportedArchitectureError(
            f"{model.config.model_type}: its experts are one parameter ({left_out[0]}) that no LoRA is known "
            "to fit",
            hint="`heal_modules=all-linear` adapts attention; or build it without healing: `no_heal`",
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
            hint="build it without healing: `no_heal`",
        )
    return Targets(sorted(names), experts, left_out)


def _mixes_tokens(name: str) -> bool:
    """Whether a module belongs to attention or to what stands in its place."""
    return any(mixer in name.lower() for mixer in TOKEN_MIXERS)


def check_targets(config: dict[str, Any], which: Modules) -> None:
    """Find what to adapt by config.json alone, before there are weights.

    Raises:
        UnsupportedArchitectureError: As `find_targets`; or the weights are packed.
    """
    if packing(config):
        method = packing_method(config)
        raise UnsupportedArchitectureError(
            f"{config['model_type']}: its weights are packed ({method}); no LoRA can be merged into those",
            hint="start from the unquantised model, or build it without healing: `no_heal`",
        )
    find_targets(on_meta(config), which)


def lora_config(targets: Targets, layers: Mapping[str, Any], *, rank: int, dropout: float) -> Any:
    """peft's LoraConfig: plain, α = r. Experts allow no dropout, as their update is added to them.

    Args:
        layers: Those to adapt, by name.
    """

    from peft import LoraConfig  # here: targets are looked for before anything long, without peft

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
    """While active, peft adapts what it is told to.

    peft 0.21 takes names like "gate_proj" for those that experts had before transformers 5: for a dense layer
    or a shared expert beside experts it would adapt the experts of all layers instead, at twice the rank.
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
    """The source's number of the first layer that gets LoRA: with `seam`, the last one before the cut.

    Below it nothing is trained: the backward pass stops there.

    Args:
        kept: Layers that stay, ascending, in the source's numbers.
        dropped: Layers that go.
    """
    before = [index for index in kept if index < min(dropped, default=0)]
    return before[-1] if seam and before else kept[0]


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
    targets: Targets,
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
