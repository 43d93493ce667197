"""Prove from headers alone that the weights hold every parameter of the model."""

import re
from collections.abc import Iterable
from typing import Any

from factory.artifacts import Source
from factory.errors import CheckpointError, VerificationError
from factory.model.architecture import locate
from factory.model.config_fields import packing
from factory.model.config_proof import check_decoder, find_layers, on_meta
from factory.model.loading import loading_report, some, told

PLAIN_DTYPES = ("BF16", "F16", "F32", "F64")  # others hold packed weights, in other shapes
AGAIN = "the checkpoint is incomplete, or config.json belongs to another model; download both again"


def check_source(source: Source) -> None:
    """Refuse a model that is not a decoder, or whose weights lack parameters that transformers would invent.

    transformers itself matches names and shapes on the meta device, so that parameters that it renames,
    fuses, ties or computes count as present. A model with its own code is checked when it is loaded.

    Raises:
        UnsupportedArchitectureError: transformers cannot build it as a causal language model.
        CheckpointError: A tensor is missing or has another shape; the message names it and its layer.
    """
    if source.remote_code:
        return
    check_decoder(source.config, num_parameters=source.num_parameters)
    model = on_meta(source.config)
    weights = _Weights(source, model)
    try:
        with told("be loaded"):
            report = loading_report(model, {name: shape for name, (_, shape) in source.tensors.items()})
    except VerificationError:  # parts to be fused do not fit together
        if packing(source.config):
            return
        weights.check_layers()
        raise
    missing = report["missing_keys"]
    mismatched = {name: shapes for name, *shapes in report["mismatched_keys"]}
    if packing(source.config):
        stored = _beginnings(report["unexpected_keys"])
        missing = {name for name in missing if name.rpartition(".")[0] not in stored}
        mismatched = {name: shapes for name, shapes in mismatched.items() if weights.is_plain(name)}
    if missing:
        raise weights.lacking(sorted(missing, key=_by_number))
    if mismatched:
        name = min(mismatched, key=_by_number)
        raise weights.misshapen(name, *mismatched[name])


class _Weights:
    """The tensors of a source, mapped from transformers' names to their own for error messages."""

    def __init__(self, source: Source, model: Any) -> None:
        self.tensors = source.tensors
        self.model = model
        self.num_layers = source.num_layers
        self.theirs = locate(source.config, source.tensors).tensor_prefix  # "h."
        self.ours = f"{find_layers(model)[0]}."  # "transformer.h."
        self.layers: list[set[str]] = [set() for _ in range(self.num_layers)]
        for name in source.tensors:
            index, rest = _split(name, self.theirs)
            if index is not None and index < self.num_layers:
                self.layers[index].add(rest)

    def is_plain(self, name: str) -> bool:
        """Return whether a parameter is stored unpacked."""
        dtype, _ = self.tensors.get(self._stored_name(name), ("", ()))
        return dtype in PLAIN_DTYPES

    def lacking(self, missing: list[str]) -> CheckpointError:
        """Return the error for parameters that no tensor provides."""
        first = missing[0]
        if wrapper := self._wrapper(missing):
            return CheckpointError(
                f"the names of the weights begin with {wrapper!r}: transformers would recognise none of them "
                f"and invent {len(missing):,} parameters",
                hint=f"remove {wrapper!r} from the names: a wrapper of the model was saved, not the model",
            )
        module = self.model.get_submodule(first.rpartition(".")[0])
        if len(missing) == 1 and module is self.model.get_output_embeddings():
            return CheckpointError(
                f"the weights lack {first}, and config.json does not tie it to the embedding",
                hint='set "tie_word_embeddings": true if it was trained so; otherwise download it again',
            )
        index, _ = _split(first, self.ours)
        if index is None:
            return CheckpointError(f"the weights lack {some(missing)}", hint=AGAIN)
        of_layer = [name for name in missing if _split(name, self.ours)[0] == index]
        return self._lacking_in(index, self._lost(index) or [self._stored_name(name) for name in of_layer])

    def misshapen(self, name: str, found: Iterable[int], wanted: Iterable[int]) -> CheckpointError:
        """Return the error for a tensor, or several fused ones, of another shape."""
        index, _ = _split(name, self.ours)
        stored = self._stored_name(name)
        if index is not None and stored not in self.tensors and (lost := self._lost(index)):
            return self._lacking_in(index, lost)
        where = "" if index is None else f" (layer {index})"
        return CheckpointError(
            f"{stored}{where} has shape {list(found)}, config.json says {list(wanted)}", hint=AGAIN
        )

    def check_layers(self) -> None:
        """Refuse a layer that lacks a tensor of the most similar layer, or has it in another shape.

        Raises:
            CheckpointError: A layer differs; the message names the tensor.
        """
        for index, mine in enumerate(self.layers):
            if lost := self._lost(index):
                raise self._lacking_in(index, lost)
            like = self._like(index)
            for rest in sorted(mine, key=_by_number):
                one, other = (f"{self.theirs}{number}.{rest}" for number in (index, like))
                found, wanted = (list(self.tensors[name][1]) for name in (one, other))
                if found != wanted:
                    raise CheckpointError(f"{one} has shape {found}, {other} {wanted}", hint=AGAIN)

    def _lacking_in(self, index: int, names: Iterable[str]) -> CheckpointError:
        return CheckpointError(f"the weights lack {some(names)} (layer {index})", hint=AGAIN)

    def _like(self, index: int) -> int:
        """Return the other layer with the most similar tensors; the layer itself if there is no other."""
        mine = self.layers[index]
        others = (number for number in range(self.num_layers) if number != index)
        return min(others, key=lambda number: len(mine ^ self.layers[number]), default=index)

    def _lost(self, index: int) -> list[str]:
        """Return the names that a layer lacks and the most similar one has."""
        lost = self.layers[self._like(index)] - self.layers[index]
        return sorted((f"{self.theirs}{index}.{rest}" for rest in lost), key=_by_number)

    def _stored_name(self, name: str) -> str:
        """Return a parameter's name in the files, which may have another prefix."""
        return f"{self.theirs}{name[len(self.ours) :]}" if name.startswith(self.ours) else name

    def _wrapper(self, missing: list[str]) -> str:
        """Return the prefix of all names if it is the reason why no layer has weights; otherwise ""."""
        in_layers = sum(name.startswith(self.ours) for name in self.model.state_dict())
        if sum(name.startswith(self.ours) for name in missing) < in_layers:
            return ""
        without_base = self.ours.removeprefix(f"{self.model.base_model_prefix}.")
        path = next((path for path in (self.ours, without_base) if self.theirs.endswith(path)), self.theirs)
        return self.theirs.removesuffix(path)


def _split(name: str, prefix: str) -> tuple[int | None, str]:
    """Split a name into layer number and rest; the number is None outside the layers."""
    index, dot, rest = name.removeprefix(prefix).partition(".")
    inside = name.startswith(prefix) and dot and re.fullmatch("[0-9]{1,9}", index)
    return (int(index), rest) if inside else (None, name)


def _beginnings(names: Iterable[str]) -> set[str]:
    """Return the names of all modules that contain these tensors."""
    return {name[: dot.start()] for name in names for dot in re.finditer(r"\.", name)}


def _by_number(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts layer 10 after layer 2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
