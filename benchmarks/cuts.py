"""How `gemv24` and `tiles24` are best cut on this GPU: every one of their `candidates`, on the linears of a decoder
layer.

    python benchmarks/cuts.py [--path gemv] [--model llama-3-8b] [--rows 1 --rows 64 ...] [--seconds 60]

Prints the fastest of each product beside what `config` takes, and writes all times as JSON. x is given as it is in a
model, so that the order in which `tiles24` reads it is made in the time, by a kernel of its own.
"""

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from hwpq_fx.bench.machine import describe_machine
from hwpq_fx.bench.measure import BOUNDS, FP8_BOUND, Clock, CudaClock, errors_of, measured, normal, rotation
from hwpq_fx.bench.shapes import MERGED, decoder
from hwpq_fx.kernels import Float8Sparse24Tensor, gemv24, quantize_rows, tiles24
from hwpq_fx.kernels.launching import arch_of
from hwpq_fx.kernels.quantize_rows import E4M3

RESULTS = Path(__file__).parent / "results"
# what is wanted most first
PLAN = {"gemv": (1, 8, 4), "tiles_fp8": (64, 512, 4096), "tiles": (16, 64, 32, 128)}
OPS = {"gemv": gemv24, "tiles_fp8": tiles24, "tiles": tiles24}
Set = tuple[torch.Tensor, torch.Tensor | None, Float8Sparse24Tensor]


def given(m: int, n: int, k: int, fp8: bool, device: torch.device) -> Set:
    """x, its scale, and a packed weight."""
    x = normal((m, k), torch.bfloat16, device)
    weight = Float8Sparse24Tensor.from_hp(normal((n, k), torch.bfloat16, device))
    return (*quantize_rows(x), weight) if fp8 else (x, None, weight)


def product(op: Any, inputs: Set, cut: Any) -> torch.Tensor:
    x, x_scale, weight = inputs
    parts = (weight.qdata, weight.sparse_metadata, weight.scale)
    return op.product_cut(x, x_scale, *parts, None, torch.bfloat16, cut)


def lines(clock: Clock, path: str, m: int, n: int, k: int, seconds: float) -> Iterator[dict[str, Any]]:
    """A line for every candidate, the default first."""
    fp8, op = path == "tiles_fp8", OPS[path]
    sets, length = rotation(n * k * 5 // 8 + m * (k + n) * 2, clock.l2_bytes)
    inputs = [given(m, n, k, fp8, clock.device) for _ in range(sets)]
    x, x_scale, weight = inputs[0]
    x = x.float() * (1 if x_scale is None else x_scale)
    dense, bound = weight.dequantize(torch.float32), FP8_BOUND if fp8 else BOUNDS[torch.bfloat16]
    for cut in op.candidates(arch_of(clock.device), m, n, k, E4M3 if fp8 else torch.bfloat16):
        calls = [partial(product, op, one, cut) for one in inputs]
        found = measured(clock, calls, length, lambda y: errors_of(y[0], x, dense).why_refused(bound), seconds)
        yield {"path": path, "m": m, "n": n, "k": k, "config": cut._asdict(), **found}


@click.command()
@click.option("--path", "paths", multiple=True, type=click.Choice(list(PLAN)), help="Only this one; may be repeated.")
@click.option("--model", default="llama-3-8b", show_default=True, help="A name, or a config.json.")
@click.option("--rows", multiple=True, type=click.IntRange(1), help=f"May be repeated.  [default: {PLAN}]")
@click.option("--seconds", default=240.0, show_default=True, help="Stop after so many.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "cuts.json", show_default=True)
def main(paths: tuple[str, ...], model: str, rows: tuple[int, ...], seconds: float, out: Path) -> None:
    """Measure, and write after every product: what is stopped early has fewer of them."""
    shapes = decoder(model).shapes((MERGED,))
    if not torch.cuda.is_available():
        raise click.ClickException("this measures a GPU, and there is none")
    clock, began = CudaClock(), time.monotonic()
    result: dict[str, Any] = {"what": "products by how they are cut", "machine": describe_machine(), "lines": []}
    for path in paths or PLAN:
        if path == "tiles_fp8" and arch_of(clock.device) < 89:
            continue
        for m in rows or PLAN[path]:
            for n, k in shapes:
                if time.monotonic() - began > seconds:
                    click.echo(f"stopped after {seconds:.0f} s")
                    return
                made = list(lines(clock, path, m, n, k, 0.05))
                result["lines"] += made
                right = [line for line in made if line["status"] == "ok"]
                best = min(right, key=lambda line: line["median_us"], default=None)
                says = f"{m} x {n}x{k} {path}: default {made[0].get('median_us', made[0].get('error'))}"
                click.echo(f"cuts {says}, best {best and best['median_us']} {best and tuple(best['config'].values())}")
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
