"""Claim: distances at several places of each document choose more steadily than at its last token.

    python benchmarks/samples.py MODEL TEXT [--sizes 3,6,9] [--documents 128] [--length 256]

One pass gives the distances at every token; each way of sampling takes some of them. "ahead" is the lead of
the best block over its closest rival in standard errors of the paired difference, "same" counts the bootstrap
halves of the documents that choose the same block. The loss is that of the model without the block, unhealed.
"""

import argparse
import random
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch

from factory.artifacts import layer_ranges
from factory.config.settings import MeasureSettings, PlanSettings
from factory.hub.pull import pull
from factory.hub.resolve import resolve
from factory.model.layers import decoder_layers
from factory.model.loading import fuse_norms, load_model
from factory.model.tokenizer import load_encoder
from factory.pruning.measure import Sample, angular_distances, recorded_boundaries, take_samples
from factory.pruning.search import COMPARE, Trial, mean_loss, take_sequences
from factory.text.text import open_text

HALVES = 20
Choose = Callable[[random.Random, int], list[int]]  # a generator, a sample's length → places


def drawn(count: int, *, first: float = 0.0) -> Choose:
    """Draw different places after the first token, or after this share of the sample."""

    def choose(generator: random.Random, length: int) -> list[int]:
        places = range(max(1, int(first * length)), length)
        return generator.sample(places, min(count, len(places)))

    return choose


def spread(count: int) -> Choose:
    """Divide the sample evenly and take one place of each part, as `measure` does."""

    def choose(generator: random.Random, length: int) -> list[int]:
        number = min(count, length - 1)
        offset = generator.random()
        return [1 + int((part + offset) * (length - 1) / number) for part in range(number)]

    return choose


WAYS: dict[str, Choose] = {
    "last token": lambda _, length: [length - 1],
    "1 place": drawn(1),
    "1, later half": drawn(1, first=0.5),
    "8 places": drawn(8),
    "8, later half": drawn(8, first=0.5),
    "8, spread": spread(8),
    "64, spread": spread(64),
    "all tokens": lambda _, length: list(range(1, length)),
}


@torch.inference_mode()
def all_distances(model: Any, samples: list[Sample], sizes: list[int]) -> dict[int, list[torch.Tensor]]:
    """Return per size and sample the distances of the blocks at every token: [s, L - n]."""
    found: dict[int, list[torch.Tensor]] = {n: [] for n in sizes}
    for _, tokens in samples:
        with recorded_boundaries(decoder_layers(model), torch.arange(len(tokens))[None]) as seen:
            model.base_model(input_ids=torch.tensor([tokens]), use_cache=False)
        distances = angular_distances(torch.stack([state[0].double() for state in seen.states], dim=1))
        for n in sizes:
            found[n].append(distances.diagonal(offset=n, dim1=1, dim2=2)[:, :-1].float())
    return found


def choice(distances: torch.Tensor) -> tuple[int, float, float, int]:
    """Return the best start of [samples, L - n], its distance, its lead, and the halves that agree."""
    mean = distances.mean(dim=0)
    best = int(mean.argmin())
    ahead = distances - distances[:, best : best + 1]
    leads = ahead.mean(dim=0) / (ahead.std(dim=0) / len(distances) ** 0.5)
    leads[best] = torch.inf
    generator = torch.Generator().manual_seed(0)
    half = (len(distances) // 2,)
    picks = [
        int(distances[torch.randint(len(distances), half, generator=generator)].mean(dim=0).argmin())
        for _ in range(HALVES)
    ]
    return best, float(mean[best]), float(leads.min()), picks.count(best)


def main() -> None:
    """Print one table per size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--sizes", default="3,6,9", help="numbers of layers to drop")
    parser.add_argument("--documents", type=int, default=128)
    parser.add_argument("--loss-documents", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens per document, at most")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    source = pull(resolve(arguments.model))
    model, encoder = load_model(source.local_folder), load_encoder(source.local_folder)
    fuse_norms(model)
    text = open_text(arguments.text, split="validation")
    settings = MeasureSettings(sequence_length=arguments.length)
    samples = list(islice(take_samples(text, encoder, settings=settings, seed=0), arguments.documents))
    distances = all_distances(model, samples, sizes)
    plan = PlanSettings(num_documents=arguments.loss_documents, sequence_length=arguments.length)
    sequences = take_sequences(text, encoder, settings=plan, seed=0, half=COMPARE)
    trial = Trial(model, sequences, pad_token_id=encoder.pad_token_id, batch_size=4)
    losses: dict[tuple[int, ...], float] = {}
    print(
        f"{source.name}, {len(samples)} documents; source {float(mean_loss(trial.losses((), [()])[0])):.2f}"
    )
    for n in sizes:
        print(f"\n| {n} layers | dropped | distance | ahead | same of {HALVES} | loss |")
        print("|---|---|--:|--:|--:|--:|")
        for name, choose in WAYS.items():
            taken = [
                every[choose(random.Random(f"0:{number}"), len(every))].double().mean(dim=0)
                for number, every in enumerate(distances[n])
            ]
            start, distance, ahead, same = choice(torch.stack(taken))
            block = tuple(range(start, start + n))
            if block not in losses:
                losses[block] = float(mean_loss(trial.losses((), [block])[0]))
            row = f"{distance:.4f} | {ahead:.1f} | {same} | {losses[block]:.2f} |"
            print(f"| {name} | {layer_ranges(block)} | {row}", flush=True)


if __name__ == "__main__":
    main()
