import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hwpq_fx.compensation import COMPENSATIONS, compensate


def _data(seed, rows=6, columns=24):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mask = torch.rand(rows, columns, generator=generator) < 0.5
    mask[:, 0] = True
    return weight, mask, torch.exp(torch.randn(columns, generator=generator))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31))
def test_energy_is_the_formula(seed):
    w, mask, s = _data(seed)
    terms = w.double() ** 2 * s
    expected = (terms.sum(1) / (terms * mask).sum(1)).sqrt()
    got = compensate(w, mask, s, "energy")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)
    assert bool((got >= 1).all())


def test_energy_keeps_the_output_energy_of_uncorrelated_inputs():
    w, mask, _ = _data(0)
    x = torch.linalg.qr(torch.randn(64, 24))[0] * torch.rand(24)
    factor = compensate(w, mask, x.square().sum(0))
    before, after = x @ w.T, x @ (factor[:, None] * w * mask).T
    torch.testing.assert_close(after.norm(dim=0), before.norm(dim=0))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), rows=st.integers(-60, 60), inputs=st.integers(-60, 60))
def test_scale_does_not_matter(seed, rows, inputs):
    w, mask, s = _data(seed)
    assert torch.equal(compensate(w, mask, s), compensate(w * 2.0**rows, mask, s * 2.0**inputs))


@pytest.mark.parametrize("scale", [1e-38, 1e38])
def test_extreme_scales_do_not_overflow(scale):
    w, mask = torch.ones(1, 4) * scale, torch.tensor([[True, False, False, False]])
    assert compensate(w, mask, torch.ones(4) * scale).tolist() == [2.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    w, mask, s = _data(1)
    assert torch.equal(compensate(w.to(dtype), mask, s), compensate(w.to(dtype).float(), mask, s))


def test_rows_without_anything_to_keep_are_left_alone():
    w, mask, s = _data(2)
    mask[0], mask[1], w[2] = False, True, 0
    s[3] = 0
    w[3], mask[3] = 0, False
    w[3, 3], mask[3, 3] = 1, True  # only a dead channel is left of this row
    assert compensate(w, mask, s)[:4].tolist() == [1.0, 1.0, 1.0, 1.0]


def test_data_free_is_all_ones():
    w, mask, s = _data(3)
    assert torch.equal(compensate(w, mask), compensate(w, mask, torch.ones_like(s)))


def test_none_is_ones():
    w, mask, s = _data(4)
    got = compensate(w, mask, s, "none")
    assert got.dtype == torch.float32
    assert got.tolist() == [1.0] * 6


def test_errors():
    w, mask, s = _data(0)
    with pytest.raises(ValueError, match=r"'hessian'.*energy, none"):
        compensate(w, mask, s, "hessian")
    for name in COMPENSATIONS:
        with pytest.raises(ValueError, match="mask must be bool"):
            compensate(w, mask[:, 1:], s, name)
        with pytest.raises(ValueError, match="mask must be bool"):
            compensate(w, mask.float(), s, name)
        with pytest.raises(ValueError, match="sum_sq"):
            compensate(w, mask, s[1:], name)
