"""A loaded model without some of its layers: its loss, with the beginning that cuts share computed once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from factory.decoder import decoder_layers, hand_on, skip_layers
from factory.errors import ModelError
from factory.models import pad_batch, row_losses

CLOSE = 0.01  # relative; batches and 16-bit sums in another order stay far below

Layers = tuple[int, ...]


Forms = dict[int, Any]  # layer → what it returns beside the states, where it returns more


@dataclass
class Call:
    """What a layer was given in a pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Trial:
    """Losses of a loaded model without some of its layers, on fixed sequences.

    The layers before the first one that a candidate leaves out give the same states for every candidate:
    they run once a batch, and each candidate starts where it differs. Nothing is changed on disk or in
    the model. Layers that are left out do not run at all.

    Args:
        model: In evaluation mode.
        sequences: Token lists of at least 2 tokens.
        batch_size: Sequences per pass.
        num_given: Tokens at the start of each sequence that are not predicted.
    """

    def __init__(
        self,
        model: Any,
        sequences: Sequence[list[int]],
        *,
        pad_token_id: int,
        batch_size: int,
        num_given: int = 1,
    ) -> None:
        self.model = model
        self.row_losses = partial(row_losses, num_given=num_given)
        self.layers = decoder_layers(model)
        self.batches = [
            pad_batch(list(sequences[start : start + batch_size]), pad_token_id=pad_token_id)
            for start in range(0, len(sequences), batch_size)
        ]
        self.forms: dict[int, Forms] = {}  # of each batch, from a pass of the whole model
        self.layer_passes = 0  # layers that were run, a batch; what the search has cost

    @property
    def passes(self) -> float:
        """What was run so far, in passes of the whole model over all sequences."""
        return self.layer_passes / len(self.layers) / len(self.batches)

    @torch.inference_mode()
    def losses(
        self, dropped: Sequence[int], candidates: Sequence[Layers], *, num_batches: int | None = None
    ) -> torch.Tensor:
        """Summed loss and predicted tokens of every candidate: [c, sequences, 2] in float64.

        Args:
            dropped: Layers that are left out for every candidate.
            candidates: Layers that one candidate leaves out besides; one after another among the rest.
            num_batches: Of the first batches only.
        """
        gone = frozenset(dropped)
        rows = []
        for number, (ids, mask) in enumerate(self.batches[:num_batches]):
            batch = (ids.to(self.model.device), mask.to(self.model.device))
            if number not in self.forms:
                self.forms[number] = {}
                with _recorded(self.layers, {}, self.forms[number]):
                    self._run(*batch)
            calls: dict[int, Call] = {}
            if any(candidates):
                with bypassed(self.layers, gone, self.forms[number]), _recorded(self.layers, calls, {}):
                    self._run(*batch, without=len(gone))
            results = [self._loss(number, batch, gone, candidate, calls) for candidate in candidates]
            rows.append(torch.stack(results))
        return torch.cat(rows, dim=1)

    @torch.inference_mode()
    def check(self) -> None:
        """Compare one loss with that of the reference, which runs every layer and discards its result.

        Raises:
            ModelError: They differ: a layer hands on more than its states to the layers after it.
        """
        middle = len(self.layers) // 2
        if middle < 2:
            return
        ids, mask = (tensor[:1].to(self.model.device) for tensor in self.batches[0])
        with skip_layers(self.model, (middle - 2, middle - 1, middle)):
            _, expected = self.row_losses(self.model, ids, mask)
        found = self.losses((middle,), [(middle - 2, middle - 1)], num_batches=1)[0, 0, 0]
        if not abs(float(found) - float(expected)) <= CLOSE * abs(float(expected)):
            raise ModelError(
                f"{self.model.config.model_type}: leaving layers out gives a loss of {float(found):.4g}, not "
                f"{float(expected):.4g}: a layer hands on more than its states",
                hint="choose the layers by --criterion angular",
            )

    def _run(self, ids: torch.Tensor, mask: torch.Tensor, *, without: int = 0) -> None:
        self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        self.layer_passes += len(self.layers) - without

    def _loss(
        self,
        number: int,
        batch: tuple[torch.Tensor, torch.Tensor],
        gone: frozenset[int],
        candidate: Layers,
        calls: dict[int, Call],
    ) -> torch.Tensor:
        """Loss of one batch where a candidate's layers are left out too, [b, 2]."""
        resume = max(candidate) + 1 if candidate else 0
        skipped = gone.union(range(resume))
        given = {resume - 1: calls[min(candidate)]} if candidate else {}
        with bypassed(self.layers, skipped, self.forms[number], given=given):
            counts, nats = self.row_losses(self.model, *batch)
        self.layer_passes += len(self.layers) - len(skipped)
        return torch.stack([nats, counts], dim=1).cpu()


def record_forms(model: Any) -> Forms:
    """What each layer returns beside the states, from a short pass."""
    layers = decoder_layers(model)
    forms: Forms = {}
    ids = torch.ones((1, 2), dtype=torch.long, device=model.device)
    with torch.no_grad(), _recorded(layers, {}, forms):
        model.base_model(input_ids=ids, use_cache=False)
    return forms


def mean_loss(losses: torch.Tensor) -> torch.Tensor:
    """[…, sequences, 2] → nats a token, […]; NaN counts as worst."""
    return (losses[..., 0].sum(dim=-1) / losses[..., 1].sum(dim=-1)).nan_to_num(nan=torch.inf)


# Layers that do not run -------------------------------------------------------------------------


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
def _recorded(layers: Any, calls: dict[int, Call], forms: Forms) -> Iterator[None]:
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
