"""Perplexity that 2:4 + FP8 leaves, method by method: `python benchmarks/accuracy.py` writes
benchmarks/results/accuracy.json and, with matplotlib, accuracy.svg; `--plot` draws the picture again,
`--times` measures the times again, which want a quiet machine and take minutes, not an hour.

The model is that of small_llama.py; every linear layer but the head is pruned to 2:4 and packed, activations become
FP8 too. All methods see the same X^T X of the same calibration rows, gathered on the dense model; what is timed is
choosing and compensating, not gathering, on the same threads. "in order" is the library's own call with
sequential=True; its time leaves out the runs of the model in between. Three seeds draw the
calibration sequences. KL is that of the next-token distributions to the dense model's, in nats: it has less noise than
perplexity, which also tells how well the dense model was calibrated.
"""

import copy
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch
from methods import METHODS, dense_fp8, inputs_of, linears, plain, pruned, where
from small_llama import SmallLlama, perplexity, small_llama
from torch import nn

import hwpq_fx
from hwpq_fx.plan import DENSE, SPARSE

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
ROWS = 64  # calibration sequences of 256 tokens
TURNS = 2  # of every method for each seed, where it is timed
KL_ROWS = 64  # held-out sequences
OURS = hwpq_fx.HWPQConfig()
IN_ORDER = "ours, cg, in order"

Batches = Sequence[dict[str, Any]]


def in_order(model: nn.Module, calib: Batches) -> tuple[nn.Module, float]:
    """A copy converted layer after layer, and the seconds that choosing, compensating and packing took."""
    model = hwpq_fx.convert(copy.deepcopy(model), calib, hwpq_fx.HWPQConfig(sequential=True))
    return plain(model), hwpq_fx.report(model).seconds["choose and pack"]


def unstructured(model: nn.Module, calib: Batches, sparsity: float) -> nn.Module:
    """A copy by the library's own call: the share is pruned anywhere, with "cg"."""
    config = hwpq_fx.HWPQConfig(sparsity=sparsity, activation="none")
    return hwpq_fx.convert(copy.deepcopy(model), calib, config)


def planned(model: nn.Module, calib: Batches, plan: hwpq_fx.Plan, share: float) -> nn.Module:
    """A copy of which so much of the linear layers' multiplications is 2:4, least loss for time saved first, by the
    `plan`, which is changed to that; the rest stays as it was."""
    total = sum(layer.shape[0] * layer.shape[1] for layer in plan.layers)
    chosen = 0
    for layer in sorted(plan.layers, key=lambda layer: layer.losses[SPARSE] / layer.microseconds[DENSE]):
        size = layer.shape[0] * layer.shape[1]
        layer.status = SPARSE if chosen + size <= share * total else DENSE
        chosen += size if layer.status == SPARSE else 0
    return plain(hwpq_fx.convert(copy.deepcopy(model), calib, OURS, plan=plan))


@torch.no_grad()
def log_probabilities(model: nn.Module, tokens: torch.Tensor, size: int = 16) -> Iterator[torch.Tensor]:
    """Of the next token, batch by batch of this size."""
    for batch in tokens.split(size):
        yield model(input_ids=batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)


def divergence(model: nn.Module, tokens: torch.Tensor, expected: Sequence[torch.Tensor]) -> float:
    """Mean KL of the dense model's `expected` to this one's, in nats a token."""
    found = log_probabilities(model, tokens)
    kls = [(p.float().exp() * (p - q)).sum(-1).mean() for p, q in zip(expected, found, strict=True)]
    return float(torch.stack(kls).mean())


def measure(
    small: SmallLlama,
    seed: int,
    methods: Sequence[str],
    expected: Sequence[torch.Tensor],
    progress: Callable[[str], None],
) -> dict[str, dict[str, float]]:
    """Perplexity and KL to the dense model (`expected`) for one draw of calibration sequences: of these methods, or of
    every one, of plans and of unstructured pruning."""
    calib = drawn(small, seed)
    rows: dict[str, dict[str, float]] = {}

    def add(name: str, model: nn.Module) -> None:
        kl = divergence(model, small.held_out[:KL_ROWS], expected)
        rows[name] = {"perplexity": perplexity(model, small.held_out), "KL": kl}
        progress(f"seed {seed}  {name}: " + ", ".join(f"{value:.4g} {what}" for what, value in rows[name].items()))

    inputs = inputs_of(small.model, calib)
    for name in methods or METHODS:
        add(name, pruned(small.model, inputs, METHODS[name])[0])
    if not methods:
        add(IN_ORDER, in_order(small.model, calib)[0])
        plan = hwpq_fx.plan(small.model, calib, OURS)
        for share in (0.25, 0.5, 0.75, 1.0):
            add(f"plan, {share:.0%} of the multiplications 2:4", planned(small.model, calib, plan, share))
        for share in (0.2, 0.5):
            add(f"unstructured {share:.0%}, cg", unstructured(small.model, calib, share))
    return rows


