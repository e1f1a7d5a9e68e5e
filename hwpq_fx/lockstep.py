"""`sequential`: every layer is converted on the inputs that the converted layers before it give, and aims at what the
dense model makes of its own.

Each recorded run of the model's graph is run twice more, dense (D) and converted (X), all of them together from one
input of linear layers to the next; or, for a block of a checkpoint, one after the other from the start to each of them
(`in_order`). There the weights W that multiply it are converted, and the converted runs go on with the new ones, as
the model will. (What one call of the model leaves to the next, a cache, is the dense model's in both.) With D and X
[R, K] that input in both, a new weight W' [N, K] is to minimise

    ||D W^T + r_D - X W'^T - r_X||^2

where r [R, N] is what the graph adds to the product and had before: the residual stream, which is off by now and can be
put right here as well. For that `reconstruct` wants X^T X and the drift W (D - X)^T X + (r_D - r_X)^T X, as much of it
as is no chance (`hwpq_fx.drift`).

Inputs from the pruned layers before are SparseGPT's (Frantar and Alistarh, arXiv 2301.00774); the dense model's outputs
as the aim are GPTAQ's (Li et al., arXiv 2504.02692), without the residual.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from hwpq_fx.kernels import Float8Sparse24Tensor
from hwpq_fx.passes import Stage, Steps, Use

from .calibration import tracked
from .compress import Compressed, compress, compress_fp8, shape_of
from .config import HWPQConfig
from .curvature import CurvatureBudget, GramMatrix, add_product
from .drift import Drift, halves_of
from .layers import Layer
from .plan import SPARSE
from .recording import Run, values_in
from .statistics import Call, InputStatistics, kept_rows

Timed = Callable[[str], AbstractContextManager[None]]


class _Job(NamedTuple):
    """A weight to convert."""

    layer: Layer
    status: str
    uses: list[Use]

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K]"""
        return shape_of(self.layer.parameter, self.uses)

    @property
    def weight(self) -> torch.Tensor:
        """[N, K]"""
        weight = self.layer.parameter.detach()
        return weight.t() if self.uses[0].transposed else weight


class Lane(NamedTuple):
    """One run of calibration, dense and converted. places: of the graph's inputs, by their ids."""

    stages: list[Stage]
    places: dict[int, int]
    call: Call
    dense: Steps
    converted: Steps

    @classmethod
    def of(cls, run: Run, converted: tuple[Any, ...]) -> "Lane":
        """converted: what the converted run is given, where `run` has the dense one's."""
        places = {id(one): place for place, one in enumerate(run.args)}
        dense, other = (Steps(run.staged, args) for args in (run.args, converted))
        return cls(run.staged.stages, places, run.call, dense, other)

    def put(self, parameter: torch.Tensor, weight: torch.Tensor) -> None:
        """Go on converted with `weight` in the parameter's place."""
        self.converted.replace(self.places[id(parameter)], weight)

    def residuals(self, number: int, job: _Job) -> tuple[fx.Node, ...]:
        return self.stages[number].residuals[self.places[id(job.layer.parameter)]]


class Lanes(Protocol):
    """All runs of calibration. Each time they are asked for they can go on to the next stage, with the weights that
    were put in."""

    def __iter__(self) -> Iterator[Lane]: ...

    def put(self, parameter: torch.Tensor, weight: torch.Tensor) -> None: ...


class _Kept(list[Lane]):
    """All of them in memory, where they are."""

    def put(self, parameter: torch.Tensor, weight: torch.Tensor) -> None:
        for lane in self:
            lane.put(parameter, weight)


def compress_in_order(
    runs: list[Run], wanted: dict[int, tuple[Layer, str]], config: HWPQConfig, timed: Timed, progress: bool
) -> dict[str, Compressed]:
    """The new weights, by their layers' names.

    runs: as `Recording` has them; used up. wanted: by a parameter's id, its layer and the status it is to have. timed:
    what is around a phase, by its name. Raises CalibrationError as `compress` does.
    """
    weights, lanes = runs[0].weights(), _Kept(Lane.of(run, run.fresh()) for run in runs)
    runs.clear()
    return compress_stages(weights, lanes, wanted, config, timed, progress)


def compress_stages(
    weights: list[list[tuple[int, Use]]],
    lanes: Lanes,
    wanted: dict[int, tuple[Layer, str]],
    config: HWPQConfig,
    timed: Timed,
    progress: bool,
) -> dict[str, Compressed]:
    """The same for any lanes. weights: those of each stage, as `Run.weights` has them."""
    stages = []
    for number, stage in enumerate(weights):
        uses: dict[int, list[Use]] = {}
        for one, use in stage:
            uses.setdefault(one, []).append(use)
        if jobs := [_Job(*wanted[one], uses[one]) for one in uses if one in wanted]:
            stages.append((number, jobs))
    made = {}
    with tracked(stages, "choose and pack in order", progress) as steps:
        for number, jobs in steps:
            with timed("run in order"):
                seen = _observe(lanes, number, jobs, config)
            for job in jobs:
                with timed("choose and pack"):
                    new = made[job.layer.name] = _compress(job, seen, config)
                lanes.put(job.layer.parameter, runnable(new.weight))
    return made


