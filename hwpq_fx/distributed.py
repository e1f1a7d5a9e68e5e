"""Calibration on several processes: each runs its share of the batches, and what they saw becomes one.

Converted models run tensor-parallel with torch's own `parallelize_module(model, mesh, plan, src_data_rank=None)`: every
process has loaded the same checkpoint and keeps its part. `RowwiseParallel` cuts the input channels, so there a weight
with activation "dynamic" quantizes each process's part of a row by a scale of its own, not the whole row by one.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from hwpq_fx.passes import Use

from .curvature import Curvature, GramMatrix, RowSample
from .errors import CalibrationError
from .layers import layers_of
from .statistics import CalibrationRecorder, InputStatistics

if TYPE_CHECKING:  # some builds of torch are without it
    from torch.distributed import ProcessGroup

Key = tuple[tuple[str, Use], ...]
"""The products, by the names of their weights, that one observed input has a part in."""
GRAM, ROWS = "X^T X", "rows"


def reduce_statistics(model: nn.Module, recorder: CalibrationRecorder, group: "ProcessGroup") -> None:
    """Make of what `recorder` saw on this process what all processes of `group` saw, on each bit for bit the same.

    Sums, sums of squares (float64) and X^T X (float32) are those of one process over all batches up to the order of
    adding. Of samples of rows every process gives a part in proportion to its rows, not the rows that one process would
    have drawn. An input that only some processes saw counts with what those saw.

    Collective: every process of the group calls it once its calibration is done. Raises CalibrationError, on every
    process, where their models are not of the same layers.
    """
    layers = layers_of(model)
    shapes = [(layer.name, tuple(layer.parameter.shape)) for layer in layers]
    names = {id(layer.parameter): layer.name for layer in layers}
    parameters = {layer.name: layer.parameter for layer in layers}
    mine = _inputs(recorder, names)
    kinds = {key: _kind(one.curvature) for key, one in mine.items()}
    blocked = {names[at]: reason for at, reason in recorder.blocked.items() if at in names}
    everyone = _gathered((shapes, kinds, blocked, recorder.calls), group)
    if any(other[0] != shapes for other in everyone):
        raise CalibrationError("the processes calibrate models that are not of the same layers")
    recorder.calls = sum(calls for *_, calls in everyone)
    for _, _, reasons, _ in everyone:
        for name, reason in reasons.items():
            recorder.block(parameters[name], reason)
    for key in sorted({key for _, kinds, _, _ in everyone for key in kinds}):
        weights = [(parameters[name], use) for name, use in key]
        one = mine.get(key) or _unseen(recorder, weights)
        agreed = {kinds[key] for _, kinds, _, _ in everyone if key in kinds}
        _agree(one, agreed.pop() if len(agreed) == 1 else "")
        _reduce(one, group)


def _inputs(recorder: CalibrationRecorder, names: dict[int, str]) -> dict[Key, InputStatistics]:
    """What was gathered, by the products it belongs to."""
    products: dict[int, list[tuple[str, Use]]] = {}
    found: dict[int, InputStatistics] = {}
    for at, uses in recorder.uses.items():
        for use, many in uses.items():
            for one in many:
                found[id(one)] = one
                products.setdefault(id(one), []).append((names[at], use))
    return {tuple(sorted(products[at])): one for at, one in found.items()}


def _unseen(recorder: CalibrationRecorder, weights: Sequence[tuple[torch.Tensor, Use]]) -> InputStatistics:
    """Statistics of an input that this process has not met."""
    weight, use = weights[0]
    one = InputStatistics(weight.shape[0 if use.transposed else 1], weight.device)
    for weight, use in weights:
        recorder.uses.setdefault(id(weight), {}).setdefault(use, []).append(one)
    return one


def _kind(curvature: Curvature | None) -> str:
    if isinstance(curvature, RowSample):
        return f"{ROWS} {curvature.capacity}"
    return GRAM if curvature is not None else ""


def _agree(one: InputStatistics, kind: str) -> None:
    """Keep curvature of the kind that all have; where one had no room for it, none is left."""
    if kind and one.curvature is None:
        channels, device = len(one.total), one.total.device
        made = GramMatrix(channels, device) if kind == GRAM else None
        one.curvature = made or RowSample(channels, device, int(kind.removeprefix(ROWS)))
    elif not kind:
        one.curvature = None


def _reduce(one: InputStatistics, group: "ProcessGroup") -> None:
    rows = _gathered(one.rows, group)
    if isinstance(one.curvature, GramMatrix):
        _add(one.curvature.matrix, group)
    elif isinstance(one.curvature, RowSample):
        one.curvature.rows = _drawn(one.curvature, rows, group)
    _add(one.total, group)
    _add(one.sums, group)
    dist.all_reduce(one.bad_call, dist.ReduceOp.MAX, group)
    one.rows = sum(rows)


def _add(tensor: torch.Tensor, group: "ProcessGroup") -> None:
    dist.all_reduce(tensor, group=group)
    # the same bits everywhere, whatever way the sum took
    dist.broadcast(tensor, dist.get_global_rank(group, 0), group)


def _drawn(sample: RowSample, rows: list[int], group: "ProcessGroup") -> torch.Tensor:
    """Rows of all processes' samples, which are in random order each: as many of each as it has of all rows."""
    total, parts = max(1, sum(rows)), []
    for rank, seen in enumerate(rows):
        count = min(seen, sample.capacity, -(-sample.capacity * seen // total))
        part = sample.rows[:count].contiguous()
        if rank != dist.get_rank(group):
            part = torch.empty(count, sample.rows.shape[1], dtype=torch.float32, device=sample.rows.device)
        dist.broadcast(part, dist.get_global_rank(group, rank), group)
        parts.append(part)
    return torch.cat(parts)[: sample.capacity]


def _gathered(value: Any, group: "ProcessGroup") -> list[Any]:
    """`value` of every process, by rank."""
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values
