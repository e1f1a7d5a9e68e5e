"""Products of packed weights: what `F.linear`, `matmul` and `addmm` do with one."""

import torch
import torch.nn.functional as F

from .linear24 import DENSE, linear24
from .packed import Float8Sparse24Tensor, given, is_packed
from .paths import EITHER, chosen, target_of
from .quantize_rows import quantize_rows
from .transforms import derivatives_are_taken

aten = torch.ops.aten
implements = Float8Sparse24Tensor.implements
implements_torch_function = Float8Sparse24Tensor.implements_torch_function


def packed_linear(x: torch.Tensor, weight: Float8Sparse24Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` with the packed rows of `weight` [N, K], whichever way it shows them, for x [..., K] of any rank.

    Accumulates in float32 and obeys autocast. Raises RuntimeError where x, or bias [N], does not fit.
    """
    if x.shape[-1:] != (channels := 2 * weight.qdata.shape[1],):
        raise RuntimeError(f"linear: x {tuple(x.shape)} does not fit a packed weight of {channels} input channels")
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype is not torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    elif x.dtype != weight.dtype:
        raise RuntimeError(f"linear: x is {x.dtype}, the packed weight {weight.dtype}; cast one of them")
    if derivatives_are_taken():
        return _followed(x, weight, bias)
    values, scale, x_hp, prepacked, prepacked_for = x, None, None, weight.prepacked, weight.prepacked_for
    quantized, hp = activations(x, weight)
    if quantized:
        values, scale = quantize_rows(x.detach())
        x_hp = x if hp or (torch.is_grad_enabled() and x.requires_grad) else None
    elif not fits_hp(weight, x.dtype):
        prepacked, prepacked_for = None, ""
    # those of a weight that was cut along its input channels, or every other row, do not lie as kernels read them
    parts = [getattr(weight, name).contiguous() for name in weight.tensor_data_names]
    return linear24(values, scale, *parts, bias, prepacked, x_hp, x.dtype, prepacked_for)


def _followed(x: torch.Tensor, weight: Float8Sparse24Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The same in ops that torch.func and forward mode know, with the dense weight; straight through the rounding of
    the activations, as `linear24`'s own derivative is."""
    if weight.activation == "dynamic":
        values, scale = quantize_rows(x.detach())
        x = x + (values.to(x.dtype) * scale.to(x.dtype) - x).detach()
    dense = weight.dequantize(x.dtype)
    return F.linear(x, dense.t() if weight.transposed else dense, bias)


def fits_hp(weight: Float8Sparse24Tensor, dtype: torch.dtype) -> bool:
    """Whether the weight's second layout is one for x in `dtype`: the dense one is not where it was made for FP8
    activations (its values are not scaled), or for another dtype than autocast's."""
    if weight.prepacked is None or weight.prepacked_for != DENSE:
        return True
    return weight.activation == "none" and weight.prepacked.dtype == dtype


def activations(x: torch.Tensor, weight: Float8Sparse24Tensor) -> tuple[bool, bool]:
    """Whether `linear24` is to be given x [..., K] in FP8, and whether as it is: both where only the run will tell
    how many rows there are."""
    if weight.activation == "none":
        return False, True
    if torch.compiler.is_dynamo_compiling() or any(type(size) is not int for size in x.shape):
        return True, x.is_cuda
    target = target_of(x.device)
    if target is None:
        return True, False
    fp8 = chosen(target, x, weight.qdata.shape[0], x.dtype, EITHER, weight.prepacked_for).fp8
    return fp8, not fp8


@implements(aten.linear.default)
@implements_torch_function([F.linear, aten.linear.default])
def _(func, types, args, kwargs):
    x, weight, bias = given(("input", "weight", "bias"), args, kwargs)
    if not is_packed(weight) or weight.transposed or is_packed(x):
        return F.linear(_dense(x), _dense(weight), bias)
    return packed_linear(x, weight, bias)


@implements_torch_function(F.multi_head_attention_forward)
def _(func, types, args, kwargs):
    # linear would batch a weight to multiply inputs that are not contiguous, as they are with batch_first
    named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    inputs = [named.pop(name) for name in ("query", "key", "value")]
    # the same tensor stays the same: self attention is told by identity
    made = {key: one.contiguous() for key, one in {id(one): one for one in inputs}.items()}
    return _below(func, [*(made[id(one)] for one in inputs), *args[3:]], named)


# caught above aten as well: there matmul may batch the weight, and autocast casts (and so lays out) it every time
@implements([aten.mm.default, aten.matmul.default])
@implements_torch_function([torch.mm, torch.matmul, torch.Tensor.mm, torch.Tensor.matmul, torch.Tensor.__matmul__])
def _(func, types, args, kwargs):
    if len(args) != 2 or kwargs:
        return _below(func, args, kwargs)
    return _product(*args)


@implements(aten.addmm.default)
@implements_torch_function([torch.addmm, torch.Tensor.addmm])
def _(func, types, args, kwargs):
    if len(args) != 3:
        return _below(func, args, kwargs)
    bias, x, weight = args
    if kwargs or not is_packed(weight) or bias.shape != weight.scale.shape[:1]:
        return torch.addmm(bias, _dense(x), _dense(weight), **kwargs)
    return _product(x, weight, bias)


def _product(x, weight, bias=None):
    # x @ weight is a linear only where the packed rows are the columns of `weight`
    if is_packed(weight) and weight.transposed and not is_packed(x):
        return packed_linear(x, weight, bias)
    return _dense(x) @ _dense(weight) if bias is None else torch.addmm(bias, _dense(x), _dense(weight))


def _dense(tensor):
    return tensor.dequantize() if is_packed(tensor) else tensor


def _below(func, args, kwargs):
    """`func` as torch defines it, which comes back here with its aten ops."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)
