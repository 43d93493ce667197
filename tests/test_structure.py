"""Imports point one way, every file says what it holds and has its tests beside it; a wheel carries all."""

import ast
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.places import ROOT
from tests.waiting import HUNG_SECONDS

# A folder imports from those in the rows before it; only the values of the first row import each other.
LEVELS = (
    ("errors", "resources", "units", "gpus", "artifacts", "config"),
    *(("store",), ("checkpoint",), ("model",), ("hub",), ("text", "parallel")),
    ("pruning", "healing", "evaluation", "report", "serving", "demo"),
    *(("builds",), ("pipeline",), ("jobs", "api"), ("cli",), ("__main__",)),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
MODULES = sorted((ROOT / "factory").rglob("*.py"))
MOST_MODULES = 11  # of a folder
NO_ROOM = ("spaces", "whole")  # folders of tests that are of no one folder of factory/


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "factory").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imported_by(path: Path) -> set[str]:
    """Modules of ours that a file imports: when it is loaded, when it works, or for types alone."""
    names = {name_of(other) for other in MODULES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "factory":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}".removeprefix("factory.")
                found.add(whole if whole in names else whole.rpartition(".")[0])
    return found - {""}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_from_the_command_line_to_the_values(path: Path) -> None:
    room = name_of(path).split(".")[0]
    for other in imported_by(path):
        below = other.split(".")[0]
        assert room in ("__init__", below) or LEVEL[below] < LEVEL[room] or LEVEL[room] == 0, other


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name_of(path): imported_by(path) for path in MODULES if name_of(path) != "__init__"}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_no_folder_holds_more_than_one_can_take_in() -> None:
    for folder in {path.parent for path in MODULES}:
        assert len([path for path in folder.glob("*.py") if path.stem != "__init__"]) <= MOST_MODULES, folder
    assert len([path for path in (ROOT / "factory").iterdir() if path.name != "__pycache__"]) <= 26


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_first_line_of_a_module_says_what_belongs_there(path: Path) -> None:
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    assert first.startswith('"""')
    assert len(first) > 20


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_command_line_prints_or_exits(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    if name_of(path).split(".")[0] != "cli":
        assert not calls & {"print", "sys.exit", "exit", "click.echo"}


def test_a_wheel_carries_template_space_recipes_and_demo_model(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--wheel-dir",
            str(tmp_path),
            str(ROOT),
        ],
        check=True,
        timeout=HUNG_SECONDS,
    )
    (wheel,) = tmp_path.glob("hf_factory-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "factory/_resources/model_cards/card.md.j2",
        "factory/_resources/spaces/compare/app.py",
        "factory/_resources/spaces/compare/pair.py",
        "factory/_resources/spaces/compare/session.py",
        "factory/_resources/spaces/compare/style.css",
        "factory/config/recipes/mistral-7b.yaml",
        "factory/parallel/accelerate/gpus.yaml",
        "factory/demo/model/model.safetensors",
        "factory/demo/model/tokenizer.json",
        "factory/demo/tasks/next_line.yaml",
    ):
        assert name in names
    entry_points = zipfile.ZipFile(wheel).read(
        next(name for name in names if name.endswith("entry_points.txt"))
    )
    assert b"hf-factory = factory.__main__:main" in entry_points


def test_tests_lie_beside_what_they_test_and_import_builders_only() -> None:
    for path in (ROOT / "tests").rglob("test_*.py"):
        room = path.relative_to(ROOT / "tests").parts[0]
        assert room in (path.name, *NO_ROOM) or (ROOT / "factory" / room).is_dir(), path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.ImportFrom) or ".test_" not in f".{node.module}", path


def test_the_embedded_model_is_small() -> None:
    folder = ROOT / "factory" / "demo" / "model"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 6_000_000
