"""Imports point one way, every file says what belongs in it, and a wheel carries all that is needed."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.waiting import HUNG_SECONDS

ROOT = Path(__file__).parent.parent
STAGES = ("publish", "measure", "plan", "search", "prune", "heal", "merge", "evaluate", "speed", "card")
LAYERS = (
    ("__init__", "errors"),
    ("references", "disk", "durable", "gpus", "tracking", "memory", "locks", "libraries", "bearer"),
    ("config", "artifacts", "front_matter"),
    ("buildfile",),
    ("header", "licenses", "remote_code", "decoder_fields", "markdown", "webpage", "hub_errors", "sweep"),
    ("sums", "legal", "json_bounds", "source_card", "remote_header", "tokenizer", "data_files"),
    (
        "transfer",
        "decoder_proof",
        "place",
        "store",
        "hub_text",
        "texts",
        "models",
        "packed",
        "plots",
        "demo.corpus",
        "processes",
    ),
    ("checkpoint", "state", "program", "apart"),
    ("decoder", "resolve", "reload", "identity", "task_files", "spread", "experts"),
    ("trial", "complete"),
    ("distill", "trainer", "lora", "attention", "micro_batch", "watch", "heal_text"),
    ("significance", "findings"),
    ("harness", "task_scores"),
    (*STAGES, "demo.next_line"),
    ("needs",),
    ("hub", "layout", "space"),
    ("preview", "removal", "verify"),
    ("run",),
    ("reproduce",),
    ("stages",),
    ("pipeline",),
    ("deploy",),
    ("jobs",),
    ("screen", "streams"),
    ("commands.asked", "commands.options", "commands.publishing"),
    (
        "commands.build",
        "commands.carried",
        "commands.entries",
        "commands.extension",
        "commands.jobs",
        "commands.prune",
        "commands.finished",
        "commands.house",
        "commands.plan",
        "commands.card",
    ),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MODULES = sorted((ROOT / "factory").rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "factory").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imported_by(path: Path) -> set[str]:
    """Modules of ours that a file imports when it is loaded or when it works, but not for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "factory":
            found |= {alias.name for alias in node.names if not alias.name.startswith("__")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("factory."):
            module = (node.module or "").removeprefix("factory.")
            found |= {f"demo.{alias.name}" for alias in node.names} if module == "demo" else {module}
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_from_the_command_line_to_the_values(path: Path) -> None:
    name = name_of(path)
    if name in ("demo", "commands"):
        return
    assert name in RANK, "a new module needs its place in LAYERS"
    for other in imported_by(path):
        assert RANK[other] < RANK[name] or (RANK[other] == RANK[name] and name not in STAGES), other


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_first_line_of_a_module_says_what_belongs_there(path: Path) -> None:
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    assert first.startswith('"""')
    assert len(first) > 20


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_command_line_prints_or_exits(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    if name_of(path).split(".")[0] not in ("cli", "commands", "screen"):
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
        "factory/recipes/mistral-7b.yaml",
        "factory/accelerate/gpus.yaml",
        "factory/demo/model/model.safetensors",
        "factory/demo/model/tokenizer.json",
        "factory/demo/tasks/next_line.yaml",
    ):
        assert name in names
    entry_points = zipfile.ZipFile(wheel).read(
        next(name for name in names if name.endswith("entry_points.txt"))
    )
    assert b"hf-factory = factory.__main__:main" in entry_points


def test_the_embedded_model_is_small() -> None:
    folder = ROOT / "factory" / "demo" / "model"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 6_000_000
