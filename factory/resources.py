"""Data files that come with the program: where a wheel and a clone of the repository keep each of them."""

from pathlib import Path

PACKAGE = Path(__file__).parent
PACKED = PACKAGE / "_resources"  # only in a wheel: what lies beside the package in the repository
BESIDE = PACKED if PACKED.is_dir() else PACKAGE.parent

RECIPES = PACKAGE / "config" / "recipes"
DEMO_MODEL = PACKAGE / "demo" / "model"
DEMO_TASKS = PACKAGE / "demo" / "tasks"
ACCELERATE_CONFIGS = PACKAGE / "parallel" / "accelerate"
CARD_TEMPLATES = BESIDE / "model_cards"
SPACE = BESIDE / "spaces" / "compare"
