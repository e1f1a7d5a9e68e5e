"""The ways to do y = x W^T + b with a packed weight on a GPU, and which one serves a shape.

gemv         x in 16 bit (or float32), few rows: sparse tensor cores on the packed weight as it lies in memory
tiles        x in 16 bit (or float32): packed tiles expanded in registers, dense tensor cores
tiles_fp8    x in e4m3: the same on dense FP8 tensor cores
cusparselt   x in e4m3: NVIDIA's library on sparse tensor cores, from a layout of its own
cutlass      x in e4m3: torchao's CUTLASS op on sparse tensor cores (sm_90), from a layout of its own
reference    plain torch, serves everything, slow
"""

from collections.abc import Callable
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from typing import NamedTuple

import torch

from . import cusparselt24, cutlass24, gemv24, tiles24
from .launching import arch_of
from .linear24 import check, linear24, linear24_reference, no_view
from .table import Table, table_of

Product = Callable[..., torch.Tensor]


class Path(NamedTuple):
    """One way. `why_not(arch, dtype, n, k)`: "" where it serves a weight [n, k] of a model in `dtype` on compute
    capability `arch` (90: sm_90), else why not. `product(x, x_scale, qdata, sparse_metadata, scale, bias, layout,
    out_dtype)`: [M, K] to [M, N]. `inline`: the same in ops that Inductor can see through, for a graph."""

    name: str
    fp8: bool
    why_not: Callable[[int, torch.dtype, int, int], str]
    product: Product
    make_layout: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    inline: Product | None = None


def _gemv_inline(x, x_scale, qdata, sparse_metadata, scale, bias, layout, out_dtype):
    return torch.ops.hwpq_fx.gemv24.default(x, qdata, sparse_metadata, scale, bias)


def _tiles_inline(x, x_scale, qdata, sparse_metadata, scale, bias, layout, out_dtype):
    return torch.ops.hwpq_fx.tiles24.default(x, x_scale, qdata, sparse_metadata, scale, bias, out_dtype)


def _reference(x, x_scale, qdata, sparse_metadata, scale, bias, layout, out_dtype):
    return linear24_reference(x, x_scale, qdata, sparse_metadata, scale, bias, None, None, out_dtype, "")


def _needs_triton(why_not: Callable[..., str], arch: int, dtype: torch.dtype, n: int, k: int) -> str:
    return why_not(arch, dtype, n, k) if find_spec("triton") else "Triton is not installed"


def _tiles_fp8_why_not(arch: int, dtype: torch.dtype, n: int, k: int) -> str:
    return f"sm_{arch} has no FP8 tensor cores" if arch < 89 else tiles24.why_not(arch, dtype, n, k)


PATHS: dict[str, Path] = {
    path.name: path
    for path in (
        Path("gemv", False, partial(_needs_triton, gemv24.why_not), gemv24.product, inline=_gemv_inline),
        Path("tiles", False, partial(_needs_triton, tiles24.why_not), tiles24.product, inline=_tiles_inline),
        Path("tiles_fp8", True, partial(_needs_triton, _tiles_fp8_why_not), tiles24.product, inline=_tiles_inline),
        Path(
            "cusparselt",
            True,
            cusparselt24.why_not,
            cusparselt24.product,
            cusparselt24.make_layout,
            cusparselt24.inline,
        ),
        Path("cutlass", True, cutlass24.why_not, cutlass24.product, cutlass24.make_layout),
    )
}
# last, and twice: with FP8 activations where only those are at hand, without them where only those may be used
REFERENCE = {fp8: Path("reference", fp8, lambda *_: "", _reference) for fp8 in (False, True)}

# what activations a path may take: in 16 bit (or float32), in e4m3, or whichever is faster
HP, FP8, EITHER = "hp", "fp8", "either"

# where the paths are compared: all that lies between goes to the next
ROWS = tuple(2**power for power in range(15))


class Target(NamedTuple):
    """A kind of GPU."""

    arch: int
    name: str


