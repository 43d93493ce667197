"""Write hashes.txt: every library of constraints.txt with the sha256 of each of its files on the index.

Torch and what it brings for GPUs are left out: which build of it is right depends on the machine and on the
index, and each has other hashes. Needs uv, and the network: `python scripts/lock.py`.
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
BUILDS_US = "hatchling\neditables\n"  # isolation would fetch them without a hash
OF_TORCH = re.compile(r"(torch|triton|nvidia-|cuda-)")


def entries(text: str) -> list[str]:
    """The requirements of a hashed file, each with its hashes."""
    return [entry for entry in re.split(r"\n(?=[A-Za-z])", "\n" + text) if entry.strip()]


def main() -> None:
    """Ask the index, through uv, and write the file."""
    made = subprocess.run(COMMAND, cwd=ROOT, input=BUILDS_US, capture_output=True, text=True)
    if made.returncode:
        sys.exit(made.stderr)
    kept = [entry.strip() + "\n" for entry in entries(made.stdout) if not OF_TORCH.match(entry.strip())]
    (ROOT / "hashes.txt").write_text(HEAD + "".join(kept), encoding="utf-8")
    sys.stdout.write(f"{len(kept)} libraries\n")


if __name__ == "__main__":
    main()
