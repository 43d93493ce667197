"""What a setting can be: criteria, splits, trackers; standard library alone, so that `--help` stays fast."""

from typing import Literal, get_args

Criterion = Literal["angular", "deepest", "block-influence", "loss", "greedy"]  # how layers are chosen
Split = Literal["train", "validation"]  # of a Hub data set
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
STANDARD_LIBRARY = ("stdlib:train", "stdlib:held-out")
MOST = 10**9  # of whatever is counted: what is more is a slip, and no arithmetic here is made for it
Tracker = Literal["trackio", "wandb", "tensorboard", "none"]
TRACKERS: tuple[Tracker, ...] = get_args(Tracker)
