import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hwpq_fx.kernels.saliency import SALIENCIES, score, score_with, terms_of, unit_scaled
from hwpq_fx.kernels.select24 import SELECTIONS, choose24

ROW_SCALE_FREE = [name for name in SALIENCIES if name != "relative"]


def _data(seed, rows=6, columns=24):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight, torch.exp(2 * torch.randn(columns, generator=generator))


def _formula(name, w, s):
    w, s = w.double(), s.double()
    return {
        "contribution": lambda: w**2 * s,
        "rank_one": lambda: w**2 / (1 - s / s.sum()),
        "relative": lambda: (
            (w.abs() / w.abs().sum(1, keepdim=True) + w.abs() / w.abs().sum(0, keepdim=True)) * s.sqrt() ** 0.5
        ),
        "magnitude": lambda: w.abs(),
    }[name]()


def _exponents(count):
    return st.lists(st.integers(-60, 60), min_size=count, max_size=count).map(torch.tensor)


@pytest.mark.parametrize("name", SALIENCIES)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31))
def test_score_is_the_formula_up_to_one_factor_per_row(name, seed):
    w, s = _data(seed)
    factor = score(w, s, name) / _formula(name, w, s)
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), rtol=1e-5, atol=0)
    if name != "relative":  # sum_sq is scaled before RIA takes its fourth root
        free = torch.log2(score(w, None, name) / _formula(name, w, torch.ones_like(s)))
        torch.testing.assert_close(free, free.round(), rtol=0, atol=1e-5)


def test_contribution_ranks_like_wanda():
    w, s = _data(3, 32, 256)
    wanda = (w.abs() * s.sqrt()).view(-1, 4).topk(2).indices
    mask = torch.zeros(wanda.shape[0], 4, dtype=torch.bool).scatter_(1, wanda, True)
    assert torch.equal(choose24(score(w, s))[0], mask.view_as(w))


@pytest.mark.parametrize("name", ROW_SCALE_FREE)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), rows=_exponents(6), inputs=st.integers(-60, 60))
def test_masks_survive_powers_of_two(name, seed, rows, inputs):
    w, s = _data(seed)
    plain = score(w, s, name)
    scaled = score(w * torch.exp2(rows.float())[:, None], s * 2.0**inputs, name)
    assert torch.equal(plain, scaled)
    for selection in SELECTIONS:
        assert torch.equal(choose24(plain, selection)[0], choose24(scaled, selection)[0])


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), weights=st.integers(-60, 60), inputs=st.integers(-60, 60))
def test_relative_survives_scaling_the_whole_weight(seed, weights, inputs):
    w, s = _data(seed)
    assert torch.equal(score(w, s, "relative"), score(w * 2.0**weights, s * 2.0**inputs, "relative"))


def test_relative_ties_rows_together():
    w, s = _data(0)
    other = w.clone()
    other[0] *= 1024
    assert not torch.equal(score(w, s, "relative")[1], score(other, s, "relative")[1])


@pytest.mark.parametrize("name", SALIENCIES)
@pytest.mark.parametrize("peak", [2.0**-149, 1e-38, 1e-20, 1e20, 3e38])
def test_extreme_scales_neither_overflow_nor_vanish(name, peak):
    w = torch.tensor([[1.0, -1.0, 0.5, 1.0]]) * peak
    s = torch.tensor([1.0, 0.5, 0.25, 1.0]) * peak
    got = score(w, s, name)
    assert bool(torch.isfinite(got).all())
    assert got[0, 0] > 0
    assert got[0, 0] == got[0, 3]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_unit_scaled_is_one_exact_power_of_two(values):
    x = torch.tensor(values, dtype=torch.float32)
    y = unit_scaled(x)
    peak = float(x.abs().max())
    if peak == 0:
        assert torch.equal(y, x)
        return
    assert 0.5 <= float(y.abs().max()) < 1
    exponent = torch.frexp(x.abs().max().double()).exponent
    assert torch.equal(y, (x.double() * 2.0 ** -int(exponent)).float())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_unit_scaled_refuses_what_is_not_finite(bad):
    with pytest.raises(ValueError, match="finite"):
        unit_scaled(torch.tensor([[1.0, 2.0], [bad, 1.0]]))


@pytest.mark.parametrize("name", SALIENCIES)
def test_given_its_terms_a_score_is_elementwise(name):
    w, s = _data(6)
    whole, terms = score(w, s, name), terms_of(w, s, name)
    rows = terms._replace(row=None if terms.row is None else terms.row[2:4])
    assert torch.equal(score_with(w[2:4], rows, name), whole[2:4])


@pytest.mark.parametrize("name", SALIENCIES)
def test_zero_rows_and_columns_score_zero(name):
    w, s = _data(1)
    w[2], w[:, 5] = 0, 0
    got = score(w, s, name)
    assert bool(torch.isfinite(got).all())
    assert not got[2].any()
    assert not got[:, 5].any()
    assert bool((got[:2, :5] > 0).all())
    assert not score(torch.zeros(4, 8), None, name).any()
    assert bool(torch.isfinite(score(w, torch.zeros_like(s), name)).all())


def test_rank_one_with_a_single_live_channel_is_finite():
    got = score(torch.ones(1, 4), torch.tensor([0.0, 7.0, 0.0, 0.0]), "rank_one")
    assert bool(torch.isfinite(got).all())
    assert got[0, 1] > got[0, 0] > 0


@pytest.mark.parametrize("name", SALIENCIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_is_computed_in_float32(name, dtype):
    w, s = _data(2)
    w, s = w.to(dtype), s.to(dtype)
    got = score(w, s, name)
    assert got.dtype == torch.float32
    assert torch.equal(got, score(w.float(), s.float(), name))


@pytest.mark.parametrize("name", SALIENCIES)
def test_default_dtype_does_not_matter(name):
    w, s = _data(2)
    expected, free = score(w, s, name), score(w, None, name)
    torch.set_default_dtype(torch.float16)
    try:
        assert torch.equal(score(w, s, name), expected)
        assert torch.equal(score(w, None, name), free)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", SALIENCIES)
def test_data_free_is_all_ones(name):
    w, s = _data(4)
    assert torch.equal(score(w, None, name), score(w, torch.ones_like(s), name))


def test_arguments_are_left_alone():
    w, s = _data(5)
    kept = w.clone(), s.clone()
    for name in SALIENCIES:
        score(w, s, name)
    assert torch.equal(w, kept[0])
    assert torch.equal(s, kept[1])


def test_errors():
    w, s = _data(0)
    with pytest.raises(ValueError, match=r"'wanda'.*contribution, rank_one, relative, magnitude"):
        score(w, s, "wanda")
    with pytest.raises(ValueError, match=r"sum_sq must be \[24\], got \[23\]"):
        score(w, s[1:])
    with pytest.raises(ValueError, match="negative"):
        score(w, -s)
    with pytest.raises(ValueError, match=r"\[N, K\]"):
        score(w[0], s)
    with pytest.raises(ValueError, match="floating point"):
        score(w.int(), s)
    with pytest.raises(ValueError, match="not empty"):
        score(w[:, :0], s[:0])
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="finite"):
            score(w, s * bad)
        with pytest.raises(ValueError, match="finite"):
            score(w * bad, s)
