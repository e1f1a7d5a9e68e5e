"""`linear24`: y = x W^T + b for a packed 2:4 FP8 weight W [N, K], the one custom op of a converted graph.

This is the definition. What a CPU runs is in `cpu24`: for many rows of x a plain matrix product with a further array
that the weight carries, `prepacked` [N, K] (see `dense_layout`). What a GPU runs is chosen in `paths`.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from .pack24 import unpack24
from .quantize_rows import E4M3

# `prepacked_for` of what `dense_layout` makes
DENSE = "dense"

# places among the arguments of `linear24` that gradients flow to
X, BIAS, X_HP = 0, 5, 7


@cache
def cpu_product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What FP8 x FP8 is multiplied in on the CPU for a model of `dtype`.

    e4m3 (4 significant bits) is exact in bfloat16, so a CPU with bfloat16 products loses nothing on the way in,
    accumulates in float32, and rounds once on the way out. Others multiply in float32. float16 would overflow:
    448 * 448 is beyond it.
    """
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native or dtype is torch.bfloat16 else torch.float32


def dense_layout(
    qdata: torch.Tensor,
    sparse_metadata: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    fp8_activation: bool,
) -> torch.Tensor:
    """W written out as [N, K] for a CPU product.

    With FP8 activations: the e4m3 values themselves, unscaled and exact, in `cpu_product_dtype(dtype)`.
    Else the dequantized weight in `dtype`, the model's own.
    """
    return unpacked(qdata, sparse_metadata, *dense_form(scale, dtype, fp8_activation))


def dense_form(
    scale: torch.Tensor, dtype: torch.dtype, fp8_activation: bool
) -> tuple[torch.Tensor | None, torch.dtype]:
    """What `dense_layout` multiplies the values by, None for nothing, and the dtype it is in."""
    return (None, cpu_product_dtype(dtype)) if fp8_activation else (scale, dtype)


