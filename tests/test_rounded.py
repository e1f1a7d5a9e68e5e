"""Products in bfloat16 inside conjugate gradients, where a few directions of the inputs drown all others."""

import pytest
import torch
from test_reconstruction import problem

from hwpq_fx.gram import MatrixFree, Rounded
from hwpq_fx.kernels import select24
from hwpq_fx.reconstruction import reconstruct, refine

torch.set_num_threads(2)


def inputs(kind: str, channels: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """For calibration, and others like the ordinary ones of these."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(channels, channels, generator=generator) / channels**0.5 + torch.eye(channels)
    x, other = (torch.randn(rows, channels, generator=generator) @ mixed for rows in (1024, 512))
    if kind == "massive row":
        x[50] *= 1000
    elif kind == "massive rows":
        x[50:60] *= 1000
    elif kind == "mean":
        mean = 30 * torch.randn(channels, generator=generator)
        x, other = x + mean, other + mean
    return x, other


@pytest.mark.parametrize("kind", ["ordinary", "massive row", "massive rows", "mean"])
@pytest.mark.parametrize("free", [False, True])
def test_loud_directions_cost_no_more_than_in_float32(kind, free):
    x, other = inputs(kind)
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    gram = x.T @ x
    mask = select24(weight, gram.diagonal())[0]
    given = MatrixFree(x) if free else gram
    kwargs = {"blocks": given.blocks if free else None}

    def error(new: torch.Tensor, rows: torch.Tensor) -> float:
        return float(((new - weight) @ rows.T).norm() / (weight @ rows.T).norm())

    exact, rounded = (refine(weight, mask, given, **kwargs, fast=fast)[0] for fast in (None, Rounded(given)))
    assert not torch.equal(exact, rounded)
    for rows in (x, other):
        assert error(rounded, rows) < 1.03 * error(exact, rows)
    assert error(rounded, x) < 0.9 * error(weight * mask, x)
    assert not bool((rounded == weight * mask).all(1).any())


@pytest.mark.parametrize("free", [False, True])
def test_beside_a_loud_direction_products_are_as_exact_as_without_it(free):
    x, _ = inputs("massive row")
    rows = torch.randn(8, 128)
    loud = x[50] / x[50].norm()
    rows -= (rows @ loud)[:, None] * loud
    rows -= (rows @ loud)[:, None] * loud
    expected = rows.double() @ (x.double().T @ x.double())
    rounded = Rounded(MatrixFree(x) if free else x.T @ x)
    got = rounded(rows).double() * rounded.size
    assert float((got - expected).norm() / expected.norm()) < 1e-2
    plain = rows.bfloat16() @ (x.T @ x).bfloat16()
    assert float((plain.double() - expected).norm() / expected.norm()) > 1


@pytest.mark.parametrize("power", [-40, -3, 3, 40])
def test_a_power_of_two_changes_no_bit(power):
    weight, mask, x, gram = problem(0)
    for one, other, diagonal in (
        (gram, gram * 4.0**power, None),
        (MatrixFree(x), MatrixFree(x * 2.0**power), gram.diagonal()),
    ):
        scaled = None if diagonal is None else diagonal * 4.0**power
        new = reconstruct(weight, mask, one, diagonal=diagonal, fast=Rounded(one))
        assert torch.equal(reconstruct(weight, mask, other, diagonal=scaled, fast=Rounded(other)), new)


def test_fewer_directions_than_it_splits_off_and_dead_channels():
    weight, mask, x, _ = problem(1, samples=5)
    x[:, [0, 5, 6]] = 0
    for given in (x.T @ x, MatrixFree(x), torch.zeros(32, 32), MatrixFree(torch.zeros(3, 32))):
        rounded = Rounded(given)
        exact = weight @ given if isinstance(given, torch.Tensor) else given(weight)
        torch.testing.assert_close(rounded(weight) * rounded.size, exact, rtol=1e-3, atol=1e-3)
    assert torch.equal(reconstruct(weight, mask, torch.zeros(32, 32), fast=Rounded(torch.zeros(32, 32))), weight * mask)
