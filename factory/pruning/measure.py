"""Measure the angular distance between every pair of layer inputs, in one pass over the text."""

import pickle
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size

from factory.artifacts import DistanceProfile, Source
from factory.config.settings import MeasureSettings
from factory.errors import DataError, ModelError
from factory.model.layers import decoder_layers
from factory.model.loading import fuse_norms, load_model
from factory.model.losses import pad_batch
from factory.model.tokenizer import Encoder, load_encoder
from factory.parallel import processes
from factory.text.text import Text

FIRST_BATCH_SIZE = 16  # sequences of full length; halved until it fits
CHUNK = 64  # samples between two checks of whether the choice is certain
SAVE_EVERY = 256  # samples
CERTAIN = 3.0  # standard errors of the paired difference between the best block and each rival
PLACES = 64  # per document, at most: ends of its samples, whose states one causal pass gives
EVERY_SIZE = 128  # layers: up to here, blocks of every size are compared with their rivals
TOKENS_AT_ONCE = 128  # positions whose pairs of layers are compared at once
STATE = "measuring.pt"
Sample = tuple[int, list[int]]  # its number, its tokens
Measured = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # distances, Block Influence, norms
Progress = Callable[[int, int, str], None]


def measure(
    source: Source,
    text: Text,
    *,
    settings: MeasureSettings,
    block_sizes: Sequence[int],
    seed: int,
    folder: Path,
    progress: Progress,
) -> DistanceProfile:
    """Measure angular distances between layer inputs (arXiv 2403.17887, section 3.2), and Block Influence.

    Each document is read up to `settings.sequence_length` tokens, and the distances at the last token of
    `PLACES` beginnings of that, which end anywhere in it, are averaged. The paper takes one sample of each
    document, cut at the sequence length: of whole documents that is a full stop, which can decide the block.
    In a causal model a token's state does not depend on what follows, so all places cost one pass.

    Reading stops after `settings.num_samples` documents; if that is None, once the nearest block of each of
    `block_sizes` is ahead of every rival by three standard errors of the paired difference, at
    `settings.max_samples`, or at the end of the text. Only sums over the samples are kept; the language-model
    head is never run. Several processes share the samples and then hold the same sums.

    Args:
        block_sizes: Numbers of layers in a cut, for each of which the choice must be certain.
        folder: Folder where the sums are saved every few hundred samples; a later call resumes from them.

    Raises:
        DataError: The text has fewer documents than requested, or fewer than 2.
        ModelError: A hidden state is not finite; the message names the layer and the sample.
    """
    encoder = load_encoder(source.local_folder)
    model = load_model(source.local_folder, four_bit=settings.four_bit)
    fuse_norms(model)
    sums = Sums.resume(folder, num_layers=source.num_layers, block_sizes=block_sizes)
    maximum = settings.num_samples or settings.max_samples
    samples = islice(take_samples(text, encoder, settings=settings, seed=seed), sums.count, maximum)
    run = find_executable_batch_size(
        lambda batch_size, some: _each(
            some,
            measure_batches(
                model,
                some,
                pad_token_id=encoder.pad_token_id,
                max_tokens=batch_size * settings.sequence_length,
                all_tokens=settings.tokens == "all",
                seed=seed,
            ),
        ),
        starting_batch_size=FIRST_BATCH_SIZE,
    )
    for chunk, measured in _measured_chunks(samples, run):
        sums.add(chunk, measured)
        progress(sums.count, maximum, sums.note() if settings.num_samples is None else "")
        long_enough = not settings.exact_length or sums.longest >= settings.sequence_length
        if settings.num_samples is None and sums.certain() and long_enough:
            break
        if sums.count % SAVE_EVERY == 0 and processes.is_main():
            sums.save(folder)
    _check_enough(sums, text, settings=settings)
    if processes.is_main():
        (folder / STATE).unlink(missing_ok=True)
    return sums.profile(source, text, settings=settings)


