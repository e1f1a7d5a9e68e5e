"""Contenders timed in turn, round after round, in one process: what disturbs one of them disturbs its neighbours."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

Times = dict[str, list[float]]
"""Seconds of each contender, round by round."""


def rounds(contenders: Mapping[str, Callable[[], Any]], runs: int, warmup: int = 2) -> Times:
    """Run each once a round."""
    times: Times = {name: [] for name in contenders}
    for turn in range(warmup + runs):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def summary(times: Times, baselines: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Median milliseconds of each; for those that are not baselines, also each baseline's time over theirs, round by
    round: above 1 they are faster than it."""
    made: dict[str, dict[str, Any]] = {name: {"ms": 1e3 * statistics.median(mine)} for name, mine in times.items()}
    for name in times.keys() - set(baselines):
        for baseline in baselines:
            ratios = [a / b for a, b in zip(times[baseline], times[name], strict=True)]
            p20, *_, p80 = statistics.quantiles(ratios, n=5, method="inclusive")
            made[name][f"{baseline} / this"] = {"median": statistics.median(ratios), "p20": p20, "p80": p80}
    return made


def machine() -> dict[str, Any]:
    """What a CPU measurement depends on."""
    cpu = torch.cpu.get_capabilities()
    return {
        "cpu": cpu["cpu_name"],
        "instructions": sorted(name for name in cpu if cpu[name] is True and name.startswith(("avx", "amx"))),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchao", "transformers", "hwpq_fx")},
    }
