"""SparseGPT (arXiv 2301.00774) for 2:4, from the paper's algorithm 1: the yardstick of benchmarks/accuracy.py."""

import torch


def sparsegpt24(
    weight: torch.Tensor, gram: torch.Tensor, damping: float = 0.01, block: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune W [N, K] to 2:4 for inputs with X^T X = `gram` [K, K]: the new weight, float32, and its mask, True = kept.

    Columns are taken from left to right. The inverse of what is left of the Hessian comes from one Cholesky factor of
    the whole inverse; in every group of four the two with the smallest w^2 / [H^-1]_jj^2 go, and each that goes is made
    up for by the columns to its right. damping: share of the mean diagonal that is added to it.
    """
    rows, columns = weight.shape
    new = weight.detach().float().clone()
    hessian = gram.float().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    new[:, dead] = 0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    mask = torch.ones(rows, columns, dtype=torch.bool, device=weight.device)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.zeros(rows, stop - start, device=weight.device)
        for j in range(start, stop):
            if j % 4 == 0:
                worth = new[:, j : j + 4].square() / factor.diagonal()[j : j + 4].square()
                mask[:, j : j + 4] = mask[:, j : j + 4].scatter(1, worth.topk(2, largest=False).indices, False)
            error = new[:, j].masked_fill(mask[:, j], 0) / factor[j, j]
            new[:, j:stop] -= error[:, None] * factor[j, j:stop]
            new[:, j].masked_fill_(~mask[:, j], 0)
            errors[:, j - start] = error
        new[:, stop:] -= errors @ factor[start:stop, stop:]
    return new, mask
