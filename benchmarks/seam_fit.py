"""Question: how much of the loss that a cut adds does a fitted seam take back, without training?

    python benchmarks/seam_fit.py MODEL --layers 10-18 --fit TEXT --evaluate TEXT [TEXT ...] [--ranks 128 0]

Fits the layer before each cut with `factory.healing.seam` on about 20,000 tokens of one text, and
measures the loss of source, cut and fit in memory, on windows of 256 tokens at the start of documents of
others. A rank of 0 is full rank.
"""

import argparse
import tempfile
import time
from pathlib import Path

from pydantic import TypeAdapter

from factory.config.options import Layers
from factory.config.settings import HealSettings
from factory.healing.seam.fit import fit_seams, load_factors
from factory.healing.seam.writers import find_writer, fitted
from factory.model.layers import skip_layers
from factory.model.loading import load_model
from factory.model.losses import token_loss
from factory.model.tokenizer import load_encoder
from factory.report.summaries import describe_seam
from factory.text.text import open_text

LENGTH = 256


def main() -> None:
    """Print the losses, and the share of the added loss that each rank takes back."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--layers", required=True)
    parser.add_argument("--fit", required=True)
    parser.add_argument("--evaluate", nargs="+", required=True)
    parser.add_argument("--ranks", nargs="+", type=int, default=[128, 0])
    parser.add_argument("--documents", type=int, default=48)
    args = parser.parse_args()
    dropped = TypeAdapter(Layers).validate_python(args.layers)
    encoder, model = load_encoder(args.model), load_model(args.model)
    windows = {
        name: [
            encoder.beginning(document, length=LENGTH)
            for document, _ in zip(
                open_text(name, split="validation").documents(), range(args.documents), strict=False
            )
        ]
        for name in args.evaluate
    }
    source = {name: token_loss(model, rows) for name, rows in windows.items()}
    with skip_layers(model, dropped):
        cut = {name: token_loss(model, rows) for name, rows in windows.items()}
    print("source", source, "\ncut", cut, flush=True)
    settings = HealSettings(bits=16, sequence_length=LENGTH, num_steps=100, batch_size=4)
    for rank in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            fit = fit_seams(
                args.model,
                open_text(args.fit, split="train"),
                dropped=dropped,
                settings=settings,
                rank=rank or None,
                seed=0,
                folder=Path(folder),
                progress=lambda *_: None,
            )
            seconds = time.perf_counter() - start
            factors = load_factors(Path(folder))
        writers = {layer: find_writer(model, layer) for layer in factors}
        with skip_layers(model, dropped), fitted(writers, factors):
            after = {name: token_loss(model, rows) for name, rows in windows.items()}
        print(f"rank {rank or 'full'}, {seconds:.0f} s: {describe_seam(fit)}")
        for name in windows:
            share = (cut[name] - after[name]) / (cut[name] - source[name])
            print(f"  {name}: {after[name]:.3f}, {share:.3f} of the added loss taken back", flush=True)


if __name__ == "__main__":
    main()
