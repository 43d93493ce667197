"""Define the criteria that choose layers, with the standard library alone, so that `--help` stays fast.

Each is implemented by a function of the same name in `factory/pruning/criteria.py` or `search.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Criterion:
    """A way to choose layers, and its descriptions."""

    name: str
    summary: str  # layers that it drops, for `--help` and docs/choosing-layers.md
    card: str  # paragraph for the model card, with {num_documents} and {order} of the plan; may be empty
    scattered: bool = False  # may choose layers that lie apart; otherwise one block
    searches: bool = False  # measures the loss of the model without layers; otherwise the profile is enough
    needs: frozenset[str] = frozenset()  # measurements that a profile from elsewhere may lack
    nested: bool = False  # its choice of n layers starts its choice of more: one search serves all sizes
    terminal: str | None = None  # text after the dropped layers; None: " by " and the name

    @property
    def by(self) -> str:
        """Return the text after the dropped layers in the terminal."""
        return f" by {self.name}" if self.terminal is None else self.terminal


ANGULAR = Criterion(
    "angular",
    summary="the block across which the states turn least (arXiv 2403.17887)",
    card="",
    terminal="",
)
CHOSEN = Criterion(  # used for `--layers`; not a choice of `--criterion`
    "chosen",
    summary="the given layers",
    card="The distance did not decide: the author of this model chose the layers.",
    terminal=" by choice",
)
# From the simplest to the most expensive: of equally good ones, the first is used.
CRITERIA: Mapping[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        ANGULAR,
        Criterion(
            "deepest",
            summary="the last layers but one (the same paper's simple heuristic)",
            card="The distance did not decide: the deepest layers but the last were dropped, the simple "
            "heuristic of the paper cited below.",
        ),
        Criterion(
            "block-influence",
            summary="the layers that each turn the states least (ShortGPT, arXiv 2403.03853)",
            card="The distance across blocks did not decide: the layers that each turn the states of a "
            "passage's tokens least were dropped, by the Block Influence of ShortGPT (Men and others).",
            scattered=True,
            needs=frozenset({"influence"}),
        ),
        Criterion(
            "loss",
            summary="the block whose removal raises the loss least",
            card="The distance did not decide: of all blocks of this size, the one whose removal raised the "
            "loss on {num_documents} passages of the same text least was dropped.",
            searches=True,
        ),
        Criterion(
            "greedy",
            summary="one layer after another, each time the one that raises the loss least",
            card="The distance did not decide: one layer after another was dropped, each time the one whose "
            "removal raised the loss on {num_documents} passages of the same text least, in the order "
            "{order}.",
            searches=True,
            scattered=True,
            nested=True,
        ),
    )
}
DEFAULT_CRITERION = ANGULAR


def criterion_of(name: str) -> Criterion:
    """Return the criterion of a plan, which another version may have made."""
    return CHOSEN if name == CHOSEN.name else CRITERIA.get(name) or Criterion(name, summary="", card="")
