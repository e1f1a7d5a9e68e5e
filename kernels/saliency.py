"""How much each weight of a linear layer matters: a score per weight, larger = keep.

W is [N out, K in] and ``sum_sq`` [K] holds the sums of squares of the layer's inputs per channel.
Scores are for comparing weights within ONE row: each row carries its own power of two, see `unit_scaled`.

A score is elementwise in W and a few vectors (`Terms`). The vectors hold every sum, whose rounding depends on its
order; made once, by torch, they give a kernel the bits of the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "DEFAULT_SALIENCY",
    "SALIENCIES",
    "Terms",
    "check_saliency",
    "score",
    "score_with",
    "terms_of",
    "unit_scaled",
]


class Terms(NamedTuple):
    """What a score takes besides W, float32; None what it has no use for."""

    channel: Tensor | None = None
    """[K]"""
    row: Tensor | None = None
    """[N]"""
    column: Tensor | None = None
    """[K]"""
    whole: Tensor | None = None
    """[2]: two powers of two, for W as a whole."""


def unit_scaled(x: Tensor) -> Tensor:
    """x [..., K] float32 times an exact power of two per last-dim vector: its max |x| comes into [0.5, 1).

    Squares and products of the result neither overflow nor, next to the largest, underflow, and a vector
    scaled by a power of two comes out bit for bit the same. All-zero vectors stay zero.
    Raises ValueError when x holds NaN or infinity.
    """
    _check_finite(x)
    return _scaled(x)


def _check_finite(x: Tensor) -> None:
    if not bool(torch.stack(x.aminmax()).isfinite().all()):  # one pass, and no bool as large as x
        raise ValueError("weights and sums of squares must be finite")


def _scaled(x: Tensor) -> Tensor:
    first, second = _powers(x.abs().amax(dim=-1, keepdim=True))
    return (x * first).mul_(second)


def _powers(peak: Tensor) -> tuple[Tensor, Tensor]:
    # Two, because 2**149 (for a subnormal peak) is itself out of range.
    exponent = -torch.frexp(peak).exponent
    half = exponent // 2
    return _power_of_two(half), _power_of_two(exponent - half)


def _power_of_two(exponent: Tensor) -> Tensor:
    # From the bits: torch.ldexp goes through pow, which owes no exactness and follows the default dtype.
    return ((exponent + 127) << 23).view(torch.float32)


class Saliency(NamedTuple):
    """terms(W float32, scaled sum_sq) and score(scaled W, which it may overwrite, W, *terms): see `unit_scaled`."""

    terms: Callable[[Tensor, Tensor], Terms]
    score: Callable[..., Tensor]


def _contribution(unit: Tensor, weight: Tensor, channel: Tensor, *_: None) -> Tensor:
    return unit.square_().mul_(channel)


contribution = Saliency(lambda weight, sum_sq: Terms(sum_sq), _contribution)
"""w^2 * s_j, the energy a weight adds to the output: Wanda's order (arXiv 2306.11695, squared)."""


def _rank_one_terms(weight: Tensor, sum_sq: Tensor) -> Terms:
    share = sum_sq / _divisor(sum_sq.sum())
    # One channel that carries everything would divide by zero.
    return Terms((1 - share).clamp_min(torch.finfo(torch.float32).eps))


def _rank_one(unit: Tensor, weight: Tensor, channel: Tensor, *_: None) -> Tensor:
    return unit.square_().div_(channel)


rank_one = Saliency(_rank_one_terms, _rank_one)
"""w^2 / (1 - s_j / sum s): HWPQ's rank-one form of the inverse Hessian (arXiv 2501.16376)."""


def _relative_terms(weight: Tensor, sum_sq: Tensor) -> Terms:
    weight = weight.float()
    whole = torch.stack(_powers(weight.abs().amax()))
    rows = _divisor(_scaled(weight).abs_().sum(1))
    columns = _divisor((weight * whole[0]).mul_(whole[1]).abs_().sum(0))
    return Terms(sum_sq.sqrt().sqrt(), rows, columns, whole)


