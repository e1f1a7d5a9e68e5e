"""Which weights stay: 2:4 masks and unstructured masks from scores, by thresholds and without sorting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from hwpq_fx.kernels import best_two

from .ewma import DEV_RATE, MEAN_RATE, ewma

__all__ = ["DEFAULT_LAMBDA", "DEFAULT_SELECTION", "SELECTIONS", "Selection", "select24", "select_ratio"]

# Threshold = mean + lambda * dev. Share of groups settled, measured on w^2 * s, 1024x4096 ("ewma" with
# Gaussian w / with Laplace w; "ewma_streaming" the same):
#   lambda   -1.0         -0.875       -0.75        -0.625       -0.5         -0.25        0
#   ewma     0.352 0.299  0.359 0.330  0.357 0.334  0.350 0.318  0.340 0.295  0.312 0.250  0.282 0.211
#   stream.  0.118 0.056  0.220 0.139  0.334 0.275  0.403 0.392  0.411 0.395  0.368 0.306  0.308 0.239
# For scores drawn alike no threshold fixed before its group can settle more than 6/16 = 0.375 of them
# (streaming's moves within the group). -0.5 serves both: streaming then keeps 0.89 of the score that the
# exact choice keeps, 0.77 at -0.75.
DEFAULT_LAMBDA = -0.5


class Selection(NamedTuple):
    """mask: bool [N, K], True = keep. settled: the share, 0 to 1, that the threshold alone decided."""

    mask: Tensor
    settled: float


def _exact(scores: Tensor, mean_rate: float, dev_rate: float, lam: float) -> Selection:
    """The best two of every four, by comparison alone; the rates and lam are not used."""
    groups = _groups(scores)
    return Selection(best_two(groups).view_as(scores), 0.0)


def _ewma(scores: Tensor, mean_rate: float, dev_rate: float, lam: float) -> Selection:
    """The best two of every four, by threshold where it settles a group and by comparison elsewhere.

    The threshold comes from the earlier groups' mean scores. When exactly two of a group's scores are
    above it, they beat the other two: the exact choice, so the mask always equals that of "exact".
    """
    groups = _groups(scores)
    mean, dev = ewma(groups.mean(-1), mean_rate, dev_rate)
    mask = groups > (mean + lam * dev).unsqueeze(-1)
    unsettled = (_count(mask) != 2).flatten().nonzero().flatten()
    compared = best_two(groups.view(-1, 4).index_select(0, unsettled))
    mask.view(-1, 4).index_copy_(0, unsettled, compared)
    return Selection(mask.view_as(scores), 1 - len(unsettled) / mean.numel())


def _ewma_streaming(scores: Tensor, mean_rate: float, dev_rate: float, lam: float) -> Selection:
    """One pass that looks neither back nor ahead (arXiv 2501.16376): first come, first pruned.

    An element goes while fewer than two of its group went and it is below the threshold from the elements
    before it, or when only just enough elements are left to reach two.
    """
    mean, dev = ewma(scores, mean_rate, dev_rate)
    below = _groups(scores < mean + lam * dev)
    pruned = torch.zeros_like(below[..., 0], dtype=torch.uint8)
    mask = torch.empty_like(below)
    for i in range(4):
        wanted = 2 - pruned
        goes = (wanted > 0) & (below[..., i] | (wanted == 4 - i))
        mask[..., i] = ~goes
        pruned += goes
    # Fewer than two below forces a prune, more than two forces a keep, two forces neither.
    settled = int((_count(below) == 2).sum()) / pruned.numel()
    return Selection(mask.view_as(scores), settled)


DEFAULT_SELECTION = "ewma"

SELECTIONS: Mapping[str, Callable[[Tensor, float, float, float], Selection]] = MappingProxyType(
    {"ewma": _ewma, "ewma_streaming": _ewma_streaming, "exact": _exact}
)


def select24(
    scores: Tensor,
    selection: str = DEFAULT_SELECTION,
    mean_rate: float = MEAN_RATE,
    dev_rate: float = DEV_RATE,
    lam: float = DEFAULT_LAMBDA,
) -> Selection:
    """Keep exactly two of every four neighbours in a row.

    scores: [N, K], K a multiple of 4, non-negative, larger = keep. selection: a key of `SELECTIONS`:

    - "exact": the two largest; of equal scores the one with the lower index.
    - "ewma": the same mask; `settled` is the share of groups that needed no comparison.
    - "ewma_streaming": the paper's single pass; `settled` is the share of groups without a forced
      decision. Of equal scores below the threshold it prunes the first, as it cannot look ahead.

    mean_rate, dev_rate, lam: of the threshold mean + lam * dev, see `ewma`.
    Every row is decided on its own: the mask of some rows is those rows of the mask.

    Raises ValueError: unknown selection, scores empty, not 2-D or NaN, K not a multiple of 4, bad rates.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"unknown selection {selection!r}; known: {', '.join(SELECTIONS)}")
    scores = _checked(scores)
    if scores.shape[1] % 4:
        raise ValueError(f"2:4 needs a multiple of 4 columns, got {scores.shape[1]}")
    return SELECTIONS[selection](scores, mean_rate, dev_rate, lam)


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
    low, high = _bisect(keys, target, start=int(_ordered(torch.tensor(lam, dtype=torch.float32))))
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


def _groups(x: Tensor) -> Tensor:
    return x.view(x.shape[0], -1, 4)


def _count(flags: Tensor) -> Tensor:
    return flags.sum(-1, dtype=torch.uint8)


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
