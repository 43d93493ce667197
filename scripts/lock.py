"""Write hashes.txt: every library of constraints.txt with the sha256 of each of its files on the index.

Torch and its GPU libraries are omitted: the right build depends on the machine and the index, and each build
has its own hashes. Needs uv and the network: `python scripts/lock.py`.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAD = """\
# sha256 of every file of every library but torch's, for `make demo HASHES=1` and `make test HASHES=1`.
# Made by scripts/lock.py from pyproject.toml and constraints.txt. An index that serves builds of its own
# has other hashes: there the plain commands are right.
"""
COMMAND = (
    "uv", "pip", "compile", "pyproject.toml", "-", "--extra", "test", "--constraint", "constraints.txt",
    "--universal", "--python-version", "3.11", "--generate-hashes", "--no-header", "--no-annotate",
    "--no-emit-index-url", "--quiet",
)  # fmt: skip
BUILD_BACKEND = "hatchling\neditables\n"  # build isolation would fetch them without hashes
OF_TORCH = re.compile(r"(torch|triton|nvidia-|cuda-)")


def entries(text: str) -> list[str]:
    """Return the requirements of a hashed file, each with its hashes."""
    return [entry for entry in re.split(r"\n(?=[A-Za-z])", "\n" + text) if entry.strip()]


def main() -> None:
    """Query the index with uv and write the file."""
    made = subprocess.run(COMMAND, cwd=ROOT, input=BUILD_BACKEND, capture_output=True, text=True)
    if made.returncode:
        sys.exit(made.stderr)
    kept = [entry.strip() + "\n" for entry in entries(made.stdout) if not OF_TORCH.match(entry.strip())]
    (ROOT / "hashes.txt").write_text(HEAD + "".join(kept), encoding="utf-8")
    sys.stdout.write(f"{len(kept)} libraries\n")


if __name__ == "__main__":
    main()
