"""The packed weight: a tensor subclass that modules hold in place of their dense weight.

What ops do with one is in `packed_products` and `packed_views`.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torchao.utils import TorchAOBaseTensor

from .cpu24 import EXPAND_ROWS, dense24, expands
from .linear24 import DENSE, dense_form
from .pack24 import FORMAT_K, unpack24
from .paths import EITHER, HP, PATHS, best_layout, describe, target_of
from .prune_pack24 import prune_pack24
from .quantize_rows import E4M3
from .select24 import best_two

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
        if weight.dim() != 2 or not shows(weight.dtype):
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
            return self.replaced(prepacked=dense, prepacked_for=DENSE)
        name = best_layout(target, *self._packed_shape(), self.dtype) if target and self.activation == "dynamic" else ""
        make = PATHS[name].make_layout if name else None
        if make is None:
            return self.bare()
        return self.replaced(prepacked=make(self.qdata, self.sparse_metadata), prepacked_for=name)

    def bare(self) -> "Float8Sparse24Tensor":
        """The same weight without a second layout."""
        return self.replaced(prepacked=None, prepacked_for="")

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

    def replaced(self, **changes: Any) -> "Float8Sparse24Tensor":
        """The same weight but for these attributes."""
        names = (*self.tensor_data_names, *self.tensor_attribute_names, *self.optional_tensor_data_names)
        return type(self)(**{name: getattr(self, name) for name in names} | changes)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in cls._ATEN_OP_TABLE[cls]:
            return super().__torch_dispatch__(func, types, args, kwargs)
        # inference mode hands composite ops (chunk, narrow, to) over whole
        if (out := func.decompose(*args, **kwargs)) is not NotImplemented:
            return out
        raise NotImplementedError(f"a packed weight has no {func}: put weight.dequantize() in its place first")

    def wants_layout(self) -> bool:
        """Whether what is made of it gets a second layout."""
        # what is on the CPU without one was left so; elsewhere there may be none to have
        return self.prepacked is not None or self.device.type != "cpu"

    def remade(self, make: Callable, dtype: torch.dtype | None) -> "Float8Sparse24Tensor":
        """A weight of the parts that `make` gives for this one's, perhaps on another device."""
        parts = {name: make(getattr(self, name)) for name in self.tensor_data_names}
        new = self.replaced(**parts, dtype=dtype or self.dtype)
        return new.expand() if self.wants_layout() else new

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
        return _rebuild, (*data.values(), self.wants_layout(), requires_grad, *key)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copy = self.detach().clone()
        return torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy


@cache
def _source_hash() -> str:
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def is_packed(tensor: Any) -> bool:
    return isinstance(tensor, Float8Sparse24Tensor)


def shows(dtype: torch.dtype) -> bool:
    """Whether a packed weight can be of this dtype to whoever looks at it."""
    return dtype.is_floating_point and dtype.itemsize >= 2


def given(names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments of an op in this order, None for those that were left out."""
    found = dict(zip(names, args, strict=False)) | kwargs
    return [found.get(name) for name in names]


def _rebuild(qdata, sparse_metadata, scale, activation, transposed, dtype, expanded, requires_grad, key=""):
    """requires_grad: that of a Parameter, None for a plain tensor."""
    weight = Float8Sparse24Tensor(qdata.view(E4M3), sparse_metadata, scale, activation, transposed, dtype)
    weight = weight.expand() if expanded else weight
    return weight if requires_grad is None else torch.nn.Parameter(weight, requires_grad)


torch.serialization.add_safe_globals([Float8Sparse24Tensor, _rebuild])
