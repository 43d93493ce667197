"""Handle experts fused into one parameter: which of them LoRA can adapt, and how they are stored."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from factory.checkpoint.header import TensorInfo
from factory.model.layers import decoder_layers

# How one matrix per expert becomes one parameter: stacked; two kinds are put one above the other.
PLAIN_CONVERSIONS = ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


@dataclass(frozen=True)
class Part:
    """A stored matrix, and the rows and expert of a parameter that it fills: all, if without experts."""

    tensor: TensorInfo
    shape: tuple[int, ...]  # of the expert's complete matrix, as stored
    expert: int = 0
    num_experts: int = 1
    start: int = 0  # the first of its rows


def fused_experts(model: Any) -> list[str]:
    """Return the names, relative to a layer, of parameters that hold all its experts, [experts, …]."""
    return sorted({name for _, name, _ in _in_layers(model)})


def adaptable_experts(model: Any) -> list[str]:
    """Return those of `fused_experts` that LoRA is known to adapt and merge correctly, in all layers.

    Their module follows transformers' interface for experts: its forward pass reads them from it, and it says
    whether they are transposed. They are stored as they are, or as one matrix per expert.
    """
    odd = [
        target
        for entry in get_model_conversion_mapping(model)
        if isinstance(entry, WeightConverter) and not _is_plain(entry)
        for target in entry.target_patterns
    ]
    unfit = {
        name
        for module, name, parameter in _in_layers(model)
        if not hasattr(module, "is_transposed") or parameter.shape[0] < 2 or any(part in name for part in odd)
    }
    return [name for name in fused_experts(model) if name not in unfit]


def _in_layers(model: Any) -> Iterator[tuple[Any, str, Any]]:
    for layer in decoder_layers(model):
        for path, module in layer.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                full = f"{path}.{name}"
                if parameter.ndim == 3 and "expert" in full:
                    yield module, full, parameter


def _is_plain(converter: WeightConverter) -> bool:
    made_by = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    return made_by in PLAIN_CONVERSIONS


def expert_sizes(model: Any) -> tuple[int, int]:
    """Count the parameters of all `fused_experts`, and of a rank-1 adapter on the adaptable ones."""
    fit = adaptable_experts(model)
    found = [(name, parameter) for _, name, parameter in _in_layers(model)]
    adapter = sum(p.shape[0] * (p.shape[1] + p.shape[2]) for name, p in found if name in fit)
    return sum(parameter.numel() for _, parameter in found), adapter


def adapted_parameters(model: Any, targets: Collection[str]) -> dict[str, str]:
    """Map module names in an adapter to the parameters that peft's `target_parameters` select.

    peft wraps a module once per parameter, the one registered first innermost.
    """
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        names = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
        meant = [name for name in names if any(f".{name}".endswith(f".{target}") for target in targets)]
        found |= {path + ".base_layer" * depth: name for depth, name in enumerate(reversed(meant))}
    return found


def stored_parts(model: Any, tensors: Mapping[str, TensorInfo]) -> dict[str, list[Part]]:
    """Map parameter names in the loaded model to their stored parts, by transformers' own tables.

    The names differ if transformers renames weights (Gemma 3) or adds a prefix (GPT-2). Tensors that loading
    fuses in other ways than `PLAIN_CONVERSIONS` are left out.

    Args:
        model: Model without values.
        tensors: Tensors of the checkpoint.
    """
    expected = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    fused_by = {
        pattern: entry for entry in converters if _is_plain(entry) for pattern in entry.source_patterns
    }
    parts: dict[str, list[Part]] = {}
    stacks: dict[str, dict[str, list[TensorInfo]]] = defaultdict(lambda: defaultdict(list))
    for stored in sorted(tensors, key=dot_natural_key):  # experts by number, as in transformers
        name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, expected)
        if name in expected and pattern is None:
            parts[name] = list(_whole(tensors[stored]))
        elif name in expected and pattern in fused_by:
            stacks[name][pattern].append(tensors[stored])
    for name, stack in stacks.items():
        order = fused_by[next(iter(stack))].source_patterns
        parts[name] = list(_stacked([stack[pattern] for pattern in order], tuple(expected[name].shape[1:])))
    return parts


def _whole(tensor: TensorInfo) -> Iterable[Part]:
    if len(tensor.shape) != 3 or not tensor.size_bytes:
        return [Part(tensor, tensor.shape)]
    shape, num_experts = tensor.shape[1:], tensor.shape[0]
    size_bytes = tensor.size_bytes // num_experts
    starts = range(tensor.start, tensor.end, size_bytes)
    matrices = (replace(tensor, shape=shape, start=start, end=start + size_bytes) for start in starts)
    return (Part(matrix, shape, expert, num_experts) for expert, matrix in enumerate(matrices))


def _stacked(kinds: list[list[TensorInfo]], shape: tuple[int, ...]) -> Iterator[Part]:
    start = 0
    for tensors in kinds:
        for expert, tensor in enumerate(tensors):
            yield Part(tensor, shape, expert, len(tensors), start)
        start += tensors[0].shape[0] if tensors else 0
