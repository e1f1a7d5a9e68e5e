"""Exponentially weighted moving average of scores and of their deviation, along rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["DEV_RATE", "MEAN_RATE", "SCAN_BLOCK", "check_rates", "decays", "ewma", "tree_size"]

# RFC 6298's alpha and beta.
MEAN_RATE = 1 / 8
DEV_RATE = 1 / 4

# Entries of a row under one tree, a power of two; the state is carried from tree to tree.
SCAN_BLOCK = 128


def ewma(scores: Tensor, mean_rate: float = MEAN_RATE, dev_rate: float = DEV_RATE) -> tuple[Tensor, Tensor]:
    """Running mean and mean absolute deviation BEFORE each entry: two float32 [N, T].

    scores: [N, T], non-negative and finite. Entry t holds the state built from entries < t, so a decision
    about entry t never looks at t. The first entry seeds the state, and entry 0 holds that seed because
    nothing is before it. The recurrences are those of TCP's round-trip estimator, RFC 6298 section 2:

        first:  mean = x                      dev = x / 2
        then:   dev = (1 - dev_rate) * dev + dev_rate * |x - mean|
                mean = (1 - mean_rate) * mean + mean_rate * x

    A row's result does not depend, bit for bit, on the rows computed along with it or on entries after it.

    Raises ValueError: scores not 2-D or empty, a rate outside (0, 1].
    """
    if scores.dim() != 2 or scores.numel() == 0:
        raise ValueError(f"scores must be [N, T] and not empty, got {list(scores.shape)}")
    check_rates(mean_rate, dev_rate)
    length = scores.shape[1]
    size = tree_size(length)
    x = pad(scores.float(), (0, -length % size))
    mean = _before(x * mean_rate, x[:, 0], decays(mean_rate), size)
    distance = (x - mean).abs_()
    dev = _before(distance.mul_(dev_rate), x[:, 0] / 2, decays(dev_rate), size)
    return mean[:, :length], dev[:, :length]


def check_rates(mean_rate: float, dev_rate: float) -> None:
    """ValueError where a rate is outside (0, 1]."""
    if not (0 < mean_rate <= 1 and 0 < dev_rate <= 1):
        raise ValueError(f"rates must be in (0, 1], got mean_rate {mean_rate} and dev_rate {dev_rate}")


def tree_size(length: int) -> int:
    """Entries under one tree in rows of `length`. A smaller tree is the left branch of a larger one: same bits."""
    return min(SCAN_BLOCK, 1 << (length - 1).bit_length())


def decays(rate: float) -> tuple[float, ...]:
    """(1 - rate)^(2^level) for every level of a tree of `SCAN_BLOCK` entries; 0 where float32 has no normal number."""
    powers = [(1 - rate) ** (1 << level) for level in range(SCAN_BLOCK.bit_length())]
    return tuple(power if power >= 2.0**-126 else 0.0 for power in powers)


def _before(steps: Tensor, seed: Tensor, decay: tuple[float, ...], size: int) -> Tensor:
    # Entry 0 of `steps` gives way to the seed, which the state of zero before it then leaves as it is.
    steps[:, 0] = seed
    states = _states(steps.view(len(steps), -1, size), decay).view_as(steps)
    states[:, 0] = seed
    return states


def _states(steps: Tensor, decay: tuple[float, ...]) -> Tensor:
    """y before each entry, where y = decay[0] * y + step, for steps [N, trees, size].

    Two neighbours are one step of a recurrence with the squared decay: it says what enters every pair, and so
    the left one; what the left one leaves enters the right one. This order of operations is the definition
    (Blelloch's scan, CMU-CS-90-190): a kernel that follows it gets the same bits. Elementwise only.
    """
    if steps.shape[-1] == 1:
        return _carried(steps, decay[0])
    left, right = steps[..., 0::2], steps[..., 1::2]
    states = torch.empty_like(steps)
    entering = _states((left * decay[0]).add_(right), decay[1:])
    states[..., 0::2] = entering
    states[..., 1::2] = (entering * decay[0]).add_(left)
    return states


def _carried(totals: Tensor, decay: float) -> Tensor:
    """The state that enters each tree, from the trees' totals [N, trees, 1]."""
    carry = torch.zeros_like(totals[:, 0])
    entering = []
    for total in totals.unbind(1):
        entering.append(carry)
        carry = carry * decay + total
    return torch.stack(entering, 1)
