"""Choosing and packing 2:4 on the CPU against Wanda: `python benchmarks/choose.py` writes results/choose.json.

Wanda only chooses; ours chooses, or chooses, quantizes to FP8 and packs. All in turn in one process, same threads.
"""

import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rounds import machine, rounds, summary
from wanda import published_loop, vectorised

from hwpq_fx.kernels import cpu24, prune_pack24, select24
from hwpq_fx.kernels.prune_pack24 import prune_pack24_reference
from hwpq_fx.kernels.select24 import select24_reference

RESULTS = Path(__file__).parent / "results"
LOOP, TOPK, TOPK_COMPILED = "Wanda, published loop", "Wanda, one topk", "Wanda, one topk, torch.compile"
DEFAULTS = ("contribution", "ewma", 1 / 8, 1 / 4, -0.5)
EXACT = ("contribution", "exact", 1 / 8, 1 / 4, -0.5)


def contest(rows: int, cols: int, dtype: torch.dtype, runs: int) -> dict[str, Any]:
    """One random weight [rows, cols] and sums of squares."""
    torch.manual_seed(0)
    weight, sum_sq = (torch.randn(rows, cols) * 0.02).to(dtype), torch.rand(cols) * 100
    compiled = torch.compile(vectorised)
    times = rounds(
        {
            LOOP: partial(published_loop, weight, sum_sq),
            TOPK: partial(vectorised, weight, sum_sq),
            TOPK_COMPILED: partial(compiled, weight, sum_sq),
            "ours, mask": partial(select24, weight, sum_sq, *EXACT),
            "ours, mask and the share that EWMA's threshold settles": partial(select24, weight, sum_sq, *DEFAULTS),
            "ours, mask, FP8 and packing": partial(prune_pack24, weight, sum_sq, None, *DEFAULTS),
            "ours in plain torch, mask": partial(select24_reference, weight, sum_sq, *EXACT),
            "ours in plain torch, mask, FP8 and packing": partial(prune_pack24_reference, weight, sum_sq, None, *EXACT),
        },
        runs,
    )
    return summary(times, (LOOP, TOPK, TOPK_COMPILED))


def compile_seconds() -> float:
    """What the first conversion on a machine waits for the C++ compiler."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        cpu24.build(Path(folder))
        return time.perf_counter() - start


@click.command()
@click.option("--threads", default=torch.get_num_threads(), show_default=True)
@click.option("--rows", default=4096, show_default=True)
@click.option("--cols", default=4096, show_default=True)
@click.option("--runs", default=15, show_default=True, type=click.IntRange(2))
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "choose.json", show_default=True)
def main(threads: int, rows: int, cols: int, runs: int, out: Path) -> None:
    """Measure and write the JSON."""
    torch.set_num_threads(threads)
    if reason := cpu24.why_not_native():
        raise click.ClickException(reason)
    result = {
        "what": f"2:4 of one {rows}x{cols} weight on the CPU; medians of {runs} rounds, ratios round by round",
        "machine": machine(),
        "seconds to compile the native ops, once per machine": compile_seconds(),
        **{
            f"{rows}x{cols} {str(dtype).removeprefix('torch.')}": contest(rows, cols, dtype, runs)
            for dtype in (torch.float32, torch.bfloat16)
        },
    }
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