def unpacked(
    qdata: torch.Tensor, sparse_metadata: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """W [N, K] in `dtype`: value (times scale, in float32, or float64 for float64), rounded once."""
    values = unpack24(qdata, sparse_metadata).to(torch.promote_types(dtype, torch.float32))
    return (values if scale is None else values * scale).to(dtype)


def no_view(y: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """`y`, which nobody else holds, in this shape. As a view of it, what the op gives could not be written to while
    gradients are recorded."""
    return torch.ops.aten._unsafe_view(y, shape)


def linear24_reference(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    qdata: torch.Tensor,
    sparse_metadata: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    prepacked: torch.Tensor | None,
    x_hp: torch.Tensor | None,
    out_dtype: torch.dtype,
    prepacked_for: str,
) -> torch.Tensor:
    """The definition, in plain torch, on any device. Arguments and errors as `linear24`."""
    check(x, x_scale, qdata, sparse_metadata, scale, bias, prepacked, x_hp, out_dtype, prepacked_for)
    dense = prepacked
    if dense is None or prepacked_for != DENSE:
        dense = dense_layout(qdata, sparse_metadata, scale, out_dtype, x_scale is not None)
    # autocast has had its say before: here it would multiply FP8 values in float16, and overflow
    with torch.autocast(x.device.type, enabled=False):
        if x_scale is None:
            y = F.linear(x, dense, None if bias is None else bias.to(out_dtype))
            return no_view(y, y.shape)
        y = F.linear(x.to(dense.dtype), dense).float() * x_scale * scale.view(-1)
        return (y if bias is None else y + bias).to(out_dtype)


@torch.library.custom_op("hwpq_fx::linear24", mutates_args=())
def linear24(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    qdata: torch.Tensor,
    sparse_metadata: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    prepacked: torch.Tensor | None,
    x_hp: torch.Tensor | None,
    out_dtype: torch.dtype,
    prepacked_for: str,
) -> torch.Tensor:
    """y [..., N] = x [..., K] W^T + bias, accumulated in float32 and returned in `out_dtype`.

    x: e4m3 with x_scale float32 [..., 1], or `out_dtype` with x_scale None. qdata, sparse_metadata: see `pack24`;
    scale float32 [N, 1]; bias [N] of any dtype, or None. prepacked: what `prepacked_for` wants beside these ("dense":
    see `dense_layout`; otherwise 1-D, see `paths`), or None. x_hp: the activation before it was quantized, given while
    gradients are wanted, which flow to it straight through the rounding, and where a GPU may choose not to quantize.
    Raises RuntimeError where shapes or dtypes do not fit.
    """
    return linear24_reference(
        x, x_scale, qdata, sparse_metadata, scale, bias, prepacked, x_hp, out_dtype, prepacked_for
    )


@linear24.register_fake
def _fake(x, x_scale, qdata, sparse_metadata, scale, bias, prepacked, x_hp, out_dtype, prepacked_for):
    check(x, x_scale, qdata, sparse_metadata, scale, bias, prepacked, x_hp, out_dtype, prepacked_for)
    return x.new_empty((*x.shape[:-1], qdata.shape[0]), dtype=out_dtype)


def check(x, x_scale, qdata, sparse_metadata, scale, bias, prepacked, x_hp, out_dtype, prepacked_for) -> None:
    """Raise RuntimeError where the arguments of `linear24` do not fit each other."""
    if x.dim() == 0 or qdata.dim() != 2 or x.shape[-1] != 2 * qdata.shape[1]:
        raise RuntimeError(f"linear24: x {tuple(x.shape)} does not fit qdata {tuple(qdata.shape)}, half of its K")
    rows, cols = qdata.shape[0], x.shape[-1]
    fp8 = x.dtype is E4M3
    if fp8 != (x_scale is not None):
        raise RuntimeError("linear24: an e4m3 x needs x_scale, and no other x takes one")
    if not fp8 and x.dtype != out_dtype:
        raise RuntimeError(f"linear24: x is {x.dtype}, the output {out_dtype}: only an e4m3 x may differ")
    exact = (torch.bfloat16, torch.float32)  # as `cpu_product_dtype`
    for name, part, shape, dtypes in (
        ("qdata", qdata, (rows, cols // 2), (E4M3,)),
        ("sparse_metadata", sparse_metadata, (rows, cols // 8), (torch.uint8,)),
        ("scale", scale, (rows, 1), (torch.float32,)),
        ("x_scale", x_scale, (*x.shape[:-1], 1), (torch.float32,)),
        ("prepacked", prepacked if prepacked_for == DENSE else None, (rows, cols), exact if fp8 else (out_dtype,)),
        ("bias", bias, (rows,), ()),
        ("x_hp", x_hp, x.shape, (out_dtype,)),
    ):
        if part is not None and (part.shape != shape or (dtypes and part.dtype not in dtypes)):
            wanted = f"{tuple(shape)} {' or '.join(map(str, dtypes))}"
            raise RuntimeError(f"linear24: {name} is {tuple(part.shape)} {part.dtype}, not {wanted}")


def _setup_context(ctx, inputs, output) -> None:
    _, x_scale, qdata, sparse_metadata, scale, *_ = inputs
    ctx.save_for_backward(qdata, sparse_metadata, scale)
    ctx.source = X if x_scale is None else X_HP


def _backward(ctx, grad):
    qdata, sparse_metadata, scale = ctx.saved_tensors
    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))  # autograd casts what is returned
    grads = [None] * 10
    if ctx.needs_input_grad[ctx.source]:
        grads[ctx.source] = grad @ unpacked(qdata, sparse_metadata, scale, grad.dtype)
    if ctx.needs_input_grad[BIAS]:
        grads[BIAS] = grad.sum_to_size(scale.shape[:1])
    return tuple(grads)


linear24.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.hwpq_fx.linear24)
def _flops(x_shape, x_scale_shape, qdata_shape, *args, out_shape=None, **kwargs) -> int:
    """For torch.utils.flop_counter: those of the dense product, as for any other, zeros included."""
    return 2 * math.prod(x_shape) * qdata_shape[0]
