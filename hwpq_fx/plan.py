"""Sparse where it pays: which layers become 2:4, which dense FP8, and which stay as they were."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hwpq_fx.kernels.ewma import DEV_RATE, MEAN_RATE
from hwpq_fx.kernels.gpus import GPUS
from hwpq_fx.kernels.paths import PATHS, target_of
from hwpq_fx.kernels.roofline import DENSE_FP8, OURS, OURS_16BIT, floor
from hwpq_fx.kernels.table import DENSE_NAMES, table_of

from .errors import ConfigError

SPARSE, FP8, DENSE = STATUSES = ("sparse24_fp8", "fp8", "dense")
FORMAT = 2
DEFAULT_GPU = "h100"
ERROR = "relative error of the layers' outputs"
# RFC 6298 takes the mean and four deviations for more than is usual.
OUTLIER_DEVIATIONS = 4
# Of the mean: among layers that are nearly equal, a few percent more are no reason to stay dense.
LEAST_DEVIATION = 1 / 10


@dataclass
class PlannedLayer:
    """One layer. errors: relative output error by status, as `LayerReport.error`; microseconds: time of its product at
    the plan's number of rows, by status; effects: what the model's output loses with this layer alone changed, by
    status (`hwpq_fx.effects`), or nothing where layers are weighed by their errors. A status that is not there cannot
    be had."""

    name: str
    shape: tuple[int, ...]
    errors: dict[str, float]
    microseconds: dict[str, float]
    status: str = DENSE
    reason: str = ""
    """Why it is what it is, where that is not the trade of loss for time."""
    effects: dict[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        return self.errors[self.status]

    @property
    def losses(self) -> dict[str, float]:
        """What it is weighed by: effects where they are known, else errors."""
        return self.effects or self.errors

    @property
    def loss(self) -> float:
        return self.losses[self.status]


class Point(NamedTuple):
    """A stop on the way from all dense to all sparse: dense time over planned time, and the summed loss."""

    speedup: float
    loss: float
    sparse: float
    """Share of the multiplications that are 2:4."""


@dataclass
class Plan:
    """What `hwpq_fx.plan` found and chose. Change a layer's `status` by hand as you like, then give the plan to
    `convert`. Prints as a table; `to_dict`, `save` and `load` are for JSON."""

    layers: list[PlannedLayer]
    rows: int
    """Rows of input that the times are for: 1 is decoding of one sequence."""
    timing: str
    """Where the times come from."""
    frontier: list[Point] = field(default_factory=list)
    """The best trades on the way from all dense to all sparse."""
    measure: str = ERROR
    """What layers are weighed by, the loss: `ERROR`, or what `hwpq_fx.effects` gives."""
    by_error: str = ""
    """Why not by effects on the output, where that was tried."""

    @property
    def error(self) -> float:
        """Relative output errors, summed over the layers."""
        return sum(layer.error for layer in self.layers)

    @property
    def loss(self) -> float:
        """Summed over the layers."""
        return summed_loss(self.layers)

    @property
    def speedup(self) -> float:
        """Time of these layers' products when dense over their time as planned."""
        return speedup(self.layers)

    @property
    def sparse_share(self) -> float:
        """Share of these layers' multiplications that are 2:4."""
        return sparse_share(self.layers)

    def statuses(self) -> dict[str, PlannedLayer]:
        """By name."""
        return {layer.name: layer for layer in self.layers}

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "frontier": [point._asdict() for point in self.frontier]}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Plan:
        """Raises ConfigError, naming what does not fit."""
        try:
            if content["format"] != FORMAT:
                raise ConfigError(f"the plan has format {content['format']}, this version reads {FORMAT}")
            layers = [PlannedLayer(**layer | {"shape": tuple(layer["shape"])}) for layer in content["layers"]]
            frontier = [Point(**one) for one in content["frontier"]]
            made = cls(layers, content["rows"], content["timing"], frontier, content["measure"], content["by_error"])
            for layer in made.layers:
                _check(layer)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"this is no plan: {type(error).__name__} {error}") from error
        if len(made.statuses()) < len(made.layers):
            twice = next(one for one, many in Counter(layer.name for layer in made.layers).items() if many > 1)
            raise ConfigError(f"the plan has {twice} twice")
        return made

    def save(self, file: str | Path) -> None:
        Path(file).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, file: str | Path) -> Plan:
        """Raises ConfigError where the file holds no plan, OSError where it cannot be read."""
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ConfigError(f"{file} is no JSON: {error}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{file} holds no plan")
        return cls.from_dict(content)

    def table(self) -> Table:
        made = Table(title=f"plan for {self.rows} rows, times from {self.timing}", title_justify="left")
        made.box, made.pad_edge = box.SIMPLE_HEAD, False
        made.add_column("layer", overflow="fold", min_width=22)
        effects = ["effect 2:4", "effect fp8"] if any(layer.effects for layer in self.layers) else []
        for column in ("out x in", "error 2:4", "error fp8", *effects, "saves us", "becomes"):
            made.add_column(column, justify="right")
        for layer in self.layers:
            saved = layer.microseconds[DENSE] - layer.microseconds[layer.status]
            became = Text(layer.status + (f" ({layer.reason})" if layer.reason else ""))
            told = [_told(layer.errors, status, ".3f") for status in (SPARSE, FP8)]
            told += [_told(layer.effects, status, ".5f") for status in (SPARSE, FP8) if effects]
            made.add_row(Text(layer.name), "x".join(map(str, layer.shape)), *told, f"{saved:.2f}", became)
        return made

    def summary(self) -> str:
        counts = ", ".join(f"{sum(one.status == status for one in self.layers)} {status}" for status in STATUSES)
        why = f" (not by their effects on the output: {self.by_error})" if self.by_error else ""
        return (
            f"of the {len(self.layers)} layers weighed here {counts}; {self.sparse_share:.0%} of their multiplications "
            f"are 2:4; their products {self.speedup:.2f}x as fast as dense, by {self.timing}; summed {self.measure} "
            f"{self.loss:.3g}{why}"
        )

    def __str__(self) -> str:
        text = StringIO()
        console = Console(file=text, width=120, color_system=None, force_terminal=False, force_jupyter=False)
        console.print(self.table())
        console.print(self.summary(), highlight=False, soft_wrap=True)
        return text.getvalue()

    def plot(self, file: str | Path) -> None:
        """Draw the frontier, speed against loss, and where this plan stands. Raises ImportError without matplotlib
        (`pip install 'hwpq_fx[plot]'`)."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([p.loss for p in self.frontier], [p.speedup for p in self.frontier], marker=".", label="frontier")
        axes.plot([self.loss], [self.speedup], marker="o", linestyle="none", label="this plan")
        axes.set_xlabel(f"{self.measure}, summed")
        axes.set_ylabel(f"products, times as fast as dense ({self.rows} rows)")
        axes.set_title(f"times from {self.timing}", fontsize="small")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(file)


def picture_formats() -> set[str]:
    """Suffixes of files that `Plan.plot` can draw. Raises ImportError without matplotlib."""
    from matplotlib.backend_bases import FigureCanvasBase

    return set(FigureCanvasBase.get_supported_filetypes())


def _check(layer: PlannedLayer) -> None:
    """Raise ConfigError where what a file says of a layer cannot be."""
    numbers = [*layer.errors.values(), *layer.microseconds.values(), *layer.effects.values()]
    if not isinstance(layer.name, str) or len(layer.shape) != 2:
        raise ConfigError(f"this is no plan: it has a layer {layer.name!r} of shape {layer.shape}")
    if not all(isinstance(one, (int, float)) for one in numbers) or DENSE not in layer.microseconds:
        raise ConfigError(f"this is no plan: errors and microseconds of {layer.name} are not numbers by status")
    if layer.effects and layer.effects.keys() != layer.errors.keys():
        raise ConfigError(f"this is no plan: {layer.name} has effects of other statuses than errors")
    check_status(layer)


def _told(numbers: dict[str, float], status: str, how: str) -> str:
    return format(numbers[status], how) if status in numbers else "-"


def check_status(layer: PlannedLayer) -> None:
    """Raise ConfigError where the layer is to become what it cannot."""
    if layer.status not in STATUSES or layer.status not in layer.errors or layer.status not in layer.microseconds:
        possible = ", ".join(status for status in STATUSES if status in layer.errors)
        raise ConfigError(f"the plan makes {layer.name} {layer.status!r}; it can be {possible}")


def summed_loss(layers: Iterable[PlannedLayer]) -> float:
    return sum(layer.loss for layer in layers)


def speedup(layers: Iterable[PlannedLayer]) -> float:
    layers = list(layers)
    planned = sum(layer.microseconds[layer.status] for layer in layers)
    return sum(layer.microseconds[DENSE] for layer in layers) / planned if planned else 1.0


def sparse_share(layers: Iterable[PlannedLayer]) -> float:
    sizes = [(layer.shape[0] * layer.shape[1], layer.status == SPARSE) for layer in layers]
    return sum(size for size, sparse in sizes if sparse) / max(1, sum(size for size, _ in sizes))


def times_of(
    products: Sequence[tuple[tuple[int, ...], Iterable[str]]],
    rows: int,
    gpu: str,
    device: torch.device,
    activation: str,
) -> tuple[list[dict[str, float]], str]:
    """Microseconds by status of products with W [N, K], given as shapes and the statuses to be had, and where they come
    from: the table that `hwpq-fx tune` made on this device where that holds all of them, else the roofline of `gpu`,
    as the two are not to be weighed against each other. activation: "dynamic" or "none", as in `HWPQConfig`: weights
    that are multiplied by 16-bit inputs have fewer paths. Raises ConfigError for a GPU that is not known."""
    check_gpu(gpu)
    dynamic, target = activation == "dynamic", target_of(device)
    paths = {
        DENSE: DENSE_NAMES[:1],
        FP8: DENSE_NAMES[1:2] if dynamic else DENSE_NAMES[2:],
        SPARSE: tuple(name for name, path in PATHS.items() if dynamic or not path.fp8),
    }
    ops = {
        DENSE: ("bf16",),
        FP8: DENSE_FP8[:1] if dynamic else DENSE_FP8[1:],
        SPARSE: OURS if dynamic else OURS_16BIT,
    }

    def measured(shape: tuple[int, ...], status: str) -> float:
        assert target is not None
        n, k = shape
        times = table_of(target.name).times(rows, n, k)
        return min((times[name] for name in paths[status] if name in times), default=math.nan)

    def modelled(shape: tuple[int, ...], status: str) -> float:
        n, k = shape
        return 1e6 * min(floor(op, rows, n, k, GPUS[gpu]).seconds for op in ops[status])

    if target:
        found = [{status: measured(shape, status) for status in statuses} for shape, statuses in products]
        if not any(math.isnan(time) for times in found for time in times.values()):
            return found, f"measurement on {target.name}"
    found = [{status: modelled(shape, status) for status in statuses} for shape, statuses in products]
    return found, f"the roofline model of {GPUS[gpu].name}"


def check_sparsity(sparsity: str | float) -> None:
    """Raise ConfigError for one that has no plan."""
    if sparsity != "2:4":
        raise ConfigError(f'a plan is for sparsity "2:4", not {sparsity!r}')


def check_gpu(gpu: str) -> None:
    """Raise ConfigError for a GPU that is not known."""
    if gpu not in GPUS:
        raise ConfigError(f"gpu {gpu!r} is not known; choose one of {', '.join(GPUS)}")


def mark_outliers(layers: Sequence[PlannedLayer]) -> None:
    """Note as outlier each layer whose loss as 2:4 is above the moving mean of its like (the same last part of the
    name, in the blocks before it) by more than four moving deviations, and by two fifths of that mean at least.

    Mean and deviation move as in RFC 6298 (see `ewma`). The mean starts at the median of its like: the first block may
    be the one that is out of the ordinary. An outlier does not hide the next one: it leaves the deviation as it is,
    and moves the mean no more than a loss at the threshold would, so that where losses are higher from some block
    on, the mean gets there.
    """
    kinds: dict[str, list[PlannedLayer]] = {}
    for layer in layers:
        if SPARSE in layer.losses:
            kinds.setdefault(layer.name.rpartition(".")[2], []).append(layer)
    for alike in kinds.values():
        mean = median(layer.losses[SPARSE] for layer in alike)
        dev = mean / 2
        for layer in alike:
            most = OUTLIER_DEVIATIONS * max(dev, LEAST_DEVIATION * mean)
            above = layer.losses[SPARSE] - mean
            if above > most:
                layer.reason = "outlier"
            else:
                dev += DEV_RATE * (abs(above) - dev)
            mean += MEAN_RATE * min(above, most)


def decide(layers: Sequence[PlannedLayer], max_loss: float | None, min_speedup: float | None) -> list[Point]:
    """Set the status of every layer but outliers and those that have no choice, and give the frontier.

    From all dense, the step with the least loss for a microsecond saved is taken first; a step makes a dense layer FP8
    or 2:4, or an FP8 layer 2:4 (or the other way, where that is faster). Steps that would take the summed loss above
    `max_loss` are passed over, and what is left of it may do for a smaller step of the same layer. With `min_speedup`
    they end once it is reached, and those that turn out not to be needed are taken back, the dearest first: then no
    layer can lose less without falling short. With neither, every step is taken.
    """
    free = [layer for layer in layers if layer.reason == ""]
    steps = [move for layer in free for move in _moves(layer)]
    smaller = [move for layer in free for move in _passed_over(layer)]
    moves = sorted(steps + smaller, key=lambda move: move.price)
    # what `min_speedup` takes may be within `max_loss` in the end, though steps on the way to it were not
    for bound in dict.fromkeys((None, max_loss)):
        _choose(layers, moves, bound, min_speedup)
        if max_loss is None or summed_loss(layers) <= max_loss:
            break
    return _frontier(layers, sorted(steps, key=lambda move: move.price))


def _choose(
    layers: Sequence[PlannedLayer], moves: Sequence[_Move], max_loss: float | None, min_speedup: float | None
) -> None:
    for layer in layers:
        layer.status = DENSE
    taken: list[_Move] = []
    for move in moves:
        if min_speedup is not None and speedup(layers) >= min_speedup:
            break
        layer = move.layer
        if layer.status != move.before:  # a later step builds on the one before it
            continue
        layer.status = move.status
        # as `Plan.loss`: added up in another order the same losses may come out above the bound
        if max_loss is not None and summed_loss(layers) > max_loss:
            layer.status = move.before
        else:
            taken.append(move)
    if min_speedup is None:
        return
    for move in reversed(taken):
        layer, losses = move.layer, move.layer.losses
        if layer.status != move.status:
            continue
        for status in sorted(losses, key=losses.__getitem__):
            if losses[move.before] <= losses[status] <= losses[move.status]:
                layer.status = status
                if status == move.status or speedup(layers) >= min_speedup:
                    break


def _frontier(layers: Sequence[PlannedLayer], steps: Sequence[_Move]) -> list[Point]:
    """Where all of the steps lead, whatever the bounds."""
    before = now = sum(layer.microseconds[DENSE] for layer in layers)
    multiplications = max(1, sum(layer.shape[0] * layer.shape[1] for layer in layers))
    loss, sparse, points = 0.0, 0, [Point(1.0, 0.0, 0.0)]
    for step in steps:
        loss += step.loss
        now -= step.saved
        sparse += step.layer.shape[0] * step.layer.shape[1] * ((step.status == SPARSE) - (step.before == SPARSE))
        points.append(Point(before / now, loss, sparse / multiplications))
    return points


class _Move(NamedTuple):
    layer: PlannedLayer
    before: str
    status: str
    loss: float
    saved: float

    @property
    def price(self) -> float:
        return self.loss / self.saved


def _moves(layer: PlannedLayer) -> list[_Move]:
    """The steps of a layer that save time, each dearer than the one before: the lower hull of loss over time saved."""
    moves: list[_Move] = []
    while steps := _steps(layer, moves[-1].status if moves else DENSE):
        moves.append(min(steps, key=lambda move: move.price))
    return moves


def _passed_over(layer: PlannedLayer) -> list[_Move]:
    """What a dense layer could be instead of what the hull makes of it at once, at less loss and a higher price."""
    hull = [move.status for move in _moves(layer)]
    return [move for move in _steps(layer, DENSE) if move.status not in hull]


def _steps(layer: PlannedLayer, at: str) -> list[_Move]:
    """All that save time over status `at`."""
    return [
        _Move(layer, at, status, layer.losses[status] - layer.losses[at], saved)
        for status in (FP8, SPARSE)
        if status in layer.losses and (saved := layer.microseconds[at] - layer.microseconds[status]) > 0
    ]
