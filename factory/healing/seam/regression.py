"""Solve ridge regressions from streamed moments, and find the best solution of low rank."""

from dataclasses import dataclass
from functools import partial
from typing import Self

import torch

RIDGES = (1e-8, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # times the mean square of the activations
Factors = tuple[torch.Tensor, torch.Tensor]  # B [d, r] and A [r, n]


@dataclass
class Moments:
    """Second moments of activations a and errors e, summed over tokens in fp64."""

    gram: torch.Tensor  # Σ aᵀa, [n, n]
    cross: torch.Tensor  # Σ aᵀe, [n, d]
    error: float = 0.0  # Σ |e|²
    count: int = 0

    def add(self, activations: torch.Tensor, errors: torch.Tensor) -> None:
        """Add tokens: activations [t, n] and errors [t, d]."""
        activations, errors = activations.double(), errors.double()
        self.gram += activations.T @ activations
        self.cross += activations.T @ errors
        self.error += float(errors.square().sum())
        self.count += len(activations)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.gram + other.gram,
            self.cross + other.cross,
            self.error + other.error,
            self.count + other.count,
        )

    @classmethod
    def none(cls, *, width: int, states: int, device: torch.device) -> Self:
        """Return the moments of no tokens: activations [0, width] and errors [0, states]."""
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        return cls(zeros(width, width), zeros(width, states))

    def solve(self, ridge: float) -> torch.Tensor:
        """Return the ridge regression of the errors on the activations, ΔW [d, n]."""
        diagonal = ridge * self.gram.diagonal().mean() * torch.ones_like(self.gram[0])
        factor = torch.linalg.cholesky(self.gram + diagonal.diag())
        return torch.cholesky_solve(self.cross, factor).T

    def explained(self, update: torch.Tensor) -> float:
        """Return the share of the squared error that an update [d, n] takes away."""
        left = (update @ self.gram * update).sum() - 2 * (update * self.cross.T).sum()
        return float(-left / self.error)


def low_rank(update: torch.Tensor, gram: torch.Tensor, *, rank: int | None) -> Factors:
    """Return B [d, r] and A [r, n] whose product is nearest to an update where it matters: on activations.

    Minimises Σ |(ΔW − B·A)·a|² over tokens (reduced-rank regression). B and A share the scale evenly.

    Args:
        update: ΔW, [d, n].
        gram: Σ aᵀa over tokens, [n, n].
        rank: Maximum rank; None: full.
    """
    d, n = update.shape
    rank = min(d, n) if rank is None else min(rank, d, n)
    _, directions = torch.linalg.eigh(update @ gram @ update.T)  # ascending
    b = directions[:, -rank:].flip(dims=[1])
    a = b.T @ update
    root = a.norm(dim=1).sqrt()
    return b * root, a / root.clamp(min=torch.finfo(root.dtype).tiny)[:, None]
