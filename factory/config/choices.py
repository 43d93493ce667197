"""What a setting can be: criteria, splits, trackers; standard library alone, so that `--help` stays fast."""

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
STANDARD_LIBRARY = ("stdlib:train", "stdlib:held-out")
MOST = 10**9  # of whatever is counted: what is more is a slip, and no arithmetic here is made for it
Tracker = Literal["trackio", "wandb", "tensorboard", "none"]
TRACKERS: tuple[Tracker, ...] = get_args(Tracker)
