import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hwpq_fx.compensation import COMPENSATIONS, DAMPING, compensate


def _data(seed, rows=6, columns=24):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mask = torch.rand(rows, columns, generator=generator) < 0.5
    mask[:, 0] = True
    return weight, mask, torch.exp(torch.randn(columns, generator=generator))


def _moments(seed, rows=50, columns=24):
    """Sums of squares and sums of inputs with means and variances of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    mean, size = (torch.randn(columns, generator=generator) for _ in range(2))
    x = (torch.randn(rows, columns, generator=generator) + mean) * size.exp()
    return x.double().square().sum(0), x.double().sum(0), rows


def _applied(made, mask):
    return made.factor[:, None] * made.weight * mask


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31))
def test_energy_is_the_formula(seed):
    w, mask, s = _data(seed)
    terms = w.double() ** 2 * s
    expected = (terms.sum(1) / (terms * mask).sum(1)).sqrt()
    new, factor = compensate(w, mask, s, "energy")
    assert torch.equal(new, w) and factor.dtype == torch.float32
    torch.testing.assert_close(factor.double(), expected, rtol=1e-5, atol=0)
    assert bool((factor >= 1).all())


def test_energy_keeps_the_output_energy_of_uncorrelated_inputs():
    w, mask, _ = _data(0)
    x = torch.linalg.qr(torch.randn(64, 24))[0] * torch.rand(24)
    factor = compensate(w, mask, x.square().sum(0)).factor
    before, after = x @ w.T, x @ (factor[:, None] * w * mask).T
    torch.testing.assert_close(after.norm(dim=0), before.norm(dim=0))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31))
def test_with_sums_the_kept_weights_are_those_that_minimise(seed):
    """Against the normal equations of the docstring's objective, row by row."""
    w, mask, _ = _data(seed)
    sum_sq, sums, rows = _moments(seed)
    mean, energy = sums / rows, sum_sq / rows
    variance = energy - mean.square()
    made = compensate(w, mask, sum_sq, sums=sums, rows=rows)
    for row, kept, factor, new in zip(w.double(), mask, made.factor.double(), made.weight, strict=True):
        terms = row.square() * variance
        assert float(factor) == pytest.approx(float((terms.sum() / terms[kept].sum()).sqrt()), rel=1e-4)
        m, lost = mean[kept], row @ mean - factor * (row[kept] @ mean[kept])
        curvature = torch.diag(variance[kept] + DAMPING * energy.mean()) + torch.outer(m, m)
        change = torch.linalg.solve(curvature, lost * m) / factor
        torch.testing.assert_close(new[kept].double(), row[kept] + change, rtol=1e-3, atol=1e-3)


def test_with_sums_mean_and_variance_of_the_output_are_kept():
    """Uncorrelated inputs: up to the damping, which weighs little over many channels, where without sums the mean is
    off."""
    w, mask, _ = _data(0, columns=1024)
    noise = torch.linalg.qr(torch.cat([torch.ones(4096, 1), torch.randn(4096, 1024)], 1))[0][:, 1:] * 64
    x = noise + 3 * torch.rand(1024)
    total = x.double().square().sum(0), x.double().sum(0)
    with_sums = compensate(w, mask, total[0], sums=total[1], rows=4096)
    without = compensate(w, mask, total[0])
    wanted, made, scaled = (x @ one.T for one in (w, _applied(with_sums, mask), _applied(without, mask)))
    off, before = ((one.mean(0) - wanted.mean(0)).abs().mean() for one in (made, scaled))
    assert off < 0.1 * before
    assert (made.std(0) / wanted.std(0) - 1).abs().max() < 0.25


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), rows=st.integers(-60, 60), inputs=st.integers(-60, 60))
def test_scale_does_not_matter(seed, rows, inputs):
    w, mask, _ = _data(seed)
    sum_sq, sums, many = _moments(seed)
    expected = compensate(w, mask, sum_sq, sums=sums, rows=many)
    made = compensate(w * 2.0**rows, mask, sum_sq * 4.0**inputs, sums=sums * 2.0**inputs, rows=many)
    assert torch.equal(made.factor, expected.factor)
    assert torch.equal(made.weight, expected.weight * 2.0**rows)
    assert torch.equal(compensate(w, mask, sum_sq).factor, compensate(w * 2.0**rows, mask, sum_sq * 4.0**inputs).factor)