def target_of(device: torch.device) -> Target | None:
    """The GPU behind a device; None where it is none of NVIDIA's."""
    return probe(device) if device.type == "cuda" and torch.version.hip is None else None


@cache
def probe(device: torch.device) -> Target:
    """Ask the driver."""
    return Target(arch_of(device), torch.cuda.get_device_name(device))


@lru_cache(maxsize=2**16)
def choose(
    target: Target, m: int, n: int, k: int, dtype: torch.dtype, activation: str, prepacked_for: str, table: Table
) -> Path:
    """The fastest way for x [m, k] and W [n, k] that serves them, by `table`.

    activation: `HP`, `FP8` or `EITHER`; prepacked_for: the path whose layout the weight carries, or "".
    """
    serving = [
        path
        for path in PATHS.values()
        if (path.fp8, activation) not in ((True, HP), (False, FP8))
        and (path.make_layout is None or path.name == prepacked_for)
        and not path.why_not(target.arch, dtype, n, k)
    ]
    ranking = table.ranking(m, n, k)
    serving = [path for path in serving if path.name in ranking]
    return min(serving, key=lambda path: ranking.index(path.name), default=REFERENCE[activation == FP8])


def chosen(target: Target, x: torch.Tensor, n: int, dtype: torch.dtype, activation: str, prepacked_for: str) -> Path:
    """`choose` for rows x [..., K], by the table of that GPU."""
    k = x.shape[-1]
    return choose(target, x.numel() // k, n, k, dtype, activation, prepacked_for, table_of(target.name))


def best_layout(target: Target, n: int, k: int, dtype: torch.dtype) -> str:
    """Which path with a layout of its own is worth that memory: one that is fastest at some number of rows, or ""."""
    table = table_of(target.name)
    served = {name: path for name, path in PATHS.items() if not path.why_not(target.arch, dtype, n, k)}
    first = [next((name for name in table.ranking(rows, n, k) if name in served), "") for rows in ROWS]
    winners = [name for name in first if name and served[name].make_layout]
    # of two libraries the one that wins more often: a third copy of the weight is not worth it
    return max(winners, key=winners.count, default="")


def describe(target: Target, n: int, k: int, dtype: torch.dtype, activation: str, prepacked_for: str) -> str:
    """What runs at how many rows, as "gemv to 8 rows, tiles to 64, cusparselt above"."""
    table = table_of(target.name)
    ranges: list[tuple[str, int]] = []
    for rows in ROWS:
        name = choose(target, rows, n, k, dtype, activation, prepacked_for, table).name
        if ranges and ranges[-1][0] == name:
            ranges.pop()
        ranges.append((name, rows))
    *bounded, (last, _) = ranges
    parts = [f"{name} to {rows} rows" for name, rows in bounded]
    return ", ".join([*parts, f"{last} above" if parts else last])


@linear24.register_kernel("cuda")
def linear24_cuda(x, x_scale, qdata, sparse_metadata, scale, bias, prepacked, x_hp, out_dtype, prepacked_for):
    check(x, x_scale, qdata, sparse_metadata, scale, bias, prepacked, x_hp, out_dtype, prepacked_for)
    activation = HP if x_scale is None else FP8 if x_hp is None else EITHER
    target = target_of(x.device)
    path = chosen(target, x, qdata.shape[0], out_dtype, activation, prepacked_for) if target else None
    path = path or REFERENCE[x_scale is not None]
    if path.fp8:
        rows, x_scale = x, x_scale.reshape(-1, 1)
    else:
        rows, x_scale = x if x_hp is None else x_hp, None
    rows = rows.reshape(-1, x.shape[-1]).contiguous()
    layout = prepacked if path.make_layout else None
    with torch.cuda.device_of(x):
        y = path.product(rows, x_scale, qdata, sparse_metadata, scale, bias, layout, out_dtype)
    return no_view(y, (*x.shape[:-1], qdata.shape[0]))
