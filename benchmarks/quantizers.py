"""Quantizing a whole model on the CPU against torchao's GPTQ, AWQ and SmoothQuant prototypes: `python
benchmarks/quantizers.py` writes results/quantizers.json.

The model is that of small_llama.py, all linear layers but the head. Every contender starts from the dense float32
model and does the same three things: it puts its observers on, the calibration batches flow through ("observing",
Dynamo's tracing included where there is any), and it makes the new weights ("quantizing"). All in turn in one process,
same threads. What a contender becomes differs: ours prunes to 2:4 as well.

torchao's GPTQ asks for CUDA. It is tried as it is, and what it raises is noted; then it runs without the two lines that
ask, the rest of its source as torchao ships it.
"""

import copy
import inspect
import json
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import click
import torch
from accuracy import ROWS
from methods import linears
from rounds import Times, machine, summary
from small_llama import perplexity, small_llama
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.prototype.awq import AWQConfig
from torchao.prototype.gptq import GPTQConfig
from torchao.prototype.gptq import api as gptq_api
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.prototype.smoothquant import SmoothQuantConfig
from torchao.quantization import (
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

import hwpq_fx
from hwpq_fx.plan import FP8

RESULTS = Path(__file__).parent / "results"
GROUP = 32  # of int4 weights that share a scale: 864 input channels allow no larger one
WANTS_CUDA = ('assert device.type == "cuda", "GPTQ only supports CUDA currently"', "torch.cuda.synchronize()")
DENSE = "dense, forward passes alone"
PHASES = ("observing", "quantizing", "total")


class Contender(NamedTuple):
    """What goes before the calibration batches, and what comes after them; both change the model in place."""

    prepare: Callable[[nn.Module], object]
    convert: Callable[[nn.Module], object]


def ours(compensation: str) -> Contender:
    """2:4 and FP8."""
    # one by one: in order, calibration is part of making the weights
    config = hwpq_fx.HWPQConfig(compensation=compensation, sequential=False)
    return Contender(lambda model: hwpq_fx.prepare(model, config), hwpq_fx.convert)


def convert_to_fp8(model: nn.Module) -> None:
    """By a plan that leaves nothing to weigh: the errors and times in it are not looked at."""
    only = {FP8: 0.0}
    layers = [hwpq_fx.PlannedLayer(n, tuple(m.weight.shape), only, only, FP8) for n, m in linears(model).items()]
    hwpq_fx.convert(model, plan=hwpq_fx.Plan(layers, rows=1, timing="none"))


def torchaos(
    config: Callable[..., AOBaseConfig], base: Callable[[], AOBaseConfig], first: str, dtype: torch.dtype | None = None
) -> Contender:
    """A prototype of torchao's in its two steps, the model in another dtype where one is given."""

    def step(name: str) -> Callable[[nn.Module], None]:
        def take(model: nn.Module) -> None:
            with redirect_stdout(StringIO()):  # GPTQ prints a line for every layer
                quantize_(model.to(dtype), config(base_config=base(), step=name), _but_the_head)

        return take

    return Contender(step(first), step("convert"))


@cache
def gptq_without_cuda() -> type[AOBaseConfig]:
    """GPTQConfig of torchao's GPTQ, read from its source again without the two lines that ask for CUDA. Raises
    ValueError where the source has no such lines."""
    source = inspect.getsource(gptq_api)
    for line in WANTS_CUDA:
        if source.count(line) != 1:
            raise ValueError(f"torchao's GPTQ does not say {line!r} once: see whether it runs on the CPU as it is")
        source = source.replace(line, "pass")
    module = ModuleType("gptq_without_cuda")
    module.__package__ = gptq_api.__package__
    exec(compile(source, module.__name__, "exec"), module.__dict__)
    return module.GPTQConfig


def int4() -> AOBaseConfig:
    """torchao's int4 for CPUs."""
    return PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)


