"""Search: the layers whose removal costs least calibration loss, and what any cut costs unhealed."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size

from factory.artifacts import CutLoss, CutLosses, DistanceProfile, PruningPlan, Source
from factory.config import PlanSettings
from factory.decoder import may_drop
from factory.errors import DataError, ModelError
from factory.models import load_model
from factory.texts import Text
from factory.tokenizer import Encoder, load_encoder
from factory.trial import Layers, Trial, mean_loss

FIRST_BATCH_SIZE = 8
FEW = 8  # sequences on which all candidates run; the best of them run on all
FINALISTS = 4
STATE = "order.json"
SEARCH, COMPARE = 0, 1  # which half of the documents: a choice is not judged by the text that made it

Progress = Callable[[int, int, str], None]


def search(
    source: Source,
    text: Text,
    profile: DistanceProfile,
    *,
    block_size: int,
    settings: PlanSettings,
    four_bit: bool,
    seed: int,
    folder: Path,
    progress: Progress,
) -> PruningPlan:
    """Choose layers by the loss on the calibration text, by `settings.criterion`: "loss" or "greedy".

    Args:
        folder: Holds the layers that a greedy search has dropped so far; a later call goes on from there.

    Raises:
        DataError: Too little text.
        ModelError: No cut of this size is possible, the loss is not finite, or a layer of this architecture
            hands on more than its states.
    """
    model = load_model(source.local_folder, four_bit=four_bit)
    encoder = load_encoder(source.local_folder)
    sequences = take_sequences(text, encoder, settings=settings, seed=seed, half=SEARCH)

    def allowed(layers: Layers) -> bool:
        return may_drop(source.config, layers)

    def run(batch_size: int) -> tuple[list[int], Trial]:
        trial = _trial(model, sequences, encoder, batch_size=batch_size)
        trial.check()
        if settings.criterion == "greedy":
            order = search_greedily(
                trial,
                num_layers=block_size,
                rank=_nearest(profile),
                may_drop=allowed,
                progress=progress,
                state=folder / STATE,
            )
            return order, trial
        starts = range(source.num_layers - block_size + 1)
        blocks = [tuple(range(start, start + block_size)) for start in starts]
        return list(search_block(trial, [b for b in blocks if allowed(b)], progress=progress)), trial

    order, trial = find_executable_batch_size(run, starting_batch_size=FIRST_BATCH_SIZE)()
    (folder / STATE).unlink(missing_ok=True)
    dropped = tuple(sorted(order))
    return PruningPlan(
        criterion=settings.criterion,
        num_layers=source.num_layers,
        dropped=dropped,
        distance=profile.across(dropped),
        order=tuple(order) if settings.criterion == "greedy" else None,
        passes=round(trial.passes, 2),
        num_documents=len(sequences),
    )


def compare(
    source: Source,
    text: Text,
    cuts: Sequence[Layers],
    *,
    settings: PlanSettings,
    four_bit: bool,
    seed: int,
    progress: Progress,
) -> CutLosses:
    """Unhealed loss of several cuts on the same documents, none of which a search has seen."""
    model = load_model(source.local_folder, four_bit=four_bit)
    encoder = load_encoder(source.local_folder)
    sequences = take_sequences(text, encoder, settings=settings, seed=seed, half=COMPARE)

    def run(batch_size: int) -> list[torch.Tensor]:
        trial = _trial(model, sequences, encoder, batch_size=batch_size)
        found = []
        for number, cut in enumerate([(), *cuts]):
            found.append(trial.losses(cut, [()])[0])
            progress(number + 1, len(cuts) + 1, "")
        return found

    whole, *rows = find_executable_batch_size(run, starting_batch_size=FIRST_BATCH_SIZE)()
    best = min(rows, key=lambda losses: float(mean_loss(losses)))
    return CutLosses(
        source=_cut_loss((), whole, best=best),
        cuts=tuple(_cut_loss(cut, losses, best=best) for cut, losses in zip(cuts, rows, strict=True)),
        num_documents=len(sequences),
        sequence_length=settings.sequence_length,
        data=text.data,
    )


def take_sequences(
    text: Text, encoder: Encoder, *, settings: PlanSettings, seed: int, half: int
) -> list[list[int]]:
    """The beginnings of every other document in shuffled order; equal documents count as one.

    Raises:
        DataError: Fewer than 2.
    """
    sequences: list[list[int]] = []
    seen: set[str] = set()
    for document in text.shuffled(seed):
        if document in seen:
            continue
        number = len(seen)
        seen.add(document)
        if number % 2 != half:
            continue
        tokens = encoder.beginning(document, length=settings.sequence_length)
        if len(tokens) > 1:
            sequences.append(tokens)
        if len(sequences) == settings.num_documents:
            break
    if len(sequences) < 2:
        raise DataError(
            f"{text.data.name} holds {len(sequences)} usable documents here; comparing losses needs 2",
            hint="give more text with --calibration-data",
        )
    return sequences


def _trial(model: Any, sequences: list[list[int]], encoder: Encoder, *, batch_size: int) -> Trial:
    return Trial(
        model,
        sequences,
        pad_token_id=encoder.pad_token_id,
        num_given=encoder.num_given,
        batch_size=batch_size,
    )


def best_candidate(
    trial: Trial, dropped: Sequence[int], candidates: Sequence[Layers]
) -> tuple[Layers, torch.Tensor]:
    """The candidate of least loss, and its losses [sequences, 2]: all on a few sequences, few on all.

    Raises:
        ModelError: No loss is finite.
    """
    few = max(FEW // len(trial.batches[0][0]), 1)
    finalists = list(candidates)
    if len(finalists) > FINALISTS and few < len(trial.batches):
        rough = mean_loss(trial.losses(dropped, finalists, num_batches=few))
        finalists = [finalists[index] for index in rough.argsort(stable=True)[:FINALISTS].tolist()]
    losses = trial.losses(dropped, finalists)
    means = mean_loss(losses)
    best = int(means.argmin())
    if not bool(means.isfinite()[best]):
        raise ModelError(
            f"the loss without layers {list(finalists[best])} is not finite",
            hint="16-bit precision may be too narrow for this model",
        )
    return finalists[best], losses[best]


def search_block(trial: Trial, candidates: Sequence[Layers], *, progress: Progress) -> Layers:
    """The block whose removal costs least loss: half the work of running each shortened model.

    Raises:
        ModelError: The surgery allows none.
    """
    if not candidates:
        raise ModelError("no block of this size can be dropped", hint="choose another --drop")
    progress(0, 1, f"{len(candidates)} blocks")
    return best_candidate(trial, (), candidates)[0]


def search_greedily(
    trial: Trial,
    *,
    num_layers: int,
    rank: Callable[[list[int]], list[int]],
    may_drop: Callable[[Layers], bool],
    progress: Progress,
    state: Path | None = None,
) -> list[int]:
    """Drop one layer after another, each time the one whose removal costs least loss.

    Args:
        num_layers: How many to drop.
        rank: From the layers that are left, the candidates worth a look.
        may_drop: Whether the surgery allows a set of layers to be missing.
        state: File that keeps the layers dropped so far, and is gone on from.

    Returns:
        The layers in the order in which they went, so that its first n are the choice for n layers.

    Raises:
        ModelError: No layer can be left out.
    """
    order: list[int] = json.loads(state.read_text(encoding="utf-8")) if state and state.exists() else []
    for step in range(len(order), num_layers):
        progress(step, num_layers, f"{step} layers dropped")
        left = [layer for layer in range(len(trial.layers)) if layer not in order]
        allowed = [(layer,) for layer in rank(left) if may_drop(tuple(sorted([*order, layer])))]
        if not allowed:
            raise ModelError(
                f"after {step} layers none can be dropped alone",
                hint="this architecture drops only whole groups of layers: use --criterion angular",
            )
        chosen, _ = best_candidate(trial, order, allowed)
        order += chosen
        if state:
            partial = state.with_suffix(".partial")
            partial.write_text(json.dumps(order), encoding="utf-8")
            partial.replace(state)
    return order


def _nearest(profile: DistanceProfile) -> Callable[[list[int]], list[int]]:
    """Of the layers that are left, the half across which the states turn least: the rest costs more.

    All of them where a profile from elsewhere does not hold those distances.
    """

    def rank(left: list[int]) -> list[int]:
        across = {
            layer: profile.mean[layer][after]
            for layer, after in zip(left, [*left[1:], profile.num_layers], strict=True)
        }
        if any(map(math.isnan, across.values())):
            return left
        return sorted(sorted(left, key=lambda layer: across[layer])[: max(len(left) // 2, 2 * FINALISTS)])

    return rank


def _cut_loss(cut: Layers, losses: torch.Tensor, *, best: torch.Tensor) -> CutLoss:
    """Mean loss with the standard error of a ratio over documents, and of its difference to the best."""
    nats, tokens = losses[:, 0], losses[:, 1]
    mean, least = mean_loss(losses), mean_loss(best)
    total, n = tokens.sum(), len(tokens)
    scale = (n / (n - 1)) ** 0.5 / float(total)
    residual = nats - mean * tokens
    return CutLoss(
        dropped=cut,
        nats=float(mean),
        stderr=scale * float(residual.norm()),
        behind=float(mean - least),
        behind_stderr=scale * float((residual - (best[:, 0] - least * tokens)).norm()),
    )
