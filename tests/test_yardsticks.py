"""The yardsticks of benchmarks/accuracy.py, ALPS and SparseGPT, do what their papers say."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from alps import alps24
from sparsegpt import sparsegpt24

from hwpq_fx.kernels import best_two


def problem(rows, columns, samples=256):
    x = torch.randn(samples, columns) @ torch.randn(columns, columns)
    return torch.randn(rows, columns), x.T @ x


def loss(weight, new, gram):
    error = (new - weight).double()
    return ((error @ gram.double()) * error).sum(1)


def largest(metric):
    return best_two(metric.unflatten(1, (-1, 4))).flatten(1)


def least_squares(weight, mask, gram, damping=0.01):
    """The weights on the mask that lose least: the normal equations, row by row."""
    hessian = gram.double() + damping * gram.double().diagonal().mean() * torch.eye(len(gram))
    best = torch.zeros_like(weight, dtype=torch.double)
    for row, kept, full in zip(best, mask, weight.double(), strict=True):
        row[kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ full)
    return best


def test_two_of_every_four_stay():
    weight, gram = problem(8, 160)
    new, mask = alps24(weight, gram)
    assert (mask.view(8, 40, 4).sum(-1) == 2).all()
    assert (new[~mask] == 0).all() and (new[mask] != 0).all()


def test_the_kept_weights_are_the_least_squares_ones():
    weight, gram = problem(8, 64)
    new, mask = alps24(weight, gram, steps=200)
    torch.testing.assert_close(new.double(), least_squares(weight, mask, gram), rtol=1e-3, atol=1e-3)
    few, same = alps24(weight, gram, steps=1)
    assert torch.equal(mask, same) and loss(weight, new, gram).sum() < loss(weight, few, gram).sum()


def test_independent_inputs_keep_what_is_worth_most_as_it_is():
    """Where two of every four matter far more, no penalty lets others in, however w^2 g is shared between w and g."""
    gram = torch.diag(10 ** torch.linspace(-3, 3, 64)[torch.randperm(64)])
    worth = torch.rand(16, 16, 4).argsort(-1).ge(2).flatten(1) * 10.0 + 1 + torch.rand(16, 64)
    weight = worth / (gram.diagonal() + 0.01 * gram.diagonal().mean()).sqrt()
    new, mask = alps24(weight, gram)
    assert torch.equal(mask, worth > 5)
    assert not torch.equal(mask, largest(weight.abs()))
    torch.testing.assert_close(new, weight * mask)


def test_independent_inputs_in_general():
    """The penalty starts small, so that pairs that are worth nearly the same may be exchanged, and only those."""
    weight, gram = torch.randn(32, 128), torch.diag(torch.rand(128) + 0.1)
    new, mask = alps24(weight, gram)
    best = largest(weight.abs() * gram.diagonal().sqrt())
    assert (mask == best).float().mean() > 0.95
    assert loss(weight, new, gram).sum() < 1.05 * loss(weight, weight * best, gram).sum()


@pytest.mark.parametrize("rank", [24, 128])
def test_loses_less_than_sparsegpt_and_than_the_best_weights_on_wandas_mask(rank):
    """Inputs as layers have them: some directions matter far more than others."""
    mine, theirs, masked = 0.0, 0.0, 0.0
    for _ in range(5):
        x = torch.randn(512, rank) @ torch.randn(rank, 128) + 0.1 * torch.randn(512, 128)
        weight, gram = torch.randn(32, 128), x.T @ x
        mine += loss(weight, alps24(weight, gram)[0], gram).sum()
        theirs += loss(weight, sparsegpt24(weight, gram)[0], gram).sum()
        wanda = largest(weight.abs() * gram.diagonal().sqrt())
        masked += loss(weight, least_squares(weight, wanda, gram), gram).sum()
    assert mine < 0.7 * theirs
    assert mine < 0.95 * masked


def test_it_stops_by_itself():
    weight, gram = problem(16, 64)
    new, mask = alps24(weight, gram, iterations=300)
    longer, same = alps24(weight, gram, iterations=600)
    assert torch.equal(mask, same) and torch.equal(new, longer)
    assert not torch.equal(mask, alps24(weight, gram, iterations=6)[1])


def test_a_first_penalty_too_small_grows():
    weight, gram = problem(16, 64)
    usual, small = (loss(weight, alps24(weight, gram, penalty=penalty)[0], gram).sum() for penalty in (0.1, 1e-3))
    assert 0.9 * usual < small < 1.1 * usual


def test_a_first_penalty_too_large_starts_again_smaller():
    """At 1e6, ADMM would leave the mask as it began."""
    weight, gram = problem(16, 64)
    start = largest(weight.abs() * (gram.diagonal() + 0.01 * gram.diagonal().mean()).sqrt())
    assert torch.equal(alps24(weight, gram, penalty=1e6, iterations=3)[1], start)
    assert not torch.equal(alps24(weight, gram, penalty=1e6)[1], start)


def test_the_scale_of_inputs_and_weights_does_not_matter():
    weight, gram = problem(4, 32)
    new, mask = alps24(weight, gram)
    other, same = alps24(weight * 8, gram * 64)
    assert torch.equal(mask, same)
    torch.testing.assert_close(other / 8, new)


def test_dead_channels_and_dead_rows():
    weight, gram = problem(4, 16)
    gram[5], gram[:, 5] = 0, 0
    weight[2] = 0
    new, mask = alps24(weight, gram)
    assert new.isfinite().all() and (mask.view(4, 4, 4).sum(-1) == 2).all()
    assert (new[2] == 0).all()


def test_two_of_every_four_stay_by_sparsegpt():
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
