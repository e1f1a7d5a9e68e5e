"""The packed weight: a tensor subclass that modules hold in place of their dense weight."""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.utils import TorchAOBaseTensor

from .linear24 import __file__ as linear24_source
from .linear24 import dense_layout, linear24
from .pack24 import FORMAT_K, pack24, unpack24
from .quantize_rows import quantize_rows, quantize_weight_rows

aten = torch.ops.aten
ACTIVATIONS = ("dynamic", "none")


class Float8Sparse24Tensor(TorchAOBaseTensor):
    """A 2:4 sparse FP8 weight W [N, K]: 5 bits per weight plus a scale per row.

    qdata: e4m3 [N, K/2]; sparse_metadata: uint8 [N, K/8] (bit layout: `pack24`); scale: float32 [N, 1];
    activation: "dynamic" (per-row FP8, made on the fly) or "none"; transposed: whether this tensor shows
    [K, N], as GPT-2's Conv1D keeps its weight; dtype: the dtype it shows and computes for;
    dense: a second layout for CPU products, derived and never saved, or None (`expand`).
    """

    tensor_data_names = ["qdata", "sparse_metadata", "scale"]  # noqa: RUF012 (torchao's protocol)
    tensor_attribute_names = ["activation", "transposed", "dtype"]  # noqa: RUF012
    optional_tensor_data_names = ["dense"]  # noqa: RUF012

    qdata: torch.Tensor
    sparse_metadata: torch.Tensor
    scale: torch.Tensor
    activation: str
    transposed: bool
    dense: torch.Tensor | None

    def __new__(cls, qdata, sparse_metadata, scale, activation, transposed, dtype, dense=None):
        rows, half = qdata.shape
        shape = (2 * half, rows) if transposed else (rows, 2 * half)
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=qdata.device, requires_grad=False)

    def __init__(self, qdata, sparse_metadata, scale, activation, transposed, dtype, dense=None):
        super().__init__()
        self.qdata = qdata
        self.sparse_metadata = sparse_metadata
        self.scale = scale
        self.activation = activation
        self.transposed = transposed
        self.dense = dense

    @classmethod
    def from_hp(
        cls,
        weight: torch.Tensor,
        mask: torch.Tensor | None = None,
        activation: str = "dynamic",
        factor: torch.Tensor | None = None,
    ) -> "Float8Sparse24Tensor":
        """Prune and pack a high-precision weight [N, K] (float32, bfloat16 or float16).

        mask: bool [N, K] that keeps exactly two of every four along K; None keeps the two largest magnitudes, the
        lower index on ties. factor: float32 [N], multiplies each row, by its scale. Raises ValueError on a shape, mask or activation that does not fit.
        """
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(f"a packed weight is 2-D floating point, not {tuple(weight.shape)} {weight.dtype}")
        if weight.shape[1] % FORMAT_K:
            raise ValueError(f"K = {weight.shape[1]} is not a multiple of {FORMAT_K}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is not one of {ACTIVATIONS}")
        mask = largest_two(weight.abs()) if mask is None else mask
        values, scale = quantize_weight_rows(weight.masked_fill(~mask, 0))
        qdata, sparse_metadata = pack24(values, mask)
        scale = scale if factor is None else scale * factor.view(-1, 1)
        return cls(qdata, sparse_metadata, scale, activation, False, weight.dtype)

    def dequantize(self, output_dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dense weight, [N, K] (or [K, N] where transposed). Exact in float32 and float64 up to the rounding
        of value * scale; pruned places are +0.0."""
        wide = torch.promote_types(output_dtype or self.dtype, torch.float32)
        dense = unpack24(self.qdata, self.sparse_metadata).to(wide) * self.scale
        dense = dense.to(output_dtype or self.dtype)
        return dense.t() if self.transposed else dense

    def expand(self) -> "Float8Sparse24Tensor":
        """The same weight with the `dense` layout that CPU products use; off the CPU, itself without one."""
        dense = None
        if self.qdata.device.type == "cpu":
            fp8 = self.activation == "dynamic"
            dense = dense_layout(self.qdata, self.sparse_metadata, self.scale, self.dtype, fp8)
        return self._with(dense=dense)

    def packed_nbytes(self) -> int:
        """Bytes of what is saved: values, indices, scales."""
        return sum(getattr(self, name).nbytes for name in self.tensor_data_names)

    def layout_nbytes(self) -> int:
        """Bytes of the derived layouts that stay in memory beside the packed weight."""
        return 0 if self.dense is None else self.dense.nbytes

    def _with(self, **changes: Any) -> "Float8Sparse24Tensor":
        names = (*self.tensor_data_names, *self.tensor_attribute_names, *self.optional_tensor_data_names)
        return type(self)(**{name: getattr(self, name) for name in names} | changes)

    def _stable_hash_for_caching(self) -> str:
        # AOTAutograd's key sees the op's name, not what it stands for: so the source of the op is part of it
        dense = None if self.dense is None else self.dense.dtype
        return f"{self.shape} {self.dtype} {self.activation} {self.transposed} {dense} {_op_source_hash()}"

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"activation={self.activation!r}, expanded={self.dense is not None})"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # `dense` is derived: say only whether there was one
        data = tuple(getattr(self, name) for name in (*self.tensor_data_names, *self.tensor_attribute_names))
        return _rebuild, (*data, self.dense is not None, isinstance(self, torch.nn.Parameter))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Float8Sparse24Tensor":
        if id(self) not in memo:
            copy = self.detach().clone()
            memo[id(self)] = _as_parameter(copy) if isinstance(self, torch.nn.Parameter) else copy
        return memo[id(self)]


@cache
def _op_source_hash() -> str:
    return hashlib.sha256(Path(linear24_source).read_bytes()).hexdigest()


def largest_two(scores: torch.Tensor) -> torch.Tensor:
    """Bool mask [N, K] of the two largest of every four along K, the lower index on ties; no sort."""
    group = scores.view(scores.shape[0], -1, 4)
    rank = torch.zeros_like(group, dtype=torch.int8)
    for i in range(4):
        for j in range(4):
            if i != j:
                beats = group[..., j] >= group[..., i] if j < i else group[..., j] > group[..., i]
                rank[..., i] += beats
    return (rank < 2).view(scores.shape)


def _as_parameter(weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.Parameter(weight, requires_grad=False)


def _rebuild(qdata, sparse_metadata, scale, activation, transposed, dtype, expanded, parameter):
    weight = Float8Sparse24Tensor(qdata, sparse_metadata, scale, activation, transposed, dtype)
    weight = weight.expand() if expanded else weight
    return _as_parameter(weight) if parameter else weight


torch.serialization.add_safe_globals([Float8Sparse24Tensor, _rebuild])

implements = Float8Sparse24Tensor.implements
implements_torch_function = Float8Sparse24Tensor.implements_torch_function


def packed_linear(x: torch.Tensor, weight: Float8Sparse24Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` with a packed weight [N, K], for x [..., K] of any rank; float32 accumulation, autocast obeyed."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    elif x.dtype != weight.dtype:
        raise RuntimeError(f"linear: x is {x.dtype}, the packed weight {weight.dtype}; cast one of them")
    values, scale, x_grad = x, None, None
    if weight.activation == "dynamic":
        values, scale = quantize_rows(x.detach())
        x_grad = x if torch.is_grad_enabled() and x.requires_grad else None
    # a dense layout made for another dtype (autocast) does not fit an unquantized x
    dense = weight.dense if scale is not None or weight.dtype == x.dtype else None
    return linear24(values, scale, weight.qdata, weight.sparse_metadata, weight.scale, bias, dense, x_grad, x.dtype)


@implements(aten.linear.default)
@implements_torch_function([F.linear, aten.linear.default])
def _(func, types, args, kwargs):
    x, weight, bias = _arguments(("input", "weight", "bias"), args, kwargs)
    if isinstance(x, Float8Sparse24Tensor):
        x = x.dequantize()
    if not isinstance(weight, Float8Sparse24Tensor):
        return F.linear(x, weight, bias)
    if weight.transposed:
        return F.linear(x, weight.dequantize(), bias)
    return packed_linear(x, weight, bias)


@implements_torch_function(F.multi_head_attention_forward)
def _(func, types, args, kwargs):
    # linear would batch a weight to multiply inputs that are not contiguous, as they are with batch_first
    inputs = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    made: dict[int, torch.Tensor] = {}  # the same tensor stays the same: self attention is told by identity
    for name in ("query", "key", "value"):
        inputs[name] = made.setdefault(id(inputs[name]), inputs[name].contiguous())
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args[3:], **inputs) if len(args) <= 3 else func(*list(inputs.values())[:3], *args[3:], **kwargs)


@implements([aten.mm.default, aten.matmul.default])
def _(func, types, args, kwargs):
    return _product(None, *args[:2])


@implements(aten.addmm.default)
def _(func, types, args, kwargs):
    bias, x, weight = args[:3]
    if kwargs.get("beta", 1) == 1 and kwargs.get("alpha", 1) == 1 and bias.dim() == 1:
        return _product(bias, x, weight)
    return torch.addmm(bias, _dense(x), _dense(weight), **kwargs)


def _product(bias, x, weight):
    # x @ weight is a linear only where the packed rows are the columns of `weight`
    if isinstance(weight, Float8Sparse24Tensor) and weight.transposed and not isinstance(x, Float8Sparse24Tensor):
        return packed_linear(x, weight.t(), bias)
    y = _dense(x) @ _dense(weight)
    return y if bias is None else y + bias


def _dense(tensor):
    return tensor.dequantize() if isinstance(tensor, Float8Sparse24Tensor) else tensor


def _arguments(names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    given = dict(zip(names, args, strict=False)) | kwargs
    return [given.get(name) for name in names]


@implements(aten.t.default)
def _(func, types, args, kwargs):
    return return_and_correct_aliasing(func, args, kwargs, args[0]._with(transposed=not args[0].transposed))


@implements([aten.transpose.int, aten.permute.default])
def _(func, types, args, kwargs):
    weight = args[0]
    dims = args[1] if func is aten.permute.default else args[1:3]
    dims = [d % 2 for d in dims]
    if func is aten.permute.default and dims == [0, 1]:
        return return_and_correct_aliasing(func, args, kwargs, weight._with())
    if sorted(dims) != [0, 1]:
        return return_and_correct_aliasing(func, args, kwargs, weight._with())
    return return_and_correct_aliasing(func, args, kwargs, weight._with(transposed=not weight.transposed))


@implements(aten.slice.Tensor)
def _(func, types, args, kwargs):
    weight, dim, start, end, step = [*args, *(0, None, None, 1)[len(args) - 1 :]]
    if dim % 2 == _row_dim(weight):
        rows = weight._apply_fn_to_data(lambda part: aten.slice.Tensor(part, 0, start, end, step))
        return return_and_correct_aliasing(func, args, kwargs, rows)
    if (start or 0) == 0 and (end is None or end >= weight.shape[dim]) and step == 1:
        return return_and_correct_aliasing(func, args, kwargs, weight._with())
    raise NotImplementedError(
        "a packed weight is sliced along its output rows only: its input channels are packed in groups of four; "
        "dequantize() first"
    )


@implements([aten.split.Tensor, aten.split_with_sizes.default])
def _(func, types, args, kwargs):
    weight, sizes = args[:2]
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % 2
    length = weight.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, length - at) for at in range(0, length, sizes)]
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [aten.slice.Tensor(weight, dim, a, b, 1) for a, b in zip(bounds, bounds[1:], strict=False)]


def _row_dim(weight: Float8Sparse24Tensor) -> int:
    return 1 if weight.transposed else 0


@implements(aten._to_copy.default)
def _(func, types, args, kwargs):
    weight = args[0]
    dtype = kwargs.get("dtype") or weight.dtype
    device = kwargs.get("device") or weight.device
    if not dtype.is_floating_point:
        raise NotImplementedError(f"a packed weight shows a floating dtype, not {dtype}; dequantize() first")
    moved = [
        getattr(weight, name).to(device, non_blocking=kwargs.get("non_blocking", False), copy=True)
        for name in weight.tensor_data_names
    ]
    copy = type(weight)(*moved, weight.activation, weight.transposed, dtype)
    # the layout is for the CPU: it stays when the weight does, and comes back when the weight does
    wanted = copy.device.type == "cpu" and (weight.dense is not None or weight.device.type != "cpu")
    return return_and_correct_aliasing(func, args, kwargs, copy.expand() if wanted else copy)


@implements(aten.copy_.default)
def _(func, types, args, kwargs):
    weight, source = args[:2]
    if not isinstance(source, Float8Sparse24Tensor):
        raise ValueError(
            "a dense tensor cannot be copied into a packed 2:4 weight: pack it with from_hp() first, "
            "or load a checkpoint of the converted model"
        )
    same = all(getattr(weight, name).shape == getattr(source, name).shape for name in weight.tensor_data_names)
    if not same or (weight.activation, weight.transposed) != (source.activation, source.transposed):
        raise ValueError(f"cannot copy {source} into {weight}: shape, activation or transposition differ")
    for name in weight.tensor_data_names:
        getattr(weight, name).copy_(getattr(source, name))
    if weight.dense is not None:
        weight.dense.copy_(weight.expand().dense)
    return weight


@implements(aten.empty_like.default)
def _(func, types, args, kwargs):
    device = kwargs.get("device")
    return args[0]._apply_fn_to_data(lambda part: torch.empty_like(part, device=device))
