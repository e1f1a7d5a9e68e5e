"""The CUTLASS path against a double of torchao's op that reads memory as CUTLASS does. No GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from doubles import torchao_op
from hwpq_fx.kernels import cutlass24
from hwpq_fx.kernels.pack24 import pack24, unpack24
from hwpq_fx.kernels.quantize_rows import E4M3, quantize_rows

DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _library(monkeypatch):
    monkeypatch.setattr(cutlass24, "library", lambda: torchao_op)


def packed(n, k, kept=0.5):
    """A packed weight, groups of which may keep zeros, of either sign; also its scale."""
    values = torch.randn(n, k).to(E4M3).float()
    values[torch.rand(n, k) > 2 * kept] = 0.0
    values[torch.rand(n, k) > 0.98] = -0.0
    mask = torch.rand(n, k // 4, 4).argsort(-1) < 2
    qdata, sparse_metadata = pack24(values.to(E4M3), mask.view(n, k))
    return qdata, sparse_metadata, torch.rand(n, 1) + 0.1


def check(m, n, k, out_dtype, bias=None, kept=0.5):
    qdata, sparse_metadata, scale = packed(n, k, kept)
    x, x_scale = quantize_rows(torch.randn(m, k))
    layout = cutlass24.make_layout(qdata, sparse_metadata)
    y = cutlass24.product(x, x_scale, qdata, sparse_metadata, scale, bias, layout, out_dtype)
    exact = x.double() @ unpack24(qdata, sparse_metadata).double().t() * x_scale * scale.view(-1)
    exact = exact if bias is None else exact + bias
    assert y.shape == (m, n)
    assert y.dtype is out_dtype
    # one rounding; twice that where the bias was rounded before
    eps = torch.finfo(out_dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=eps, atol=eps * (0.01 if bias is None else 4))


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(0, 70),
    n=st.integers(1, 24).map(lambda i: 8 * i),
    k=st.integers(1, 10).map(lambda i: 32 * i),
    out_dtype=st.sampled_from(DTYPES),
    kept=st.sampled_from([0.0, 0.2, 0.5]),
)
def test_agrees_with_float64(m, n, k, out_dtype, kept):
    check(m, n, k, out_dtype, kept=kept)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_bias_of_any_dtype(bias_dtype, out_dtype):
    check(5, 72, 160, out_dtype, bias=torch.randn(72, dtype=bias_dtype))


@pytest.mark.parametrize("shape", [(8, 32), (64, 128), (72, 160), (200, 384)])
def test_layout_is_one_row_of_bytes_an_eighth_of_a_byte_a_weight(shape):
    n, k = shape
    qdata, sparse_metadata, _ = packed(n, k)
    layout = cutlass24.make_layout(qdata, sparse_metadata)
    assert layout.dim() == 1
    assert layout.dtype is torch.uint8
    assert layout.is_contiguous()
    assert layout.numel() == -(-n // 64) * 64 * -(-k // 128) * 16
    # every byte at its place, and the rest a defined pattern
    for row, byte in [(0, 0), (n - 1, k // 8 - 1), (n // 2, k // 16)]:
        at = byte // 16 * (-(-n // 64) * 64 * 16) + row * 16 + byte % 16
        assert layout[at] == sparse_metadata[row, byte]
    assert sorted(layout.tolist()) == sorted(
        sparse_metadata.flatten().tolist() + [0x44] * (layout.numel() - sparse_metadata.numel())
    )


def test_rows_of_a_larger_weight_are_served_too():
    """Weights that are packed next to each other: qdata of one is a slice of all."""
    qdata, sparse_metadata, scale = packed(128, 64)
    x, x_scale = quantize_rows(torch.randn(3, 64))
    part = slice(40, 112)
    args = qdata[part], sparse_metadata[part]
    y = cutlass24.product(x, x_scale, *args, scale[part], None, cutlass24.make_layout(*args), torch.bfloat16)
    exact = x.double() @ unpack24(*args).double().t() * x_scale * scale[part].view(-1)
    torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize(
    ("arch", "dtype", "n", "k", "says"),
    [
        (90, torch.bfloat16, 4096, 4096, ""),
        (90, torch.float16, 8, 32, ""),
        (80, torch.bfloat16, 4096, 4096, "sm_90 only"),
        (86, torch.bfloat16, 4096, 4096, "sm_90 only"),
        (89, torch.bfloat16, 4096, 4096, "sm_90 only"),
        (100, torch.bfloat16, 4096, 4096, "sm_90 only"),
        (120, torch.bfloat16, 4096, 4096, "sm_90 only"),
        (90, torch.float32, 4096, 4096, "not torch.float32"),
        (90, torch.bfloat16, 4100, 4096, "4100x4096"),
        (90, torch.bfloat16, 4096, 4080, "4096x4080"),
    ],
)
def test_why_not(arch, dtype, n, k, says):
    reason = cutlass24.why_not(arch, dtype, n, k)
    assert says in reason
    assert bool(reason) == bool(says)


def test_why_not_names_a_library_that_did_not_load(monkeypatch):
    monkeypatch.setattr(cutlass24, "library", lambda: None)
    assert "did not load" in cutlass24.why_not(90, torch.bfloat16, 64, 64)


def test_what_why_not_refuses_the_op_refuses():
    """The double keeps both honest: where the path says it serves, the op takes it, and nowhere else."""
    for n, k in [(8, 32), (12, 32), (8, 48), (64, 128), (136, 352)]:
        served = not cutlass24.why_not(90, torch.bfloat16, n, k)
        try:
            check(2, n, k, torch.bfloat16)
            took = True
        except RuntimeError:
            took = False
        assert took == served, (n, k)
