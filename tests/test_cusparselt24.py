"""The cuSPARSELt path against a double of the library, as strict as PyTorch's C++ and the library itself. No GPU."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from doubles import CuSparseLt
from hwpq_fx.kernels import cusparselt24
from hwpq_fx.kernels.pack24 import pack24, unpack24
from hwpq_fx.kernels.quantize_rows import E4M3, quantize_rows

OUT = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture
def double(monkeypatch):
    double = CuSparseLt()
    monkeypatch.setattr(cusparselt24, "library", lambda: double.library)
    monkeypatch.setattr(cusparselt24, "_found", {})
    return double


def packed(n, k, kept=0.5):
    """A packed weight, groups of which may keep zeros, of either sign; its scale and its layout."""
    values = torch.randn(n, k).to(E4M3).float()
    values[torch.rand(n, k) > 2 * kept] = 0.0
    values[torch.rand(n, k) > 0.98] = -0.0
    mask = torch.rand(n, k // 4, 4).argsort(-1) < 2
    parts = pack24(values.to(E4M3), mask.view(n, k))
    return (*parts, torch.rand(n, 1) + 0.1, cusparselt24.make_layout(*parts))


def run(m, weight, out_dtype, bias=None):
    qdata, sparse_metadata, scale, layout = weight
    x, x_scale = quantize_rows(torch.randn(m, 2 * qdata.shape[1]))
    y = cusparselt24.product(x, x_scale, qdata, sparse_metadata, scale, bias, layout, out_dtype)
    exact = x.double() @ unpack24(qdata, sparse_metadata).double().t() * x_scale * scale.view(-1)
    return y, exact, 0.0 if bias is None else bias.double()


def check(m, weight, out_dtype, bias=None):
    y, exact, bias = run(m, weight, out_dtype, bias)
    assert y.shape == exact.shape
    assert y.dtype is out_dtype
    assert y.is_contiguous()
    # bfloat16: half a unit on the way out of the library, half a unit at the end; others: the end's, and float32's
    raw = torch.finfo(torch.bfloat16 if out_dtype is torch.bfloat16 else torch.float32).eps
    bound = raw / 2 * exact.abs() + torch.finfo(out_dtype).eps / 2 * (exact + bias).abs() * 1.01 + 4e-6
    assert not ((y.double() - exact - bias).abs() > bound).any()


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(0, 90),
    n=st.integers(1, 5).map(lambda i: 32 * i),
    k=st.integers(1, 5).map(lambda i: 32 * i),
    out_dtype=st.sampled_from(OUT),
    kept=st.sampled_from([0.0, 0.2, 0.5]),
)
def test_agrees_with_float64(m, n, k, out_dtype, kept):
    with pytest.MonkeyPatch.context() as patch:
        double = CuSparseLt()
        patch.setattr(cusparselt24, "library", lambda: double.library)
        patch.setattr(cusparselt24, "_found", {})
        check(m, packed(n, k, kept), out_dtype)


@pytest.mark.parametrize("out_dtype", OUT)
@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_bias_of_any_dtype(double, bias_dtype, out_dtype):
    check(5, packed(32, 64), out_dtype, bias=torch.randn(32, dtype=bias_dtype))


def test_large_sums_do_not_overflow_a_float16_model(double):
    x = torch.full((16, 64), 448.0).to(E4M3)
    values = torch.full((32, 64), 448.0).to(E4M3)
    qdata, sparse_metadata = pack24(values, torch.tensor([1, 1, 0, 0]).bool().repeat(32, 16))
    layout, scale = cusparselt24.make_layout(qdata, sparse_metadata), torch.full((32, 1), 1e-3)
    y = cusparselt24.product(x, torch.full((16, 1), 1e-3), qdata, sparse_metadata, scale, None, layout, torch.float16)
    torch.testing.assert_close(y, torch.full_like(y, 448 * 448 * 32e-6))


def test_layout_is_one_row_of_bytes(double):
    *_, layout = packed(64, 96)
    assert layout.dim() == 1
    assert layout.dtype is torch.uint8
    assert layout.is_contiguous()
    assert 64 * 96 * 5 // 8 <= layout.numel() < 64 * 96


def test_one_search_for_a_bucket_a_shape_and_a_dtype(double):
    weight = packed(32, 64)
    for m in (1, 9, 16):
        run(m, weight, torch.bfloat16)
    assert double.searched == [(16, torch.bfloat16)]
    for m in (17, 20, 32, 31):
        run(m, weight, torch.bfloat16)
    assert double.searched == [(16, torch.bfloat16), (32, torch.bfloat16)]
    run(3, weight, torch.float32)
    run(3, weight, torch.float16)  # leaves the library in float32 as well
    assert double.searched[2:] == [(16, torch.float32)]
    run(3, packed(32, 96), torch.bfloat16)
    run(3, packed(64, 64), torch.bfloat16)
    assert len(double.searched) == 5
    # what was found is what ran
    assert double.used == [(1, -1, 3)] * 3 + [(2, -1, 3)] * 4 + [(3, -1, 3)] * 2 + [(4, -1, 3), (5, -1, 3)]


def test_another_version_searches_anew(double):
    weight = packed(32, 64)
    run(3, weight, torch.bfloat16)
    double.library = double.library._replace(version=801)
    run(3, weight, torch.bfloat16)
    double.library = double.library._replace(device_name=lambda device: "Another GPU")
    run(3, weight, torch.bfloat16)
    assert len(double.searched) == 3


def test_no_search_while_a_graph_is_captured(double):
    weight = packed(32, 64)
    double.capturing = True
    check(40, weight, torch.bfloat16)
    assert double.used == [cusparselt24.DEFAULT]
    double.capturing = False
    run(16, weight, torch.bfloat16)  # finds 1
    run(100, weight, torch.bfloat16)  # finds 2
    run(100, weight, torch.float32)  # finds 3, of no use to bfloat16
    double.capturing = True
    for m, alg_id in ((16, 1), (20, 1), (60, 2), (100, 2), (200, 2)):
        run(m, weight, torch.bfloat16)
        assert double.used[-1] == (alg_id, -1, 3), m
    run(60, packed(64, 64), torch.bfloat16)
    assert double.used[-1] == cusparselt24.DEFAULT
    assert len(double.searched) == 3
    double.capturing = False
    run(40, weight, torch.bfloat16)  # what a capture fell back to was not kept
    assert len(double.searched) == 4


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2**18))
def test_buckets_are_powers_of_two(m):
    bucket = cusparselt24.bucket_of(m)
    assert bucket in cusparselt24.BUCKETS
    assert bucket >= min(m, cusparselt24.LARGEST_BUCKET)
    assert bucket == 16 or bucket < 2 * m


def test_a_search_at_many_rows_is_bounded(double, monkeypatch):
    monkeypatch.setattr(cusparselt24, "LARGEST_BUCKET", 32)
    check(100, packed(32, 32), torch.bfloat16)
    assert double.searched == [(32, torch.bfloat16)]


def test_algorithms_go_through_a_file(double, monkeypatch):
    weight = packed(32, 64)
    run(16, weight, torch.bfloat16)
    written = json.dumps(cusparselt24.export_algorithms())
    assert json.loads(written) == {"Test GPU/800/32x64/16/bfloat16": [1, -1, 3]}
    monkeypatch.setattr(cusparselt24, "_found", {})
    cusparselt24.import_algorithms(json.loads(written))
    run(16, weight, torch.bfloat16)
    assert len(double.searched) == 1
    assert double.used == [(1, -1, 3)] * 2


@pytest.mark.parametrize("broken", [[1, 2], [1, 2, 3, 4], [1, 2, None], ["1", 1, -1], [1.5, 1, -1], 7, None, "abc"])
def test_a_broken_algorithm_is_refused_whole(double, broken):
    with pytest.raises(ValueError, match="is not alg_id"):
        cusparselt24.import_algorithms({"a": [0, 1, -1], "b": broken})
    assert cusparselt24.export_algorithms() == {}


@pytest.mark.parametrize(
    ("arch", "dtype", "n", "k", "says"),
    [
        *[(arch, dtype, 4096, 4096, "") for arch in (89, 90, 100, 120) for dtype in OUT],
        (90, torch.bfloat16, 32, 32, ""),
        (80, torch.bfloat16, 4096, 4096, "no FP8 kernels for sm_80"),
        (86, torch.bfloat16, 4096, 4096, "no FP8 kernels for sm_86"),
        (90, torch.float64, 4096, 4096, "torch.float64"),
        (90, torch.bfloat16, 4112, 4096, "4112x4096"),
        (90, torch.bfloat16, 4096, 4080, "4096x4080"),
    ],
)
def test_why_not(double, arch, dtype, n, k, says):
    reason = cusparselt24.why_not(arch, dtype, n, k)
    assert says in reason
    assert bool(reason) == bool(says)


def test_why_not_names_a_missing_and_an_old_library(double, monkeypatch):
    double.library = double.library._replace(version=701)
    assert "800" in cusparselt24.why_not(89, torch.bfloat16, 64, 64)
    assert cusparselt24.why_not(90, torch.bfloat16, 64, 64) == ""
    monkeypatch.setattr(cusparselt24, "library", lambda: None)
    assert "without cuSPARSELt" in cusparselt24.why_not(90, torch.bfloat16, 64, 64)


def test_what_why_not_refuses_the_library_refuses(double):
    for n, k in [(32, 32), (48, 32), (32, 48), (96, 160)]:
        served = not cusparselt24.why_not(90, torch.bfloat16, n, k)
        try:
            check(2, packed(n, k), torch.bfloat16)
            took = True
        except RuntimeError:
            took = False
        assert took == served, (n, k)


def test_torch_has_the_functions_we_call():
    """Names and order of arguments, where this torch has them: `Library` calls them by position."""
    schema = torch.ops.aten._cslt_sparse_mm.default._schema
    names = ["compressed_A", "dense_B", "bias", "alpha", "out_dtype", "transpose_result"]
    assert [argument.name for argument in schema.arguments] == [*names, "alg_id", "split_k", "split_k_mode"]
    found = cusparselt24.library()
    assert (found is None) == (not torch.backends.cusparselt.is_available())
