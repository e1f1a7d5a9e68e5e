"""What conjugate gradients ask of an input X [R, K]: X^T X, or a sample of the rows where it would not fit."""

from collections.abc import Sequence
from functools import reduce

import torch

from .gram import MatrixFree

# Rows of a sample. MiniLM: 2048 of 7313 rows keep nine tenths of what all of them give, 512 rows three quarters.
SAMPLE_ROWS = 4096
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
        left = self._left.setdefault(device, self._limit(device) - self.taken)
        if (size := 4 * channels * channels) <= left:
            self._left[device] -= size
            return GramMatrix(channels, device)
        capacity = min(SAMPLE_ROWS, left // (4 * channels))
        if capacity < 256:
            return None
        self._left[device] -= 4 * channels * capacity
        return RowSample(channels, device, capacity)

    def _limit(self, device: torch.device) -> int:
        if self.limit is not None:
            return self.limit
        return (torch.cuda.mem_get_info(device)[0] + self.taken) // 2 if device.type == "cuda" else CPU_BYTES


def combined(parts: Sequence[Curvature | None], device: torch.device) -> tuple[torch.Tensor | MatrixFree, str] | None:
    """The inputs of several calls taken as one, and what to call it in the report. None where one is missing, or where
    they are of both kinds."""
    grams = [part.matrix.to(device) for part in parts if isinstance(part, GramMatrix)]
    samples = [part.rows.to(device) for part in parts if isinstance(part, RowSample)]
    if grams and len(grams) == len(parts):
        return reduce(torch.add, grams), "cg, X^T X"  # a single one is not copied: it may be most of the memory
    if samples and len(samples) == len(parts):
        rows = torch.cat(samples)
        return MatrixFree(rows), f"cg, {len(rows)} rows"
    return None