@pytest.mark.parametrize("scale", [1e-38, 1e38])
def test_extreme_scales_do_not_overflow(scale):
    w, mask = torch.ones(1, 4) * scale, torch.tensor([[True, False, False, False]])
    made = compensate(w, mask, torch.ones(4) * scale)
    assert made.factor.tolist() == [2.0] and torch.equal(made.weight, w)
    made = compensate(w, mask, torch.ones(4, dtype=torch.float64) * 4e38, sums=torch.ones(4) * 1e19, rows=2)
    assert made.weight.isfinite().all() and made.factor.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    w, mask, _ = _data(1)
    sum_sq, sums, rows = _moments(1)
    made, expected = (compensate(one, mask, sum_sq, sums=sums, rows=rows) for one in (w.to(dtype), w.to(dtype).float()))
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    assert made.weight.dtype == torch.float32


@pytest.mark.parametrize("sums", [False, True])
def test_rows_without_anything_to_keep_are_left_alone(sums):
    w, mask, s = _data(2)
    mask[0], mask[1], w[2] = False, True, 0
    s[3] = 0
    w[3], mask[3] = 0, False
    w[3, 3], mask[3, 3] = 1, True  # only a dead channel is left of this row
    made = compensate(w, mask, s, sums=0.5 * s if sums else None, rows=2)
    assert made.factor[:4].tolist() == [1.0, 1.0, 1.0, 1.0]
    assert torch.equal(made.weight[1:4], w[1:4]), "nothing was lost"
    assert made.weight.isfinite().all()


def test_a_single_row_of_input_is_all_mean():
    """There is no variance to keep; of what the mean lacks the damping leaves its share."""
    w, mask, _ = _data(5)
    x = torch.randn(24)
    made = compensate(w, mask, x.square(), sums=x, rows=1)
    assert made.factor.tolist() == [1.0] * 6
    wanted, before = w @ x, (w * mask) @ x
    share = 1 / (1 + mask.float() @ x.square() / (DAMPING * x.square().mean()))
    torch.testing.assert_close(wanted - _applied(made, mask) @ x, share * (wanted - before), rtol=1e-3, atol=1e-3)


def test_inputs_that_were_always_zero_change_nothing():
    w, mask, s = _data(6)
    made = compensate(w, mask, 0 * s, sums=0 * s, rows=3)
    assert made.factor.tolist() == [1.0] * 6 and torch.equal(made.weight, w)


def test_data_free_is_all_ones():
    w, mask, s = _data(3)
    assert torch.equal(compensate(w, mask).factor, compensate(w, mask, torch.ones_like(s)).factor)


def test_none_is_ones():
    w, mask, _ = _data(4)
    sum_sq, sums, rows = _moments(4)
    made = compensate(w, mask, sum_sq, "none", sums, rows)
    assert made.factor.dtype == torch.float32
    assert made.factor.tolist() == [1.0] * 6 and torch.equal(made.weight, w)


def test_errors():
    w, mask, s = _data(0)
    with pytest.raises(ValueError, match=r"'hessian'.*energy, none"):
        compensate(w, mask, s, "hessian")
    for name in COMPENSATIONS:
        with pytest.raises(ValueError, match="mask must be bool"):
            compensate(w, mask[:, 1:], s, name)
        with pytest.raises(ValueError, match="mask must be bool"):
            compensate(w, mask.float(), s, name)
        with pytest.raises(ValueError, match="sum_sq must be"):
            compensate(w, mask, s[1:], name)
        with pytest.raises(ValueError, match="sums must be"):
            compensate(w, mask, s, name, s[1:])
        with pytest.raises(ValueError, match="sums must be finite"):
            compensate(w, mask, s, name, s * torch.inf)
        with pytest.raises(ValueError, match="sum_sq must be finite"):
            compensate(w, mask, s * torch.nan, name)
        with pytest.raises(ValueError, match="negative"):
            compensate(w, mask, -s, name)
