"""What the layers before have left to a weight W [N, K] to make up for, as far as its inputs tell.

With inputs D of the dense model and X of the converted one, and residuals r (see `lockstep`), that is

    e = (D - X) W^T + r_D - r_X,    and the drift    e^T X    is all of it that a fit of W to X can see.

Much of e has nothing to do with X, and what a fit finds of that in the calibration rows, it adds to all others: on
SmolLM2, from 16 k rows of 576 or 1536 channels, over half of what it finds. Two halves of the rows tell how much: what
both find is there, the rest is chance. The share of it in what all rows find follows from how alike the two are by the
formula for a test of twice the length (Spearman and Brown, 1910), and is what to keep of it (Wiener).
"""

from collections.abc import Sequence

import torch

from .curvature import add_product
from .reconstruction import reconstruct

# rows of W that tell for all of them, or as many weights
PROBED, WEIGHTS = 32, 2**14
Half = tuple[int, slice]


def halves_of(run: int, rows: int) -> list[Half]:
    """Which rows of a run of calibration belong to which half: of the first run one half to each, then all by turns."""
    return [(0, slice(rows // 2)), (1, slice(rows // 2, rows))] if run == 0 else [(run % 2, slice(rows))]


class Drift:
    """Of one weight, [N, K], gathered run by run. pulled: it has residuals."""

    def __init__(self, weight: torch.Tensor, pulled: bool):
        self.weight = weight
        self.pull = torch.zeros_like(weight, dtype=torch.float32) if pulled else None
        """(r_D - r_X)^T X"""
        rows, channels = weight.shape
        self._probed = slice(None, None, -(-rows // max(PROBED, WEIGHTS // channels)))
        self._probe = weight[self._probed].float()
        # by what it is from, inputs or residuals, and by half
        self._halves = self._probe.new_zeros(2, 2, *self._probe.shape)

    def add(
        self, off: torch.Tensor, residuals: Sequence[torch.Tensor], rows: torch.Tensor, halves: Sequence[Half]
    ) -> None:
        """A run's D - X [R, K], what its residuals are off by [R, N], and X [R, K]."""
        if not residuals:
            self.pull = None  # all runs have them, or none counts
        self._add(0, off.float() @ self._probe.T, rows, halves)
        if (pull := self.pull) is not None:
            for one in residuals:
                add_product(pull, one.to(rows.dtype), rows)
                self._add(1, one[:, self._probed].float(), rows, halves)

    def _add(self, kind: int, error: torch.Tensor, rows: torch.Tensor, halves: Sequence[Half]) -> None:
        for half, part in halves:
            add_product(self._halves[kind, half], error[part], rows[part].float())

    def total(self, cross: torch.Tensor, gram: torch.Tensor, steps: int) -> torch.Tensor:
        """What to aim at, float32 [N, K]: e^T X, as much of it as `share` says. cross: (D - X)^T X [K, K]; gram: X^T X
        [K, K]; steps: of the conjugate gradients that will be fitted with."""
        whole = self.weight.float() @ cross
        if self.pull is not None:
            whole += self.pull
        return whole.mul_(self.share(gram, steps))

    def share(self, gram: torch.Tensor, steps: int) -> float:
        """Of what a fit to all rows finds, that which is no chance: 0 to 1. 0 as well where X is not finite."""
        if not bool(gram.diagonal().isfinite().all()):  # `compress` will name the batch
            return 0.0
        halves = self._halves[0] if self.pull is None else self._halves.sum(0)
        both = halves.flatten(0, 1)
        # masks are still to come: half of the channels, as many as will be fitted
        kept = (torch.arange(both.shape[1], device=both.device) % 2 == 0).expand_as(both)
        one, other = reconstruct(torch.zeros_like(both), kept, gram, steps, drift=both).view_as(halves)
        own = _dot(one, halves[0]) * _dot(other, halves[1])
        if own <= 0:  # there is none in one of them
            return 0.0
        alike = max(0.0, (_dot(one, halves[1]) + _dot(other, halves[0])) / 2 / own**0.5)
        return min(1.0, 2 * alike / (1 + alike))


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() * b.double()).sum())
