"""Search for the layers whose removal costs least calibration loss, and compare cuts without healing."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size

from factory.artifacts import CutLoss, CutLosses, DistanceProfile, PruningPlan, Source
from factory.config.criteria import CRITERIA
from factory.config.settings import PlanSettings
from factory.errors import DataError, ModelError
from factory.model.architecture import may_drop
from factory.model.layers import Call, Forms, Layers, bypassed, decoder_layers, recorded_calls, skip_layers
from factory.model.loading import load_model
from factory.model.losses import pad_batch, row_losses
from factory.model.tokenizer import Encoder, load_encoder
from factory.text.text import Text

CLOSE = 0.01  # relative; other batches and orders of 16-bit sums differ by far less
FIRST_BATCH_SIZE = 8
FEW = 8  # sequences on which all candidates run; only the best run on all sequences
FINALISTS = 4
STATE = "order.json"
SEARCH, COMPARE = 0, 1  # halves of the documents: a choice is not judged on the text it was made on
Progress = Callable[[int, int, str], None]


class Trial:
    """Losses of a loaded model without some of its layers, on fixed sequences.

    The layers before the first one that a candidate drops give the same states for every candidate: they
    run once per batch, and each candidate starts where it differs. Dropped layers do not run at all;
    nothing is changed on disk or in the model.

    Args:
        model: Model in evaluation mode.
        sequences: Token lists of at least 2 tokens.
        batch_size: Sequences per pass.
        num_given: Number of tokens at the start of each sequence that are not predicted.
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
        self.forms: dict[int, Forms] = {}  # by batch, from a pass of the whole model
        self.layer_passes = 0  # layers run, summed over batches: the cost of the search

    @property
    def passes(self) -> float:
        """Work done so far, in passes of the whole model over all sequences."""
        return self.layer_passes / len(self.layers) / len(self.batches)

    @torch.inference_mode()
    def losses(
        self, dropped: Sequence[int], candidates: Sequence[Layers], *, num_batches: int | None = None
    ) -> torch.Tensor:
        """Return summed loss and number of predicted tokens per candidate: [c, sequences, 2] in float64.

        Args:
            dropped: Layers dropped for every candidate.
            candidates: Layers that each candidate drops besides, consecutive among the remaining ones.
            num_batches: Number of batches to use, from the first; None uses all.
        """
        gone = frozenset(dropped)
        rows = []
        for number, (ids, mask) in enumerate(self.batches[:num_batches]):
            batch = (ids.to(self.model.device), mask.to(self.model.device))
            if number not in self.forms:
                self.forms[number] = {}
                with recorded_calls(self.layers, {}, self.forms[number]):
                    self._run(*batch)
            calls: dict[int, Call] = {}
            if any(candidates):
                with bypassed(self.layers, gone, self.forms[number]), recorded_calls(self.layers, calls, {}):
                    self._run(*batch, without=len(gone))
            results = [self._loss(number, batch, gone, candidate, calls) for candidate in candidates]
            rows.append(torch.stack(results))
        return torch.cat(rows, dim=1)

    @torch.inference_mode()
    def check(self) -> None:
        """Compare one loss with a reference that runs every layer and discards the dropped ones' output.

        Raises:
            ModelError: The losses differ: a layer passes on more than its hidden states.
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
                f"{self.model.config.model_type}: dropping layers gives a loss of {float(found):.4g}, not "
                f"{float(expected):.4g}: a layer passes on more than its hidden states",
                hint="use `criterion=angular`",
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
        """Return the loss of one batch with a candidate's layers dropped too, [b, 2]."""
        resume = max(candidate) + 1 if candidate else 0
        skipped = gone.union(range(resume))
        given = {resume - 1: calls[min(candidate)]} if candidate else {}
        with bypassed(self.layers, skipped, self.forms[number], given=given):
            counts, nats = self.row_losses(self.model, *batch)
        self.layer_passes += len(self.layers) - len(skipped)
        return torch.stack([nats, counts], dim=1).cpu()


def mean_loss(losses: torch.Tensor) -> torch.Tensor:
    """Return the mean loss in nats per token: […, sequences, 2] → […]; NaN becomes infinity."""
    return (losses[..., 0].sum(dim=-1) / losses[..., 1].sum(dim=-1)).nan_to_num(nan=torch.inf)


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
    within: Callable[[Layers], bool] = lambda _: True,
) -> PruningPlan:
    """Choose layers by the loss on the calibration set, as `settings.criterion` says.

    Args:
        folder: Folder that stores the layers a greedy search has dropped so far; a later call resumes there.
        within: Predicate: is this set of layers part of one that the user allows?

    Raises:
        DataError: There is too little text.
        ModelError: No cut of this size is possible, the loss is not finite, or a layer of this architecture
            passes on more than its hidden states.
    """
    model = load_model(source.local_folder, four_bit=four_bit)
    encoder = load_encoder(source.local_folder)
    sequences = take_sequences(text, encoder, settings=settings, seed=seed, half=SEARCH)

    def allowed(layers: Layers) -> bool:
        return may_drop(source.config, layers) and within(layers)

    def run(batch_size: int) -> tuple[list[int], Trial]:
        trial = _trial(model, sequences, encoder, batch_size=batch_size)
        trial.check()
        choose = BY_LOSS[settings.criterion]
        options = {"block_size": block_size, "may_drop": allowed, "progress": progress}
        return choose(trial, profile, **options, state=folder / STATE), trial

    order, trial = find_executable_batch_size(run, starting_batch_size=FIRST_BATCH_SIZE)()
    (folder / STATE).unlink(missing_ok=True)
    dropped = tuple(sorted(order))
    return PruningPlan(
        criterion=settings.criterion,
        num_layers=source.num_layers,
        dropped=dropped,
        distance=profile.across(dropped),
        order=tuple(order) if CRITERIA[settings.criterion].nested else None,
        passes=round(trial.passes, 2),
        num_documents=len(sequences),
    )