def _measured_chunks(
    samples: Iterator[Sample], run: Callable[[list[Sample]], list[Measured]]
) -> Iterator[tuple[list[Sample], list[Measured]]]:
    """Yield chunks of samples with their results; the next ones are read and tokenised meanwhile.

    Several processes measure a chunk each at once, which are yielded one after the other: where measuring
    stops does not depend on their number.
    """
    number = CHUNK * processes.count()
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(lambda: list(islice(samples, number)))
        while some := following.result():
            following = reader.submit(lambda: list(islice(samples, number)))
            measured = processes.divide(some, run, cost=lambda sample: len(sample[1]))
            for start in range(0, len(some), CHUNK):
                yield some[start : start + CHUNK], measured[start : start + CHUNK]


def _each(samples: Sequence[Sample], batches: Iterable[Measured]) -> list[Measured]:
    """Return the results of each sample alone, in their order, from those of `measure_batches`."""
    alone = [row for batch in batches for row in zip(*(torch.split(part, 1) for part in batch), strict=True)]
    found = {number: row for (number, _), row in zip(_longest_first(samples), alone, strict=True)}
    return [found[number] for number, _ in samples]


def take_samples(text: Text, encoder: Encoder, *, settings: MeasureSettings, seed: int) -> Iterator[Sample]:
    """Yield the numbered beginnings of the documents in shuffled order, cut to the sequence length."""
    number = 0
    for document in text.shuffled(seed):
        tokens = encoder.beginning(document, length=settings.sequence_length)
        if len(tokens) > 1:
            yield number, tokens
            number += 1


def _check_enough(sums: "Sums", text: Text, *, settings: MeasureSettings) -> None:
    if settings.num_samples and sums.count < settings.num_samples:
        raise DataError(
            f"{text.data.name} has {sums.count} usable documents; {settings.num_samples} were requested",
            hint=f"use `samples={sums.count}`, or provide more text with `calibration_data`",
        )
    if sums.count < 2:
        raise DataError(
            f"{text.data.name} has {sums.count} usable documents; measuring needs at least 2",
            hint="provide more text with `calibration_data`",
        )
    if settings.exact_length and sums.longest < settings.sequence_length:
        raise DataError(
            f"the longest of {sums.count} documents of {text.data.name} has {sums.longest} tokens; "
            f"sequences of {settings.sequence_length} were requested",
            hint=f"use `sequence_length={sums.longest}`, or provide longer text with `calibration_data`",
        )


class Moments:
    """Streaming mean and standard error over samples of a tensor (Chan, Golub and LeVeque 1979)."""

    def __init__(self, *shape: int) -> None:
        self.count = 0
        self.mean = torch.zeros(shape, dtype=torch.float64)
        self.squares = torch.zeros(shape, dtype=torch.float64)

    def add(self, values: torch.Tensor) -> None:
        """Add a batch of samples, [b, *shape] in float64."""
        mean = values.mean(dim=0)
        delta, total = mean - self.mean, self.count + len(values)
        self.squares += (values - mean).square().sum(dim=0)
        self.squares += delta.square() * (self.count * len(values) / total)
        self.mean += delta * (len(values) / total)
        self.count = total

    @property
    def stderr(self) -> torch.Tensor:
        """Standard error of the mean, in the shape of one sample."""
        return (self.squares / max(self.count - 1, 1) / max(self.count, 1)).sqrt()


