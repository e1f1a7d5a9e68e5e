"""What conjugate gradients ask of an input X [R, K]: X^T X, or a sample of the rows where it would not fit."""

from collections.abc import Sequence
from functools import reduce

import torch

from .reconstruction import Gram, MatrixFree

# Rows of a sample. MiniLM: 2048 of 7313 rows keep nine tenths of what all of them give, 512 rows three quarters.
SAMPLE_ROWS = 4096


class GramMatrix:
    """X^T X, float32 [K, K]."""

    def __init__(self, channels: int, device: torch.device):
        self.matrix = torch.zeros(channels, channels, device=device)

    def update(self, rows: torch.Tensor) -> None:
        """Add rows [R, K], any floating dtype."""
        rows = rows.float()
        self.matrix.addmm_(rows.T, rows)


class RowSample:
    """Up to `capacity` rows, each row seen so far being as likely to be among them as any other."""

    def __init__(self, channels: int, device: torch.device, capacity: int):
        self.capacity = capacity
        self.rows = torch.empty(0, channels, device=device)
        self._lots = torch.empty(0)
        self._random = torch.Generator().manual_seed(0)

    def update(self, rows: torch.Tensor) -> None:
        """Offer rows [R, K], any floating dtype."""
        # every row draws a lot, and the highest ones stay: no matter how the rows were cut into batches
        lots = torch.cat([self._lots, torch.rand(rows.shape[0], generator=self._random)])
        self._lots, chosen = lots.topk(min(self.capacity, len(lots)))
        self.rows = torch.cat([self.rows, rows.float()])[chosen.to(rows.device)]


Curvature = GramMatrix | RowSample


class CurvatureBudget:
    """Hands out the one or the other until `limit` bytes are spent, and then nothing."""

    def __init__(self, limit: int):
        self.left = limit

    def grant(self, channels: int, device: torch.device) -> Curvature | None:
        """X^T X where it fits, else a sample of rows, or None where not even a few hundred rows fit."""
        if (size := 4 * channels * channels) <= self.left:
            self.left -= size
            return GramMatrix(channels, device)
        capacity = min(SAMPLE_ROWS, self.left // (4 * channels))
        if capacity < 256:
            return None
        self.left -= 4 * channels * capacity
        return RowSample(channels, device, capacity)


def combined(parts: Sequence[Curvature | None], device: torch.device) -> tuple[Gram, str] | None:
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
