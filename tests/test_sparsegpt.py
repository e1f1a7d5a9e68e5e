"""The yardstick of benchmarks/accuracy.py does what its paper says."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from sparsegpt import sparsegpt24


def problem(rows, columns, samples=256):
    x = torch.randn(samples, columns) @ torch.randn(columns, columns)
    return torch.randn(rows, columns), x.T @ x


def loss(weight, new, gram):
    error = (new - weight).double()
    return ((error @ gram.double()) * error).sum(1)


def test_two_of_every_four_stay():
    weight, gram = problem(8, 160)
    new, mask = sparsegpt24(weight, gram, block=48)
    assert (mask.view(8, 40, 4).sum(-1) == 2).all()
    assert (new[~mask] == 0).all() and (new[mask] != 0).all()


def test_equals_optimal_brain_surgeon_where_all_that_stays_is_to_the_right():
    """Then every kept weight can still answer, and the answer is the least squares one."""
    weight, gram = problem(1, 4)
    weight[0, :2] *= 1e-3  # the first two go
    new, mask = sparsegpt24(weight, gram, damping=0.0)
    assert mask.tolist() == [[False, False, True, True]]
    kept = torch.tensor([2, 3])
    best = torch.linalg.solve(gram[kept][:, kept].double(), gram[kept].double() @ weight[0].double())
    torch.testing.assert_close(new[0, kept].double(), best, rtol=1e-3, atol=1e-4)


def test_loses_less_than_the_mask_alone_and_blocks_do_not_matter():
    weight, gram = problem(16, 128)
    new, mask = sparsegpt24(weight, gram)
    assert loss(weight, new, gram).sum() < 0.7 * loss(weight, weight * mask, gram).sum()
    other, same = sparsegpt24(weight, gram, block=32)
    assert torch.equal(mask, same)
    torch.testing.assert_close(new, other, rtol=1e-3, atol=1e-3)


def test_dead_channels():
    weight, gram = problem(4, 16)
    gram[5], gram[:, 5] = 0, 0
    new, _ = sparsegpt24(weight, gram)
    assert new.isfinite().all() and (new[:, 5] == 0).all()
