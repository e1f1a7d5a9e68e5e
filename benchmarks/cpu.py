"""CPU figures of README: `python benchmarks/cpu.py [--threads N]` writes benchmarks/results/cpu.json.

Paired runs in one process, dense and converted in turn; medians, and ratios of each pair. MiniLM with its real
weights: compiled against compiled at batch 1 and 32, and the observed forward against a plain eager one.
"""

import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch

import hwpq_fx
from hwpq_fx.calibration import Calibration
from hwpq_fx.minilm import MiniLM, sentences

RESULTS = Path(__file__).parent / "results"


def paired(first: Callable[[], Any], second: Callable[[], Any], runs: int, warmup: int = 5) -> dict[str, float]:
    """Median milliseconds of both, and the median and quintiles of the ratio first / second, pair by pair."""
    times: list[tuple[float, float]] = []
    for run in range(warmup + runs):
        start = time.perf_counter()
        first()
        middle = time.perf_counter()
        second()
        if run >= warmup:
            times.append((middle - start, time.perf_counter() - middle))
    ratios = [a / b for a, b in times]
    p20, *_, p80 = statistics.quantiles(ratios, n=5)
    return {
        "first_ms": 1e3 * statistics.median(a for a, _ in times),
        "second_ms": 1e3 * statistics.median(b for _, b in times),
        "ratio": statistics.median(ratios),
        "ratio_p20": p20,
        "ratio_p80": p80,
        "runs": runs,
    }


def conversion_speed(minilm: MiniLM, activation: str, runs: int) -> dict[str, dict[str, float]]:
    """Dense over converted, both compiled; above 1 the converted one is faster."""
    made = {}
    calib = minilm.batches(sentences("calibration"))
    dense = torch.compile(copy.deepcopy(minilm.model))
    converted = hwpq_fx.convert(
        torch.compile(copy.deepcopy(minilm.model)), calib, hwpq_fx.HWPQConfig(activation=activation)
    )
    for size in (1, 32):
        batch = dict(minilm.tokenizer(sentences("heldout")[-size:], padding=True, return_tensors="pt"))
        torch._dynamo.reset()  # both sizes as their own static shape
        made[f"batch {size}, {batch['input_ids'].shape[1]} tokens"] = paired(
            lambda batch=batch: dense(**batch), lambda batch=batch: converted(**batch), runs
        )
    return made


def observing_cost(minilm: MiniLM, curvature_bytes: int | None, runs: int) -> dict[str, float]:
    """Observed forward over plain eager forward on the calibration batches, once traced."""
    batches = minilm.batches(sentences("calibration"))
    observed = copy.deepcopy(minilm.model)
    calibration = Calibration(observed, curvature_bytes)
    calibration.run(batches)
    try:
        return paired(
            lambda: calibration.run(batches), lambda: [minilm.model(**batch) for batch in batches], runs, warmup=2
        )
    finally:
        calibration.remove()


@click.command()
@click.option("--threads", default=torch.get_num_threads(), show_default=True)
@click.option("--runs", default=60, show_default=True, type=click.IntRange(2))
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "cpu.json", show_default=True)
def main(threads: int, runs: int, out: Path) -> None:
    """Measure and write the JSON."""
    torch.set_num_threads(threads)
    minilm = MiniLM()
    with torch.no_grad():
        result = {
            "what": "all-MiniLM-L6-v2 on the CPU; ratio = dense / converted, or observed / plain",
            "machine": {
                "cpu": platform.processor() or platform.machine(),
                "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
                "threads": threads,
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "torchao", "transformers", "hwpq_fx")},
            },
            "observed over plain eager, sums of squares": observing_cost(minilm, 0, max(5, runs // 10)),
            "observed over plain eager, X^T X": observing_cost(minilm, None, max(5, runs // 10)),
            "dense over converted, compiled, activation dynamic": conversion_speed(minilm, "dynamic", runs),
            "dense over converted, compiled, activation none": conversion_speed(minilm, "none", runs),
        }
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