class Sums:
    """Running sums over the samples, O(L²) in size, plus O(L²) per block size."""

    def __init__(self, num_layers: int, block_sizes: Sequence[int]) -> None:
        self.num_layers = num_layers
        self.block_sizes = tuple(sorted(set(block_sizes)))
        self.distance = Moments(num_layers + 1, num_layers + 1)
        self.influence = Moments(num_layers)
        self.norms = Moments(num_layers + 1, 2)  # of the first token, and of the median token after it
        # Differences between all pairs of blocks; the plan never drops the last layer.
        sizes = range(1, num_layers) if num_layers <= EVERY_SIZE else self.block_sizes
        self.rivals = {n: Moments(num_layers - n, num_layers - n) for n in sizes}
        self.num_tokens = 0
        self.longest = 0  # tokens

    @property
    def count(self) -> int:
        """Number of samples so far."""
        return self.distance.count

    def add(self, samples: list[Sample], measured: list[Measured]) -> None:
        """Add the results of `measure_batches` for these samples."""
        distances, influence, norms = (torch.cat(parts) for parts in zip(*measured, strict=True))
        self.distance.add(distances)
        self.influence.add(influence)
        self.norms.add(norms)
        for n, moments in self.rivals.items():
            blocks = distances.diagonal(offset=n, dim1=1, dim2=2)[:, :-1]  # [b, L - n]
            moments.add(blocks[:, :, None] - blocks[:, None, :])
        self.num_tokens += sum(len(tokens) for _, tokens in samples)
        self.longest = max(self.longest, *(len(tokens) for _, tokens in samples))

    def leads(self, n: int) -> torch.Tensor:
        """Return the lead of the nearest block of n layers over each block, in standard errors: [L - n]."""
        moments = self.rivals[n]
        best = int(self.distance.mean.diagonal(offset=n)[:-1].argmin())
        ahead, error = moments.mean[:, best], moments.stderr[:, best]
        # A block that is equal in every sample is just as good a choice.
        leads = torch.where((ahead == 0) & (error == 0), torch.inf, ahead / error)
        return leads.nan_to_num(nan=0.0, posinf=torch.inf)

    def lead(self, n: int) -> float:
        """Return the lead of the nearest block of n layers over its closest rival, in standard errors."""
        return float(self.leads(n).min())

    def ties(self) -> dict[int, tuple[int, ...]]:
        """Return, per block size, the starts of the blocks from which the nearest cannot be told."""
        near = {n: (self.leads(n) < CERTAIN).nonzero().flatten().tolist() for n in self.rivals}
        return {n: tuple(starts) for n, starts in near.items() if starts}

    def certain(self) -> tuple[int, ...]:
        """Return the requested block sizes if the choice is certain for all of them, else an empty tuple."""
        sizes = self.block_sizes
        return sizes if sizes and all(self.lead(n) >= CERTAIN for n in sizes) else ()

    @property
    def moments(self) -> list[Moments]:
        """Return all moments, in the order in which they are saved."""
        return [self.distance, self.influence, self.norms, *self.rivals.values()]

    def note(self) -> str:
        """Describe in words how certain the choice is so far."""
        lead = min((self.lead(n) for n in self.block_sizes), default=0.0)
        return f"best block ahead by {lead:.1f} of {CERTAIN:.0f} standard errors"

    def save(self, folder: Path) -> None:
        """Write everything to one file, which is replaced atomically."""
        partial = folder / f"{STATE}.partial"
        torch.save(_plain(self), partial)
        partial.replace(folder / STATE)

    @classmethod
    def resume(cls, folder: Path, *, num_layers: int, block_sizes: Sequence[int]) -> "Sums":
        """Load what an earlier attempt saved in `folder`, or start from zero."""
        sums = cls(num_layers, block_sizes)
        if (folder / STATE).exists():
            try:
                saved = torch.load(folder / STATE, weights_only=True)
            except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
                return sums  # truncated by a power cut
            for moment, (count, mean, squares) in zip(sums.moments, saved["moments"], strict=True):
                moment.count, moment.mean, moment.squares = count, mean, squares
            sums.num_tokens, sums.longest = saved["num_tokens"], saved["longest"]
        return sums

    def profile(self, source: Source, text: Text, *, settings: MeasureSettings) -> DistanceProfile:
        """Return the result, rounded to the precision of float32 states to keep files short."""
        return DistanceProfile(
            num_layers=self.num_layers,
            source_commit=source.commit,
            num_samples=self.count,
            sequence_length=settings.sequence_length,
            num_tokens=self.num_tokens,
            tokens=settings.tokens,
            quantization="nf4" if settings.four_bit else None,
            certain_for=self.certain() if settings.num_samples is None else (),
            mean=_rows(self.distance.mean),
            stderr=_rows(self.distance.stderr),
            influence=_row(self.influence.mean),
            influence_stderr=_row(self.influence.stderr),
            ties=self.ties(),
            first_norm=_row(self.norms.mean[:, 0]),
            other_norm=_row(self.norms.mean[:, 1]),
            data=text.data,
        )


