"""Exponentially weighted moving average of scores and of their deviation, along rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["DEV_RATE", "MEAN_RATE", "ewma"]

# RFC 6298's alpha and beta.
MEAN_RATE = 1 / 8
DEV_RATE = 1 / 4

_BLOCK = 32


def ewma(scores: Tensor, mean_rate: float = MEAN_RATE, dev_rate: float = DEV_RATE) -> tuple[Tensor, Tensor]:
    """Running mean and mean absolute deviation BEFORE each entry: two float32 [N, T].

    scores: [N, T], non-negative and finite. Entry t holds the state built from entries < t, so a decision
    about entry t never looks at t. The first entry seeds the state, and entry 0 holds that seed because
    nothing is before it. The recurrences are those of TCP's round-trip estimator, RFC 6298 section 2:

        first:  mean = x                      dev = x / 2
        then:   dev = (1 - dev_rate) * dev + dev_rate * |x - mean|
                mean = (1 - mean_rate) * mean + mean_rate * x

    A row's result does not depend, bit for bit, on the rows computed along with it.

    Raises ValueError: scores not 2-D or empty, a rate outside (0, 1].
    """
    if scores.dim() != 2 or scores.numel() == 0:
        raise ValueError(f"scores must be [N, T] and not empty, got {list(scores.shape)}")
    if not (0 < mean_rate <= 1 and 0 < dev_rate <= 1):
        raise ValueError(f"rates must be in (0, 1], got {mean_rate} and {dev_rate}")
    x = scores.float()
    mean = _before(x * mean_rate, x[:, 0], 1 - mean_rate)
    distance = (x - mean).abs_()
    dev = _before(distance.mul_(dev_rate), x[:, 0] / 2, 1 - dev_rate)
    return mean, dev


def _before(steps: Tensor, seed: Tensor, decay: float) -> Tensor:
    # Entry 0 of `steps` gives way to the seed; then the scan, shifted by one, with the seed in front again.
    steps[:, 0] = seed
    return torch.cat([steps[:, :1], _scan(steps[:, :-1], decay)], dim=1)


def _scan(u: Tensor, decay: float) -> Tensor:
    """y_t = decay * y_(t-1) + u_t along the rows of u [N, T].

    Rows are cut into blocks, and each step works on all blocks at once: first what every block hands on
    when started from zero, then (the same scan over these, T / block long) what enters every block, then
    the recurrence itself. Elementwise only: a matrix product by the decays would be no quicker, rounds
    differently with the number of rows, and may run in TF32.
    """
    rows, length = u.shape
    if length < 2:
        return u
    block = min(_BLOCK, length)
    blocks = -(-length // block)
    # Time first, so that a step reads and writes whole contiguous planes: [block, N, blocks].
    y = pad(u, (0, blocks * block - length)).view(rows, blocks, block).permute(2, 0, 1).contiguous()
    if blocks > 1:
        handed_on = y[0].clone()
        for step in range(1, block):
            handed_on.mul_(decay).add_(y[step])
        y[0, :, 1:] += _scan(handed_on, decay**block)[:, :-1] * decay
    for step in range(1, block):
        y[step] += y[step - 1] * decay
    return y.permute(1, 2, 0).reshape(rows, blocks * block)[:, :length]
