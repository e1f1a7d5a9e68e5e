"""The CPU's native ops against the plain-torch definitions."""

import logging
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hwpq_fx.kernels import cpu24
from hwpq_fx.kernels.linear24 import dense_layout, linear24, linear24_reference
from hwpq_fx.kernels.pack24 import unpack24
from hwpq_fx.kernels.prune_pack24 import prune_pack24, prune_pack24_reference
from hwpq_fx.kernels.quantize_rows import E4M3, quantize_rows
from hwpq_fx.kernels.saliency import SALIENCIES
from hwpq_fx.kernels.select24 import SELECTIONS, select24, select24_reference

RATES = (1 / 8, 1 / 4, -0.5)
HP = [torch.float32, torch.bfloat16, torch.float16]

native = pytest.mark.skipif(bool(cpu24.why_not_native()), reason=cpu24.why_not_native() or "-")
expands = pytest.mark.skipif(bool(cpu24.why_not(0, torch.float32, 8, 8)), reason="this CPU cannot expand")


def test_there_is_a_compiler_wherever_torch_compile_works():
    assert cpu24.why_not_native() == ""


def awkward_weight(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Ties, zeros of both signs, rows from subnormal to large, a row of zeros."""
    weight = torch.randn(rows, cols) * torch.logspace(-42, 30, rows)[:, None]
    weight[:, ::3] = weight[:, :1]
    weight[:, 1::5] = -0.0
    weight[rows // 2] = 0
    return weight.clamp(-6e4, 6e4).to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@native
@pytest.mark.parametrize("dtype", HP)
@pytest.mark.parametrize("saliency", SALIENCIES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_choosing_is_bit_equal_to_the_reference(selection, saliency, dtype, monkeypatch):
    if selection != "ewma_streaming":  # which the reference alone serves
        monkeypatch.setattr(cpu24, "select24_reference", None)
    for rows, cols in ((37, 88), (3, 8), (1, 4), (5, 4 * 1024 * 2 + 20)):
        weight, sum_sq = awkward_weight(rows, cols, dtype), torch.rand(cols)
        sum_sq[0] = 0
        mask, settled = select24(weight, sum_sq, saliency, selection, *RATES)
        want_mask, want_settled = select24_reference(weight, sum_sq, saliency, selection, *RATES)
        assert torch.equal(mask, want_mask)
        assert settled == want_settled and settled.dtype == want_settled.dtype and settled.shape == ()


@native
@given(
    rows=st.integers(1, 40), eighths=st.integers(1, 160), dtype=st.sampled_from(HP), seed=st.integers(0, 2**20),
    saliency=st.sampled_from(sorted(SALIENCIES)), how=st.sampled_from(["chosen", "streaming", "given"]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_packing_is_bit_equal_to_the_reference(rows, eighths, dtype, seed, saliency, how):
    torch.manual_seed(seed)
    weight, sum_sq = awkward_weight(rows, 8 * eighths, dtype), torch.rand(8 * eighths)
    mask = torch.rand(rows, 2 * eighths, 4).argsort(-1).lt(2).view(rows, -1) if how == "given" else None
    selection = "ewma_streaming" if how == "streaming" else "ewma"
    got = prune_pack24(weight, sum_sq, mask, saliency, selection, *RATES)
    want = prune_pack24_reference(weight, sum_sq, mask, saliency, selection, *RATES)
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


@native
def test_packing_rounds_every_finite_value_as_torch_does():
    # rows whose scale is 1: every float32 pattern that e4m3 tells apart, and its neighbours
    near = torch.arange(0, 448.01, 2**-9).clamp(max=448)
    near = torch.cat([near, near.nextafter(torch.tensor(0.0)), (near + 2**-11).clamp(max=448), -near])
    weight = torch.zeros(len(near), 8)
    weight[:, 0], weight[:, 5] = 448, near
    qdata, _, scale = prune_pack24(weight, None, None, "magnitude", "exact", *RATES)
    assert (scale == 1).all()
    want = near.to(E4M3).float() + 0.0
    got = torch.where(near == 0, 0.0, qdata.float()[:, 2:].sum(1))
    assert torch.equal(got, want)


@native
def test_a_mask_that_is_not_24_is_refused():
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[:, ::2] = False
    prune_pack24(torch.ones(2, 16), None, mask)
    mask[1, 8] = True
    with pytest.raises(ValueError, match="exactly two of every four"):
        prune_pack24(torch.ones(2, 16), None, mask)


@native
@pytest.mark.parametrize("dtype", HP)
def test_unpacking_is_bit_equal_to_the_reference(dtype):
    parts = prune_pack24(awkward_weight(33, 136, torch.float32))
    for scale in (parts[2], None):
        want = unpack24(*parts[:2]).float() * (1.0 if scale is None else scale)
        assert same_bits(cpu24.dense24(*parts[:2], scale, dtype), want.to(dtype))


def packed(rows: int, cols: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    return prune_pack24(torch.randn(rows, cols))


def exact_product(x, x_scale, qdata, metadata, scale, bias):
    weight = unpack24(qdata, metadata).double() * scale.double()
    y = (x.double() * (1 if x_scale is None else x_scale.double())) @ weight.t()
    return y if bias is None else y + bias.double()


@expands
@given(
    m=st.integers(0, 19), n=st.integers(1, 70), eighths=st.integers(1, 200), dtype=st.sampled_from(HP),
    fp8=st.booleans(), with_bias=st.booleans(), seed=st.integers(0, 2**20),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_products_against_float64(m, n, eighths, dtype, fp8, with_bias, seed):
    parts = packed(n, 8 * eighths, seed)
    x = torch.randn(m, 8 * eighths).to(dtype)
    x, x_scale = quantize_rows(x) if fp8 else (x, None)
    bias = torch.randn(n).to(dtype) if with_bias else None
    y = cpu24.product(x, x_scale, *parts, bias, None, dtype)
    want = exact_product(x, x_scale, *parts, bias)
    # summed in float32: what is rounded to `dtype` is off by float32's error of the sum of magnitudes
    weight = unpack24(*parts[:2]).double() * parts[2].double()
    size = (x.double() * (1 if x_scale is None else x_scale.double())).abs() @ weight.abs().t() + 1
    error = (y.double() - want).abs()
    assert y.dtype == dtype and y.shape == (m, n)
    assert (error <= 2e-6 * size + torch.finfo(dtype).eps * want.abs()).all()


@native
def test_every_other_row_of_a_weight_is_a_weight():
    parts = packed(12, 72)
    some = [part[::2] for part in parts]
    assert same_bits(cpu24.dense24(*some, torch.float32), cpu24.dense24(*parts, torch.float32)[::2].contiguous())
    if not cpu24.why_not(0, torch.float32, 8, 8):
        x = torch.randn(2, 72)
        y = cpu24.product(x, None, *parts, None, None, torch.float32)
        assert torch.equal(cpu24.product(x, None, *some, None, None, torch.float32), y[:, ::2])


@expands
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_output_is_written_whatever_the_threads(threads):
    parts, before = packed(501, 1544), torch.get_num_threads()
    x = torch.randn(3, 1544, dtype=torch.bfloat16)
    want = exact_product(x, None, *parts, None)
    try:
        torch.set_num_threads(threads)
        for _ in range(3):  # into memory that held NaN
            del (garbage := [torch.full((3, 501), torch.nan, dtype=torch.bfloat16) for _ in range(4)])[:]
            y = cpu24.product(x, None, *parts, None, None, torch.bfloat16)
            assert torch.allclose(y.double(), want, rtol=2e-2, atol=2e-2) and not garbage
    finally:
        torch.set_num_threads(before)


@expands
def test_nan_and_infinity_come_through_as_in_a_dense_product():
    parts = packed(16, 64)
    x = torch.randn(4, 64)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    for dtype in (torch.float32, torch.bfloat16):
        y = cpu24.product(x.to(dtype), None, *parts, None, None, dtype)
        want = x.to(dtype) @ dense_layout(*parts, dtype, False).t()
        assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf())
    values, x_scale = quantize_rows(x)
    assert cpu24.product(values, x_scale, *parts, None, None, torch.float32)[1].isnan().all()


@expands
def test_the_op_in_compiled_code_and_its_fake():
    parts = packed(24, 72)
    x = torch.randn(2, 72, dtype=torch.bfloat16)
    args = (x, None, *parts, torch.randn(24), torch.bfloat16)
    # not its schema test, which compares FP8 tensors by multiplying them
    torch.library.opcheck(
        torch.ops.hwpq_fx.expand24.default, args, test_utils=("test_faketensor", "test_aot_dispatch_dynamic")
    )
    compiled = torch.compile(lambda *a: torch.ops.hwpq_fx.expand24(*a) * 2, fullgraph=True)
    assert torch.equal(compiled(*args), torch.ops.hwpq_fx.expand24(*args) * 2)
    with pytest.raises(RuntimeError, match="shapes"), torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        torch.ops.hwpq_fx.expand24(x[:, :64], *args[1:])


@expands
@pytest.mark.parametrize("fp8", [True, False])
def test_linear24_expands_for_few_rows_alone(fp8, monkeypatch):
    parts, calls = packed(24, 72), []
    product = cpu24.product
    monkeypatch.setattr(cpu24, "product", lambda x, *rest: calls.append(len(x)) or product(x, *rest))
    for lead in ((), (1,), (2, 2), (5,), (3, 2), (0, 3)):
        x = torch.randn(*lead, 72)
        x, x_scale = quantize_rows(x) if fp8 else (x, None)
        y = linear24(x, x_scale, *parts, None, None, None, torch.float32, "")
        want = exact_product(x, x_scale, *parts, None)
        assert y.shape == (*lead, 24) and torch.allclose(y.double(), want, rtol=2e-2, atol=2e-2 * fp8 + 1e-4)
    assert calls == [1, 1, 4, 0]


@expands
def test_compiled_graphs_hold_the_expansion():
    from torch._inductor.utils import run_and_get_code

    parts = packed(24, 72)

    def run(x):
        return linear24(x, None, *parts, None, None, None, x.dtype, "").relu()

    for rows, times in ((1, 1), (6, 0)):
        x = torch.randn(rows, 72)
        y, code = run_and_get_code(torch.compile(run, fullgraph=True, dynamic=False), x)
        assert torch.allclose(y, run(x), atol=1e-4)
        assert "".join(code).count("torch.ops.hwpq_fx.expand24.default(") == times


def test_without_a_compiler_the_references_serve_and_say_so(monkeypatch, caplog, tmp_path):
    """In a fresh process, as a library that was loaded stays loaded."""
    code = """
import logging, torch
logging.basicConfig()
from hwpq_fx.kernels import cpu24
from hwpq_fx.kernels.prune_pack24 import prune_pack24, prune_pack24_reference
weight = torch.randn(8, 16)
got = prune_pack24(weight)
want = prune_pack24_reference(weight, None, None, "contribution", "ewma", 1 / 8, 1 / 4, -0.5)
assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, want))
x = torch.randn(2, 16, dtype=torch.bfloat16)
assert cpu24.why_not(0, torch.bfloat16, 8, 16)
y = torch.ops.hwpq_fx.expand24(x, None, *got, None, torch.bfloat16)
assert y.shape == (2, 8)
"""
    environment = {"PATH": "", "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no native CPU kernels: no C++ compiler" in done.stderr


def test_a_compiler_that_fails_is_named_with_what_it_said(monkeypatch, caplog, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho out of cheese >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(cpu24, "user_cache_path", lambda name: tmp_path)
    with caplog.at_level(logging.WARNING, "hwpq_fx"):
        assert "out of cheese" in cpu24.why_not_native.__wrapped__()
    assert "out of cheese" in caplog.text and not list(tmp_path.glob("*.so"))


@expands
def test_the_reference_serves_the_op_where_the_cpu_cannot(monkeypatch):
    parts = packed(8, 16)
    x = torch.randn(2, 16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"})
    assert "avx512_vbmi2" in cpu24.why_not(0, torch.float32, 8, 16)
    got = cpu24._expand24(x, None, *parts, None, torch.float32)
    assert torch.equal(got, linear24_reference(x, None, *parts, None, None, None, torch.float32, ""))
