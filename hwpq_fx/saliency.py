"""How much each weight of a linear layer matters: a score per weight, larger = keep.

W is [N out, K in] and ``sum_sq`` [K] holds the sums of squares of the layer's inputs per channel.
Scores are for comparing weights within ONE row: each row carries its own power of two, see `unit_scaled`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

__all__ = ["DEFAULT_SALIENCY", "SALIENCIES", "score", "unit_scaled"]

Saliency = Callable[[Tensor, Tensor], Tensor]


def unit_scaled(x: Tensor) -> Tensor:
    """x [..., K] float32 times an exact power of two per last-dim vector: its max |x| comes into [0.5, 1).

    Squares and products of the result neither overflow nor, next to the largest, underflow, and a vector
    scaled by a power of two comes out bit for bit the same. All-zero vectors stay zero.
    Raises ValueError when x holds NaN or infinity.
    """
    peak = x.abs().amax(dim=-1, keepdim=True)
    if not bool(torch.isfinite(peak).all()):
        raise ValueError("weights and sums of squares must be finite")
    exponent = -torch.frexp(peak).exponent
    # Two steps, because 2**149 (for a subnormal peak) is itself out of range.
    half = exponent // 2
    return (x * _power_of_two(half)).mul_(_power_of_two(exponent - half))


def _power_of_two(exponent: Tensor) -> Tensor:
    # From the bits: torch.ldexp goes through pow, which owes no exactness and follows the default dtype.
    return ((exponent + 127) << 23).view(torch.float32)


def contribution(weight: Tensor, sum_sq: Tensor) -> Tensor:
    """w^2 * s_j, the energy a weight adds to the output: Wanda's order (arXiv 2306.11695, squared)."""
    return unit_scaled(weight).square_().mul_(sum_sq)


def rank_one(weight: Tensor, sum_sq: Tensor) -> Tensor:
    """w^2 / (1 - s_j / sum s): HWPQ's rank-one form of the inverse Hessian (arXiv 2501.16376)."""
    share = _ratio(sum_sq, sum_sq.sum())
    # One channel that carries everything would divide by zero.
    return unit_scaled(weight).square_().div_((1 - share).clamp_min(torch.finfo(torch.float32).eps))


def relative(weight: Tensor, sum_sq: Tensor) -> Tensor:
    """(|w| / row sum + |w| / column sum) * ||x_j||^0.5: RIA (arXiv 2402.05406) with a = 0.5.

    All-zero rows and columns score 0. The column sums tie the rows together: unlike the other scores this
    one changes when single rows are scaled (it is only invariant to scaling the whole of W), and the
    score of some rows is not the score of those rows alone.
    """
    by_row = unit_scaled(weight).abs_()
    by_column = unit_scaled(weight.reshape(-1)).abs_().view_as(weight)
    importance = _ratio(by_row, by_row.sum(1, keepdim=True)) + _ratio(by_column, by_column.sum(0))
    return importance.mul_(sum_sq.sqrt().sqrt())


def magnitude(weight: Tensor, sum_sq: Tensor) -> Tensor:
    """|w|; ``sum_sq`` is not used."""
    return unit_scaled(weight).abs_()


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    # 0/0 is 0: a sum of non-negative parts is zero only when every part is.
    return part / torch.where(whole > 0, whole, 1.0)


DEFAULT_SALIENCY = "contribution"

# Each takes W float32 and `unit_scaled` sums of squares.
SALIENCIES: Mapping[str, Saliency] = MappingProxyType(
    {"contribution": contribution, "rank_one": rank_one, "relative": relative, "magnitude": magnitude}
)


def score(weight: Tensor, sum_sq: Tensor | None = None, name: str = DEFAULT_SALIENCY) -> Tensor:
    """Saliency of every weight: float32 [N, K], non-negative, larger = keep.

    weight: [N, K], any float dtype; computed in float32. sum_sq: [K] sums of squares per input channel,
    or None for data-free (all ones). name: a key of `SALIENCIES`.

    Multiplying a row of W or all of sum_sq by a power of two leaves the scores as they are, bit for bit
    (but see `relative` for rows).

    Raises ValueError: unknown name, shapes that do not match, values that are not finite, negative sum_sq.
    """
    if name not in SALIENCIES:
        raise ValueError(f"unknown saliency {name!r}; known: {', '.join(SALIENCIES)}")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight must be [N, K] and not empty, got {list(weight.shape)}")
    channels = weight.shape[1]
    if sum_sq is None:
        sum_sq = torch.ones(channels, device=weight.device)
    elif sum_sq.shape != (channels,):
        raise ValueError(f"sum_sq must be [{channels}], got {list(sum_sq.shape)}")
    elif bool((sum_sq < 0).any()):
        raise ValueError("sum_sq holds negative sums of squares")
    return SALIENCIES[name](weight.detach().float(), unit_scaled(sum_sq.detach().float()))
