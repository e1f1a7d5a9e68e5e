"""Packed weights to test with, and what they and their products must be."""

import torch
import torch.nn.functional as F
from torch import nn

from hwpq_fx.kernels import Float8Sparse24Tensor, quantize_rows
from hwpq_fx.kernels.linear24 import cpu_product_dtype

N, K = 24, 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("dynamic", "none")
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def make(rows=N, cols=K, activation="dynamic", dtype=torch.float32, expanded=True):
    weight = Float8Sparse24Tensor.from_hp(torch.randn(rows, cols).to(dtype), activation=activation)
    return weight.expand() if expanded else weight


def same(a, b):
    """Every part and every attribute alike, bit for bit."""
    names, attributes = a.__tensor_flatten__()
    other_names, other_attributes = b.__tensor_flatten__()
    assert (type(a), names, attributes) == (type(b), other_names, other_attributes)
    for name in names:
        ours, theirs = getattr(a, name), getattr(b, name)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert ours.contiguous().view(torch.uint8).equal(theirs.contiguous().view(torch.uint8))


def check(y, x, weight, bias=None):
    """y against x W^T + b in float64, within what float32 sums and the roundings on the way may add.

    The CPU may multiply FP8 in bfloat16: exact on the way in, rounded once on the way out.
    """
    dtype, product_dtype = x.dtype, x.dtype
    dense = weight.dequantize(torch.float64)
    if weight.activation == "dynamic":
        product_dtype = cpu_product_dtype(dtype)
        values, scale = quantize_rows(x)
        x = values.double() * scale.double()
    x, bias = x.double(), torch.zeros(len(dense)).double() if bias is None else bias.double()
    product, size = x @ dense.t(), x.abs() @ dense.abs().t() + bias.abs()
    allowed = (x.shape[-1] + 8) * UNIT[torch.float32] * size + UNIT[product_dtype] * product.abs()
    allowed += 2 * UNIT[dtype] * (product.abs() + bias.abs())
    if weight.activation == "none":  # for many rows the weight itself is rounded to the model's dtype
        allowed += UNIT[dtype] * size
    assert y.dtype is dtype
    assert y.shape == product.shape
    assert ((y.double() - product - bias).abs() <= allowed).all()


class Layer(nn.Module):
    def __init__(self, rows=N, cols=K, **kwargs):
        super().__init__()
        self.weight = nn.Parameter(make(rows, cols, **kwargs), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(rows).to(self.weight.dtype))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)
