"""The layers of a model in memory: finding, skipping and replacing them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.nn import ModuleList

Layers = tuple[int, ...]
Forms = dict[int, Any]  # layer → what it returns beside the states, where it returns more


def decoder_layers(model: Any) -> "ModuleList":
    """The decoder's layers of a loaded causal language model, as the list that its forward walks.

    Raises:
        UnsupportedArchitectureError: No single list of the configured length.
    """
    from factory.model.config_proof import find_layers

    return find_layers(model)[1]


@contextmanager
def skip_layers(model: Any, dropped: Iterable[int]) -> Iterator[None]:
    """While active, the dropped layers of a loaded model hand on their input.

    They still run, so that what they return beside the hidden states keeps its form and the cache its
    length; only their output is replaced. Nothing of the surgery on disk is used, so the model serves as
    the reference for it.
    """
    layers = decoder_layers(model)
    handles = [layers[i].register_forward_hook(hand_on, with_kwargs=True) for i in dropped]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hand_on(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A layer's output with its input in it; a forward hook that makes the layer do nothing.

    Where a layer returns more than the hidden states, what it was given in the same place and shape is
    handed on too (the router states of ZAYA).
    """
    if not isinstance(output, tuple | list):
        return args[0] if args else kwargs["hidden_states"]
    given = [*args, *[None] * len(output)] if args else [kwargs["hidden_states"], *[None] * len(output)]
    return type(output)(
        before if place == 0 or getattr(before, "shape", None) == getattr(after, "shape", 0) else after
        for place, (before, after) in enumerate(zip(given, output, strict=False))
    )


@dataclass
class Call:
    """What a layer was given in a pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def record_forms(model: Any) -> Forms:
    """What each layer returns beside the states, from a short pass."""
    layers = decoder_layers(model)
    forms: Forms = {}
    ids = torch.ones((1, 2), dtype=torch.long, device=model.device)
    with torch.no_grad(), recorded_calls(layers, {}, forms):
        model.base_model(input_ids=ids, use_cache=False)
    return forms


@contextmanager
def bypassed(
    layers: Any, skipped: frozenset[int], forms: Forms, *, given: dict[int, Call] | None = None
) -> Iterator[None]:
    """Replace the forward of some layers by one that hands on its input, or what another was given.

    Args:
        given: Layer → the call whose input it hands on instead of its own.
    """
    with ExitStack() as stack:
        for index in skipped:
            layer = layers[index]
            stack.callback(_restore, layer, layer.__dict__.get("forward"))
            layer.forward = _handing_on(layer, forms.get(index), (given or {}).get(index))
        yield


def _handing_on(layer: Any, form: Any, instead: Call | None) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if instead is not None:
            args, kwargs = instead.args, {**kwargs, **instead.kwargs}
        return hand_on(layer, args, kwargs, form)

    return forward


def _restore(layer: Any, forward: Any) -> None:
    """accelerate, too, may have put a forward of its own on the instance."""
    if forward is None:
        del layer.forward
    else:
        layer.forward = forward


@contextmanager
def recorded_calls(layers: Any, calls: dict[int, Call], forms: Forms) -> Iterator[None]:
    """Keep what every layer is given in a pass, and the form of what it returns."""

    def hook(index: int) -> Callable[..., None]:
        def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls[index] = Call(args, kwargs)
            if isinstance(output, tuple | list):  # the states themselves are the next layer's input
                forms[index] = type(output)([None, *output[1:]])

        return keep

    handles = [
        layer.register_forward_hook(hook(index), with_kwargs=True) for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
