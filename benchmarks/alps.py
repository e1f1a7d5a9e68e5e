"""ALPS (arXiv 2406.07831) for 2:4, from the paper's algorithms 1 and 2: a yardstick of benchmarks/accuracy.py."""

import torch

from hwpq_fx.kernels import best_two

EVERY = 3  # iterations between two looks at the share of the mask that has changed
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # where more than so much has, the penalty is multiplied by that
FEW, SHRINK = 0.005, 5.0  # no more than so much at the first look: the penalty was so many times too large
LONG, LITTLE = 30, 3e-4  # after so many iterations, less than so much is nothing


def alps24(
    weight: torch.Tensor,
    gram: torch.Tensor,
    damping: float = 0.01,
    penalty: float = 0.1,
    iterations: int = 300,
    steps: int = 10,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune W [N, K] to 2:4 for inputs with X^T X = `gram` [K, K]: the new weight, float32, and its mask, True = kept.

    ADMM chooses the mask, `steps` of conjugate gradients fit the kept weights. Every channel is first scaled to a unit
    diagonal, so that the penalty means the same to all, and the gradients need no other preconditioner. damping: share
    of the mean diagonal that is added to it. The constants are those of the authors' code.
    """
    gram = gram.float()
    size = (gram.diagonal() + damping * gram.diagonal().mean()).sqrt()
    hessian = (gram / size / size[:, None]).fill_diagonal_(1)
    dense = weight.detach().float() * size
    target = dense @ hessian
    start, mask = _admm(dense, hessian, target, penalty, iterations)
    return _fitted(start, mask, hessian, target, steps) / size, mask


def _admm(
    dense: torch.Tensor, hessian: torch.Tensor, target: torch.Tensor, penalty: float, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Algorithm 1: `free` answers the inputs, `sparse` is 2:4, `dual` (the multipliers over the penalty) draws the two
    together, until the mask of `sparse` stays as it is. One eigendecomposition serves every penalty."""
    values, vectors = torch.linalg.eigh(hessian)
    first = _best(dense)
    sparse, dual, seen, growing = dense * first, torch.zeros_like(dense), first, False
    for iteration in range(iterations):
        if iteration % EVERY == 0:
            inverse = (vectors / (values + penalty)) @ vectors.T
        free = (target + penalty * (sparse - dual)) @ inverse
        dual += free
        mask = _best(dual)
        sparse = dual * mask
        dual -= sparse
        if iteration % EVERY == EVERY - 1:
            changed, seen = float((mask != seen).sum() / mask.sum()), mask
            if growing and (changed == 0 or (iteration >= LONG and changed < LITTLE)):
                break
            growing = growing or changed > FEW
            if growing:
                factor = next(factor for share, factor in GROWTH if changed > share)
                penalty, dual = penalty * factor, dual / factor
            else:
                penalty, sparse, dual, seen = penalty / SHRINK, dense * first, torch.zeros_like(dense), first
    return sparse, mask


def _fitted(
    start: torch.Tensor, mask: torch.Tensor, hessian: torch.Tensor, target: torch.Tensor, steps: int
) -> torch.Tensor:
    """Algorithm 2: conjugate gradients on the kept weights, all rows at once."""
    tiny = torch.finfo(start.dtype).tiny  # a row that has arrived moves by zero, not by 0 / 0
    new, residual = start, (target - start @ hessian) * mask
    direction, energy = residual, residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        curved = (direction @ hessian) * mask
        step = energy / (direction * curved).sum(1, keepdim=True).clamp_min(tiny)
        new, residual = new + step * direction, residual - step * curved
        before, energy = energy, residual.square().sum(1, keepdim=True)
        direction = residual + energy / before.clamp_min(tiny) * direction
    return new


def _best(weight: torch.Tensor) -> torch.Tensor:
    """The two largest magnitudes of every four neighbours: bool [N, K]."""
    return best_two(weight.abs().unflatten(1, (-1, 4))).flatten(1)
