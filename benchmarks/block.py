"""Seconds to make the linears of one LLaMA-3-8B decoder block 2:4 FP8: `python benchmarks/block.py` writes
results/block.json.

Random bf16 weights; inputs whose channels are correlated, gathered as `hwpq_fx.convert` does; then choosing,
compensating and packing layer by layer with compensation="cg" and "energy" of the default config, and with SparseGPT.
Meant for a GPU; on the CPU take --scale 16 --rows 4096.
"""

import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from rounds import machine
from sparsegpt import sparsegpt24

from hwpq_fx import HWPQConfig
from hwpq_fx.bench.machine import describe_machine
from hwpq_fx.bench.shapes import SIBLINGS
from hwpq_fx.compress import compress
from hwpq_fx.curvature import GramMatrix
from hwpq_fx.kernels import FORMAT_K, Float8Sparse24Tensor
from hwpq_fx.kernels.roofline import MODELS
from hwpq_fx.passes import Use
from hwpq_fx.reconstruction import reconstruction_loss
from hwpq_fx.statistics import InputStatistics

RESULTS = Path(__file__).parent / "results"
BLOCK = MODELS["llama-3-8b"]
CHUNK = 8192  # rows of one calibration batch
DIRECTIONS = 64  # that all channels of an input share
SUMS, GRAM, SPARSEGPT = "sums of squares", "X^T X", "SparseGPT"

Seconds = list[float]
"""Run by run."""


class Gathered(NamedTuple):
    """Of one input [R, K]."""

    sums: InputStatistics
    gram: GramMatrix


class Layer(NamedTuple):
    """weight bf16 [N, K]; what was gathered of its input, with the sums of squares alone and with X^T X besides."""

    name: str
    weight: torch.Tensor
    sums: InputStatistics
    full: InputStatistics

    @property
    def gram(self) -> torch.Tensor:
        """float32 [K, K]."""
        return self.full.curvature.matrix

    def uses(self, seen: InputStatistics) -> dict[Use, list[InputStatistics]]:
        """As calibration would have it: one input for all rows."""
        return {Use(False, 0, self.weight.shape[0]): [seen]}


Method = Callable[[Layer], Float8Sparse24Tensor]


