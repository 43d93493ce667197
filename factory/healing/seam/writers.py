"""Find the module of a layer that writes into the residual stream last, and change what it writes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from factory.errors import UnsupportedArchitectureError
from factory.healing.lora import feed_forward
from factory.healing.seam.regression import Factors
from factory.model.layers import decoder_layers

CLOSE = 2e-2  # relative; the additions of 16-bit states are rounded


@dataclass(frozen=True)
class Writer:
    """The linear module whose output enters the residual stream unchanged, times a constant."""

    name: str  # relative to its layer: "mlp.down_proj"
    module: Any
    width: int  # of its input
    scale: float  # of its output on the way; 1 in most families


def find_writer(model: Any, index: int) -> Writer:
    """Find the last feed-forward module of a layer whose output reaches the layer's output unchanged.

    This is tried, not looked up by name: the gradient of the layer's output for the module's must be a
    constant times the identity. It is not if a norm follows the module (Gemma 2 and 3), or if the module sees
    only some of the tokens (experts).

    Raises:
        UnsupportedArchitectureError: There is none.
    """
    layer = decoder_layers(model)[index]
    names = [name for name in feed_forward(model) if name in dict(layer.named_modules())]
    outputs: dict[str, list[torch.Tensor]] = {}
    widths: dict[str, int] = {}
    states: list[torch.Tensor] = []

    def replace(name: str) -> Callable[..., torch.Tensor]:
        def hook(_module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            leaf = output.detach().requires_grad_()
            outputs.setdefault(name, []).append(leaf)
            widths[name] = args[0].shape[-1]
            return leaf

        return hook

    with ExitStack() as hooks, torch.enable_grad():
        for name in names:
            hooks.callback(layer.get_submodule(name).register_forward_hook(replace(name)).remove)
        keep = layer.register_forward_hook(lambda _module, _args, output: states.append(states_of(output)))
        hooks.callback(keep.remove)
        ids = torch.arange(1, 9, device=model.device)[None] % model.config.get_text_config().vocab_size
        model.base_model(input_ids=ids, use_cache=False)
    for name in reversed(outputs):
        if len(outputs[name]) == 1 and (scale := _scale(states[0], outputs[name][0])):
            return Writer(name, layer.get_submodule(name), widths[name], scale)
    raise UnsupportedArchitectureError(
        f"`heal_start=seam-fit`: {model.config.model_type} has no feed-forward module in layer {index} whose "
        "output enters the hidden states as it is, for every token",
        hint="remove `heal_start`",
    )


def _scale(states: torch.Tensor, output: torch.Tensor) -> float | None:
    """Return c if the states are c times a module's output plus something else; None if they are not."""
    if not states.requires_grad or states.numel() != output.numel():
        return None
    direction = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states)
    (gradient,) = torch.autograd.grad(states, output, direction, retain_graph=True, allow_unused=True)
    if gradient is None:
        return None
    direction = direction.reshape(gradient.shape)
    scale = float((gradient * direction).sum() / direction.square().sum())
    same = torch.allclose(gradient, scale * direction, rtol=CLOSE, atol=CLOSE * abs(scale))
    return scale if same and scale else None


def states_of(output: Any) -> torch.Tensor:
    """Return the hidden states in a layer's output."""
    states: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return states


@contextmanager
def fitted(writers: Mapping[int, Writer], factors: Mapping[int, Factors]) -> Iterator[None]:
    """Add updates to the outputs of their modules while active.

    Args:
        writers: Module of each layer.
        factors: Update of each layer that has one, as B and A.
    """

    def add(index: int) -> Callable[..., torch.Tensor]:
        def hook(_module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            b, a = (factor.to(output) for factor in factors[index])
            added: torch.Tensor = output + args[0].to(output) @ a.T @ b.T
            return added

        return hook

    with ExitStack() as hooks:
        for index in factors:
            hooks.callback(writers[index].module.register_forward_hook(add(index)).remove)
        yield
