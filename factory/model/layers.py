"""Find, skip and replace the layers of a model in memory."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.nn import ModuleList

Layers = tuple[int, ...]
Forms = dict[int, Any]  # layer → its outputs besides the hidden states, if any


def decoder_layers(model: Any) -> "ModuleList":
    """Return the decoder layers of a loaded causal language model, as the list that its forward uses.

    Raises:
        UnsupportedArchitectureError: There is no single list of the configured length.
    """
    from factory.model.config_proof import find_layers

    return find_layers(model)[1]


@contextmanager
def skip_layers(model: Any, dropped: Iterable[int]) -> Iterator[None]:
    """Make the dropped layers of a loaded model pass on their input while active.

    They still run, so that their other outputs keep their form and the cache its length; only the hidden
    states are replaced. No code of the surgery on disk is used, so the model can serve as its reference.
    """
    layers = decoder_layers(model)
    handles = [layers[i].register_forward_hook(hand_on, with_kwargs=True) for i in dropped]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hand_on(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Return a layer's output with its input in it; a forward hook that makes the layer do nothing.

    If a layer returns more than the hidden states, inputs of the same position and shape are passed on, too
    (the router states of ZAYA).
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
    """Arguments of a layer in a pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def record_forms(model: Any, run: Callable[..., Any] | None = None) -> Forms:
    """Record in a short pass what each layer returns besides the hidden states.

    Args:
        run: What runs the layers; by default the model without its head.
    """
    layers = decoder_layers(model)
    forms: Forms = {}
    ids = torch.ones((1, 2), dtype=torch.long, device=model.device)
    with torch.no_grad(), recorded_calls(layers, {}, forms):
        (run or model.base_model)(input_ids=ids, use_cache=False)
    return forms


@contextmanager
def bypassed(
    layers: Any, skipped: frozenset[int], forms: Forms, *, given: dict[int, Call] | None = None
) -> Iterator[None]:
    """Replace the forward of some layers by one that passes on its input, or that of another call.

    Args:
        skipped: Numbers of the layers to replace.
        forms: Outputs of the layers, from `record_forms`.
        given: Layer → call whose input it passes on instead of its own.
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
    """Restore a layer's forward; accelerate may have set one on the instance, too."""
    if forward is None:
        del layer.forward
    else:
        layer.forward = forward


@contextmanager
def recorded_calls(layers: Any, calls: dict[int, Call], forms: Forms) -> Iterator[None]:
    """Record the arguments of every layer in a pass, and the form of its output."""

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
