"""Fit the layer before each cut to what the dropped layers did: ridge regression, without training.

In the source, the last linear module of layer b writes W·a into the residual stream. With h the states after
that layer and y those after the last dropped layer, the fit finds ΔW such that h + ΔW·a ≈ y. The best part
of it of low rank starts a LoRA adapter; without training, all of it is merged.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

from factory.artifacts import Adapter, Checkpoint, FittedSeam, SeamFit
from factory.checkpoint.adapter import ADAPTER_WEIGHTS, PEFT_PREFIX
from factory.config.settings import HealSettings
from factory.errors import DataError, HealingError, UnsupportedArchitectureError
from factory.healing.data import divide
from factory.healing.lora import save_guard
from factory.healing.seam.regression import RIDGES, Factors, Moments, low_rank
from factory.healing.seam.writers import Writer, find_writer, fitted, states_of
from factory.model.config_proof import find_layers
from factory.model.layers import decoder_layers, skip_layers
from factory.model.loading import load_model, skeleton
from factory.model.losses import token_loss
from factory.model.tokenizer import load_encoder
from factory.store.files import write_atomically
from factory.text.text import Text

NUM_TOKENS = 20_000  # read by the fit, or more for wide layers
TOKENS_PER_INPUT = 8  # of the module that is fitted
LENGTH = 256  # tokens per sequence of the fit
HELD_OUT = 10  # one in so many sequences decides the strength of the ridge
OUTLIER = 5.0  # times the median norm of a sequence's states; attention sinks reach 100 times
WEIGHTS = "seam.safetensors"


def seams_of(dropped: Sequence[int]) -> list[tuple[int, int]]:
    """Return for each run of dropped layers the layer before it, −1 if there is none, and its last layer."""
    gone = set(dropped)
    starts = [index for index in sorted(gone) if index - 1 not in gone]
    ends = [index for index in sorted(gone) if index + 1 not in gone]
    return [(start - 1, end) for start, end in zip(starts, ends, strict=True)]


def fit_seams(
    source_folder: Path,
    text: Text,
    *,
    dropped: Sequence[int],
    settings: HealSettings,
    rank: int | None,
    seed: int,
    folder: Path,
    progress: Callable[[int, int, str], None],
) -> SeamFit:
    """Fit the layer before each cut in turn, with the fits of earlier cuts in place, and keep the updates.

    Tokens whose states have outlier norms are left out: one attention sink would outweigh all others. A fit
    that does not lower the loss on the held-out sequences is not kept: where cuts are close together, a good
    fit of the states can be a bad one for the model. A fit that is already in `folder` is returned.

    Args:
        text: Text to heal on.
        dropped: Layers that the source is to lose.
        settings: Settings of healing; with 4 bits, the fit is to the states of the NF4 model.
        rank: Maximum rank of an update; None: full.

    Raises:
        DataError: There is too little text.
        HealingError: The states are not finite.
        UnsupportedArchitectureError: No cut has a layer before it, or no module there can be fitted.
    """
    if made := SeamFit.find(folder):
        return made
    check_seams(dropped)
    encoder = load_encoder(source_folder)
    guard, sequences = divide(text, encoder, settings=settings, seed=seed)
    pieces = (
        piece
        for sequence in sequences
        for piece in encoder.windows(encoder.without_prefix(sequence), length=LENGTH)
    )
    model = load_model(source_folder, four_bit=settings.bits == 4)
    writers = {before: find_writer(model, before) for before, _ in seams_of(dropped) if before >= 0}
    with skip_layers(model, dropped):
        loss_before = token_loss(model, guard)
    kept: list[FittedSeam] = []
    factors: dict[int, Factors] = {}
    rejected: list[int] = []
    loss = loss_before
    for seam, found in fit_each(model, writers, pieces, factors, dropped=dropped, rank=rank):
        progress(
            len(kept) + len(rejected) + 1, len(writers), f"fitted layer {seam.layer} to the cut after it"
        )
        with skip_layers(model, dropped), fitted(writers, {**factors, seam.layer: found}):
            tried = token_loss(model, guard)
        if tried < loss:
            loss, factors[seam.layer] = tried, found
            kept.append(seam)
        else:
            rejected.append(seam.layer)
    fit = SeamFit(
        quantization="nf4" if settings.bits == 4 else "none",
        seams=tuple(kept),
        rejected=tuple(rejected),
        without_layer_before=len(seams_of(dropped)) - len(writers),
        loss_before=loss_before,
        loss_after=loss,
    )
    _save(fit, factors, guard, folder)
    return fit


def fit_each(
    model: Any,
    writers: Mapping[int, Writer],
    pieces: Iterator[list[int]],
    factors: Mapping[int, Factors],
    *,
    dropped: Sequence[int],
    rank: int | None,
) -> Iterator[tuple[FittedSeam, Factors]]:
    """Yield the fit of each seam of a loaded source; see `fit_seams`.

    Args:
        writers: Module to fit in each layer before a cut.
        pieces: Sequences, of which as many are taken as the widest module needs.
        factors: Updates of earlier seams that the caller has kept.
    """
    widest = max(writer.width for writer in writers.values())
    sequences = _take(pieces, num_tokens=max(NUM_TOKENS, TOKENS_PER_INPUT * widest))
    for before, end in seams_of(dropped):
        if before >= 0:
            collect = partial(_moments, model, (before, end), writers, factors, dropped=dropped)
            yield _fit(collect, sequences, before=before, writer=writers[before], rank=rank)


def _save(fit: SeamFit, factors: Mapping[int, Factors], guard: Sequence[list[int]], folder: Path) -> None:
    """Write the updates, and last the record that makes them valid."""
    tensors = {
        f"{index}.{side}": factor.float().cpu().contiguous()
        for index, pair in factors.items()
        for side, factor in zip("BA", pair, strict=True)
    }
    save_file(tensors, folder / WEIGHTS)
    save_guard(folder, guard)
    write_atomically(folder / SeamFit.file_name, fit.text())


def untrained(
    seam: SeamFit, pruned: Checkpoint, *, text: Text, dropped: Sequence[int], folder: Path
) -> Adapter:
    """Write the updates that `fit_seams` kept in `folder` as an adapter of the pruned model.

    Raises:
        HealingError: None was kept, since none lowered the loss.
    """
    if not seam.seams:
        raise HealingError(
            "no fitted seam lowers the loss on held-out text, and there is nothing else to merge",
            hint="remove `heal_start`, or remove `no_heal` to train",
        )
    prefix, _ = find_layers(skeleton(pruned.folder))
    factors = load_factors(folder)
    rank = max(a.shape[0] for _, a in factors.values())
    tensors = {}
    for one in seam.seams:
        b, a = factors[one.layer]
        new = one.layer - sum(index < one.layer for index in dropped)
        name = f"{PEFT_PREFIX}{prefix}.{new}.{one.module}"
        missing = rank - a.shape[0]
        tensors[f"{name}.lora_A.weight"] = pad(a, (0, 0, 0, missing))
        tensors[f"{name}.lora_B.weight"] = pad(b, (0, missing))
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    modules = sorted({one.module for one in seam.seams})
    LoraConfig(r=rank, lora_alpha=rank, target_modules=modules, task_type="CAUSAL_LM").save_pretrained(folder)
    return Adapter(
        folder=folder,
        objective=None,
        quantization=seam.quantization,
        rank=rank,
        learning_rate=0.0,
        target_modules=tuple(modules),
        num_steps=0,
        num_tokens=0,
        sequence_length=LENGTH,
        num_trainable_parameters=0,
        curve=(),
        seam=seam,
        guard_loss_before=seam.loss_before,
        guard_loss_after=seam.loss_after,
        data=text.data,
    )


def set_start(model: Any, names: Mapping[int, str], seam: SeamFit, factors: Mapping[int, Factors]) -> None:
    """Give a LoRA adapter of peft the fitted updates as its values.

    Args:
        model: peft's model.
        names: Layer of the source → its name in the model below peft's.
    """
    for one in seam.seams:
        b, a = factors[one.layer]
        adapted = model.get_submodule(f"{PEFT_PREFIX}{names[one.layer]}.{one.module}")
        rank = a.shape[0]
        with torch.no_grad():
            adapted.lora_A["default"].weight[:rank] = a.to(adapted.lora_A["default"].weight)
            adapted.lora_B["default"].weight[:, :rank] = b.to(adapted.lora_B["default"].weight)


def check_seams(dropped: Sequence[int]) -> None:
    """Refuse a cut that has no layer before it.

    Raises:
        UnsupportedArchitectureError: Every dropped layer belongs to a block that begins at layer 0.
    """
    if all(before < 0 for before, _ in seams_of(dropped)):
        raise UnsupportedArchitectureError(
            "`heal_start=seam-fit`: the cut begins at layer 0, so there is no layer before it to fit",
            hint="remove `heal_start`, or drop other layers with `layers`",
        )


def _take(sequences: Iterator[list[int]], *, num_tokens: int) -> list[list[int]]:
    """Take sequences until there are enough tokens.

    Raises:
        DataError: There are fewer than two.
    """
    taken: list[list[int]] = []
    total = 0
    for sequence in sequences:
        taken.append(sequence)
        total += len(sequence)
        if total >= num_tokens:
            break
    if len(taken) < 2:
        raise DataError(
            "the healing text has too little to fit the seam to, beside what is held out",
            hint="provide more with `heal_data`, or remove `heal_start`",
        )
    return taken


@torch.no_grad()
def _moments(
    model: Any,
    place: tuple[int, int],
    writers: Mapping[int, Writer],
    factors: Mapping[int, Factors],
    sequences: Sequence[list[int]],
    *,
    dropped: Sequence[int],
) -> tuple[Moments, int]:
    """Sum the moments of some sequences, and count the tokens left out.

    Args:
        place: Layer before the cut, and last layer of the cut.
        factors: Updates of earlier cuts. With any, the activations are those of the pruned model with them;
            the target always is the source's state.
    """
    layers = decoder_layers(model)
    before, end = place
    writer = writers[before]
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, states: torch.Tensor) -> None:
        seen[name] = states.reshape(-1, states.shape[-1])

    moments: Moments | None = None
    left_out = 0
    with ExitStack() as hooks:
        for module, hook in (
            (writer.module, lambda _module, args, _output: keep("activations", args[0])),
            (layers[before], lambda _module, _args, output: keep("written", states_of(output))),
            (layers[end], lambda _module, _args, output: keep("target", states_of(output))),
        ):
            hooks.callback(module.register_forward_hook(hook).remove)
        for sequence in sequences:
            ids = torch.tensor([sequence], device=model.device)
            model.base_model(input_ids=ids, use_cache=False)
            target = seen["target"].float()
            if factors:
                with skip_layers(model, dropped), fitted(writers, factors):
                    model.base_model(input_ids=ids, use_cache=False)
            activations, written = seen["activations"].float(), seen["written"].float()
            target = target.to(written.device)
            usual = _usual(written) & _usual(target)
            left_out += int((~usual).sum())
            moments = moments or Moments.none(
                width=activations.shape[-1], states=written.shape[-1], device=activations.device
            )
            errors = (target - written)[usual].to(activations.device)
            moments.add(writer.scale * activations[usual.to(activations.device)], errors)
    assert moments is not None
    return moments, left_out


def _usual(states: torch.Tensor) -> torch.Tensor:
    """Return which tokens of a sequence [t, d] have finite states without an outlier norm: [t]."""
    norms = states.norm(dim=-1)
    usual: torch.Tensor = norms <= OUTLIER * norms.nanmedian()
    return usual


def _fit(
    collect: Callable[[Sequence[list[int]]], tuple[Moments, int]],
    sequences: Sequence[list[int]],
    *,
    before: int,
    writer: Writer,
    rank: int | None,
) -> tuple[FittedSeam, Factors]:
    """Fit one seam: the ridge on some sequences, its strength on the others, then on all."""
    every = min(HELD_OUT, len(sequences))
    held_out = sequences[every - 1 :: every]
    (train, left_out), (test, more) = (
        collect([sequence for place, sequence in enumerate(sequences, 1) if place % every]),
        collect(held_out),
    )
    if not (train.count and test.count):
        raise HealingError(
            f"`heal_start=seam-fit`: the states after layer {before} are not finite",
            hint="the model's weights or their 4-bit form overflow; remove `heal_start`",
        )
    scores = {ridge: test.explained(train.solve(ridge)) for ridge in RIDGES}
    ridge = max(scores, key=lambda ridge: scores[ridge])
    whole = train + test
    factors = low_rank(whole.solve(ridge), whole.gram, rank=rank)
    seam = FittedSeam(
        layer=before,
        module=writer.name,
        rank=factors[1].shape[0],
        ridge=ridge,
        explained=scores[ridge],
        num_tokens=whole.count,
        num_left_out=left_out + more,
    )
    return seam, factors


def load_factors(folder: Path) -> dict[int, Factors]:
    """Read the updates that `fit_seams` kept: layer → B [d, r] and A [r, n]."""
    tensors = load_file(folder / WEIGHTS)
    return {
        int(name[:-2]): (tensors[name], tensors[f"{name[:-2]}.A"]) for name in tensors if name.endswith("B")
    }
