"""What conjugate gradients ask of an input X [R, K]: X^T X, or a sample of the rows where it would not fit."""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple, Protocol

import torch

from .gram import MatrixFree
from .memory import room

# Rows of a sample. MiniLM: 2048 of 7313 rows keep nine tenths of what all of them give, 512 rows three quarters.
SAMPLE_ROWS = 4096
HELD_OUT = 8  # of so many sampled rows one tells the error
CPU_BYTES = 4 * 2**30


def add_product(matrix: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """matrix [N, K] float32 += left^T right, of [R, N] and [R, K] in one floating dtype."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        # tensor cores multiply these exactly, and add in float32
        matrix += torch.mm(left.T, right, out_dtype=torch.float32)
    else:
        matrix.addmm_(left.T.float(), right.float())


class GramMatrix:
    """X^T X, float32 [K, K]."""

    def __init__(self, channels: int, device: torch.device):
        self.matrix = torch.zeros(channels, channels, dtype=torch.float32, device=device)

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    def update(self, rows: torch.Tensor) -> None:
        """Add rows [R, K], any floating dtype."""
        add_product(self.matrix, rows, rows)


class RowSample:
    """Up to `capacity` rows, each row seen so far being as likely to be among them as any other."""

    def __init__(self, channels: int, device: torch.device, capacity: int):
        self.capacity = capacity
        self.rows = torch.empty(0, channels, dtype=torch.float32, device=device)
        self._lots = torch.empty(0, dtype=torch.float32, device="cpu")
        self._random = torch.Generator().manual_seed(0)

    @property
    def nbytes(self) -> int:
        """Once it is full."""
        return 4 * self.rows.shape[1] * self.capacity

    def update(self, rows: torch.Tensor) -> None:
        """Offer rows [R, K], any floating dtype."""
        # every row draws a lot, and the highest ones stay: no matter how the rows were cut into batches
        drawn = torch.rand(rows.shape[0], dtype=torch.float32, device="cpu", generator=self._random)
        lots = torch.cat([self._lots, drawn])
        self._lots, chosen = lots.topk(min(self.capacity, len(lots)))
        self.rows = torch.cat([self.rows, rows.float()])[chosen.to(rows.device)]


Curvature = GramMatrix | RowSample


class Part(Protocol):
    """What is known of one input (`InputStatistics`): its energies float64 [K] and its rows, all of them, and more."""

    total: torch.Tensor
    rows: int
    curvature: Curvature | None


class CurvatureBudget:
    """Hands out the one or the other until `limit` bytes are spent on a device, and then nothing.

    limit: None is half of what is free on a GPU when the first is asked for, 4 GiB elsewhere. taken: bytes that others
    hold already.
    """

    def __init__(self, limit: int | None, taken: int = 0):
        self.limit, self.taken = limit, taken
        self._left: dict[torch.device, int] = {}

    def grant(self, channels: int, device: torch.device) -> Curvature | None:
        """X^T X where it fits, else a sample of rows, or None where not even a few hundred rows fit."""
        if device not in self._left:
            most = room(device, self.taken) if device.type == "cuda" else CPU_BYTES
            self._left[device] = (most if self.limit is None else self.limit) - self.taken
        left = self._left[device]
        if (size := 4 * channels * channels) <= left:
            self._left[device] -= size
            return GramMatrix(channels, device)
        capacity = min(SAMPLE_ROWS, left // (4 * channels))
        if capacity < 256:
            return None
        self._left[device] -= 4 * channels * capacity
        return RowSample(channels, device, capacity)


class Combined(NamedTuple):
    """fit: the G to minimise. measure: the G by which calibration's error is told, another one where rows are a
    sample. name: what to call it in the report."""

    fit: torch.Tensor | MatrixFree
    measure: torch.Tensor | MatrixFree
    name: str


def combined(parts: Sequence[Part], device: torch.device) -> Combined | None:
    """The inputs of several calls taken as one. None where curvature is missing from one, or where it is of both
    kinds."""
    grams = [part.curvature.matrix.to(device) for part in parts if isinstance(part.curvature, GramMatrix)]
    samples = [part for part in parts if isinstance(part.curvature, RowSample)]
    if grams and len(grams) == len(parts):
        gram = reduce(torch.add, grams)  # a single one is not copied: it may be most of the memory
        return Combined(gram, gram, "cg, X^T X")
    if samples and len(samples) == len(parts):
        fits, measures = zip(*(_of_sample(part, device) for part in samples), strict=True)
        fit, measure = _joined(fits), _joined(measures)
        return Combined(fit, measure, f"cg, {len(measure.sample)} rows")
    return None


def _joined(parts: Sequence[MatrixFree]) -> MatrixFree:
    """The sum of theirs."""
    ridges = [part.ridge for part in parts if part.ridge is not None]
    return MatrixFree(torch.cat([part.sample for part in parts]), ridge=torch.stack(ridges).sum(0) if ridges else None)


def _of_sample(part: Part, device: torch.device) -> tuple[MatrixFree, MatrixFree]:
    """What to fit to and what to measure by, both with the energies of all rows along their diagonals.

    A fit to few rows is a fit to their noise as well, and measured by them it looks as good as that. So of a sample
    every eighth row is for measuring alone and stands for all rows that are not fitted to; of the others the
    correlations are shrunk. What has no row of its own to tell of it is taken for uncorrelated.
    """
    assert isinstance(part.curvature, RowSample)
    rows, total = part.curvature.rows.to(device), part.total.to(device)
    if len(rows) == part.rows:
        return MatrixFree(rows), MatrixFree(rows)
    held = torch.arange(len(rows), device=device) % HELD_OUT == HELD_OUT - 1
    fit, other = rows[~held], rows[held]
    lacking = _scaled_to(other, (total - _energies(fit)).clamp_min_(0))
    measure = MatrixFree(torch.cat([fit, other]), ridge=lacking.float())
    _scaled_to(fit, torch.full_like(total, len(fit)))  # mean squares of one
    shrunk = _shrinkage(fit) * (1 - len(fit) / part.rows)
    lacking = _scaled_to(fit, (1 - shrunk) * total)
    return MatrixFree(fit, ridge=(shrunk * total + lacking).float()), measure


def _energies(rows: torch.Tensor) -> torch.Tensor:
    """float64 [K]: sums of squares over the rows."""
    return torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64).square_()


def _scaled_to(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Scale the channels of `rows` [R, K], in place, to the energies wanted, float64 [K]; what is lacking where they
    are zero."""
    energies = _energies(rows)
    rows *= torch.where(energies > 0, (wanted / energies).sqrt(), 0)
    return torch.where(energies > 0, 0, wanted)


def _shrinkage(rows: torch.Tensor) -> float:
    """How much less than the sample says channels are correlated: the share of squared correlations that is noise, of
    `rows` [R, K] whose channels have mean squares of one. Schäfer and Strimmer, "A shrinkage approach to large-scale
    covariance matrix estimation", 2005."""
    count, energies = len(rows), rows.square()
    # sums over all pairs of two channels, by way of R x R: ||X^T X|| = ||X X^T||
    squares = sum(float((part @ rows.T).square().sum(dtype=torch.float64)) for part in rows.split(256)) / count**2
    squares -= float(energies.mean(0).square().sum(dtype=torch.float64))
    fourth = energies.sum(1, dtype=torch.float64).square().sum() - energies.square().sum(dtype=torch.float64)
    return min(1.0, max(0.0, (float(fourth) / count - squares) / count / squares)) if squares > 0 else 1.0
