"""Where the repository and its golden files lie, for tests at any depth below them."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
