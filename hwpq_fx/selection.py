"""Which weights stay where any may go: unstructured masks from scores, by one threshold and without sorting.

2:4 masks are an op: `hwpq_fx.kernels.select24`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hwpq_fx.kernels.ewma import DEV_RATE, MEAN_RATE, ewma
from hwpq_fx.kernels.select24 import DEFAULT_LAMBDA

__all__ = ["Selection", "select_ratio"]


class Selection(NamedTuple):
    """mask: bool [N, K], True = keep. settled: the share, 0 to 1, that the threshold alone decided."""

    mask: Tensor
    settled: float


def select_ratio(
    scores: Tensor,
    ratio: float,
    mean_rate: float = MEAN_RATE,
    dev_rate: float = DEV_RATE,
    lam: float = DEFAULT_LAMBDA,
) -> Selection:
    """Prune exactly round(ratio * N * K) elements of a layer, wherever they are.

    scores: [N, K], non-negative, larger = keep. An element goes when it is below mean + lambda * dev of
    the elements before it in its row, with ONE lambda for the layer, found by bisection on the number
    pruned; lam is where the bisection starts. Solved for lambda, the test is (score - mean) / dev <
    lambda, so each step is one count. Zero scores cost nothing to prune and go first. What lies between
    the last two lambdas is equal there: the lower row-major index stays. `settled` is the share of
    elements that the threshold decided.

    Raises ValueError: ratio outside (0, 1), scores empty, not 2-D, NaN or infinite, bad rates.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"ratio must be in (0, 1), got {ratio}")
    scores = _checked(scores)
    if bool(torch.isinf(scores.amax())):
        raise ValueError("scores hold infinity")
    keys = _ordered(_critical_lambda(scores, mean_rate, dev_rate)).flatten()
    target = round(ratio * keys.numel())
    low, high = _bisect(keys, target, start=int(_ordered(torch.tensor(lam, dtype=torch.float32, device="cpu"))))
    pruned = keys < low
    missing = target - int(pruned.sum())
    if missing == 0:
        return Selection(~pruned.view_as(scores), 1.0)
    undecided = ((keys >= low) & (keys < high)).nonzero().flatten()  # in row-major order
    pruned[undecided[-missing:]] = True
    return Selection(~pruned.view_as(scores), 1 - undecided.numel() / keys.numel())


def _checked(scores: Tensor) -> Tensor:
    if scores.dim() != 2 or scores.numel() == 0:
        raise ValueError(f"scores must be [N, K] and not empty, got {list(scores.shape)}")
    scores = scores.detach().float().contiguous()
    if bool(torch.isnan(scores.amax())):
        raise ValueError("scores hold NaN")
    return scores


def _critical_lambda(scores: Tensor, mean_rate: float, dev_rate: float) -> Tensor:
    """The lambda above which each element is pruned: (score - mean) / dev, -inf for zero scores."""
    mean, dev = ewma(scores, mean_rate, dev_rate)
    distance = scores - mean
    # A run of equal scores has no deviation but the mean's rounding: that is not a preference.
    distance[distance.abs() <= mean * 2**-20] = 0
    critical = (distance / dev).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    return critical.masked_fill_(scores == 0, -torch.inf)


def _ordered(x: Tensor) -> Tensor:
    """int32 keys in the order of the float32 x (no NaN): neighbouring floats have neighbouring keys."""
    bits = x.view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _bisect(keys: Tensor, target: int, start: int) -> tuple[int, int]:
    """(low, high): `target` keys are < low, or high = low + 1 and the target falls among the keys == low.

    At most 33 counts: keys are 32-bit integers, and the first try is `start`.
    """
    low, high = int(keys.amin()), int(keys.amax()) + 1
    middle = start
    while high - low > 1:
        count = int((keys < middle).sum())
        if count == target:
            return middle, middle
        low, high = (middle, high) if count < target else (low, middle)
        middle = (low + high) // 2
    return low, high