def compare(
    source: Source,
    text: Text,
    cuts: Sequence[Layers],
    *,
    sink: int | None = None,
    settings: PlanSettings,
    four_bit: bool,
    seed: int,
    progress: Progress,
) -> CutLosses:
    """Measure the unhealed loss of several cuts on the same documents, none of them used by a search.

    Args:
        sink: Layer that makes the attention sink; the loss without it alone is measured too.
    """
    model = load_model(source.local_folder, four_bit=four_bit)
    encoder = load_encoder(source.local_folder)
    sequences = take_sequences(text, encoder, settings=settings, seed=seed, half=COMPARE)

    tried: list[Layers] = [(), *cuts, *([(sink,)] if sink is not None else [])]

    def run(batch_size: int) -> list[torch.Tensor]:
        trial = _trial(model, sequences, encoder, batch_size=batch_size)
        found = []
        for number, cut in enumerate(tried):
            found.append(trial.losses(cut, [()])[0])
            progress(number + 1, len(tried), "")
        return found

    whole, *rows = find_executable_batch_size(run, starting_batch_size=FIRST_BATCH_SIZE)()
    rows, alone = rows[: len(cuts)], rows[len(cuts) :]
    best = min(rows, key=lambda losses: float(mean_loss(losses)))
    return CutLosses(
        source=_cut_loss((), whole, best=best),
        cuts=tuple(_cut_loss(cut, losses, best=best) for cut, losses in zip(cuts, rows, strict=True)),
        sink=_cut_loss(tried[-1], alone[0], best=whole) if alone else None,
        num_documents=len(sequences),
        sequence_length=settings.sequence_length,
        data=text.data,
    )


def take_sequences(
    text: Text, encoder: Encoder, *, settings: PlanSettings, seed: int, half: int
) -> list[list[int]]:
    """Return the beginnings of every other document in shuffled order, duplicates removed.

    Raises:
        DataError: Fewer than 2 documents are usable.
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
            f"{text.data.name} has {len(sequences)} usable documents here; comparing losses needs 2",
            hint="provide more text with `calibration_data`",
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
    """Return the candidate with the lowest loss, and its losses [sequences, 2].

    All candidates run on a few sequences, the best few on all.

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
            hint="16-bit precision may be too low for this model",
        )
    return finalists[best], losses[best]


def search_block(trial: Trial, candidates: Sequence[Layers], *, progress: Progress) -> Layers:
    """Return the block whose removal costs least, in half the work of running each shortened model.

    Raises:
        ModelError: The architecture does not allow any of them.
    """
    if not candidates:
        raise ModelError("no block of this size can be dropped", hint="choose another `drop`")
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
    """Drop one layer after another, each time the one whose removal costs least.

    Args:
        num_layers: Number of layers to drop.
        rank: Function from the remaining layers to the candidates worth trying.
        may_drop: Predicate: can this set of layers be cut from the architecture?
        state: File that stores the layers dropped so far, and is used to resume.

    Returns:
        The layers in the order in which they were dropped: the first n are the choice for n layers.

    Raises:
        ModelError: No further layer can be dropped.
    """
    order: list[int] = json.loads(state.read_text(encoding="utf-8")) if state and state.exists() else []
    for step in range(len(order), num_layers):
        progress(step, num_layers, f"{step} layers dropped")
        left = [layer for layer in range(len(trial.layers)) if layer not in order]
        can = [layer for layer in left if may_drop(tuple(sorted([*order, layer])))]
        ranked = set(rank(left))
        allowed = [(layer,) for layer in can if layer in ranked] or [(layer,) for layer in can]
        if not allowed:
            raise ModelError(
                f"after {step} dropped layers, no other layer can be dropped alone",
                hint="this architecture drops only whole groups of layers: use `criterion=angular`",
            )
        chosen, _ = best_candidate(trial, order, allowed)
        order += chosen
        if state:
            partial = state.with_suffix(".partial")
            partial.write_text(json.dumps(order), encoding="utf-8")
            partial.replace(state)
    return order


def _nearest(profile: DistanceProfile) -> Callable[[list[int]], list[int]]:
    """Return a function that keeps the half of the remaining layers across which the states turn least.

    It keeps all of them if an imported profile lacks those distances.
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


def _block(
    trial: Trial,
    _profile: DistanceProfile,
    *,
    block_size: int,
    may_drop: Callable[[Layers], bool],
    progress: Progress,
    **_: Any,
) -> list[int]:
    """Choose a block; quick enough to start over after an interruption."""
    starts = range(len(trial.layers) - block_size + 1)
    blocks = [tuple(range(start, start + block_size)) for start in starts]
    return list(search_block(trial, [block for block in blocks if may_drop(block)], progress=progress))


def _greedily(trial: Trial, profile: DistanceProfile, *, block_size: int, **options: Any) -> list[int]:
    """Choose one layer after another among those that the profile ranks first."""
    return search_greedily(trial, num_layers=block_size, rank=_nearest(profile), **options)


BY_LOSS: Mapping[str, Callable[..., list[int]]] = {"loss": _block, "greedy": _greedily}


def _cut_loss(cut: Layers, losses: torch.Tensor, *, best: torch.Tensor) -> CutLoss:
    """Return the mean loss and its difference to the best, with standard errors of ratios over documents."""
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