class Clock:
    """Wall-clock seconds of work on a device, from idle to idle, and its memory."""

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"

    def time(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """What `work` returns, and how long it took."""
        self._idle()
        start = time.perf_counter()
        made = work()
        self._idle()
        return made, time.perf_counter() - start

    def forget_peak(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)

    def memory(self) -> dict[str, int]:
        """Bytes held by tensors now, and at most since `forget_peak`; nothing is known on the CPU."""
        if not self.on_gpu:
            return {}
        held, peak = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
        return {"held bytes": held, "peak bytes": peak}

    def _idle(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def random_input(rows: int, channels: int, device: torch.device) -> torch.Tensor:
    """bf16 [rows, channels]: noise, directions common to all channels whose strength falls as that of real
    activations does, and channels of unlike size."""
    strength = torch.arange(1, DIRECTIONS + 1, device=device).float().rsqrt()[:, None]
    shared = torch.randn(DIRECTIONS, channels, device=device) * strength
    size = torch.exp(0.5 * torch.randn(channels, device=device))
    x = torch.empty(rows, channels, dtype=torch.bfloat16, device=device)
    for part in x.split(CHUNK):
        own, common = (torch.randn(len(part), many, device=device) for many in (channels, DIRECTIONS))
        part.copy_((own + common @ shared) * size)
    return x


def gather(
    inputs: dict[str, torch.Tensor], runs: int, clock: Clock
) -> tuple[dict[str, Gathered], dict[str, dict[str, Seconds]]]:
    """The statistics of every input, and the seconds that each kind of them took, run by run."""
    seconds: dict[str, dict[str, Seconds]] = {name: {SUMS: [], GRAM: []} for name in inputs}
    found = {}
    for run in range(1 + runs):  # the first warms up
        for name, x in inputs.items():
            shape = x.shape[1], x.device
            made = Gathered(InputStatistics(*shape), GramMatrix(*shape))
            for kind, one in zip((SUMS, GRAM), made, strict=True):
                _, took = clock.time(partial(_update, one, x))
                if run:
                    seconds[name][kind].append(took)
            found[name] = made
    return found, seconds


def _update(one: InputStatistics | GramMatrix, x: torch.Tensor) -> None:
    for part in x.split(CHUNK):
        one.update(part)


def layers_of(scale: int, found: dict[str, Gathered]) -> list[Layer]:
    """Random weights for what was gathered."""
    layers = []
    for group in SIBLINGS:
        sums, gram = found[" + ".join(group)]
        full = copy.copy(sums)
        full.curvature = gram
        for name in group:
            shape = [size // scale for size in BLOCK[name]]
            weight = (torch.randn(shape, device=gram.matrix.device) * 0.02).bfloat16()
            layers.append(Layer(name, weight, sums, full))
    return layers


def ours(config: HWPQConfig, layer: Layer) -> Float8Sparse24Tensor:
    """As `convert` compresses it; it measures its own error besides."""
    seen = layer.full if config.compensation == "cg" else layer.sums
    return compress(layer.name, layer.weight, layer.uses(seen), config).weight


def sparsegpt(layer: Layer) -> Float8Sparse24Tensor:
    """From the same X^T X to the same format."""
    new, mask = sparsegpt24(layer.weight, layer.gram)
    return Float8Sparse24Tensor.from_hp(new.to(layer.weight.dtype), mask)


def methods(with_sparsegpt: bool) -> dict[str, Method]:
    """By name."""
    made: dict[str, Method] = {name: partial(ours, HWPQConfig(compensation=name)) for name in ("cg", "energy")}
    if with_sparsegpt:
        made[SPARSEGPT] = sparsegpt
    return made


def error_of(layer: Layer, packed: Float8Sparse24Tensor) -> float:
    """||X(W - W')|| / ||XW|| over the rows that were gathered. Raises ClickException where that makes no sense."""
    weight = layer.weight.float()
    lost, whole = (
        reconstruction_loss(weight, other, layer.gram).sum()
        for other in (packed.dequantize(torch.float32), torch.zeros_like(weight))
    )
    error = float((lost / whole).sqrt())
    if not error < 1:
        raise click.ClickException(f"{layer.name}: relative output error {error}; no time is reported")
    return error


@dataclass
class Record:
    """What a method takes and makes: seconds and relative output error by layer, bytes."""

    method: Method
    seconds: dict[str, Seconds] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    def warm_up(self, layers: list[Layer]) -> None:
        """The errors, which are the same in every round."""
        self.errors = {layer.name: error_of(layer, self.method(layer)) for layer in layers}

    def run(self, layers: list[Layer], clock: Clock) -> None:
        """One round."""
        clock.forget_peak()
        for layer in layers:
            _, took = clock.time(partial(self.method, layer))
            self.seconds.setdefault(layer.name, []).append(took)
        self.memory = clock.memory()

    @property
    def totals(self) -> Seconds:
        """For the block."""
        return [sum(each) for each in zip(*self.seconds.values(), strict=True)]

    def summary(self, yardstick: Seconds) -> dict[str, Any]:
        """Medians, and of the ratio to the yardstick's seconds round by round, where there are any."""
        ratios = [theirs / mine for theirs, mine in zip(yardstick, self.totals, strict=bool(yardstick))]
        return {
            "seconds": statistics.median(self.totals),
            **({f"{SPARSEGPT} / this": statistics.median(ratios)} if ratios else {}),
            **self.memory,
            "layers": {
                name: {"seconds": statistics.median(mine), "error": self.errors[name]}
                for name, mine in self.seconds.items()
            },
        }


def gathered(seconds: dict[str, dict[str, Seconds]]) -> dict[str, dict[str, float]]:
    """Medians of every input, and what they add up to."""
    made = {name: {kind: statistics.median(mine) for kind, mine in one.items()} for name, one in seconds.items()}
    kinds = next(iter(made.values()))
    return {**made, "total": {kind: sum(one[kind] for one in made.values()) for kind in kinds}}


@click.command()
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--scale", default=1, show_default=True, type=click.IntRange(1), help="Divides all sizes of the block.")
@click.option("--rows", default=65536, show_default=True, type=click.IntRange(1), help="Rows of every input.")
@click.option("--runs", default=3, show_default=True, type=click.IntRange(1))
@click.option("--without-sparsegpt", is_flag=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "block.json", show_default=True)
def main(device: str, scale: int, rows: int, runs: int, without_sparsegpt: bool, out: Path) -> None:
    """Measure and write the JSON, after every round: what is stopped early has fewer runs and not nothing."""
    if any(size % (scale * FORMAT_K) for shape in BLOCK.values() for size in shape):
        raise click.BadParameter(f"sizes divided by {scale} are no multiples of {FORMAT_K}", param_hint="--scale")
    clock = Clock(torch.device(device))
    torch.manual_seed(0)
    with torch.no_grad():
        inputs = {
            " + ".join(group): random_input(rows, BLOCK[group[0]][1] // scale, clock.device) for group in SIBLINGS
        }
        found, seconds = gather(inputs, runs, clock)
        del inputs  # not part of what the methods need
        gathering = gathered(seconds)
        click.echo("block gather " + ", ".join(f"{kind} {took:.3f} s" for kind, took in gathering["total"].items()))
        layers = layers_of(scale, found)
        records = {name: Record(method) for name, method in methods(not without_sparsegpt).items()}
        for name, record in records.items():
            record.warm_up(layers)
            errors = ", ".join(f"{layer} {error:.3f}" for layer, error in record.errors.items())
            click.echo(f"block errors of {name}: {errors}")
        for run in range(1, 1 + runs):
            for name, record in records.items():
                record.run(layers, clock)
                click.echo(f"block run {run} {name} {record.totals[-1]:.3f} s")
            yardstick = records[SPARSEGPT].totals if SPARSEGPT in records else []
            result = {
                "what": "one LLaMA-3-8B block of random weights to 2:4 FP8: median seconds, and errors relative to the "
                "output of each layer over the calibration rows",
                "machine": describe_machine() if clock.on_gpu else machine(),
                "rows": rows,
                "scale": scale,
                "runs": run,
                "seconds to gather": gathering,
                "choose, compensate, pack": {name: one.summary(yardstick) for name, one in records.items()},
            }
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
