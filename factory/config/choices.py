"""Define the choices of settings, with the standard library alone, so that `--help` stays fast."""

from typing import TYPE_CHECKING, Literal

from factory.config.criteria import CRITERIA
from factory.config.objectives import OBJECTIVES

if TYPE_CHECKING:
    CriterionName = str
    ObjectiveName = str
else:  # one of the names in the table, which pydantic checks
    CriterionName = Literal[tuple(CRITERIA)]
    ObjectiveName = Literal[tuple(OBJECTIVES)]
Split = Literal["train", "validation"]  # of a Hub data set
STANDARD_LIBRARY = ("stdlib:train", "stdlib:held-out", "stdlib:prose")
MAX_COUNT = 10**9  # limit of every count: larger ones are typing errors
RUNTIMES = ("transformers-4", "vllm", "sglang", "llama.cpp", "mlx", "ctranslate2", "onnx")
HealStart = Literal["none", "seam-fit"]
Tracker = Literal["trackio", "wandb", "tensorboard", "none"]
