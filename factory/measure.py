"""Measure: the angular distance between every pair of layer inputs, in one pass over the text."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size

from factory.artifacts import DistanceProfile, Source
from factory.config import MeasureSettings
from factory.decoder import decoder_layers
from factory.errors import DataError, ModelError
from factory.models import load_model, load_tokenizer, pad_batch
from factory.texts import Text

FIRST_BATCH_SIZE = 8  # halved until it fits


def measure(
    source: Source,
    text: Text,
    *,
    settings: MeasureSettings,
    seed: int,
    progress: Callable[[int, int], None],
) -> DistanceProfile:
    """Angular distances between layer inputs at the last real token (arXiv 2403.17887, section 3.2).

    Each document gives one sample: its first `settings.sequence_length` tokens. States are compared in
    float64; the language-model head is never run.

    Raises:
        DataError: The text holds fewer than 2 documents of at least 2 tokens.
        ModelError: A state is not finite; says the layer and the sample.
    """
    tokenizer = load_tokenizer(source.local_folder)
    samples = take_samples(text, tokenizer, settings=settings, seed=seed)
    samples.sort(key=len, reverse=True)  # little padding; and what does not fit shows at once
    model = load_model(source.local_folder)
    statistics = find_executable_batch_size(
        lambda batch_size: measure_model(
            model, samples, pad_token_id=tokenizer.pad_token_id, batch_size=batch_size, progress=progress
        ),
        starting_batch_size=FIRST_BATCH_SIZE,
    )()
    mean, stderr = statistics.result()
    return DistanceProfile(
        num_layers=source.num_layers,
        num_samples=len(samples),
        sequence_length=settings.sequence_length,
        num_tokens=sum(len(sample) for sample in samples),
        mean=_rows(mean),
        stderr=_rows(stderr),
        data=text.data,
    )


def take_samples(text: Text, tokenizer: Any, *, settings: MeasureSettings, seed: int) -> list[list[int]]:
    """Token lists of the first documents in shuffled order, cut to the sequence length."""
    samples: list[list[int]] = []
    for document in text.shuffled(seed):
        tokens = tokenizer(document, truncation=True, max_length=settings.sequence_length).input_ids
        if len(tokens) > 1:
            samples.append(tokens)
        if len(samples) == settings.num_samples:
            break
    if len(samples) < 2:
        raise DataError(
            f"{text.data.name} holds {len(samples)} usable documents; measuring needs at least 2",
            hint="give more text with --calibration-data",
        )
    return samples


class PairStatistics:
    """Streaming mean and standard error of a [k, k] matrix over samples (Welford, in float64)."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, size, dtype=torch.float64)
        self.squares = torch.zeros(size, size, dtype=torch.float64)

    def add(self, matrices: torch.Tensor) -> None:
        """Add a batch of matrices, [b, k, k]."""
        for matrix in matrices:
            self.count += 1
            delta = matrix - self.mean
            self.mean += delta / self.count
            self.squares += delta * (matrix - self.mean)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard error of the mean, both [k, k]."""
        variance = self.squares / max(self.count - 1, 1)
        return self.mean, (variance / self.count).sqrt()


@torch.inference_mode()
def measure_model(
    model: Any,
    samples: list[list[int]],
    *,
    pad_token_id: int,
    batch_size: int,
    progress: Callable[[int, int], None],
) -> PairStatistics:
    """Run all samples through a loaded model; statistics over (L+1)² pairs of boundaries."""
    layers = decoder_layers(model)
    statistics = PairStatistics(len(layers) + 1)
    for start in range(0, len(samples), batch_size):
        ids, mask = pad_batch(samples[start : start + batch_size], pad_token_id=pad_token_id)
        with _last_token_states(layers, mask.sum(dim=1) - 1) as states:
            # The inner model: the head's logits, the largest tensor of a pass, are not needed.
            model.base_model(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False
            )
        stacked = torch.stack(states, dim=1)  # [b, L + 1, d], float64
        _check_finite(stacked, first_sample=start)
        statistics.add(angular_distances(stacked))
        progress(min(start + batch_size, len(samples)), len(samples))
    return statistics


def angular_distances(states: torch.Tensor) -> torch.Tensor:
    """arccos of the cosine over π between all pairs of states: [b, k, d] → [b, k, k], in [0, 1]."""
    unit = torch.nn.functional.normalize(states, dim=-1)
    cosine = (unit @ unit.transpose(-1, -2)).clamp(-1.0, 1.0)
    distances = cosine.arccos() / torch.pi
    diagonal = torch.arange(states.shape[1], device=states.device)
    distances[:, diagonal, diagonal] = 0.0
    return distances


@contextmanager
def _last_token_states(layers: Any, positions: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Collect each layer's input and the last layer's output at one position a row.

    Hooks rather than `output_hidden_states`, whose last entry is after the final norm and so not
    comparable with the others.
    """
    states: list[torch.Tensor] = []
    rows = torch.arange(len(positions))

    def keep(hidden: torch.Tensor) -> None:
        where = positions.to(hidden.device)
        states.append(hidden[rows.to(hidden.device), where].to("cpu", torch.float64))

    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(args[0] if args else kwargs["hidden_states"])

    def after(_module: Any, _args: tuple[Any, ...], output: Any) -> None:
        keep(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(after))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _check_finite(states: torch.Tensor, *, first_sample: int) -> None:
    bad = (~states.isfinite().all(dim=-1)).nonzero()
    if len(bad):
        sample, layer = (int(value) for value in bad[0])
        raise ModelError(
            f"the input of layer {layer} is not finite on sample {first_sample + sample}",
            hint="the weights may be damaged, or 16-bit precision too narrow for this model",
        )


def _rows(matrix: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    """As nested tuples, rounded to what float32 states can carry, so that files stay short."""
    return tuple(tuple(round(value, 7) for value in row) for row in matrix.tolist())
