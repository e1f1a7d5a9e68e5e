"""The packed weight: a tensor subclass that modules hold in place of their dense weight."""

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.utils import TorchAOBaseTensor

from .cpu24 import EXPAND_ROWS, dense24, expands
from .linear24 import DENSE, dense_form, linear24
from .pack24 import FORMAT_K, unpack24
from .paths import EITHER, HP, PATHS, best_layout, chosen, describe, target_of
from .prune_pack24 import prune_pack24
from .quantize_rows import E4M3, quantize_rows
from .select24 import best_two

aten = torch.ops.aten
ACTIVATIONS = ("dynamic", "none")


class Float8Sparse24Tensor(TorchAOBaseTensor):
    """A 2:4 sparse FP8 weight W [N, K]: 5 bits per weight plus a scale per row.

    qdata: e4m3 [N, K/2]; sparse_metadata: uint8 [N, K/8] (bit layout: `pack24`); scale: float32 [N, 1];
    activation: "dynamic" (per-row FP8, made on the fly) or "none"; transposed: whether this tensor shows
    [K, N], as GPT-2's Conv1D keeps its weight; dtype: the dtype it shows and computes for;
    prepacked: a second layout to compute with, derived and never saved, or None; prepacked_for: what reads it, "dense"
    on the CPU, a path's name on a GPU, or "" (`expand`).
    """

    tensor_data_names = ["qdata", "sparse_metadata", "scale"]  # noqa: RUF012 (torchao's protocol)
    tensor_attribute_names = ["activation", "transposed", "dtype", "prepacked_for"]  # noqa: RUF012
    optional_tensor_data_names = ["prepacked"]  # noqa: RUF012

    qdata: torch.Tensor
    sparse_metadata: torch.Tensor
    scale: torch.Tensor
    activation: str
    transposed: bool
    prepacked_for: str
    prepacked: torch.Tensor | None

    def __new__(cls, qdata, sparse_metadata, scale, activation, transposed, dtype, prepacked_for="", prepacked=None):
        rows, half = qdata.shape
        shape = (2 * half, rows) if transposed else (rows, 2 * half)
        # views of a normal tensor have to be normal tensors, inside torch.inference_mode() too
        with torch.inference_mode(qdata.is_inference()):
            return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=qdata.device)

    def __init__(self, qdata, sparse_metadata, scale, activation, transposed, dtype, prepacked_for="", prepacked=None):
        super().__init__()
        self.qdata = qdata
        self.sparse_metadata = sparse_metadata
        self.scale = scale
        self.activation = activation
        self.transposed = transposed
        self.prepacked_for = prepacked_for
        self.prepacked = prepacked

    @classmethod
    def from_hp(
        cls,
        weight: torch.Tensor,
        mask: torch.Tensor | None = None,
        activation: str = "dynamic",
        factor: torch.Tensor | None = None,
    ) -> "Float8Sparse24Tensor":
        """Prune and pack a high-precision weight [N, K] (floating point of 16 bits or more; no gradient is kept).

        mask: bool [N, K] that keeps exactly two of every four along K; None keeps the two largest magnitudes, the
        lower index on ties. factor: float32 [N], multiplies each row, by its scale. Raises ValueError on a shape,
        dtype, mask or activation that does not fit, and on NaN or Inf in the weight.
        """
        weight = weight.detach()
        if weight.dim() != 2 or not _shows(weight.dtype):
            raise ValueError(f"a packed weight is 2-D floating point, not {tuple(weight.shape)} {weight.dtype}")
        rows, cols = weight.shape
        if cols % FORMAT_K:
            raise ValueError(f"K = {cols} is not a multiple of {FORMAT_K}, which the 2:4 format needs")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is not one of {ACTIVATIONS}")
        if mask is not None and (mask.shape != weight.shape or mask.dtype is not torch.bool):
            raise ValueError(f"mask is {tuple(mask.shape)} {mask.dtype}, not {(rows, cols)} torch.bool")
        if factor is not None and factor.shape != (rows,):
            raise ValueError(f"factor is {tuple(factor.shape)}, the weight has {rows} rows")
        if not bool(weight.isfinite().all()):
            raise ValueError("the weight holds NaN or Inf")
        if mask is None:
            mask = best_two(weight.abs().unflatten(1, (-1, 4))).flatten(1)
        qdata, sparse_metadata, scale = prune_pack24(weight, None, mask)
        scale = scale if factor is None else scale * factor.detach().float().view(-1, 1)
        return cls(qdata, sparse_metadata, scale, activation, False, weight.dtype)

    def dequantize(self, output_dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense weight, [N, K] (or [K, N] where transposed). Exact in float32 and float64 up to the rounding
        of value * scale; pruned places are +0.0."""
        wide = torch.promote_types(output_dtype or self.dtype, torch.float32)
        dense = unpack24(self.qdata, self.sparse_metadata).to(wide) * self.scale
        dense = dense.to(output_dtype or self.dtype)
        return dense.t() if self.transposed else dense

    def expand(self) -> "Float8Sparse24Tensor":
        """The same weight with the layout that makes its products fast: on the CPU the dense one, on a GPU that of
        the library that is fastest there (`paths.best_layout`); elsewhere, and where none is faster, without one."""
        target = target_of(self.qdata.device)
        if target is None and self.qdata.device.type == "cpu":
            form = dense_form(self.scale, self.dtype, self.activation == "dynamic")
            dense = dense24(self.qdata, self.sparse_metadata, *form)
            return self._with(prepacked=dense, prepacked_for=DENSE)
        name = best_layout(target, *self._packed_shape(), self.dtype) if target and self.activation == "dynamic" else ""
        make = PATHS[name].make_layout if name else None
        if make is None:
            return self.bare()
        return self._with(prepacked=make(self.qdata, self.sparse_metadata), prepacked_for=name)

    def bare(self) -> "Float8Sparse24Tensor":
        """The same weight without a second layout."""
        return self._with(prepacked=None, prepacked_for="")

    def paths(self) -> str:
        """What runs, at how many rows of input."""
        target = target_of(self.device)
        if target is None:
            many = self.prepacked_for or "unpacked at every call"
            on_cpu = self.device.type == "cpu" and expands(1, self.dtype, *self._packed_shape())
            return f"expand to {EXPAND_ROWS} rows, {many} above" if on_cpu else many
        activation = EITHER if self.activation == "dynamic" else HP
        return describe(target, *self._packed_shape(), self.dtype, activation, self.prepacked_for)

    def _packed_shape(self) -> tuple[int, int]:
        rows, half = self.qdata.shape
        return rows, 2 * half

    def packed_nbytes(self) -> int:
        """Bytes of what is saved: values, indices, scales."""
        return sum(getattr(self, name).nbytes for name in self.tensor_data_names)

    def layout_nbytes(self) -> int:
        """Bytes of the derived layouts that stay in memory beside the packed weight."""
        return 0 if self.prepacked is None else self.prepacked.nbytes

    def _with(self, **changes: Any) -> "Float8Sparse24Tensor":
        names = (*self.tensor_data_names, *self.tensor_attribute_names, *self.optional_tensor_data_names)
        return type(self)(**{name: getattr(self, name) for name in names} | changes)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        # inference mode hands composite ops (chunk, narrow, to) over whole; torchao's table holds the others
        if func not in cls._ATEN_OP_TABLE[cls] and (out := func.decompose(*args, **kwargs or {})) is not NotImplemented:
            return out
        return super().__torch_dispatch__(func, types, args, kwargs or {})

    def _wants_layout(self) -> bool:
        # what is on the CPU without one was left so; elsewhere there may be none to have
        return self.prepacked is not None or self.device.type != "cpu"

    def _remade(self, make: Callable, dtype: torch.dtype | None) -> "Float8Sparse24Tensor":
        """A weight of the parts that `make` gives for this one's, perhaps on another device."""
        parts = {name: make(getattr(self, name)) for name in self.tensor_data_names}
        new = self._with(**parts, dtype=dtype or self.dtype)
        return new.expand() if self._wants_layout() else new

    def _stable_hash_for_caching(self) -> str:
        # AOTAutograd's key sees a product with this weight, not what that stands for: so the source is part of it
        names, attributes = self.__tensor_flatten__()
        parts = [(p.dtype, p.device, tuple(p.shape), p.stride()) for p in (getattr(self, name) for name in names)]
        return f"{attributes} {self.requires_grad} {parts} {_source_hash()}"

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"activation={self.activation!r}, prepacked_for={self.prepacked_for!r})"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # bytes, because plain pickle knows no FP8; `prepacked` is derived: say only whether to make one
        names = (*self.tensor_data_names, "activation", "transposed", "dtype")
        data = {name: getattr(self, name) for name in names} | {"qdata": self.qdata.view(torch.uint8)}
        # a fake weight is pickled for AOTAutograd's key alone: torch 2.11 does not ask for the stable hash
        key = (self._stable_hash_for_caching(),) if isinstance(self.qdata, FakeTensor) else ()
        requires_grad = self.requires_grad if isinstance(self, torch.nn.Parameter) else None
        return _rebuild, (*data.values(), self._wants_layout(), requires_grad, *key)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copy = self.detach().clone()
        return torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy


@cache
def _source_hash() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def _shows(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize >= 2


def _rebuild(qdata, sparse_metadata, scale, activation, transposed, dtype, expanded, requires_grad, key=""):
    """requires_grad: that of a Parameter, None for a plain tensor."""
    weight = Float8Sparse24Tensor(qdata.view(E4M3), sparse_metadata, scale, activation, transposed, dtype)
    weight = weight.expand() if expanded else weight
    return weight if requires_grad is None else torch.nn.Parameter(weight, requires_grad)


torch.serialization.add_safe_globals([Float8Sparse24Tensor, _rebuild])

implements = Float8Sparse24Tensor.implements
implements_torch_function = Float8Sparse24Tensor.implements_torch_function


def packed_linear(x: torch.Tensor, weight: Float8Sparse24Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` with the packed rows of `weight` [N, K], whichever way it shows them, for x [..., K] of any rank.

    Accumulates in float32 and obeys autocast. Raises RuntimeError where x, or bias [N], does not fit.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    elif x.dtype != weight.dtype:
        raise RuntimeError(f"linear: x is {x.dtype}, the packed weight {weight.dtype}; cast one of them")
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
    x, weight, bias = _arguments(("input", "weight", "bias"), args, kwargs)
    if not _is_packed(weight) or weight.transposed or _is_packed(x):
        return F.linear(_dense(x), _dense(weight), bias)
    return packed_linear(x, weight, bias)


@implements_torch_function(F.multi_head_attention_forward)
def _(func, types, args, kwargs):
    # linear would batch a weight to multiply inputs that are not contiguous, as they are with batch_first
    given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    inputs = [given.pop(name) for name in ("query", "key", "value")]
    # the same tensor stays the same: self attention is told by identity
    made = {key: one.contiguous() for key, one in {id(one): one for one in inputs}.items()}
    return _below(func, [*(made[id(one)] for one in inputs), *args[3:]], given)


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
    if kwargs or not _is_packed(weight) or bias.shape != weight.scale.shape[:1]:
        return torch.addmm(bias, _dense(x), _dense(weight), **kwargs)
    return _product(x, weight, bias)


def _product(x, weight, bias=None):
    # x @ weight is a linear only where the packed rows are the columns of `weight`
    if _is_packed(weight) and weight.transposed and not _is_packed(x):
        return packed_linear(x, weight, bias)
    return _dense(x) @ _dense(weight) if bias is None else torch.addmm(bias, _dense(x), _dense(weight))


def _is_packed(tensor: Any) -> bool:
    return isinstance(tensor, Float8Sparse24Tensor)


def _dense(tensor):
    return tensor.dequantize() if _is_packed(tensor) else tensor


def _below(func, args, kwargs):
    """`func` as torch defines it, which comes back here with its aten ops."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _arguments(names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    given = dict(zip(names, args, strict=False)) | kwargs
    return [given.get(name) for name in names]


def _dim(dim: int) -> int:
    if not -2 <= dim < 2:
        raise IndexError(f"a packed weight has 2 dimensions: there is no dimension {dim}")
    return dim % 2


@implements([aten.t.default, aten.transpose.int, aten.permute.default])
def _(func, types, args, kwargs):
    weight = args[0]
    dims = {aten.t.default: (1, 0), aten.transpose.int: args[1:], aten.permute.default: args[-1]}[func]
    turned = _dim(dims[0]) != _dim(dims[1]) and (func is not aten.permute.default or _dim(dims[0]) == 1)
    return return_and_correct_aliasing(func, args, kwargs, weight._with(transposed=weight.transposed != turned))


@implements(aten.slice.Tensor)
def _(func, types, args, kwargs):
    weight, dim, start, end, step = _arguments(("self", "dim", "start", "end", "step"), args, kwargs)
    dim, step = _dim(dim or 0), step or 1
    if dim == _row_dim(weight):
        # of the layouts only the dense one has rows
        whole = weight if weight.prepacked_for == DENSE else weight.bare()
        part = whole._apply_fn_to_data(lambda part: aten.slice.Tensor(part, 0, start, end, step))
    elif (cut := (everything := range(weight.shape[dim]))[start:end:step]) == everything:
        part = weight._with()
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
    return whole._with(**{n: getattr(whole, n)[:, start // width[n] : stop // width[n]] for n in names})


@implements(aten.cat.default)
def _(func, types, args, kwargs):
    weights, dim = _arguments(("tensors", "dim"), args, kwargs)
    first = weights[0]
    kinds = {(one.activation, one.transposed, one.dtype) if _is_packed(one) else None for one in weights}
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
    new = first.bare()._with(**parts | ({} if along_rows else {"scale": first.scale.clone()}))
    return new.expand() if first._wants_layout() else new


@implements([aten.split.Tensor, aten.split_with_sizes.default])
def _(func, types, args, kwargs):
    weight, sizes, dim = _arguments(("self", "sizes", "dim"), args, kwargs)
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
    return return_and_correct_aliasing(func, args, kwargs, weight._with())


def _row_dim(weight: Float8Sparse24Tensor) -> int:
    return 1 if weight.transposed else 0


@implements(aten._to_copy.default)
def _(func, types, args, kwargs):
    weight, dtype = args[0], kwargs.get("dtype")
    if dtype is not None and not _shows(dtype):
        raise NotImplementedError(
            f"a packed weight shows floating point of 16 bits or more, not {dtype}; dequantize() first"
        )
    device, non_blocking = kwargs.get("device") or weight.device, kwargs.get("non_blocking", False)
    copy = weight._remade(lambda part: part.to(device, non_blocking=non_blocking, copy=True), dtype)
    return return_and_correct_aliasing(func, args, kwargs, copy)


@implements(aten.empty_like.default)
def _(func, types, args, kwargs):
    return args[0]._remade(lambda part: torch.empty_like(part, device=kwargs.get("device")), kwargs.get("dtype"))


@implements(aten.to.dtype_layout)
def _(func, types, args, kwargs):
    # torchao's own takes no dtype
    return func.decompose(*args, **kwargs)


@implements(aten.copy_.default)
def _(func, types, args, kwargs):
    weight, source = args[:2]
    if not _is_packed(source):
        raise ValueError(
            "a dense tensor cannot be copied into a packed 2:4 weight: pack it with from_hp() first, "
            "or load a checkpoint of the converted model"
        )
    if not _is_packed(weight):
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
