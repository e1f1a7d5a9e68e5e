"""What a pruned row can do for its output without being retrained: one factor per row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from hwpq_fx.kernels.saliency import score

__all__ = ["COMPENSATIONS", "compensate"]


def _none(terms: Tensor, mask: Tensor) -> Tensor:
    """Ones: rows stay as pruned."""
    return terms.new_ones(terms.shape[0])


def _energy(terms: Tensor, mask: Tensor) -> Tensor:
    """sqrt(sum of all w^2 s / sum of kept w^2 s): the row's output energy under uncorrelated inputs."""
    total, kept = terms.sum(1), torch.where(mask, terms, 0.0).sum(1)
    return torch.where(kept > 0, (total / kept).sqrt(), 1.0)


# Each takes the contributions [N, K] and the mask.
COMPENSATIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType({"energy": _energy, "none": _none})


def compensate(weight: Tensor, mask: Tensor, sum_sq: Tensor | None = None, name: str = "energy") -> Tensor:
    """Factor for every row of the pruned weight: float32 [N].

    weight: [N, K], any float dtype. mask: bool [N, K], True = kept. sum_sq: [K] sums of squares per input
    channel, or None for ones. name: a key of `COMPENSATIONS`. "energy" gives 1 for rows that keep nothing
    and rows without energy; like the scores, it does not change with the scale of a row or of sum_sq.

    Raises ValueError: unknown name, a mask that is not bool or not W's shape, and what `score` raises.
    """
    if name not in COMPENSATIONS:
        raise ValueError(f"unknown compensation {name!r}; known: {', '.join(COMPENSATIONS)}")
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool {list(weight.shape)}, got {mask.dtype} {list(mask.shape)}")
    return COMPENSATIONS[name](score(weight, sum_sq, "contribution"), mask)