OURS = {
    "ours, 2:4 + FP8, energy": ours("energy"),
    "ours, 2:4 + FP8, cg": ours("cg"),
    "ours, FP8 alone": Contender(ours("none").prepare, convert_to_fp8),
}
THEIRS = {
    "GPTQ, int8": torchaos(GPTQConfig, Int8WeightOnlyConfig, "observe"),
    "GPTQ, int4": torchaos(GPTQConfig, lambda: Int4WeightOnlyConfig(group_size=GROUP), "observe"),
    "GPTQ, int8, without its two CUDA lines": torchaos(
        lambda **options: gptq_without_cuda()(**options), Int8WeightOnlyConfig, "observe"
    ),
    "AWQ, int8": torchaos(AWQConfig, Int8WeightOnlyConfig, "prepare"),
    # torchao's int4 product of float32 takes 50 times as long as that of bfloat16
    f"AWQ, int4 in groups of {GROUP}, bfloat16": torchaos(AWQConfig, int4, "prepare", torch.bfloat16),
    "SmoothQuant, int8, activations too": torchaos(SmoothQuantConfig, Int8DynamicActivationInt8WeightConfig, "prepare"),
}
NOTHING = Contender(lambda model: None, lambda model: None)


def quantized(model: nn.Module, batches: Sequence[torch.Tensor], contender: Contender) -> tuple[nn.Module, list[float]]:
    """A copy of the model that a contender has quantized, and the seconds of PHASES."""
    model = copy.deepcopy(model)
    start = time.perf_counter()
    contender.prepare(model)
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    observed = time.perf_counter()
    contender.convert(model)
    done = time.perf_counter()
    return model, [observed - start, done - observed, done - start]


def measure(
    model: nn.Module, calib: torch.Tensor, held_out: torch.Tensor, runs: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Seconds and perplexity of every contender. calib, held_out: int64 [sequences, length].

    One sequence warms each contender up, which also tells whether it runs here. Raises RuntimeError where one runs and
    leaves a layer as it was; errors in ours are raised too, those in torchao's are noted.
    """
    contenders, not_run = {}, {}
    for name, contender in (OURS | THEIRS).items():
        try:
            made, _ = quantized(model, [calib[:1]], contender)
        except Exception as error:
            if name in OURS:
                raise
            not_run[name] = f"{type(error).__name__}: {error}"
            progress(f"{name}: {not_run[name]}")
            continue
        if same := [one for one, layer in linears(made).items() if type(layer.weight) is nn.Parameter]:
            raise RuntimeError(f"{name} leaves {len(same)} layers as they were: {same[0]}, ...")
        contenders[name] = contender

    perplexities = {"dense": perplexity(model, held_out)}
    times: dict[str, Times] = {phase: {name: [] for name in contenders} for phase in PHASES}
    plain = []
    for turn in range(runs):
        plain.append(quantized(model, calib.split(16), NOTHING)[1][-1])
        for name, contender in contenders.items():
            made, seconds = quantized(model, calib.split(16), contender)
            for phase, one in zip(PHASES, seconds, strict=True):
                times[phase][name].append(one)
            if turn == 0:
                perplexities[name] = perplexity(made, held_out)
            progress(f"round {turn}  {name}: {perplexities[name]:.2f}, {seconds[0]:.2f} + {seconds[1]:.2f} s")
    theirs = [name for name in contenders if name in THEIRS]
    return {
        "perplexity": perplexities,
        **{phase: summary(times[phase], theirs) for phase in PHASES},
        DENSE: summary({DENSE: plain}, [DENSE])[DENSE],
        "not run": not_run,
    }


def _but_the_head(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name != "lm_head"


@click.command()
@click.option("--threads", default=torch.get_num_threads(), show_default=True)
@click.option("--runs", type=click.IntRange(min=2), default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "quantizers.json", show_default=True)
def main(threads: int, runs: int, out: Path) -> None:
    """Measure and write the JSON."""
    small = small_llama(threads)
    torch.set_num_threads(threads)
    calib = small.train[torch.randperm(len(small.train), generator=torch.Generator().manual_seed(0))[:ROWS]]
    result = {
        "what": f"quantizing {len(linears(small.model))} linear layers after {calib.numel()} calibration tokens; "
        f"medians of {runs} rounds, ratios (their time over ours) round by round; perplexity on held-out sources",
        "machine": machine(),
        "parameters": sum(parameter.numel() for parameter in small.model.parameters()),
        **measure(small.model, calib, small.held_out, runs, click.echo),
    }
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
