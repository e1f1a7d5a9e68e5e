"""Packed weights that multiply the same input, seen as one: their rows lie next to each other in memory, nothing twice.

    before   q.qdata [Nq, K/2]     k.qdata [Nk, K/2]     v.qdata [Nv, K/2]      each in memory of its own
    after    one buffer [Nq + Nk + Nv, K/2], of which these three are the rows; the same for every other part

The weights stay the tensors they are, with their own shapes, and can be used one by one. Copies of them (`.to()`,
`deepcopy`) have memory of their own again.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, NamedTuple

import torch

from .linear24 import DENSE
from .packed import Float8Sparse24Tensor

# compiled code may count on it for every tensor that it is given: what starts off it is copied, or faults
ALIGNMENT = 16
JOINED = "_hwpq_joined"  # on a weight: the join it belongs to
HELD = "other tensors share their memory, as those of a state_dict taken before do"
_moving = Lock()


class Joined(NamedTuple):
    """Weights as one. True for them as long as their parts lie at `addresses`: the join keeps that memory alive, so
    nothing else can come to lie there."""

    weight: Float8Sparse24Tensor
    addresses: list[int]
    state: tuple[Any, ...]


def joined(weights: Sequence[Float8Sparse24Tensor]) -> Float8Sparse24Tensor | None:
    """The rows of `weights` one after the other as one weight [sum of N, K], of their own memory; None where
    `why_apart` has a reason.

    The first call moves them together, one part at a time; later ones find them so. Asked anew before each use, it
    is right whatever has been done to the weights since.
    """
    known = weights[0].__dict__.get(JOINED)
    if known is not None and known.addresses == _addresses(weights) and known.state == _state(weights, known.weight):
        return known.weight
    with _moving:
        return None if why_apart(weights) else _join(weights)


def why_apart(weights: Sequence[Float8Sparse24Tensor]) -> str:
    """Why `weights` cannot lie in memory as the rows of one, or "". Changes nothing."""
    if weights[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    if len({(_attributes(one), one.dtype, one.qdata.shape[1], one.device) for one in weights}) > 1:
        return "they differ in input channels, dtype, device, activation or layout"
    if weights[0].prepacked_for not in ("", DENSE):
        return f"each has a layout of its own, for {weights[0].prepacked_for}"
    columns = list(zip(*map(_parts, weights), strict=True))
    if weights[0].is_cuda and any(one.qdata.is_inference() for one in weights):
        return "tensors of inference mode do not tell when they are written to"
    if any(part.numel() == 0 or not part.is_contiguous() for column in columns for part in column):
        return "one of them is empty, or not contiguous in memory"
    if any(part.nbytes % ALIGNMENT for column in columns for part in column[:-1]):
        return f"a part of them would not start at a multiple of {ALIGNMENT} bytes"
    if all(_adjacent(column) for column in columns):
        return ""
    if len({id(one) for one in weights}) < len(weights):
        return "one of them is there twice"
    if any(part.device.type == "cpu" and part.is_shared() for column in columns for part in column):
        return "their memory is shared between processes"
    if _held(weights):
        return HELD
    return ""


def stacked(weights: Sequence[Float8Sparse24Tensor], join: Callable[[Sequence[torch.Tensor]], torch.Tensor]):
    """One weight of what `join` makes of each part of `weights`, from first to last."""
    names, attributes = weights[0].__tensor_flatten__()
    parts = {name: join([getattr(one, name) for one in weights]) for name in names}
    return Float8Sparse24Tensor.__tensor_unflatten__(parts, attributes, None, None)


def _join(weights: Sequence[Float8Sparse24Tensor]) -> Float8Sparse24Tensor:
    # made of and for tensors that work inside inference mode and outside of it
    with torch.inference_mode(weights[0].qdata.is_inference()), torch.no_grad():
        for column in zip(*map(_parts, weights), strict=True):
            if not _adjacent(column):
                _move(column)
        weight = stacked(weights, _rows)
        if weight.is_cuda:
            weight = weight.expand()
    result = Joined(weight, _addresses(weights), _state(weights, weight))
    for one in weights:
        setattr(one, JOINED, result)
    return weight


def _move(column: Sequence[torch.Tensor]) -> None:
    rows = [part.shape[0] for part in column]
    buffer = column[0].new_empty((sum(rows), *column[0].shape[1:]))
    for part, place in zip(column, buffer.split(rows), strict=True):
        place.copy_(part)
        # in place, so that whoever holds this very tensor follows
        part.data = place


def _rows(column: Sequence[torch.Tensor]) -> torch.Tensor:
    first = column[0].detach()
    return first.as_strided((sum(part.shape[0] for part in column), *first.shape[1:]), first.stride())


def _adjacent(column: Sequence[torch.Tensor]) -> bool:
    storage, at = column[0].untyped_storage()._cdata, column[0].data_ptr()
    for part in column:
        if part.untyped_storage()._cdata != storage or part.data_ptr() != at:
            return False
        at += part.nbytes
    return True


def _parts(weight: Float8Sparse24Tensor) -> list[torch.Tensor]:
    return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]


def _addresses(weights: Sequence[Float8Sparse24Tensor]) -> list[int]:
    parts: list[torch.Tensor | None] = []
    for one in weights:
        parts += one.qdata, one.sparse_metadata, one.scale, one.prepacked
    return [0 if part is None else part.data_ptr() for part in parts]


def _state(weights: Sequence[Float8Sparse24Tensor], weight: Float8Sparse24Tensor) -> tuple[Any, ...]:
    """What else the join depends on: a layout that only the whole has is made anew once rows were written to."""
    if weight.prepacked is None or weight.prepacked_for == DENSE:
        return _attributes(weights[0])
    return *_attributes(weights[0]), *(part._version for one in weights for part in (one.qdata, one.sparse_metadata))


def _attributes(weight: Float8Sparse24Tensor) -> tuple[Any, ...]:
    return weight.activation, weight.transposed, weight.prepacked_for


def _held(weights: Sequence[Float8Sparse24Tensor]) -> bool:
    """Whether tensors beside these weights, and the joins they were in, share their memory. Relies on torch's count of
    who holds a storage, which is not public; tried on torch 2.11 and 2.13."""
    known = [*weights, *(one.__dict__[JOINED].weight for one in weights if JOINED in one.__dict__)]
    parts = [part for one in known for part in _parts(one)]
    tensors = {id(one): one for part in parts for one in (part, part._base) if one is not None}
    counts = Counter(one.untyped_storage()._cdata for one in tensors.values())
    # one holder more: the storage's own Python object, which there is once
    return any(torch._C._storage_Use_Count(storage) > count + 1 for storage, count in counts.items())
