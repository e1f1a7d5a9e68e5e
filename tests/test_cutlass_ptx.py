"""torchao's own kernels, compiled from CUTLASS, read our packed weight as we mean it. Skipped where there are neither
sources nor a compiler: see rehearsal/cutlass."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from hwpq_fx.kernels import cutlass24
from hwpq_fx.kernels.pack24 import pack24, unpack24
from hwpq_fx.kernels.quantize_rows import E4M3, quantize_rows
from rehearsal import cutlass

pytestmark = pytest.mark.skipif(not cutlass.FOLDER, reason="HWPQ_FX_CUTLASS: see tests/rehearsal/cutlass")


def test_they_are_the_kernels_that_torchao_ships():
    """By name, which says all of their template arguments."""
    (library,) = Path(find_spec("torchao").origin).parent.glob("_C_cutlass_90a*.so")
    shipped = library.read_bytes()
    assert len(cutlass.names()) == 4
    assert [name for name in cutlass.names() if name.encode() not in shipped] == []


def packed(n, k, kept=1.0):
    """A packed weight; but for a share `kept` its values are zero."""
    values = torch.randn(n, k).to(E4M3).float()
    values = torch.where(values == 0, 1.0, values) * (torch.rand(n, k) < kept)
    mask = torch.rand(n, k // 4, 4).argsort(-1) < 2
    return pack24(values.to(E4M3), mask.view(n, k))


@pytest.mark.parametrize("shape", [(64, 128), (8, 32), (72, 160), (200, 384), (256, 544)])
def test_the_compressor_writes_our_layout(shape):
    n, k = shape
    qdata, sparse_metadata = packed(n, k)
    values, metadata = cutlass.compress(unpack24(qdata, sparse_metadata))
    assert values.view(torch.uint8).equal(qdata.view(torch.uint8))
    assert metadata.numel() == cutlass24.make_layout(qdata, sparse_metadata).numel()
    assert cutlass24.read_layout(metadata, n, k // 8).equal(sparse_metadata)


@pytest.mark.parametrize("kept", [1.0, 0.3])
@pytest.mark.parametrize("shape", ["1x64x32", "3x8x128", "16x72x96", "64x136x1056", "100x64x256", "128x200x544"])
def test_the_product_reads_our_layout(shape, kept):
    check(*map(int, shape.split("x")), kept)


@pytest.mark.parametrize("shape", ["129x8x32", "300x264x288"])
def test_the_product_of_many_rows_by_two_programs_at_once(shape):
    check(*map(int, shape.split("x")), 0.8)


def check(m, n, k, kept):
    qdata, sparse_metadata = packed(n, k, kept)
    scale = torch.rand(n, 1) + 0.5
    x, x_scale = quantize_rows(torch.randn(m, k))
    half = 64 < m <= 128
    out_dtype, bias = (torch.float16, None) if half else (torch.bfloat16, torch.randn(n, dtype=torch.bfloat16))
    layout = cutlass24.make_layout(qdata, sparse_metadata)
    y = cutlass.product(x, x_scale, qdata, layout, scale, bias, out_dtype)
    exact = x.double() @ unpack24(qdata, sparse_metadata).double().t() * x_scale * scale.view(-1)
    exact = exact if bias is None else exact + bias
    assert not y.isnan().any()
    # one rounding, and what Hopper's sums of FP8 lose
    error = (y.double() - exact).abs().max() / exact.abs().max()
    assert error < torch.finfo(out_dtype).eps + 2e-3
