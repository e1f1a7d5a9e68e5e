"""What a pruned row can do for its output by what two sums per channel tell: one factor, and one direction."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from .gram import SINGULAR

__all__ = ["COMPENSATIONS", "Compensated", "compensate"]

# Times the mean energy, added to every channel's variance: channels are correlated otherwise as well, and a change of
# all in one direction costs more than their variances say. Between 0.01 and 10 two trained models (SmolLM2, MiniLM) do
# not mind; that of benchmarks/small_llama.py, trained for half an hour, loses more at 0.01.
DAMPING = 10.0


class Compensated(NamedTuple):
    """weight float32 [N, K], of which the kept weights count, and factor float32 [N], which is to multiply its rows."""

    weight: Tensor
    factor: Tensor


class _Moments(NamedTuple):
    """Of every channel over the rows, float32 [K], at a scale where the largest energy is near 1; no mean where none
    is known."""

    variance: Tensor
    mean: Tensor | None
    damping: float


def _none(weight: Tensor, mask: Tensor, moments: _Moments) -> Compensated:
    """Rows stay as pruned."""
    return Compensated(weight, weight.new_ones(weight.shape[0]))


def _energy(weight: Tensor, mask: Tensor, moments: _Moments) -> Compensated:
    # rows at a scale where their squares are in range, by powers of two
    peak = weight.abs().amax(1, keepdim=True)
    back = torch.where(peak > 0, peak / (2 * torch.frexp(peak).mantissa), 1)
    unit = weight / back
    kept_ones = mask.float()  # a product with bool takes five times as long
    held = unit * kept_ones
    deviation = moments.variance.sqrt()
    total, kept = (torch.linalg.vector_norm(rows * deviation, dim=1) for rows in (unit, held))
    factor = torch.where(kept > 0, total / kept, 1.0)
    if moments.mean is None:
        return Compensated(weight, factor)
    spread = moments.variance + moments.damping
    pull = torch.where(spread > 0, moments.mean / spread, 0)
    lost = unit @ moments.mean / factor - held @ moments.mean
    shift = lost / (1 + kept_ones @ (moments.mean * pull))
    return Compensated(torch.addcmul(weight, shift[:, None] * back, pull), factor)


COMPENSATIONS: Mapping[str, Callable[[Tensor, Tensor, _Moments], Compensated]] = MappingProxyType(
    {"energy": _energy, "none": _none}
)


def compensate(
    weight: Tensor,
    mask: Tensor,
    sum_sq: Tensor | None = None,
    name: str = "energy",
    sums: Tensor | None = None,
    rows: int = 1,
) -> Compensated:
    """The weight to prune by the mask, and a factor for each of its rows.

    weight: [N, K], any float dtype. mask: bool [N, K], True = kept. sum_sq: [K] sums of squares per input channel over
    `rows` rows of input, or None for ones. sums: [K] the sums themselves, where they are known. name: a key of
    `COMPENSATIONS`. "none" leaves all as it is. "energy" keeps what the moments tell of a row's output: with mean m and
    variance v per channel, as if channels were otherwise uncorrelated, the factor

        f = sqrt(sum of w^2 v / sum of kept w^2 v)

    keeps its variance, and where sums are given, the kept weights w + d with the smallest

        sum of (f d)^2 (v + damping) + (sum of w m - f sum of kept (w + d) m)^2

    keep its mean, up to the damping: d = c m / (v + damping), with one c for the row. (Inputs of language models have
    large means. Quantizers correct outputs for theirs in the bias: Nagel et al., arXiv 1906.04721.) The factor is 1 for
    rows that keep nothing and rows without energy. A row times a power of two gives the same bits times it, and so do
    inputs.

    Raises ValueError: unknown name, a mask that is not bool or not W's shape, sums that do not fit or are not finite,
    negative sum_sq. The weight is taken to be finite.
    """
    if name not in COMPENSATIONS:
        raise ValueError(f"unknown compensation {name!r}; known: {', '.join(COMPENSATIONS)}")
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool {list(weight.shape)}, got {mask.dtype} {list(mask.shape)}")
    for what, given in (("sum_sq", sum_sq), ("sums", sums)):
        if given is not None and given.shape != weight.shape[1:]:
            raise ValueError(f"{what} must be [{weight.shape[1]}], got {list(given.shape)}")
        if given is not None and not bool(given.isfinite().all()):
            raise ValueError(f"{what} must be finite")
    if sum_sq is not None and bool((sum_sq < 0).any()):
        raise ValueError("sum_sq holds negative sums of squares")
    return COMPENSATIONS[name](weight.detach().float(), mask, _moments(weight, sum_sq, sums, rows))


def _moments(weight: Tensor, sum_sq: Tensor | None, sums: Tensor | None, rows: int) -> _Moments:
    if sum_sq is None:
        return _Moments(weight.new_ones(weight.shape[1], dtype=torch.float32), None, 0.0)
    energy = sum_sq.double() / rows
    # an even power of two, so that its root is one too
    size = 4.0 ** (math.frexp(float(energy.amax()))[1] // 2)
    energy = energy / size
    if sums is None:
        return _Moments(energy.float(), None, 0.0)
    mean = sums.double() / rows / math.sqrt(size)
    variance = energy - mean.square()
    variance = torch.where(variance > SINGULAR * energy, variance, 0)
    return _Moments(variance.float(), mean.float(), DAMPING * float(energy.mean()))
