"""Wanda's n:m pruning, written from its description (arXiv 2306.11695, section 3 and the released code's loop).

metric = |W| * ||x_j||, W [N, K]; of every four neighbours along K the two smallest go.
"""

import torch


def metric(weight: torch.Tensor, sum_sq: torch.Tensor) -> torch.Tensor:
    """|W| times the norm of each input channel: [N, K] float32 for float32 `sum_sq` [K]."""
    return weight.abs() * sum_sq.sqrt().view(1, -1)


def published_loop(weight: torch.Tensor, sum_sq: torch.Tensor) -> torch.Tensor:
    """Bool [N, K], True = pruned: one topk of [N, 4] after the other along K, scattered into the mask."""
    scores = metric(weight, sum_sq)
    pruned = torch.zeros(scores.shape, dtype=torch.bool)
    for start in range(0, scores.shape[1], 4):
        group = scores[:, start : start + 4].float()
        pruned.scatter_(1, start + torch.topk(group, 2, dim=1, largest=False)[1], True)
    return pruned


def vectorised(weight: torch.Tensor, sum_sq: torch.Tensor) -> torch.Tensor:
    """The same with one topk over [N * K / 4, 4]."""
    scores = metric(weight, sum_sq)
    groups = scores.view(-1, 4)
    pruned = torch.zeros(groups.shape, dtype=torch.bool)
    return pruned.scatter_(1, torch.topk(groups, 2, dim=1, largest=False)[1], True).view_as(scores)
