"""Locate the data files that come with the program, in a wheel or a clone of the repository."""

from pathlib import Path

PACKAGE = Path(__file__).parent
PACKED = PACKAGE / "_resources"  # only in a wheel: files that a clone keeps beside the package
BESIDE = PACKED if PACKED.is_dir() else PACKAGE.parent

RECIPES = PACKAGE / "config" / "recipes"
DEMO_MODEL = PACKAGE / "demo" / "model"
DEMO_TASKS = PACKAGE / "demo" / "tasks"
ACCELERATE_CONFIGS = PACKAGE / "parallel" / "accelerate"
CARD_TEMPLATES = BESIDE / "model_cards"
SPACE = BESIDE / "spaces" / "compare"
