"""Run llama.cpp's own converter, for the families that only it knows."""

import shutil
import subprocess
import sys
from pathlib import Path

from factory.errors import ModelError, UsageError

SCRIPT = "convert_hf_to_gguf.py"
INSTALL = "it comes with llama.cpp's source, and needs its gguf-py"


def find_converter(given: Path | None) -> Path | None:
    """Return the converter that was given, or else the one on PATH; None without one.

    Raises:
        UsageError: The given file does not exist.
    """
    if given is not None:
        if not given.is_file():
            raise UsageError(
                f"`converter={given}` is not a file", hint=f"give the path of llama.cpp's {SCRIPT}; {INSTALL}"
            )
        return given
    found = shutil.which(SCRIPT)
    return Path(found) if found else None


def convert(folder: Path, out: Path, *, kind: str, converter: Path) -> None:
    """Write a model folder as GGUF.

    Args:
        kind: "F16" or "Q8_0".

    Raises:
        ModelError: The converter failed; quotes the last line that it printed.
    """
    command = [sys.executable, str(converter)] if converter.suffix == ".py" else [str(converter)]
    arguments = [str(folder.resolve()), "--outfile", str(out.resolve()), "--outtype", kind.lower()]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, errors="replace")
    if done.returncode or not out.is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise ModelError(
            f"llama.cpp's converter refuses {folder.name}: {(lines or ['it printed nothing'])[-1][:300]}",
            hint=f"try a newer llama.cpp; run it alone: python {converter} {folder}",
        )