def _relative(unit: Tensor, weight: Tensor, channel: Tensor, row: Tensor, column: Tensor, whole: Tensor) -> Tensor:
    by_row = unit.abs_().div_(row.unsqueeze(1))
    by_column = (weight * whole[0]).mul_(whole[1]).abs_().div_(column)
    return by_row.add_(by_column).mul_(channel)


relative = Saliency(_relative_terms, _relative)
"""(|w| / row sum + |w| / column sum) * ||x_j||^0.5: RIA (arXiv 2402.05406) with a = 0.5.

All-zero rows and columns score 0. The column sums tie the rows together: unlike the other scores this
one changes when single rows are scaled (it is only invariant to scaling the whole of W), and the
score of some rows is not the score of those rows alone.
"""

magnitude = Saliency(lambda weight, sum_sq: Terms(), lambda unit, *_: unit.abs_())
"""|w|; ``sum_sq`` is not used."""


def _divisor(whole: Tensor) -> Tensor:
    # 0/0 is to be 0: a sum of non-negative parts is zero only when every part is.
    return torch.where(whole > 0, whole, 1.0)


DEFAULT_SALIENCY = "contribution"

SALIENCIES: Mapping[str, Saliency] = MappingProxyType(
    {"contribution": contribution, "rank_one": rank_one, "relative": relative, "magnitude": magnitude}
)


def terms_of(weight: Tensor, sum_sq: Tensor | None, name: str) -> Terms:
    """The vectors of a score. Arguments as `score`, none of them checked."""
    sum_sq = weight.new_ones(weight.shape[1], dtype=torch.float32) if sum_sq is None else sum_sq.float()
    return SALIENCIES[name].terms(weight, _scaled(sum_sq))


def score_with(weight: Tensor, terms: Terms, name: str) -> Tensor:
    """`score` of weight [N, K] from the `terms` of its matrix, elementwise."""
    weight = weight.float()
    return SALIENCIES[name].score(_scaled(weight), weight, *terms)


def score(weight: Tensor, sum_sq: Tensor | None = None, name: str = DEFAULT_SALIENCY) -> Tensor:
    """Saliency of every weight: float32 [N, K], non-negative, larger = keep.

    weight: [N, K], any float dtype; computed in float32. sum_sq: [K] sums of squares per input channel,
    or None for data-free (all ones). name: a key of `SALIENCIES`.

    Multiplying a row of W or all of sum_sq by a power of two leaves the scores as they are, bit for bit
    (but see `relative` for rows).

    Raises ValueError: unknown name, shapes that do not match, values that are not finite, negative sum_sq.
    """
    check_saliency(weight, sum_sq, name)
    weight, sum_sq = weight.detach(), None if sum_sq is None else sum_sq.detach()
    if sum_sq is not None and bool((sum_sq < 0).any()):
        raise ValueError("sum_sq holds negative sums of squares")
    for part in (weight,) if sum_sq is None else (weight, sum_sq):
        _check_finite(part)
    return score_with(weight, terms_of(weight, sum_sq, name), name)


def check_saliency(weight: Tensor, sum_sq: Tensor | None, name: str) -> None:
    """ValueError where the arguments of `score` do not fit, whatever they hold."""
    if name not in SALIENCIES:
        raise ValueError(f"unknown saliency {name!r}; known: {', '.join(SALIENCIES)}")
    if weight.dim() != 2 or weight.numel() == 0 or not weight.dtype.is_floating_point:
        raise ValueError(f"weight must be [N, K] floating point and not empty, got {list(weight.shape)} {weight.dtype}")
    channels = weight.shape[1]
    if sum_sq is not None and sum_sq.shape != (channels,):
        raise ValueError(f"sum_sq must be [{channels}], got {list(sum_sq.shape)}")