def _plain(sums: Sums) -> dict[str, Any]:
    return {
        "moments": [(moment.count, moment.mean, moment.squares) for moment in sums.moments],
        "num_tokens": sums.num_tokens,
        "longest": sums.longest,
    }


def _row(values: torch.Tensor) -> tuple[float, ...]:
    return tuple(round(value, 7) for value in values.tolist())


def _rows(matrix: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(_row(row) for row in matrix)


@torch.inference_mode()
def measure_batches(
    model: Any,
    samples: Sequence[Sample],
    *,
    pad_token_id: int,
    max_tokens: int,
    all_tokens: bool = False,
    seed: int = 0,
) -> Iterator[Measured]:
    """Yield distances [b, L + 1, L + 1], Block Influence [b, L] and norms [b, L + 1, 2] per batch.

    All are in float64 on the CPU. The norms are those of the first token and of the median token after it.
    Batches hold samples of similar length, at most `max_tokens` including padding, the longest first, so
    that running out of memory shows at once.

    Args:
        all_tokens: Average over all tokens but the first, whose state is an outlier, instead of `PLACES`.
        seed: Seed of the places; those of a sample depend on nothing else but its number and length.
    """
    layers = decoder_layers(model)
    for batch in _batches(samples, max_tokens=max_tokens):
        ids, _ = pad_batch([tokens for _, tokens in batch], pad_token_id=pad_token_id)
        maximum = ids.shape[1] - 1 if all_tokens else PLACES
        positions, weights = _positions(batch, maximum=maximum, seed=seed)
        weights = weights.to(model.device)
        with recorded_boundaries(layers, positions.to(model.device)) as seen:
            # The inner model: the head's logits, the largest tensor of a pass, are not needed. No mask:
            # no real token attends to the padding after it, and attention is faster without one.
            model.base_model(input_ids=ids.to(model.device), use_cache=False)
        _check_finite(seen.finite, [number for number, _ in batch])
        # Layers spread over several devices leave their states there.
        states = [state.to(model.device) for state in seen.states]
        influence = torch.stack([(turn.to(model.device) * weights).sum(dim=1) for turn in seen.turns], dim=1)
        distances = torch.stack(
            [_mean_distances([state[row] for state in states], weights[row]) for row in range(len(batch))]
        )
        first = torch.stack([norm.to(model.device) for norm in seen.first_norms], dim=1)
        norms = torch.stack([first, _median_norms(states, weights)], dim=2)
        yield distances.cpu(), influence.cpu(), norms.cpu()


def _median_norms(states: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Return the median norm over the positions of weight: L + 1 of [b, p, d] → [b, L + 1]."""
    norms = torch.stack([state.double().norm(dim=-1) for state in states], dim=1)  # [b, L + 1, p]
    return norms.masked_fill(weights[:, None, :] == 0, torch.nan).nanmedian(dim=-1).values


def angular_distances(states: torch.Tensor) -> torch.Tensor:
    """Return arccos(cosine) / π between all pairs of states: [b, k, d] → [b, k, k], in [0, 1]."""
    unit = torch.nn.functional.normalize(states, dim=-1)
    cosine = (unit @ unit.transpose(-1, -2)).clamp(-1.0, 1.0)
    distances = cosine.arccos() / torch.pi
    diagonal = torch.arange(states.shape[1], device=states.device)
    distances[:, diagonal, diagonal] = 0.0
    return distances


def _mean_distances(states: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Return one sample's weighted mean distance over positions: L + 1 of [p, d] → [L + 1, L + 1]."""
    total = torch.zeros((len(states), len(states)), dtype=torch.float64, device=weights.device)
    for start in range(0, len(weights), TOKENS_AT_ONCE):
        some = slice(start, start + TOKENS_AT_ONCE)
        together = torch.stack([state[some].double() for state in states], dim=1)  # [p, L + 1, d]
        total += torch.einsum("p,pij->ij", weights[some], angular_distances(together))
    return total


def _longest_first(samples: Sequence[Sample]) -> list[Sample]:
    return sorted(samples, key=lambda sample: (-len(sample[1]), sample[0]))


def _batches(samples: Sequence[Sample], *, max_tokens: int) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for sample in _longest_first(samples):
        if batch and (len(batch) + 1) * len(batch[0][1]) > max_tokens:
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def _positions(samples: Sequence[Sample], *, maximum: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions per sample and their weights: both [b, p].

    A sample's range after position 0 is divided evenly, and each part gives one position, at the same random
    distance from its beginning. Samples with fewer than `maximum` are padded in front, with weight 0.
    """
    positions, weights = [], []
    for number, tokens in samples:
        after = len(tokens) - 1
        count = min(maximum, after)
        offset = random.Random(f"{seed}:{number}").random()
        spaced = [1 + int((part + offset) * after / count) for part in range(count)]
        positions.append([after] * (maximum - count) + spaced)
        weights.append([0.0] * (maximum - count) + [1 / count] * count)
    return torch.tensor(positions), torch.tensor(weights, dtype=torch.float64)


@dataclass
class Boundaries:
    """Values recorded at each layer's input and the last layer's output, at some positions."""

    states: list[torch.Tensor] = field(default_factory=list)  # L + 1 of [b, p, d]
    finite: list[torch.Tensor] = field(default_factory=list)  # L + 1 of [b]
    turns: list[torch.Tensor] = field(default_factory=list)  # L of [b, p]: 1 − cosine over a layer
    first_norms: list[torch.Tensor] = field(default_factory=list)  # L + 1 of [b]: at position 0


@contextmanager
def recorded_boundaries(layers: Any, positions: torch.Tensor) -> Iterator[Boundaries]:
    """Record the states at `positions`, [b, p].

    Uses hooks, because the last entry of `output_hidden_states` is after the final norm and so not
    comparable with the others. Block Influence is the mean of 1 − cosine (ShortGPT, arXiv 2403.03853,
    equation 1).
    """
    seen = Boundaries()
    rows = torch.arange(len(positions), device=positions.device)[:, None]
    before: torch.Tensor | None = None

    def see(hidden: torch.Tensor) -> None:
        nonlocal before
        state = hidden[rows.to(hidden.device), positions.to(hidden.device)]
        if before is not None:
            both = before.to(state.device).double(), state.double()
            seen.turns.append(1 - torch.nn.functional.cosine_similarity(*both, dim=-1))
        seen.finite.append(state.isfinite().flatten(start_dim=1).all(dim=1))
        seen.states.append(state)
        seen.first_norms.append(hidden[:, 0].double().norm(dim=-1))
        before = state

    def enter(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(args[0] if args else kwargs["hidden_states"])

    def leave(_module: Any, _args: tuple[Any, ...], output: Any) -> None:
        see(output[0] if isinstance(output, tuple | list) else output)

    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(leave))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _check_finite(finite: Sequence[torch.Tensor], numbers: list[int]) -> None:
    found = torch.stack([each.to(finite[0].device) for each in finite], dim=1)  # [b, L + 1]
    if bool(found.all()):
        return
    row, layer = (int(value) for value in (~found).nonzero()[0])
    raise ModelError(
        f"the input of layer {layer} is not finite on sample {numbers[row]}",
        hint="the weights may be damaged, or 16-bit precision may be too low for this model",
    )
