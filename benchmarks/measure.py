"""Claim: one pass measures every cut, no slower and in less memory than one pass per block size.

    python benchmarks/measure.py --model FOLDER --data FILE [--reference-samples 4000]
    python benchmarks/measure.py --shape mistral-7b
    python benchmarks/measure.py --shape llama-70b --four-bit --cap-gb 40

The rival is the method of PruneMe (github.com/arcee-ai/PruneMe, layer_similarity.py), reimplemented: all
hidden states, logits and cache of a pass, the last state after the final norm, one block size per run,
cosines in 16 bits, batches in the order of the text, every sample's distances kept. It reads the last tokens
in one step per layer, where PruneMe takes one per layer and sequence. With --shape, weights and tokens are
random and made on the device, for speed and memory only. With --cap-gb, using more GPU memory than that,
including the CUDA context, is an error.
"""

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size
from shapes import SHAPES, random_model

from factory.artifacts import layer_ranges
from factory.config.settings import MeasureSettings
from factory.model.devices import device_name
from factory.model.layers import decoder_layers
from factory.model.loading import fuse_norms, load_model, matrix_weights
from factory.model.losses import pad_batch
from factory.model.tokenizer import load_encoder
from factory.pruning.measure import (
    CERTAIN,
    CHUNK,
    FIRST_BATCH_SIZE,
    Sample,
    Sums,
    measure_batches,
    take_samples,
)
from factory.text.text import open_text

PAPER_SAMPLES = 10_000  # arXiv 2403.17887, section 3.2
PRUNEME_SAMPLES = 4_000  # its run_layer_similarity.sh

Batches = Callable[[list[Sample], int], None]  # samples, full-length sequences per batch


# The model and the samples ----------------------------------------------------------------------


def random_samples(count: int, *, length: int, vocab_size: int) -> list[Sample]:
    """Return full-length sequences of random tokens."""
    generator = torch.Generator().manual_seed(0)
    return list(enumerate(torch.randint(vocab_size, (count, length), generator=generator).tolist()))


# The two ways -----------------------------------------------------------------------------------


