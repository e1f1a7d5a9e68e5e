"""Timing, statistics and refusals of `hwpq_fx.bench.measure`, with a clock that is none."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clocks import FakeClock, fill, is_one
from hwpq_fx.bench.measure import (
    CALLS_TIMES_L2,
    MOST_CALLS,
    SETS_TIMES_L2,
    CudaRegion,
    Errors,
    GpuLost,
    copy_bandwidth,
    errors_between,
    errors_of,
    matrix_rate,
    measured,
    node_us,
    one_line,
    rotation,
    spread,
)


def test_spread_is_median_and_quintiles_in_microseconds():
    found = spread([1e-6 * value for value in (5, 1, 2, 4, 3, 6)])
    assert (found.median_us, found.p20_us, found.p80_us) == pytest.approx((3.5, 2.0, 5.0))
    assert found.samples == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_errors_of_is_the_frobenius_norm_against_float64(dtype):
    x, weight = torch.randn(33, 48, dtype=dtype), torch.randn(24, 48, dtype=dtype)
    wanted = x.double() @ weight.double().t()
    y = wanted.to(dtype)
    assert errors_of(y, x, weight).whole == pytest.approx(((y.double() - wanted).norm() / wanted.norm()).item())
    assert errors_of(y, x, weight) == pytest.approx(errors_between(y, wanted))


def test_rows_in_pieces_are_the_same(monkeypatch):
    x, weight = torch.randn(23, 16), torch.randn(8, 16)
    y = x @ weight.t() + 0.1
    whole = errors_of(y, x, weight)
    monkeypatch.setattr("hwpq_fx.bench.measure.ROWS_AT_ONCE", 5)
    assert errors_of(y, x, weight) == pytest.approx(whole)


@pytest.mark.parametrize(("at", "name"), [((700, slice(None)), "row"), ((slice(None), 700), "column")])
def test_one_wrong_row_or_column_of_thousands_is_seen(at, name):
    x, weight = torch.randn(20000, 8), torch.randn(20000 if name == "column" else 8, 8)
    x = x[:1000] if name == "column" else x
    y = x @ weight.t()
    y[at] = 0
    found = errors_of(y, x, weight)
    assert found.whole < 1e-2, "the norm of the whole hides it"
    assert f"worst {name}" in found.why_refused(1e-2)


def test_a_right_product_passes_and_nan_never_does():
    x, weight = torch.randn(9, 64, dtype=torch.bfloat16), torch.randn(32, 64, dtype=torch.bfloat16)
    y = x @ weight.t()
    assert errors_of(y, x, weight).why_refused(1e-2) == ""
    y[3, 5] = math.nan
    assert "nan" in errors_of(y, x, weight).why_refused(1e-2)
    assert Errors(0.0, math.nan, 0.0).why_refused(1e-2) and Errors(0.0, 0.0, math.nan).why_refused(1e-2)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10**10), st.integers(1, 2 * 10**8))
def test_sets_are_several_times_the_cache(nbytes, l2):
    sets, length = rotation(nbytes, l2)
    assert 2 <= sets <= length <= MOST_CALLS
    assert sets * nbytes >= SETS_TIMES_L2 * l2 or sets == MOST_CALLS
    assert length * nbytes >= CALLS_TIMES_L2 * l2 or length == MOST_CALLS


def test_a_right_call_has_its_times():
    out = torch.empty(8)
    line = measured(FakeClock(), [partial(fill, out, 1)], 3, is_one, 0.1)
    assert line == {"status": "ok", "median_us": pytest.approx(3.0), "p20_us": pytest.approx(1.8),
                    "p80_us": pytest.approx(4.2), "samples": 5, "calls": 3, "not_replayed": ""}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8])
def test_unwritten_output_has_no_speed(dtype):
    out = torch.ones(8, dtype=dtype)
    line = measured(FakeClock(), [partial(fill, out, 1, 7)], 1, lambda y: is_one([y[0].float()]), 0.1)
    assert line == {"status": "wrong", "error": "not one"}


def test_an_error_that_comes_later_has_no_speed():
    runs = iter(range(100))
    line = measured(FakeClock(), [lambda: torch.tensor(1.0 if next(runs) < 2 else 2.0)], 1, is_one, 0.1)
    assert line == {"status": "wrong", "error": "not one"}


def test_what_a_contender_raises_is_its_result():
    def broken():
        raise RuntimeError("no such\n   kernel")

    assert measured(FakeClock(), [broken], 1, is_one, 0.1) == {
        "status": "failed",
        "error": "RuntimeError: no such kernel",
    }
    with pytest.raises(GpuLost):
        measured(FakeClock(lost=GpuLost("gone")), [broken], 1, is_one, 0.1)


def test_one_line_is_short():
    assert len(one_line(ValueError("word " * 1000))) == 300


def test_ceilings_count_bytes_both_ways_and_two_operations():
    clock = FakeClock(took=(2e-3,) * 5)
    assert copy_bandwidth(clock, 1000) == pytest.approx(2 * 1000 / 2e-3)
    assert matrix_rate(clock, 16) == pytest.approx(2 * 16**3 / 2e-3)
    assert node_us(clock) == pytest.approx(2e3) and clock.regions[-1].calls == 256


def test_the_gpu_is_at_work_before_it_is_timed(monkeypatch):
    """A clock that compiling let fall comes back in the meantime."""
    region, runs = CudaRegion.__new__(CudaRegion), []
    region.calls, now = 2, iter(0.02 * at for at in range(99))
    monkeypatch.setattr(region, "run", lambda: runs.append(None))
    monkeypatch.setattr(region, "_timed", lambda count: [4e-3 * (len(runs) >= 3)] * count)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    assert region.sample(0.04) == [2e-3] * 10 and len(runs) == 3
