"""`linear24`: y = x W^T + b for a packed 2:4 FP8 weight W [N, K], the one custom op of a converted graph.

On the CPU no instruction reads 2:4, so the weight carries a third array, `dense` [N, K] (see `dense_layout`), and
the op is a plain matrix product with it. Inductor sees through the op there (`_decompose_on_cpu`) and fuses the
scales and the bias into what follows.
"""

from functools import cache

import torch
import torch.nn.functional as F

from .pack24 import unpack24


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
    values = unpack24(qdata, sparse_metadata)
    if fp8_activation:
        return values.to(cpu_product_dtype(dtype))
    return (values.float() * scale).to(dtype)


def linear24_reference(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    qdata: torch.Tensor,
    sparse_metadata: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dense: torch.Tensor | None,
    x_grad: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The definition, in plain torch, on any device. Arguments as `linear24`."""
    if dense is None:
        dense = dense_layout(qdata, sparse_metadata, scale, out_dtype, x_scale is not None)
    if x_scale is None:
        return F.linear(x, dense, bias)
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
    dense: torch.Tensor | None,
    x_grad: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """y [..., N] = x [..., K] W^T + bias, accumulated in float32 and returned in `out_dtype`.

    x: e4m3 with x_scale float32 [..., 1], or `out_dtype` with x_scale None. qdata, sparse_metadata: see `pack24`;
    scale float32 [N, 1]; bias [N] or None; dense: see `dense_layout`, or None. x_grad: the activation before it
    was quantized, given only while gradients are wanted: they flow to it straight through the rounding.
    Raises RuntimeError where shapes or dtypes do not fit.
    """
    _check(x, x_scale, qdata, sparse_metadata, scale, bias, dense, out_dtype)
    y = linear24_reference(x, x_scale, qdata, sparse_metadata, scale, bias, dense, x_grad, out_dtype)
    # torch.library forbids returning an input, which a product with an empty K could never be
    return y


@linear24.register_fake
def _fake(x, x_scale, qdata, sparse_metadata, scale, bias, dense, x_grad, out_dtype):
    _check(x, x_scale, qdata, sparse_metadata, scale, bias, dense, out_dtype)
    return x.new_empty((*x.shape[:-1], qdata.shape[0]), dtype=out_dtype)


def _check(x, x_scale, qdata, sparse_metadata, scale, bias, dense, out_dtype) -> None:
    rows, half = qdata.shape
    fp8 = x.dtype is torch.float8_e4m3fn
    wrong = None
    if x.shape[-1] != 2 * half:
        wrong = f"x has {x.shape[-1]} channels, the packed weight takes {2 * half}"
    elif fp8 != (x_scale is not None):
        wrong = "an e4m3 x needs x_scale, and no other x takes one"
    elif not fp8 and x.dtype != out_dtype:
        wrong = f"x is {x.dtype}, the output {out_dtype}: without FP8 activations they must be the same"
    elif sparse_metadata.shape != (rows, half // 4) or scale.shape != (rows, 1):
        wrong = f"sparse_metadata {tuple(sparse_metadata.shape)} or scale {tuple(scale.shape)} does not fit qdata"
    elif dense is not None and dense.shape != (rows, 2 * half):
        wrong = f"dense is {tuple(dense.shape)}, the weight ({rows}, {2 * half})"
    elif bias is not None and bias.shape != (rows,):
        wrong = f"bias is {tuple(bias.shape)}, the output has {rows} channels"
    if wrong:
        raise RuntimeError(f"linear24: {wrong}")


def _setup_context(ctx, inputs, output) -> None:
    x, x_scale, qdata, sparse_metadata, scale, bias, dense, x_grad, _ = inputs
    ctx.save_for_backward(qdata, sparse_metadata, scale)
    ctx.through = x_grad if x_scale is not None else x
    ctx.through_dtype = None if ctx.through is None else ctx.through.dtype
    ctx.quantized = x_scale is not None
    ctx.bias_dtype = None if bias is None else bias.dtype
    del ctx.through


def _backward(ctx, grad):
    qdata, sparse_metadata, scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.through_dtype is not None:
        weight = unpack24(qdata, sparse_metadata).float() * scale
        grad_x = (grad.float() @ weight).to(ctx.through_dtype)
    if ctx.bias_dtype is not None:
        grad_bias = grad.float().flatten(0, -2).sum(0).to(ctx.bias_dtype)
    gx, gx_grad = (None, grad_x) if ctx.quantized else (grad_x, None)
    return gx, None, None, None, None, grad_bias, None, gx_grad, None


linear24.register_autograd(_backward, setup_context=_setup_context)


def _decompose_on_cpu(x, *rest):
    return linear24_reference(x, *rest) if x.device.type == "cpu" else NotImplemented


def _register_inductor_decomposition() -> None:
    """Inductor's table of decompositions has no public door. Tried on torch 2.11 and 2.13."""
    from torch._inductor.decomposition import register_decomposition

    register_decomposition([torch.ops.hwpq_fx.linear24.default])(_decompose_on_cpu)


_register_inductor_decomposition()
