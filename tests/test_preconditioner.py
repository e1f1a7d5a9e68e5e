"""What leads conjugate gradients: near X^T X, inverted row by row, and worth its price."""

import pytest
import torch
from test_reconstruction import exact_loss, problem
from test_rounded import inputs

from hwpq_fx.gram import MatrixFree, Rounded, size_of
from hwpq_fx.kernels import select24
from hwpq_fx.preconditioner import QUIET, RANK, Preconditioner
from hwpq_fx.reconstruction import lead, reconstruct, refine

torch.set_num_threads(2)


def decaying(channels=128, samples=512, seed=0):
    """X of which each direction is less loud than the one before, and channels of different scales."""
    random = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(channels, channels, generator=random)).Q
    loudness = 30 / torch.arange(1, channels + 1)
    scales = torch.exp(torch.randn(channels, generator=random))
    return (torch.randn(samples, channels, generator=random) * loudness) @ directions * scales


def whole(led_by):
    return torch.diag(led_by.rest) + led_by.factor.T @ led_by.factor


def test_it_is_near_what_it_stands_for():
    x = decaying()
    gram = x.T @ x
    gram /= size_of(gram.diagonal())
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(128)
    led_by = lead(gram)
    assert led_by.factor.shape == (RANK, 128)
    torch.testing.assert_close(led_by.scale, damped.diagonal())
    torch.testing.assert_close(whole(led_by).diagonal(), damped.diagonal(), rtol=1.1 * QUIET, atol=0)
    # how far from each other the eigenvalues of P^-1 G are is what the number of steps depends on
    spread = {
        name: float(values[-1] / values[0])
        for name, values in (
            ("diagonal", torch.linalg.eigvals(torch.linalg.solve(torch.diag(led_by.scale), damped)).real.sort().values),
            ("led", torch.linalg.eigvals(torch.linalg.solve(whole(led_by), damped)).real.sort().values),
        )
    }
    assert spread["led"] < 0.2 * spread["diagonal"]


def test_downhill_is_the_inverse_over_what_is_kept():
    x = decaying()
    led_by = lead(x.T @ x)
    kept = torch.rand(5, 128) < 0.5
    kept[1], kept[2] = True, False
    slope = torch.randn(5, 128)
    got = led_by.among(kept)(slope)
    for row, mask in enumerate(kept):
        expected = torch.linalg.solve(whole(led_by)[mask][:, mask].double(), -slope[row, mask].double())
        torch.testing.assert_close(got[row, mask].double(), expected, rtol=1e-3, atol=1e-3 * float(got.abs().max()))
        assert not bool(got[row, ~mask].any())


def test_steps_led_by_loud_directions_go_further():
    x = decaying()
    gram, weight = x.T @ x, torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    mask = select24(weight, gram.diagonal())[0]
    led_by, alone = lead(gram), lead(gram)
    alone.factor, alone.rest = torch.zeros_like(alone.factor), alone.scale  # the diagonal
    best, led, others = (
        float(exact_loss(weight, reconstruct(weight, mask, gram, steps, led_by=by), x).sum())
        for steps, by in ((100, led_by), (4, led_by), (8, alone))
    )
    assert best <= led < others
    assert led - best < 0.5 * (others - best)


@pytest.mark.parametrize("kind", ["massive row", "massive rows", "mean"])
@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_directions_of_any_loudness(kind, free, fast):
    x, _ = inputs(kind)
    gram = x.T @ x
    given = MatrixFree(x) if free else gram
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    mask = select24(weight, gram.diagonal())[0]
    new, chosen = refine(
        weight, mask, given, blocks=given.blocks if free else None, fast=Rounded(given) if fast else None
    )
    before, after = exact_loss(weight, weight * mask, x), exact_loss(weight, new, x)
    assert bool((after < 0.9 * before).all())
    assert float(new.abs().max()) < 20 * float(weight.abs().max()) and not bool(new[~chosen].any())


@pytest.mark.parametrize("samples", [1, 5, 40])
def test_fewer_directions_than_it_takes_and_dead_channels(samples):
    x = decaying(32, samples)
    x[:, [0, 9]] = 0
    led_by = lead(x.T @ x, damping=0)
    assert not bool(led_by.factor[:, [0, 9]].any()) and led_by.rest[[0, 9]].tolist() == [0, 0]
    assert bool((led_by.rest >= QUIET * led_by.scale).all())
    new = reconstruct(torch.randn(4, 32), torch.rand(4, 32) < 0.5, x.T @ x, 50, damping=0, led_by=led_by)
    assert bool(new.isfinite().all())


def test_what_is_no_gram_leaves_the_diagonal():
    weight, mask, _, gram = problem(0)
    led_by = Preconditioner(lambda rows: rows @ -gram, gram.diagonal(), 0.0)
    assert not bool(led_by.factor.any()) and torch.equal(led_by.rest, gram.diagonal())
    assert bool(led_by.among(mask)(weight).isfinite().all())


def test_parts_share_it():
    weight, mask, _, gram = problem(1)
    kwargs = {"led_by": lead(gram)}
    assert torch.equal(reconstruct(weight, mask, gram, **kwargs), reconstruct(weight, mask, gram))
    assert torch.equal(refine(weight, mask, gram, **kwargs)[0], refine(weight, mask, gram)[0])
