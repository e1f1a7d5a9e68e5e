"""Perplexity that 2:4 + FP8 leaves, method by method: `python benchmarks/accuracy.py` writes
benchmarks/results/accuracy.json and, with matplotlib, accuracy.svg; `--plot` draws the picture again.

The model is that of small_llama.py; every linear layer but the head is pruned to 2:4 and packed, activations become
FP8 too. All methods see the same X^T X of the same calibration rows, gathered on the dense model; what is timed is
choosing and compensating, not gathering, on the same threads. Three seeds draw the calibration sequences.
"""

import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from small_llama import SmallLlama, perplexity, small_llama
from sparsegpt import sparsegpt24
from torch import nn

import hwpq_fx
from hwpq_fx.compensation import compensate
from hwpq_fx.kernels import Float8Sparse24Tensor, best_two, quantize_rows, quantize_weight_rows
from hwpq_fx.kernels.saliency import score
from hwpq_fx.plan import DENSE, SPARSE
from hwpq_fx.reconstruction import refine

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
ROWS = 64  # calibration sequences of 256 tokens


class Pruned(NamedTuple):
    """A layer after a method: weight [N, K], mask bool [N, K], and a factor for every row or None."""

    weight: torch.Tensor
    mask: torch.Tensor
    factor: torch.Tensor | None = None


Method = Callable[[torch.Tensor, torch.Tensor], Pruned]


def by_score(saliency: str) -> Method:
    """The best two of every four by one of our saliencies, nothing compensated."""

    def method(weight: torch.Tensor, gram: torch.Tensor) -> Pruned:
        scores = score(weight, gram.diagonal(), saliency)
        return Pruned(weight, best_two(scores.unflatten(1, (-1, 4))).flatten(1))

    return method


def wanda(weight: torch.Tensor, gram: torch.Tensor) -> Pruned:
    """Wanda (arXiv 2306.11695): |w| times the norm of its input, the smallest two of every four go by top-k."""
    metric = (weight.abs() * gram.diagonal().sqrt()).unflatten(1, (-1, 4))
    gone = metric.topk(2, dim=-1, largest=False).indices
    return Pruned(weight, torch.ones_like(metric, dtype=torch.bool).scatter_(-1, gone, False).flatten(1))


def energy(weight: torch.Tensor, gram: torch.Tensor) -> Pruned:
    """compensation="energy"."""
    mask = by_score("contribution")(weight, gram).mask
    return Pruned(weight, mask, compensate(weight, mask, gram.diagonal(), "energy"))


def cg(rounds: int, steps: int) -> Method:
    """compensation="cg"."""

    def method(weight: torch.Tensor, gram: torch.Tensor) -> Pruned:
        return Pruned(*refine(weight, by_score("contribution")(weight, gram).mask, gram, rounds, steps))

    return method


METHODS: dict[str, Method] = {
    "magnitude": by_score("magnitude"),
    "rank-one form": by_score("rank_one"),
    "contribution": by_score("contribution"),
    "RIA": by_score("relative"),
    "Wanda": wanda,
    "SparseGPT": lambda weight, gram: Pruned(*sparsegpt24(weight, gram)),
    "ours, energy": energy,
    "ours, cg without choosing again": cg(0, 20),
    "ours, cg": cg(3, 5),
}


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer but the head."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if name != "lm_head"}