def drawn(small: SmallLlama, seed: int) -> Batches:
    """Calibration batches."""
    order = torch.randperm(len(small.train), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": batch, "use_cache": False} for batch in small.train[order[:ROWS]].split(16)]


def times(small: SmallLlama, progress: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Seconds of choosing and compensating, every method in its turn, and SparseGPT's time over each, turn by turn."""
    seconds: dict[str, list[float]] = {name: [] for name in (*METHODS, IN_ORDER)}
    for seed in SEEDS:
        calib = drawn(small, seed)
        inputs = inputs_of(small.model, calib)
        for _ in range(TURNS):
            for name, method in METHODS.items():
                seconds[name].append(pruned(small.model, inputs, method)[1])
            seconds[IN_ORDER].append(in_order(small.model, calib)[1])
            progress(", ".join(f"{name} {mine[-1]:.3g}" for name, mine in seconds.items()))
    theirs = seconds["SparseGPT"]
    return {
        name: {
            "seconds": summary(mine),
            "SparseGPT's seconds over these": summary([a / b for a, b in zip(theirs, mine, strict=True)]),
        }
        for name, mine in seconds.items()
    }


def summary(values: list[float]) -> dict[str, float]:
    """Mean, median and spread."""
    return {
        "mean": statistics.mean(values),
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
    }


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


def write(
    small: SmallLlama,
    seeds: list[dict[str, dict[str, float]]],
    dense: dict[str, float],
    timed: dict[str, dict[str, Any]],
    out: Path,
) -> None:
    """The JSON and the picture."""
    methods: dict[str, Any] = {
        name: {what: summary([one[name][what] for one in seeds]) for what in seeds[0][name]} for name in seeds[0]
    }
    for row in methods.values():
        row["gap"] = row["perplexity"]["mean"] - dense["dense"]
    for name, row in timed.items():
        methods[name] |= row
    result = {
        "what": "held-out perplexity, gap above the dense model's, KL in nats; mean, median, low, high over seeds",
        "seeds": len(seeds),
        "model": {
            "parameters": sum(parameter.numel() for parameter in small.model.parameters()),
            "layers": len(linears(small.model)),
            "calibration tokens": ROWS * small.train.shape[1],
            "held-out tokens": small.held_out.numel(),
        },
        "machine": where(small.model.device),
        **dense,
        "methods": methods,
    }
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    if find_spec("matplotlib"):
        plot(result, out.with_suffix(".svg"))


@click.command()
@click.option("--threads", default=torch.get_num_threads(), show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "accuracy.json", show_default=True)
@click.option("--method", "chosen", multiple=True, type=click.Choice(list(METHODS)), help="Print only these, no JSON.")
@click.option("--times", "times_only", is_flag=True, help="Measure times alone, and put them into the JSON.")
@click.option("--plot", "plot_only", is_flag=True, help="Measure nothing: draw what the JSON holds.")
def main(threads: int, device: str, out: Path, chosen: tuple[str, ...], times_only: bool, plot_only: bool) -> None:
    """Measure and write the JSON."""
    if plot_only:
        plot(json.loads(out.read_text()), out.with_suffix(".svg"))
        return
    small = small_llama(threads, device)
    torch.set_num_threads(threads)
    if times_only:
        result = json.loads(out.read_text())
        for name, row in times(small, click.echo).items():
            result["methods"][name] |= row
        out.write_text(json.dumps(result | {"machine": where(small.model.device)}, indent=2) + "\n")
        return
    dense, fp8 = perplexity(small.model, small.held_out), perplexity(dense_fp8(small.model), small.held_out)
    click.echo(f"dense {dense:.2f}, dense FP8 {fp8:.2f}")
    expected = [part.half() for part in log_probabilities(small.model, small.held_out[:KL_ROWS])]
    seeds: list[dict[str, dict[str, float]]] = []
    for seed in SEEDS:
        seeds.append(measure(small, seed, chosen, expected, click.echo))
        if not chosen:  # what is there is kept, should it end before its time
            write(small, seeds, {"dense": dense, "dense FP8": fp8}, {}, out)
    if not chosen:
        write(small, seeds, {"dense": dense, "dense FP8": fp8}, times(small, click.echo), out)


if __name__ == "__main__":
    main()
