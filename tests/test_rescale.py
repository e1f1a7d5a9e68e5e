import pytest
import torch

from hwpq_fx.kernels.rescale_triton import rescale

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 32), (8, 512), (9, 513), (17, 1000)])
def test_scales_and_bias_in_one_pass(shape, dtype, bias_dtype):
    m, n = shape
    raw = torch.randn(m, n, dtype=torch.bfloat16 if dtype is torch.bfloat16 else torch.float32, device=DEVICE)
    x_scale, scale = torch.rand(m, 1, device=DEVICE), torch.rand(n, 1, device=DEVICE)
    bias = None if bias_dtype is None else torch.randn(n, dtype=bias_dtype, device=DEVICE)
    out = torch.full((m, n), torch.nan, dtype=dtype, device=DEVICE)
    rescale(raw, x_scale, scale, bias, out)
    expected = raw.double() * scale.double().view(-1) * x_scale.double() + (0 if bias is None else bias.double())
    torch.testing.assert_close(out, expected.to(dtype))