def grams(model: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """X^T X of every linear layer's input, float32 [K, K]."""
    found: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def gather(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[0].flatten(0, -2).float()
            found[name] = found.get(name, 0) + rows.T @ rows

        return gather

    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in linears(model).items()]
    with torch.no_grad():
        for batch in tokens.split(16):
            model(input_ids=batch, use_cache=False)
    for one in hooks:
        one.remove()
    return found


def pruned(model: nn.Module, inputs: dict[str, torch.Tensor], method: Method) -> tuple[nn.Module, float]:
    """A copy of the model with every layer pruned and packed, and the seconds that the method took."""
    model, seconds = copy.deepcopy(model), 0.0
    for name, module in linears(model).items():
        weight = module.weight.detach()
        start = time.perf_counter()
        new = method(weight, inputs[name])
        seconds += time.perf_counter() - start
        packed = Float8Sparse24Tensor.from_hp(new.weight, new.mask, "dynamic", new.factor).expand()
        module.weight = nn.Parameter(packed, requires_grad=False)
    return model, seconds


def dense_fp8(model: nn.Module) -> nn.Module:
    """Weights and activations rounded to e4m3 with a scale per row, nothing pruned."""
    model = copy.deepcopy(model)
    for module in linears(model).values():
        values, scale = quantize_weight_rows(module.weight.detach())
        module.weight = nn.Parameter(values.float() * scale, requires_grad=False)

        def rounded(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            values, scale = quantize_rows(args[0])
            return (values.float() * scale,)

        module.register_forward_pre_hook(rounded)
    return model


def unstructured(model: nn.Module, calib: torch.Tensor, sparsity: float) -> float:
    """Perplexity-ready copy by the library's own call: the share is pruned anywhere, with "cg"."""
    config = hwpq_fx.HWPQConfig(sparsity=sparsity, compensation="cg", activation="none")
    batches = [{"input_ids": batch, "use_cache": False} for batch in calib.split(16)]
    return hwpq_fx.convert(copy.deepcopy(model), batches, config)


def planned(model: nn.Module, calib: torch.Tensor, share: float) -> nn.Module:
    """A copy of which so much of the linear layers' multiplications is 2:4, cheapest error for time saved first; the
    rest stays as it was."""
    config = hwpq_fx.HWPQConfig(compensation="cg")
    batches = [{"input_ids": batch, "use_cache": False} for batch in calib.split(16)]
    plan = hwpq_fx.plan(model, batches, config)
    total = sum(layer.shape[0] * layer.shape[1] for layer in plan.layers)
    chosen = 0
    for layer in sorted(plan.layers, key=lambda layer: layer.errors[SPARSE] / layer.microseconds[DENSE]):
        size = layer.shape[0] * layer.shape[1]
        layer.status = SPARSE if chosen + size <= share * total else DENSE
        chosen += size if layer.status == SPARSE else 0
    return hwpq_fx.convert(copy.deepcopy(model), batches, config, plan=plan)


def measure(small: SmallLlama, seed: int, progress: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Perplexity and seconds of every method for one draw of calibration sequences."""
    order = torch.randperm(len(small.train), generator=torch.Generator().manual_seed(seed))
    calib = small.train[order[:ROWS]]
    inputs = grams(small.model, calib)
    rows: dict[str, dict[str, float]] = {}
    for name, method in METHODS.items():
        model, seconds = pruned(small.model, inputs, method)
        rows[name] = {"perplexity": perplexity(model, small.held_out), "seconds": seconds}
        progress(f"seed {seed}  {name}: {rows[name]['perplexity']:.2f}, {seconds:.2f} s")
    for share in (0.25, 0.5, 0.75, 1.0):
        name = f"plan, {share:.0%} of the multiplications 2:4"
        rows[name] = {"perplexity": perplexity(planned(small.model, calib, share), small.held_out)}
        progress(f"seed {seed}  {name}: {rows[name]['perplexity']:.2f}")
    for share in (0.2, 0.5):
        name = f"unstructured {share:.0%}, cg"
        rows[name] = {"perplexity": perplexity(unstructured(small.model, calib, share), small.held_out)}
        progress(f"seed {seed}  {name}: {rows[name]['perplexity']:.2f}")
    return rows


def summary(values: list[float]) -> dict[str, float]:
    """Mean and spread over the seeds."""
    return {"mean": statistics.mean(values), "low": min(values), "high": max(values)}


def plot(result: dict[str, Any], file: Path) -> None:
    """The gap of every method, and where a plan stands in between."""
    from matplotlib.figure import Figure

    methods = result["methods"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(list(methods), [row["gap"] for row in methods.values()], color="#4477aa")
    axes.invert_yaxis()
    axes.set_xlabel(f"perplexity above the dense model's {result['dense']:.2f}")
    axes.bar_label(axes.containers[0], fmt="%.2f", padding=2, fontsize="small")
    axes.margins(x=0.12)
    figure.savefig(file, metadata={"Date": None})


@click.command()
@click.option("--threads", default=torch.get_num_threads(), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "accuracy.json", show_default=True)
@click.option("--plot", "plot_only", is_flag=True, help="Measure nothing: draw what the JSON holds.")
def main(threads: int, out: Path, plot_only: bool) -> None:
    """Measure and write the JSON."""
    if plot_only:
        plot(json.loads(out.read_text()), out.with_suffix(".svg"))
        return
    small = small_llama(threads)
    torch.set_num_threads(threads)
    dense, fp8 = perplexity(small.model, small.held_out), perplexity(dense_fp8(small.model), small.held_out)
    click.echo(f"dense {dense:.2f}, dense FP8 {fp8:.2f}")
    seeds = [measure(small, seed, click.echo) for seed in SEEDS]
    methods: dict[str, Any] = {
        name: {what: summary([one[name][what] for one in seeds]) for what in seeds[0][name]} for name in seeds[0]
    }
    for row in methods.values():
        row["gap"] = row["perplexity"]["mean"] - dense
    result = {
        "what": "perplexity on held-out sources; gap = perplexity minus the dense model's; mean, low, high of 3 seeds",
        "model": {
            "parameters": sum(parameter.numel() for parameter in small.model.parameters()),
            "layers": len(linears(small.model)),
            "calibration tokens": ROWS * small.train.shape[1],
            "held-out tokens": small.held_out.numel(),
        },
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "threads": threads,
            **{name: version(name) for name in ("torch", "torchao", "transformers", "hwpq_fx")},
        },
        "dense": dense,
        "dense FP8": fp8,
        "methods": methods,
    }
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    if find_spec("matplotlib"):
        plot(result, out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
