"""Products with G = X^T X [K, K] of inputs X [R, K]: the matrix itself, a sample of X, and both in a faster dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Gram", "MatrixFree", "Product", "Rounded", "size_of"]

Product: TypeAlias = Callable[[Tensor], Tensor]
Gram: TypeAlias = Tensor | Product  # X^T X [K, K], or V -> V X^T X of float32 [N, K]

SINGULAR = 2.0**-20  # of a weight's own curvature: what is left of less beside its neighbour is rounding
RANK = 16  # what `Rounded` splits off: 1 does for a massive row or a mean


class MatrixFree:
    """V -> (V X^T) X + V diag(ridge) for a sample X of the inputs: where there are too many channels to hold X^T X.

    sample: [R, K], any floating dtype; not copied. max_bytes bounds each of a product's temporaries, down to one row
    of X or one column for V. ridge: float32 [K], not negative. Raises ValueError: a sample that is not floating point,
    not 2-D or empty.
    """

    def __init__(self, sample: Tensor, max_bytes: int = 2**26, ridge: Tensor | None = None):
        if sample.dim() != 2 or sample.numel() == 0 or not sample.is_floating_point():
            raise ValueError(f"sample must be floating point [R, K], got {sample.dtype} {list(sample.shape)}")
        self.sample, self.max_bytes, self.ridge = sample.detach(), max_bytes, ridge

    def __call__(self, rows: Tensor) -> Tensor:
        """rows: [N, K], in the dtype to multiply in. Returns float32 [N, K]."""
        out = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
        for part in self._parts(max(rows.shape), rows.dtype):
            out += rows @ part.T @ part
        return out if self.ridge is None else out.addcmul_(rows, self.ridge)

    @property
    def diagonal(self) -> Tensor:
        """float32 [K]."""
        diagonal = torch.linalg.vector_norm(self.sample, dim=0, dtype=torch.float32).square_()
        return diagonal if self.ridge is None else diagonal.add_(self.ridge)

    @property
    def blocks(self) -> Tensor:
        """float32 [K/4, 4, 4], along the diagonal."""
        channels = self.sample.shape[1]
        out = torch.zeros(channels // 4, 4, 4, dtype=torch.float32, device=self.sample.device)
        for part in self._parts(channels):
            groups = part.view(-1, channels // 4, 4).transpose(0, 1)
            out.baddbmm_(groups.mT, groups)
        if self.ridge is not None:
            out.diagonal(dim1=1, dim2=2).add_(self.ridge.view(-1, 4))
        return out

    def _parts(self, width: int, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
        for part in self.sample.split(max(1, self.max_bytes // (4 * width))):
            yield part.to(dtype)


class Rounded:
    """V -> V G / size, with factors rounded to a dtype that multiplies faster, and the loudest directions of G not.

    Rounding is a share of G's largest eigenvalue: one massive row of X, or channels with a large mean, and it drowns
    all that is left. So only G - C D^-1 C^T is rounded, with C [K, RANK] the columns of a pivoted Cholesky
    factorization (Harbrecht, Peters and Schneider, "On the low-rank approximation by the pivoted Cholesky
    decomposition", 2012), and C D^-1 C^T multiplied in float32.

    gram: X^T X float32 [K, K], or a `MatrixFree`; as much memory as it takes in `dtype` is held besides. size: the
    power of two that brings G's largest to [0.5, 1).
    """

    def __init__(self, gram: Tensor | MatrixFree, dtype: torch.dtype = torch.bfloat16):
        self._dtype, self._ridge = dtype, None
        if isinstance(gram, Tensor):
            self.size, self._scale = size_of(gram.diagonal()), 1.0
            self._remainder: Product = self._of_matrix(gram.detach())
        else:
            self.size = size_of(gram.diagonal)
            # x at a scale where neither it nor its squares are out of range
            scale = 2.0 ** -(math.frexp(self.size)[1] // 2)
            self._scale = 1 / (self.size * scale) / scale
            self._remainder = self._of_sample(gram, scale)
            self._ridge = None if gram.ridge is None else gram.ridge / self.size

    def __call__(self, rows: Tensor) -> Tensor:
        """rows: float32 [N, K]. Returns float32 [N, K]."""
        out = self._remainder(rows.to(self._dtype)).float()
        out.addmm_(rows @ self._columns.T, self._shares, beta=self._scale)
        return out if self._ridge is None else out.addcmul_(rows, self._ridge)

    def _of_matrix(self, gram: Tensor) -> Product:
        _, self._columns, self._shares = _pivoted(lambda at: gram.index_select(0, at), gram.diagonal(), self.size)
        matrix = torch.empty(gram.shape, dtype=self._dtype, device=gram.device)
        height = max(1, 2**20 // len(gram))  # rows at a time: nothing else as large as the matrix
        for made, rows, columns in zip(
            matrix.split(height), gram.split(height), self._columns.T.split(height), strict=True
        ):
            made.copy_(torch.addmm(rows, columns, self._shares, beta=1 / self.size, alpha=-1))
        return lambda rows: rows @ matrix

    def _of_sample(self, gram: MatrixFree, scale: float) -> Product:
        x = gram.sample.float()
        diagonal = MatrixFree(x).diagonal
        at, self._columns, self._shares = _pivoted(lambda at: x.index_select(1, at).T @ x, diagonal, self.size)
        # As in Gram-Schmidt, x[:, at] = basis @ shares[:, at]; what is orthogonal to the basis has the G that is left.
        triangle = self._shares[:, at]
        basis = torch.linalg.solve_triangular(triangle, x[:, at], upper=True, left=False, unitriangular=True)
        left = torch.addmm(x, basis, self._shares, alpha=-1).mul_(scale)
        return MatrixFree(left.to(self._dtype), gram.max_bytes)


def _pivoted(row: Product, diagonal: Tensor, size: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of G / size, G given by a function of a row's index [1] and by its diagonal: RANK pivots, the columns C [RANK, K]
    and D^-1 C^T [RANK, K]. Waits for nothing on the device."""
    left = diagonal = diagonal.float() / size
    pivots = torch.zeros(min(RANK, len(diagonal)), dtype=torch.int64, device=diagonal.device)
    columns = torch.zeros(len(pivots), len(diagonal), dtype=torch.float32, device=diagonal.device)
    shares = torch.zeros_like(columns)
    for rank in range(len(pivots)):
        at = pivots[rank : rank + 1].copy_(left.argmax())
        column = row(at).float() / size - columns[:rank].index_select(1, at).T @ shares[:rank]
        pivot = column.index_select(1, at)
        columns[rank] = column
        shares[rank] = torch.where(pivot > SINGULAR * diagonal.index_select(0, at), column / pivot, 0)
        left = (left - columns[rank] * shares[rank]).index_fill_(0, at, 0)
    return pivots, columns, shares


def size_of(diagonal: Tensor) -> float:
    """The power of two that brings the diagonal's largest to [0.5, 1)."""
    # The clamp keeps it and its inverse within float32.
    return 2.0 ** max(-126, min(126, math.frexp(float(diagonal.amax()))[1]))
