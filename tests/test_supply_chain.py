"""What is installed is what was pinned, hashed and written down."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from factory.builds.record import installed_libraries
from scripts.lock import BUILD_BACKEND, OF_TORCH, entries
from tests.places import ROOT

HINT = "run `pip install uv && python scripts/lock.py`"
SHA256 = re.compile(r"--hash=sha256:[0-9a-f]{64}")


def pinned(path: Path) -> dict[str, str]:
    """Library → version of each line `name==version`."""
    lines = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {canonicalize_name(name): number for name, number in lines}


def test_every_hashed_library_has_its_hashes_and_nothing_else_is_in_the_file() -> None:
    text = (ROOT / "hashes.txt").read_text(encoding="utf-8")
    head, rest = re.split(r"\n(?=[a-z])", text, maxsplit=1)
    assert all(line.startswith("#") for line in head.splitlines())
    for entry in entries(rest):
        first, *hashes = [line.strip().removesuffix("\\").strip() for line in entry.strip().splitlines()]
        assert re.match(r"[a-z0-9._-]+==\S+", first), first
        assert hashes
        assert all(SHA256.fullmatch(line) for line in hashes), first


def test_what_is_hashed_is_what_is_pinned() -> None:
    hashed, constraints = pinned(ROOT / "hashes.txt"), pinned(ROOT / "constraints.txt")
    differing = {name for name in hashed.keys() & constraints.keys() if hashed[name] != constraints[name]}
    assert not differing, HINT


def test_everything_that_is_asked_for_is_hashed_but_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["test"], *BUILD_BACKEND.split()]
    names = {canonicalize_name(Requirement(text).name) for text in asked}
    hashed = pinned(ROOT / "hashes.txt")
    assert names - hashed.keys() == {name for name in names if OF_TORCH.match(name)} == {"torch"}, HINT


def test_a_build_names_every_library_below_the_program() -> None:
    found = installed_libraries()
    assert found.keys() >= {"python", "torch", "transformers", "numpy", "tokenizers", "safetensors", "click"}
    assert all(number == version(name) for name, number in found.items() if name != "python")
    assert not found.keys() & {"hf-factory", "pytest", "ruff", "gradio"}  # of the extras


def test_a_library_that_is_not_there_is_left_out() -> None:
    assert installed_libraries(of="no-such-distribution").keys() == {"python"}
