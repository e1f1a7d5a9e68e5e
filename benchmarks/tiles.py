"""How `tiles24` is best cut on this GPU: every one of `tiles24.candidates`, on the linears of a decoder layer.

    python benchmarks/tiles.py [--model llama-3-8b] [--rows 16 --rows 64 ...] [--seconds 60]

Prints the fastest of each product beside what `tiles24.config` takes, and writes all times as JSON. x is given as it is
in a model, so that its order (`tiles24.deal`) is made in the time, by a kernel of its own.
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
from hwpq_fx.kernels import Float8Sparse24Tensor, quantize_rows
from hwpq_fx.kernels.launching import arch_of
from hwpq_fx.kernels.quantize_rows import E4M3
from hwpq_fx.kernels.tiles24 import Config, candidates, product_cut

RESULTS = Path(__file__).parent / "results"
ROWS = (64, 16, 32, 512, 4096, 128)
Set = tuple[torch.Tensor, torch.Tensor | None, Float8Sparse24Tensor]


def given(m: int, n: int, k: int, fp8: bool, device: torch.device) -> Set:
    """x, its scale, and a packed weight."""
    x = normal((m, k), torch.bfloat16, device)
    weight = Float8Sparse24Tensor.from_hp(normal((n, k), torch.bfloat16, device))
    return (*quantize_rows(x), weight) if fp8 else (x, None, weight)


def product(inputs: Set, cut: Config) -> torch.Tensor:
    x, x_scale, weight = inputs
    return product_cut(x, x_scale, weight.qdata, weight.sparse_metadata, weight.scale, None, torch.bfloat16, cut)


def lines(clock: Clock, m: int, n: int, k: int, fp8: bool, seconds: float) -> Iterator[dict[str, Any]]:
    """A line for every candidate, the default first."""
    sets, length = rotation(n * k * 5 // 8 + m * (k + n) * 2, clock.l2_bytes)
    inputs = [given(m, n, k, fp8, clock.device) for _ in range(sets)]
    x, x_scale, weight = inputs[0]
    x = x.float() * (1 if x_scale is None else x_scale)
    dense, bound = weight.dequantize(torch.float32), FP8_BOUND if fp8 else BOUNDS[torch.bfloat16]
    arch, dtype = arch_of(clock.device), E4M3 if fp8 else torch.bfloat16
    for cut in candidates(arch, m, n, k, dtype):
        calls = [partial(product, one, cut) for one in inputs]
        found = measured(clock, calls, length, lambda y: errors_of(y[0], x, dense).why_refused(bound), seconds)
        yield {"m": m, "n": n, "k": k, "dtype": "e4m3" if fp8 else "bfloat16", "config": cut._asdict(), **found}


@click.command()
@click.option("--model", default="llama-3-8b", show_default=True, help="A name, or a config.json.")
@click.option("--rows", multiple=True, default=ROWS, show_default=True, type=click.IntRange(1))
@click.option("--seconds", default=240.0, show_default=True, help="Stop after so many.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "tiles.json", show_default=True)
def main(model: str, rows: tuple[int, ...], seconds: float, out: Path) -> None:
    """Measure, and write after every product: what is stopped early has fewer of them."""
    if not torch.cuda.is_available():
        raise click.ClickException("this measures a GPU, and there is none")
    clock, began = CudaClock(), time.monotonic()
    result: dict[str, Any] = {"what": "tiles24 by config", "machine": describe_machine(), "lines": []}
    for m in rows:
        for n, k in decoder(model).shapes((MERGED,)):
            for fp8 in (True, False) if arch_of(clock.device) >= 89 else (False,):
                if time.monotonic() - began > seconds:
                    click.echo(f"stopped after {seconds:.0f} s")
                    return
                made = list(lines(clock, m, n, k, fp8, 0.05))
                result["lines"] += made
                right = [line for line in made if line["status"] == "ok"]
                best = min(right, key=lambda line: line["median_us"], default=None)
                says = f"{m} x {n}x{k} {made[0]['dtype']}: default {made[0].get('median_us', made[0].get('error'))}"
                click.echo(f"tiles {says}, best {best and best['median_us']} {best and tuple(best['config'].values())}")
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
