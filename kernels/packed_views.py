"""Views, parts, joins and copies of packed weights: what aten's ops that are no products do with one."""

from itertools import accumulate, pairwise

import torch
from torch.utils._python_dispatch import return_and_correct_aliasing

from .linear24 import DENSE
from .pack24 import FORMAT_K
from .packed import Float8Sparse24Tensor, given, is_packed, shows

aten = torch.ops.aten
implements = Float8Sparse24Tensor.implements
implements_torch_function = Float8Sparse24Tensor.implements_torch_function


def _dim(dim: int) -> int:
    if not -2 <= dim < 2:
        raise IndexError(f"a packed weight has 2 dimensions: there is no dimension {dim}")
    return dim % 2


@implements([aten.t.default, aten.transpose.int, aten.permute.default])
def _(func, types, args, kwargs):
    weight = args[0]
    dims = {aten.t.default: (1, 0), aten.transpose.int: args[1:], aten.permute.default: args[-1]}[func]
    turned = _dim(dims[0]) != _dim(dims[1]) and (func is not aten.permute.default or _dim(dims[0]) == 1)
    return return_and_correct_aliasing(func, args, kwargs, weight.replaced(transposed=weight.transposed != turned))


@implements(aten.slice.Tensor)
def _(func, types, args, kwargs):
    weight, dim, start, end, step = given(("self", "dim", "start", "end", "step"), args, kwargs)
    dim, step = _dim(dim or 0), step or 1
    if dim == _row_dim(weight):
        # of the layouts only the dense one has rows
        whole = weight if weight.prepacked_for == DENSE else weight.bare()
        part = whole._apply_fn_to_data(lambda part: aten.slice.Tensor(part, 0, start, end, step))
    elif (cut := (everything := range(weight.shape[dim]))[start:end:step]) == everything:
        part = weight.replaced()
    elif step == 1 and cut.start % FORMAT_K == cut.stop % FORMAT_K == 0:
        part = _columns(weight, cut.start, max(cut.start, cut.stop))
    else:
        raise NotImplementedError(
            f"a packed weight is cut along its input channels at multiples of {FORMAT_K} only, which are packed "
            "together; dequantize() first"
        )
    return return_and_correct_aliasing(func, args, kwargs, part)


def _columns(weight: Float8Sparse24Tensor, start: int, stop: int) -> Float8Sparse24Tensor:
    """Input channels start..stop, multiples of 8: the memory of `weight` itself."""
    whole = weight if weight.prepacked_for == DENSE else weight.bare()
    width = {"qdata": 2, "sparse_metadata": FORMAT_K, "prepacked": 1}  # input channels to an element
    names = [name for name in width if getattr(whole, name) is not None]
    return whole.replaced(**{n: getattr(whole, n)[:, start // width[n] : stop // width[n]] for n in names})


@implements(aten.cat.default)
def _(func, types, args, kwargs):
    weights, dim = given(("tensors", "dim"), args, kwargs)
    first = weights[0]
    kinds = {(one.activation, one.transposed, one.dtype) if is_packed(one) else None for one in weights}
    if len(kinds) > 1:
        raise NotImplementedError(
            "cat joins packed weights of one activation, orientation and dtype, not these; dequantize() them first"
        )
    along_rows = _dim(dim or 0) == _row_dim(first)
    if not along_rows and not all(one.scale.equal(first.scale) for one in weights):
        raise NotImplementedError(
            "packed weights are joined along their input channels only where they have the same scales; dequantize() "
            "them first"
        )
    parts = {
        name: torch.cat([getattr(one, name) for one in weights], 0 if along_rows else 1)
        for name in first.tensor_data_names
    }
    new = first.bare().replaced(**parts | ({} if along_rows else {"scale": first.scale.clone()}))
    return new.expand() if first.wants_layout() else new


@implements([aten.split.Tensor, aten.split_with_sizes.default])
def _(func, types, args, kwargs):
    weight, sizes, dim = given(("self", "sizes", "dim"), args, kwargs)
    dim = _dim(dim or 0)
    length = weight.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, length - at) for at in range(0, length, sizes)]
    if sum(sizes) != length:
        raise RuntimeError(f"split: {list(sizes)} do not add up to {length}, the size of dimension {dim}")
    bounds = accumulate(sizes, initial=0)
    return [aten.slice.Tensor(weight, dim, start, end, 1) for start, end in pairwise(bounds)]


@implements(aten.view.default)
def _(func, types, args, kwargs):
    weight, shape = args
    if tuple(shape) != tuple(weight.shape):
        raise NotImplementedError(
            f"a packed weight {tuple(weight.shape)} cannot be viewed as {tuple(shape)}; dequantize() first"
        )
    return return_and_correct_aliasing(func, args, kwargs, weight.replaced())


def _row_dim(weight: Float8Sparse24Tensor) -> int:
    return 1 if weight.transposed else 0


@implements(aten._to_copy.default)
def _(func, types, args, kwargs):
    weight, dtype = args[0], kwargs.get("dtype")
    if dtype is not None and not shows(dtype):
        raise NotImplementedError(
            f"a packed weight shows floating point of 16 bits or more, not {dtype}; dequantize() first"
        )
    device, non_blocking = kwargs.get("device") or weight.device, kwargs.get("non_blocking", False)
    copy = weight.remade(lambda part: part.to(device, non_blocking=non_blocking, copy=True), dtype)
    return return_and_correct_aliasing(func, args, kwargs, copy)


@implements(aten.empty_like.default)
def _(func, types, args, kwargs):
    return args[0].remade(lambda part: torch.empty_like(part, device=kwargs.get("device")), kwargs.get("dtype"))


@implements(aten.to.dtype_layout)
def _(func, types, args, kwargs):
    # torchao's own takes no dtype
    return func.decompose(*args, **kwargs)


@implements(aten.copy_.default)
def _(func, types, args, kwargs):
    weight, source = args[:2]
    if not is_packed(source):
        raise ValueError(
            "a dense tensor cannot be copied into a packed 2:4 weight: pack it with from_hp() first, "
            "or load a checkpoint of the converted model"
        )
    if not is_packed(weight):
        raise ValueError(
            "a packed 2:4 weight cannot be copied into a dense tensor: dequantize() it, or convert the model first"
        )
    same = all(getattr(weight, name).shape == getattr(source, name).shape for name in weight.tensor_data_names)
    if not same or (weight.activation, weight.transposed) != (source.activation, source.transposed):
        raise ValueError(f"cannot copy {source} into {weight}: shape, activation or transposition differ")
    for name in weight.tensor_data_names:
        getattr(weight, name).copy_(getattr(source, name))
    if weight.prepacked is not None:
        weight.prepacked.copy_(weight.expand().prepacked)
    return weight


@implements(aten.is_pinned.default)
def _(func, types, args, kwargs):
    return args[0].qdata.is_pinned()


@implements(aten._pin_memory.default)
def _(func, types, args, kwargs):
    return args[0]._apply_fn_to_data(lambda part: part.pin_memory())


@implements_torch_function(torch.Tensor.share_memory_)
def _(func, types, args, kwargs):
    # torch's own writes to storage that a wrapper does not have, and crashes
    args[0]._apply_fn_to_data(lambda part: part.share_memory_())
    return args[0]