def runnable(weight: torch.Tensor) -> torch.Tensor:
    """A new weight with what it needs to be multiplied by."""
    return weight.expand() if isinstance(weight, Float8Sparse24Tensor) else weight


def held_bytes(runs: list[Run]) -> dict[torch.device, int]:
    """About what `compress_in_order` has in memory between two stages, at most, by device: parameters, packed weights
    and statistics left out. Found by one more run of the largest; the others count by the sizes of their arguments."""
    largest = max(runs, key=Run.nbytes)
    share = 2 * sum(map(Run.nbytes, runs)) / max(1, largest.nbytes())  # dense and converted
    steps, most = Steps(largest.staged, largest.fresh()), Counter[torch.device]()
    for stage in largest.staged.stages:
        steps.advance(stage)
        alive = (one.untyped_storage() for one in values_in(tree_leaves(list(steps.env.values()))))
        sizes = Counter[torch.device]()
        for storage in {storage.data_ptr(): storage for storage in alive}.values():
            sizes[storage.device] += storage.nbytes()
        most |= sizes
    return {device: round(share * size) for device, size in most.items()}


class _Seen:
    """What a stage's weights need of their inputs. Where there is room for it, `cross` is (D - X)^T X, float32 [K, K],
    and `drifts` has what else makes up the drifts, by the names of the layers."""

    def __init__(self, x: torch.Tensor, jobs: list[_Job], pulled: set[str], limit: int | None):
        channels, device, budget = x.shape[-1], x.device, CurvatureBudget(limit)
        self.statistics = InputStatistics(channels, device, budget.grant(channels, device))
        sparse = [job for job in jobs if job.status == SPARSE]
        second = budget.grant(channels, device) if sparse else None
        self.cross = second.matrix if isinstance(second, GramMatrix) else None
        sparse = [] if self.cross is None else sparse
        self.drifts = {job.layer.name: (job, Drift(job.weight, job.layer.name in pulled)) for job in sparse}
        self.runs = 0


def _observe(lanes: Lanes, number: int, jobs: list[_Job], config: HWPQConfig) -> _Seen:
    """Run all lanes up to stage `number`, and gather there."""
    seen = None
    for lane in lanes:
        seen = _add(seen, lane, number, jobs, config)
        del lane  # where they are not kept, the next one is made in the room of this
    assert seen is not None, "a recording has a run"
    return seen


def _add(seen: _Seen | None, lane: Lane, number: int, jobs: list[_Job], config: HWPQConfig) -> _Seen:
    dense, x = (steps.advance(lane.stages[number]) for steps in (lane.dense, lane.converted))
    if seen is None:
        pulled = {
            job.layer.name
            for job in jobs
            if [(use.start, use.stop) for use in job.uses] == [(0, job.shape[0])] and lane.residuals(number, job)
        }
        seen = _Seen(x, jobs, pulled, config.curvature_bytes)
    keep = lane.call.rows_to_keep(x, lane.stages[number].sequence_first)
    seen.statistics.update(x, keep, lane.call.number)
    if seen.cross is None:
        return seen
    rows = kept_rows(x, keep)
    off = kept_rows(dense, keep) - rows
    add_product(seen.cross, off, rows)
    halves = halves_of(seen.runs, len(rows))
    for job, drift in seen.drifts.values():
        nodes = lane.residuals(number, job) if drift.pull is not None else ()
        pairs = [[kept_rows(steps.env[node], keep) for steps in (lane.dense, lane.converted)] for node in nodes]
        drift.add(off, [theirs - ours for theirs, ours in pairs], rows, halves)
    seen.runs += 1
    return seen


def _compress(job: _Job, seen: _Seen, config: HWPQConfig) -> Compressed:
    name, parameter = job.layer.name, job.layer.parameter
    statistics = {use: [seen.statistics] for use in job.uses}
    if job.status != SPARSE:
        return compress_fp8(name, parameter, statistics, config)
    drift = None
    if seen.cross is not None and isinstance(seen.statistics.curvature, GramMatrix):
        _, one = seen.drifts[name]
        drift = one.total(seen.cross, seen.statistics.curvature.matrix, config.cg_steps)
    made = compress(name, parameter, statistics, config, drift=drift)
    made.line.compensation = made.line.compensation.replace("cg", "cg, in order", 1)
    return made
