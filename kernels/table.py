"""Which path is fastest at which shape: measured on the user's GPU (`hwpq-fx tune`), or the default shipped here.

The file is JSON, one per kind of GPU, in the user's cache folder:

    {"format": 1, "device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "triton": "3.6.0", "source": "measured",
     "entries": [{"n": 4096, "k": 4096, "us": {"1": {"gemv": 5.1, "tiles": 7.9}, "2": {...}}}],
     "algorithms": {...}}

us: median microseconds of each path that serves, and of `DENSE_NAMES`, by rows of x; algorithms: what cuSPARSELt's
search found (`cusparselt24.export_algorithms`).
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from math import inf, log
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from .cusparselt24 import import_algorithms

FORMAT = 1
logger = logging.getLogger("hwpq_fx")

# What is not ours and may stand in a table beside our paths, for `hwpq_fx.plan`: bf16, then dense FP8.
DENSE_NAMES = ("bf16", "fp8 dynamic", "fp8 weight-only")

Times = Mapping[int, Mapping[str, float]]
"""Microseconds of each path by name, for each number of rows."""

# Fastest first, up to so many rows. From published figures and the roofline, not measured by us: memory bounds the
# few-rows kernels, which read 5 bits per weight; cuSPARSELt with its algorithm search leads torchao's CUTLASS op at
# many rows (arXiv 2603.05232).
DEFAULT_RANKING = (
    (8, ("gemv", "tiles", "tiles_fp8", "cusparselt", "cutlass")),
    (64, ("tiles", "tiles_fp8", "cusparselt", "cutlass", "gemv")),
    (inf, ("cusparselt", "cutlass", "tiles_fp8", "tiles", "gemv")),
)


@dataclass(frozen=True, eq=False)
class Table:
    """Measured times by (N, K), or none: then the default ranking holds."""

    entries: Mapping[tuple[int, int], Times] = field(default_factory=dict)
    algorithms: Mapping[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """Where it comes from: "measured" or "default"."""
        return "measured" if self.entries else "default"

    def ranking(self, m: int, n: int, k: int) -> tuple[str, ...]:
        """Names of paths for x [m, k] and W [n, k], fastest first: those of the nearest shape that was measured, at
        the next larger number of rows."""
        if not self.entries:
            return next(names for most, names in DEFAULT_RANKING if m <= most)
        nearest = min(self.entries, key=lambda shape: abs(log(shape[0] / n)) + abs(log(shape[1] / k)))
        times = self.times(m, *nearest)
        return tuple(sorted(times, key=times.__getitem__))

    def times(self, m: int, n: int, k: int) -> Mapping[str, float]:
        """Microseconds by name at the next larger number of rows; empty where this very shape was not measured."""
        measured = self.entries.get((n, k))
        if measured is None:
            return {}
        return measured[min((rows for rows in measured if rows >= m), default=max(measured))]


DEFAULT = Table()


def versions() -> dict[str, str]:
    """What a measured table depends on."""
    return {name: _version(name) for name in ("torch", "triton")}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def user_table_file(device: str) -> Path:
    """Where the table of this kind of GPU is kept, by its name as the driver gives it."""
    return user_cache_path("hwpq_fx") / f"{re.sub(r'[^A-Za-z0-9]+', '-', device).strip('-').lower()}.json"


def save_table(table: Table, device: str, file: Path | None = None) -> Path:
    """Write a measured table for this kind of GPU, whole or not at all, and use it from now on in this process."""
    file = file or user_table_file(device)
    entries = [{"n": n, "k": k, "us": times} for (n, k), times in table.entries.items()]
    content = {"format": FORMAT, "device": device, **versions(), "source": "measured", "entries": entries}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(content | {"algorithms": dict(table.algorithms)}, indent=1) + "\n")
    temporary.replace(file)
    table_of.cache_clear()
    return file


def load_table(file: Path, device: str) -> Table:
    """Read a table that `save_table` wrote for this kind of GPU, and give cuSPARSELt its algorithms.

    Raises ValueError, saying what does not fit, for another GPU, another torch or Triton, or a broken file.
    """
    try:
        content = json.loads(file.read_text())
        found = {"format": content["format"], "device": content["device"]} | {
            name: content[name] for name in versions()
        }
        entries = {
            (int(one["n"]), int(one["k"])): {
                int(rows): {str(name): float(us) for name, us in times.items()} for rows, times in one["us"].items()
            }
            for one in content["entries"]
        }
        algorithms = dict(content["algorithms"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"is broken ({type(error).__name__}: {error})") from error
    for name, wanted in ({"format": FORMAT, "device": device} | versions()).items():
        if found[name] != wanted:
            raise ValueError(f"was made for {name} {found[name]}, this is {wanted}")
    sane = all(n > 0 and k > 0 and times and all(rows > 0 and many for rows, many in times.items())
               for (n, k), times in entries.items())  # fmt: skip
    if not entries or not sane:
        raise ValueError("holds no times, or shapes that cannot be")
    import_algorithms(algorithms)
    return Table(entries, algorithms)


@cache
def table_of(device: str) -> Table:
    """The user's table for this kind of GPU, or the default; a file that does not fit is left aside with a warning."""
    file = user_table_file(device)
    if not file.exists():
        return DEFAULT
    try:
        return load_table(file, device)
    except ValueError as error:
        logger.warning("%s %s: it is not used; `hwpq-fx tune` makes a new one", file, error)
        return DEFAULT
