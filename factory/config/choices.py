"""What a setting can be: criteria, splits, trackers; standard library alone, so that `--help` stays fast."""

from typing import Literal, get_args

Criterion = Literal["angular", "deepest", "block-influence", "loss", "greedy"]  # how layers are chosen
Split = Literal["train", "validation"]  # of a Hub data set
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
STANDARD_LIBRARY = ("stdlib:train", "stdlib:held-out")
MAX_COUNT = 10**9  # of whatever is counted: more is a slip of the hand
Tracker = Literal["trackio", "wandb", "tensorboard", "none"]