class PruneMe:
    """Angular distances of all blocks of n layers as PruneMe measures them."""

    def __init__(self, num_layers: int, n: int) -> None:
        self.n = n
        self.kept: list[list[float]] = [[] for _ in range(num_layers - n)]  # block, sample

    @torch.no_grad()
    def add(self, model: Any, samples: list[Sample], *, batch_size: int, pad_token_id: int) -> None:
        """Measure the samples."""
        for start in range(0, len(samples), batch_size):
            batch = [tokens for _, tokens in samples[start : start + batch_size]]
            ids, mask = (tensor.to(model.device) for tensor in pad_batch(batch, pad_token_id=pad_token_id))
            states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
            rows, last = torch.arange(len(batch), device=mask.device), mask.sum(dim=1) - 1
            # On a CPU the model runs in fp32: round the states to the precision of PruneMe.
            ends = [state[rows, last].to(torch.bfloat16) for state in states[1:]]
            for distances, before, after in zip(self.kept, ends, ends[self.n :], strict=False):
                distances.extend(self.distance(before, after).tolist())

    @staticmethod
    def distance(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Return arccos(cosine) / π in the precision of the states: two of [b, d] → [b]."""
        before, after = (state / state.norm(dim=-1, keepdim=True) for state in (before, after))
        return (before * after).sum(dim=-1).clamp(-1, 1).arccos() / torch.pi

    @property
    def start(self) -> int:
        """Return the first layer of the nearest block; none starts at 0, as the first state is an output."""
        means = [statistics.fmean(distances) for distances in self.kept]
        return means.index(min(means)) + 1


class Ways:
    """Both ways over the same model, and the bare forward pass."""

    def __init__(self, model: Any, *, length: int, pad_token_id: int, n: int) -> None:
        self.model, self.length, self.pad_token_id, self.n = model, length, pad_token_id, n
        self.num_layers = len(decoder_layers(model))
        self.sums = Sums(self.num_layers, (self.n,))
        self.pruneme = PruneMe(self.num_layers, self.n)
        fuse_norms(model)
        self.fused = [
            (module, vars(module)["forward"]) for module in model.modules() if "forward" in vars(module)
        ]

    def use_fused(self, wanted: bool) -> None:
        """Use fused norms, as our measurement does, or the original ones."""
        for module, forward in self.fused:
            vars(module).pop("forward", None)
            if wanted:
                module.forward = forward

    def ours(self, samples: list[Sample], batch_size: int) -> None:
        """Measure as `factory.pruning.measure.measure` does a chunk."""
        self.use_fused(True)
        measured = measure_batches(
            self.model, samples, pad_token_id=self.pad_token_id, max_tokens=batch_size * self.length
        )
        self.sums.add(samples, list(measured))

    def theirs(self, samples: list[Sample], batch_size: int) -> None:
        """Measure as PruneMe does."""
        self.use_fused(False)
        self.pruneme.add(self.model, samples, batch_size=batch_size, pad_token_id=self.pad_token_id)

    @torch.inference_mode()
    def forward(self, samples: list[Sample], batch_size: int) -> None:
        """Run only the layers on our batches: the lower limit of the time."""
        self.use_fused(True)
        ordered = sorted(samples, key=lambda sample: -len(sample[1]))
        while ordered:
            count = max(batch_size * self.length // len(ordered[0][1]), 1)
            batch, ordered = ordered[:count], ordered[count:]
            ids, _ = pad_batch([tokens for _, tokens in batch], pad_token_id=self.pad_token_id)
            self.model.base_model(input_ids=ids.to(self.model.device), use_cache=False)

    def largest_batch(self, way: Batches, samples: list[Sample], *, first: int) -> int | None:
        """Return how many sequences fit, halving from `first`; None if not even one does."""

        def attempt(batch_size: int) -> int:
            way(samples[:batch_size], batch_size)
            return batch_size

        try:
            return int(find_executable_batch_size(attempt, starting_batch_size=first)())
        except RuntimeError as error:
            if "No executable batch size" not in str(error):
                raise
            return None


# What is measured of them -----------------------------------------------------------------------


def wait() -> None:
    """Wait until the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object]) -> float:
    """Return the wall time of some work."""
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def memory_of(work: Callable[[], object]) -> int:
    """Return the peak memory in bytes beyond that before: allocated on a GPU, or resident on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def compare(ways: Ways, samples: list[Sample], *, rounds: int, batches: dict[str, int | None]) -> None:
    """Print memory, then speed in alternating rounds."""
    works = {"ours": ways.ours, "theirs": ways.theirs, "forward": ways.forward}
    per_round = len(samples) // rounds
    peaks = {}
    for name, batch_size in batches.items():
        if batch_size:
            work = partial(works[name], samples[:batch_size], batch_size)
            work()  # warm-up
            peaks[name] = memory_of(work)
            print(f"{name}: {peaks[name] / 1e9:.3f} GB beyond the weights, {batch_size} sequences per batch")
        else:
            print(f"{name}: out of memory with one sequence per batch")
    if len(peaks) == 2:
        print(f"memory beyond the weights, ours / theirs: {peaks['ours'] / peaks['theirs']:.3f}")
    sizes = {name: size for name, size in {**batches, "forward": batches["ours"]}.items() if size}
    speeds: dict[str, list[float]] = {name: [] for name in sizes}
    for number in range(rounds):
        chunk = samples[number * per_round : (number + 1) * per_round]
        num_tokens = sum(len(tokens) for _, tokens in chunk)
        for name in sorted(sizes, reverse=number % 2 == 1):
            speeds[name].append(num_tokens / seconds_of(partial(works[name], chunk, sizes[name])))
    report(ways, speeds, per_round=per_round)


def report(ways: Ways, speeds: dict[str, list[float]], *, per_round: int) -> None:
    """Print medians with their spread, and the ratios of the rounds."""
    operations = 2 * matrix_weights(decoder_layers(ways.model))
    print(f"medians of {len(speeds['ours'])} alternating rounds of {per_round} samples; forward: layers only")
    for name, values in speeds.items():
        speed = statistics.median(values)
        print(
            f"{name:8} {speed:9,.0f} tokens/s ({min(values):,.0f}–{max(values):,.0f}), "
            f"{speed * operations / 1e12:.3g} TFLOP/s in the layers' matrices"
        )
    share = statistics.median(a / b for a, b in zip(speeds["ours"], speeds["forward"], strict=True))
    print(f"share of the forward pass in our time: {share:.1%}")
    if "theirs" in speeds:
        ratio = statistics.median(a / b for a, b in zip(speeds["ours"], speeds["theirs"], strict=True))
        runs = ways.num_layers - 1
        print(f"speed, ours / theirs: {ratio:.3f} for one n, {ratio * runs:.1f} for all {runs}")


def choose(ways: Ways, samples: Iterator[Sample], *, others: list[int], batch_size: int) -> None:
    """Print after how many samples the choice is certain, and whether more samples change it."""
    ways.sums = sums = Sums(ways.num_layers, (ways.n, *others))
    certain: dict[int, tuple[int, float, int]] = {}  # block size to samples, seconds, block
    kept: list[Sample] = []
    spent = 0.0
    while chunk := list(islice(samples, CHUNK)):
        spent += seconds_of(partial(ways.ours, chunk, batch_size))
        kept += chunk
        for n in sums.rivals:
            if n not in certain and sums.lead(n) >= CERTAIN:
                certain[n] = (sums.count, spent, start_of(sums, n))
    print(f"{sums.count} samples, {sums.num_tokens:,} tokens, {spent:.1f} s in all")
    paper = PAPER_SAMPLES * spent / sums.count
    for n in sums.rivals:
        block = start_of(sums, n)
        if n not in certain:
            print(f"n = {n}: {layers(block, n)}, not certain: ahead by {sums.lead(n):.1f} standard errors")
            continue
        count, seconds, found = certain[n]
        print(
            f"n = {n}: certain of {layers(found, n)} after {count} samples, {seconds:.1f} s; all choose "
            f"{layers(block, n)}; {PAPER_SAMPLES:,} at this speed: {paper:.0f} s, {paper / seconds:.0f} times"
        )
    used = kept[:PRUNEME_SAMPLES]
    ways.pruneme = PruneMe(ways.num_layers, ways.n)
    theirs = seconds_of(partial(ways.theirs, used, batch_size))
    print(
        f"theirs, n = {ways.n}: {layers(ways.pruneme.start, ways.n)} of {len(used)} samples, {theirs:.1f} s; "
        f"{PRUNEME_SAMPLES:,} at this speed: {PRUNEME_SAMPLES * theirs / len(used):.0f} s"
    )


def layers(start: int, n: int) -> str:
    """Return "layers 14–23" for display."""
    return f"layers {layer_ranges(range(start, start + n))}"


def start_of(sums: Sums, n: int) -> int:
    """Return the first layer of the nearest block of n."""
    return int(sums.distance.mean.diagonal(offset=n)[:-1].argmin())


# The command ------------------------------------------------------------------------------------


def asked() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, help="folder of a model; needs --data")
    what.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--data", help="text to read with --model")
    parser.add_argument("--four-bit", action="store_true")
    parser.add_argument("--cap-gb", type=float)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, help="sequences per batch; default: as in a build")
    parser.add_argument("--round-samples", type=int, default=CHUNK)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--drop", type=float, default=0.3, help="fraction of layers, which gives n")
    parser.add_argument("--also-n", type=int, nargs="*", default=[], help="other block sizes to report on")
    parser.add_argument(
        "--reference-samples", type=int, default=0, help="samples to check a certain choice on"
    )
    options = parser.parse_args()
    if (options.model is None) != (options.data is None):
        parser.error("--model and --data go together")
    if options.reference_samples and options.model is None:
        parser.error("--reference-samples needs --model: random tokens choose nothing")
    return options


def main() -> None:
    """Make or load the model, then compare."""
    options = asked()
    if options.cap_gb:
        cap(options.cap_gb)
    start = time.perf_counter()
    model, pad_token_id, take = load(options)
    wait()
    ready = time.perf_counter() - start
    length, n = options.sequence_length, int(options.drop * len(decoder_layers(model)) + 0.5)
    print(
        f"{options.shape or options.model.name}{', NF4' * options.four_bit} on {device_name(model.device)}, "
        f"ready after {ready:.1f} s; at most {length} tokens per sample, n = {n}"
    )
    if torch.cuda.is_available():
        print(f"weights: {torch.cuda.memory_allocated() / 1e9:.2f} GB")
    samples = take(options.rounds * options.round_samples)
    ways = Ways(model, length=length, pad_token_id=pad_token_id, n=n)
    longest = sorted(samples, key=lambda sample: -len(sample[1]))
    ours = ways.largest_batch(ways.ours, longest, first=options.batch_size or FIRST_BATCH_SIZE)
    if ours is None:
        sys.exit("ours: out of memory with one sequence per batch")
    theirs = ways.largest_batch(ways.theirs, longest, first=ours)
    compare(ways, samples, rounds=options.rounds, batches={"ours": ours, "theirs": theirs})
    if options.reference_samples:
        choose(ways, iter(take(options.reference_samples)), others=options.also_n, batch_size=ours)


def load(options: argparse.Namespace) -> tuple[Any, int, Callable[[int], list[Sample]]]:
    """Return the model, its padding token, and a function that takes the first samples."""
    length = options.sequence_length
    if options.shape:
        config = SHAPES[options.shape]
        take = partial(random_samples, length=length, vocab_size=config.vocab_size)
        return random_model(config, four_bit=options.four_bit), 0, take
    encoder = load_encoder(options.model)
    text, settings = open_text(options.data, split="train"), MeasureSettings(sequence_length=length)

    def read(count: int) -> list[Sample]:
        return list(islice(take_samples(text, encoder, settings=settings, seed=0), count))

    return load_model(options.model, four_bit=options.four_bit), encoder.pad_token_id, read


def cap(gigabytes: float) -> None:
    """Limit PyTorch to what a card of this size leaves after the CUDA context."""
    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((gigabytes * 1e9 - context) / total)
    print(f"capped at {gigabytes:g} GB, {context / 1e9:.2f} GB of it for the CUDA context")


if __name__ == "__main__":
    main()
