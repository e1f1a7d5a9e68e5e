"""What leads conjugate gradients: the loudest directions of X^T X whole, and of the others the diagonal.

Inputs of a language model have few loud directions, and with the diagonal alone each costs about a step: on SmolLM2, 5
steps led by 16 of them end where 10 do without. They are found by a Nyström approximation (Frangella, Tropp and
Udell, "Randomized Nyström preconditioning", arXiv 2110.02820, algorithm 2.1), started from two power iterations; each
row of a weight has other kept channels, whose part of it is inverted by the formula of Woodbury.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from .gram import Product

RANK = 16
POWERS = 2  # iterations
QUIET = 2.0**-4  # of a channel's own is left to the diagonal at least: what is less may be rounding


class Preconditioner:
    """P = diag(rest) + F^T F, near G + shift * I.

    product: V -> V G of float32 [N, K]; called POWERS + 1 times with RANK rows. diagonal: float32 [K], of G. Waits for
    nothing on the device. Where G is not what it should be, positive semi-definite, P is its diagonal.
    """

    def __init__(self, product: Product, diagonal: Tensor, shift: float):
        channels, device = len(diagonal), diagonal.device
        scale = diagonal + shift
        root = torch.where(scale > 0, scale.rsqrt(), 0)

        def unit(rows: Tensor) -> Tensor:
            """The product with G where G + shift * I has a diagonal of ones."""
            return product(rows * root) * root

        random = torch.Generator().manual_seed(0)
        size = (channels, min(RANK, channels // 2))
        start = torch.randn(size, generator=random, dtype=torch.float32, device="cpu").to(device)
        for _ in range(POWERS):
            start = unit(torch.linalg.qr(start).Q.T).T
        basis = torch.linalg.qr(start).Q
        image = unit(basis.T).double()
        core = image @ basis.double()
        core = (core + core.T) / 2
        core.diagonal().add_(2.0**-20 * core.trace())
        triangle, failed = torch.linalg.cholesky_ex(core)
        factor = torch.linalg.solve_triangular(triangle, image, upper=False).float()
        factor = torch.where((failed == 0) & factor.isfinite().all(), factor, 0)
        self.scale = scale
        """float32 [K], the diagonal of G + shift * I"""
        self.rest = (1 - factor.square().sum(0)).clamp_(QUIET, 1) * scale
        """float32 [K]"""
        self.factor = factor * scale.sqrt()
        """F, float32 [RANK, K]"""

    @cached_property
    def _inverse(self) -> Tensor:
        """Of `rest`."""
        return torch.where(self.rest > 0, 1 / self.rest, 0)

    @cached_property
    def _products(self) -> tuple[Tensor, Tensor]:
        """Of any two rows of F, over `rest`, [pairs, K], and which two rows' they are, [RANK, RANK]."""
        rank, device = len(self.factor), self.factor.device
        one, other = torch.triu_indices(rank, rank, device=device)
        places = torch.empty(rank, rank, dtype=torch.int64, device=device)
        places[one, other] = places[other, one] = torch.arange(len(one), device=device)
        return self.factor[one] * self.factor[other] * self._inverse, places

    def among(self, kept: Tensor) -> Callable[[Tensor], Tensor]:
        """slope [N, K] -> -slope P^-1, of each row among its kept channels alone, bool [N, K]; elsewhere zero."""
        factor, (products, places) = self.factor, self._products
        inverse = kept.float()  # a product with bool takes three times as long
        inner = (inverse @ products.T)[:, places]
        inner.diagonal(dim1=1, dim2=2).add_(1)
        small = torch.linalg.inv_ex(inner).inverse
        inverse.mul_(self._inverse).neg_()

        def downhill(slope: Tensor) -> Tensor:
            alone = slope * inverse
            shares = torch.bmm((alone @ factor.T)[:, None], small)[:, 0]
            return alone.addcmul_(shares @ factor, inverse)

        return downhill
