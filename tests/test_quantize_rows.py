import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hwpq_fx.kernels import quantize_rows, quantize_weight_rows
from hwpq_fx.kernels.quantize_rows import E4M3, E4M3_MAX, MIN_SCALE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = float(torch.finfo(torch.float32).max)
QUANTIZERS = (quantize_rows, quantize_weight_rows)


def rows_of(strategy):
    return st.integers(1, 3).flatmap(
        lambda rows: st.lists(strategy, min_size=8 * rows, max_size=8 * rows).map(
            lambda flat: torch.tensor(flat, dtype=torch.float32).view(rows, 8)
        )
    )


# one row mixes magnitudes that become normal numbers, subnormals and zeros of e4m3
MIXED = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -448.0]), st.floats(-448, 448, width=32), st.floats(-2, 2, width=32))
ANYTHING = st.one_of(MIXED, st.floats(-LARGEST, LARGEST, width=32), st.floats(-(2.0**-120), 2.0**-120, width=32))


def half_ulp(scaled):
    """Half a unit in the last place of e4m3 at `scaled`: 3 bits after the leading one, 2^-9 apart below 2^-6."""
    exponent = scaled.abs().clamp(min=2.0**-6).log2().floor()
    return 2.0 ** (exponent - 3) / 2


@pytest.mark.parametrize("quantize", QUANTIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=80)
@given(x=rows_of(ANYTHING))
def test_error_is_half_a_unit_in_the_last_place(quantize, dtype, x):
    x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    values, scale = quantize(x)
    assert (values.dtype, values.shape) == (E4M3, x.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, (*x.shape[:-1], 1))
    scaled = x.double() / scale.double()
    # 2^-23 of it: the quotient is rounded to float32 before it is rounded to e4m3
    assert ((values.double() - scaled).abs() <= half_ulp(scaled) + scaled.abs() * 2.0**-23).all()


@pytest.mark.parametrize("quantize", QUANTIZERS)
@settings(deadline=None, max_examples=80)
@given(x=rows_of(ANYTHING))
def test_scale_is_amax_over_448(quantize, x):
    _, scale = quantize(x)
    amax = x.abs().max(-1, keepdim=True).values
    assert scale.equal(torch.maximum(amax / 448, torch.tensor(2.0**-126)))
    assert E4M3_MAX == torch.finfo(E4M3).max == 448
    assert torch.finfo(torch.float32).tiny == MIN_SCALE


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_the_largest_of_a_row_becomes_448(quantize):
    x = torch.randn(64, 40) * torch.logspace(-30, 30, 64).view(-1, 1)
    values, _ = quantize(x)
    assert values.float().abs().amax(-1).eq(448).all()
    assert values.float().sign().equal(torch.where(values.float() == 0, 0, x.sign()))


@pytest.mark.parametrize("quantize", QUANTIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros(quantize, dtype):
    values, scale = quantize(torch.zeros(2, 8, dtype=dtype))
    assert values.view(torch.uint8).tolist() == [[0] * 8] * 2
    assert scale.tolist() == [[2.0**-126]] * 2


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_tiny_rows_stay_finite(quantize):
    """Below 448 times the smallest normal float32 the scale stops, and the values shrink instead."""
    x = torch.tensor([[2.0**-149, 0, 0, 0], [2.0**-126, -(2.0**-127), 2.0**-135, 0], [448 * 2.0**-126, 0, 0, 1e-40]])
    values, scale = quantize(x)
    assert scale.eq(2.0**-126).all()
    assert values.float().tolist() == [[0, 0, 0, 0], [1, -0.5, 2.0**-9, 0], [448, 0, 0, 2.0**-7]]


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_huge_rows_do_not_overflow(quantize):
    x = torch.tensor([[LARGEST, -LARGEST, LARGEST / 2, 0]])
    values, scale = quantize(x)
    assert values.float().tolist() == [[448, -448, 224, 0]]
    assert scale.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_spread_over_their_row_only(bad, dtype):
    x = torch.randn(3, 8).to(dtype)
    values, scale = quantize_rows(x)
    x[1, 5] = bad
    with_bad, bad_scale = quantize_rows(x)
    assert (with_bad.float() * bad_scale)[1].isnan().all()
    others = [0, 2]
    assert with_bad.view(torch.uint8)[others].equal(values.view(torch.uint8)[others])
    assert bad_scale[others].equal(scale[others])


@pytest.mark.parametrize("quantize", QUANTIZERS)
@settings(deadline=None, max_examples=60)
@given(x=rows_of(MIXED), power=st.integers(-60, 60))
def test_a_power_of_two_moves_into_the_scale(quantize, x, power):
    x[:, 0] = x[:, 0].clamp(min=1.0)  # away from the smallest scale
    values, scale = quantize(x)
    moved, moved_scale = quantize(x * 2.0**power)
    # where the product is still a normal number, nothing is lost in it
    exact = (x * 2.0**power).abs() >= 2.0**-120
    assert moved.view(torch.uint8)[exact].equal(values.view(torch.uint8)[exact])
    assert moved_scale.equal(scale * 2.0**power)


@settings(deadline=None, max_examples=80)
@given(x=rows_of(ANYTHING))
def test_weights_have_no_negative_zero(x):
    values, scale = quantize_weight_rows(x)
    plain, plain_scale = quantize_rows(x)
    plain = plain.view(torch.uint8)
    assert values.view(torch.uint8).equal(torch.where(plain == 0x80, 0, plain))
    assert scale.equal(plain_scale)


def test_a_negative_that_rounds_to_zero_is_written_positive():
    values, _ = quantize_weight_rows(torch.tensor([[448.0, -1e-6, -0.0, 0.0, -(2.0**-9), -(2.0**-10)]]))
    assert values.view(torch.uint8).tolist() == [[0x7E, 0, 0, 0, 0x81, 0]]


def test_a_scale_may_be_given():
    weight = torch.tensor([[1.0, -3.0, 1000.0, -1000.0], [0.5, 0.25, 0.0, -0.0]])
    given_scale = torch.tensor([[2.0], [0.25]])
    values, scale = quantize_weight_rows(weight, given_scale)
    assert scale is given_scale
    assert values.float().tolist() == [[0.5, -1.5, 448, -448], [2, 1, 0, 0]]


@pytest.mark.parametrize("shape", [(8,), (2, 8), (2, 3, 8), (2, 3, 4, 8), (0, 8), (2, 0, 8)])
def test_rank(shape):
    x = torch.randn(shape)
    values, scale = quantize_rows(x)
    assert scale.shape == (*shape[:-1], 1)
    flat, flat_scale = quantize_rows(x.reshape(-1, 8))
    assert values.view(torch.uint8).equal(flat.view(torch.uint8).view(shape))
    assert scale.equal(flat_scale.view(scale.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_rounds_alike(dtype):
    """Rounding, NaN and Inf included, is what eager does, bit for bit."""
    x = torch.randn(7, 200) * torch.logspace(-40, 30, 7).view(-1, 1)  # the first is subnormal
    x[1], x[2, 3], x[4, 4] = 0, float("nan"), float("inf")
    x = x.to(dtype)
    values, scale = quantize_rows(x)
    compiled, compiled_scale = torch.compile(quantize_rows)(x)
    torch.testing.assert_close(compiled_scale, scale, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(compiled.float(), values.float(), rtol=0, atol=0, equal_nan=True)
