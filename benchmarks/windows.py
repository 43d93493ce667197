"""Measure how much the loss of a window depends on its beginning: with the tokenizer's prefix, and without.

    python benchmarks/windows.py MODEL [--data DATA] [--documents 12] [--length 256] [--windows 3]

Long documents are cut into windows. The first begins as the tokenizer begins a text. Each later one is read
with that prefix, as the factory does, and without it, as a plain cut. Both losses are of the same tokens.
"""

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from factory.model.loading import load_model
from factory.model.tokenizer import Encoder, load_encoder
from factory.text.text import open_text


def main() -> None:
    """Print the loss of each window, with its standard error over documents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", default="stdlib:held-out")
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--length", type=int, default=256, help="tokens per window, without the prefix")
    parser.add_argument("--windows", type=int, default=3)
    options = parser.parse_args()
    encoder, model = load_encoder(options.model), load_model(options.model)
    documents = islice(long_documents(options, encoder), options.documents)
    rows = [losses(model, tokens, encoder, length=options.length) for tokens in documents]
    if len(rows) < 2:
        raise SystemExit(f"{options.data} holds {len(rows)} documents of {options.windows} windows")
    print(f"{options.model.name}, {len(rows)} documents of {options.data}, prefix {encoder.prefix}")
    print("window  with prefix      without prefix   nats per token; ± one standard error over documents")
    table = torch.tensor(rows)  # [documents, windows, 2]
    means, errors = table.mean(dim=0), table.std(dim=0) / len(rows) ** 0.5
    for number, (mean, error) in enumerate(zip(means.tolist(), errors.tolist(), strict=True), start=1):
        print(f"{number:>6}  {mean[0]:.3f} ± {error[0]:.3f}    {mean[1]:.3f} ± {error[1]:.3f}")
    print(f"   all  {float(table[..., 0].mean()):.3f}            {float(table[..., 1].mean()):.3f}")


def long_documents(options: argparse.Namespace, encoder: Encoder) -> Iterator[list[int]]:
    """Yield the tokens of documents that fill all windows."""
    needed = options.length * options.windows
    for document in open_text(options.data, split="validation").documents():
        (tokens,) = encoder.encode([document])
        if len(tokens) >= needed:
            yield tokens[:needed]


@torch.inference_mode()
def losses(model: object, tokens: list[int], encoder: Encoder, *, length: int) -> list[list[float]]:
    """Return the mean loss of each window, in nats: [windows, 2], with the prefix and as a plain cut."""
    found = []
    for start in range(0, len(tokens), length):
        piece = tokens[start : start + length]
        with_prefix = loss_of_last(model, [*encoder.prefix, *piece], count=length - 1)
        plain = loss_of_last(model, piece, count=length - 1) if start else with_prefix
        found.append([with_prefix, plain])
    return found


def loss_of_last(model: object, ids: list[int], *, count: int) -> float:
    """Return the mean loss of the last `count` tokens of a sequence."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, -count - 1 : -1].float()  # type: ignore[operator]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[-count:])))


if __name__ == "__main__":
    main()
