"""The path "gemv": y = x W^T + b for few rows of x, bound by reading the weight in its 5 bits per weight.

x stays in 16 bits, each row costs no further reading of the weight up to 8 rows, sums are float32. Kernels and how
they work: `gemv24_triton`.
"""

from typing import Any, NamedTuple

import torch
from torch.library import triton_op

from .launching import DTYPES, arch_of, check_parts, interpreted, wrapped
from .pack24 import FORMAT_K
from .quantize_rows import E4M3

# what a warp of `sparse_mma_kernel` multiplies in a turn: rows of x, rows of the weight, length of both
TILE_M, TILE_N, TURN = 8, 16, 128
RESIDENT_WARPS = 40 * 132


class SparseMma(NamedTuple):
    """How `sparse_mma_kernel` cuts a product: a program makes 16 columns of 8 rows, its warps share K."""

    warps: int
    wide: bool
    """Whether x is loaded in pieces of 16 bytes, of which half is used."""
    ahead: bool = False
    """Whether a program first asks the L2 cache for all that it will read of the weight."""


class Plain(NamedTuple):
    """How `plain_kernel` cuts a product."""

    block_n: int
    groups: int
    """Groups of four along K in a step."""
    warps: int


def config(arch: int, m: int, n: int, k: int, dtype: torch.dtype) -> SparseMma | Plain:
    """For x [m, k] of `dtype` and W [n, k] on compute capability `arch` (90: sm_90).

    What hides the latency of memory is the number of warps that wait for it (a turn of one asks for 1.25 KiB): as
    many as are resident at once with the registers they take, none left for a second round. Where there is a second
    round in any case, its programs had better not take long: twice the warps, half the turns. More than 4 rows of x
    would wait longer for the cache than for memory if every word were a load of its own.
    """
    if dtype is torch.float32 or k % TURN or n < TILE_N:
        return Plain(16, 64, 4)
    programs = -(-n // TILE_N) * -(-m // TILE_M)
    warps = 32
    while warps > k // TURN or (warps > 4 and programs * warps > RESIDENT_WARPS):
        warps //= 2
    return SparseMma(2 * warps if programs * warps > RESIDENT_WARPS and k >= 16 * TURN else warps, m > 4)


def candidates(arch: int, m: int, n: int, k: int, dtype: torch.dtype) -> list[SparseMma | Plain]:
    """Configs worth measuring for that product; the first is `config`'s."""
    first = config(arch, m, n, k, dtype)
    if isinstance(first, Plain):
        return [first]
    warps = [some for some in (4, 8, 16, 32) if some <= k // TURN]
    both = (False, True)
    others = [SparseMma(some, wide, ahead) for ahead in both for wide in both[m > 4 :] for some in warps]
    return list(dict.fromkeys([first, *others]))


def why_not(arch: int, dtype: torch.dtype, n: int, k: int) -> str:
    """ "" where this path serves a weight [n, k] of a model in `dtype` on compute capability `arch`, else why not."""
    if arch < 80:
        return f"sm_{arch} has no sparse tensor cores"
    if dtype not in DTYPES:
        return f"models in {dtype} are not served"
    return f"K = {k} is not a multiple of {FORMAT_K}" if k % FORMAT_K else ""


def product(x, x_scale, qdata, sparse_metadata, scale, bias, layout, out_dtype):
    """y [M, N] = x W^T * scale + bias; see `gemv24`. x_scale and layout are None, out_dtype is that of x."""
    return gemv24(x, qdata, sparse_metadata, scale, bias)


def arguments(
    config: SparseMma | Plain, k: int, dtype: torch.dtype, bias: bool
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The kernel for x [M, k] of `dtype`, its constants, its options."""
    from . import gemv24_triton as kernels

    if isinstance(config, Plain):
        constants = {"K": k, "BIAS": bias, "BLOCK_N": config.block_n, "GROUPS": config.groups}
        return kernels.plain_kernel, constants, {"num_warps": config.warps}
    constants = {"K": k, "BF16": dtype is torch.bfloat16, "BIAS": bias}
    constants |= {"WARPS": config.warps, "WIDE": config.wide, "AHEAD": config.ahead}
    return kernels.sparse_mma_kernel, constants, {"num_warps": config.warps}


def product_cut(x, x_scale, qdata, sparse_metadata, scale, bias, out_dtype, cut: SparseMma | Plain):
    """`gemv24`, cut as told; nothing is checked, x lies as the kernel reads it, and there is something to do. x_scale
    is None, out_dtype that of x."""
    y = x.new_empty((x.shape[0], qdata.shape[0]))
    launch(x, qdata, sparse_metadata, scale, bias, y, cut)
    return y


def launch(
    x: torch.Tensor,
    qdata: torch.Tensor,
    sparse_metadata: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    config: SparseMma | Plain,
) -> None:
    """Write x [M, K] W^T * scale + bias to y [M, N]. M and N are not 0."""
    (m, k), n = x.shape, qdata.shape[0]
    kernel, constants, options = arguments(config, k, x.dtype, bias is not None)
    grid = (-(-n // config.block_n), m) if isinstance(config, Plain) else (-(-n // TILE_N), -(-m // TILE_M))
    kernel = wrapped(kernel)
    kernel[grid](x, qdata.view(torch.uint8), sparse_metadata, scale, bias, y, m, n, **constants, **options)


def _config(x: torch.Tensor, qdata: torch.Tensor, sparse_metadata: torch.Tensor) -> SparseMma | Plain:
    (m, k), n = x.shape, qdata.shape[0]
    # the interpreter knows no assembly
    if interpreted() or any(part.storage_offset() % 16 for part in (qdata, sparse_metadata)):
        return Plain(16, 64, 4)
    return config(arch_of(x.device), m, n, k, x.dtype)


@triton_op("hwpq_fx::gemv24", mutates_args={})
def gemv24(
    x: torch.Tensor,
    qdata: torch.Tensor,
    sparse_metadata: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """y [M, N] = x [M, K] W^T * scale + bias, accumulated in float32 and returned in the dtype of x.

    x: bfloat16, float16 or float32; qdata e4m3 [N, K/2], sparse_metadata uint8 [N, K/8]: see `pack24`; scale float32
    [N, 1]; bias [N] of any float dtype, or None. Raises RuntimeError where shapes or dtypes do not fit, or a weight's
    part is not contiguous.
    """
    _check(x, qdata, sparse_metadata, scale, bias)
    if not x.shape[0] or not qdata.shape[0]:
        return x.new_empty((x.shape[0], qdata.shape[0]))
    x = x.contiguous()
    x = x.clone() if x.storage_offset() % 8 else x  # read in pieces of 16 bytes
    cut = _config(x, qdata, sparse_metadata)
    return product_cut(x, None, qdata, sparse_metadata, scale, bias, x.dtype, cut)


@gemv24.register_fake
def _fake(x, qdata, sparse_metadata, scale, bias):
    _check(x, qdata, sparse_metadata, scale, bias)
    return x.new_empty((x.shape[0], qdata.shape[0]))


def _check(x, qdata, sparse_metadata, scale, bias) -> None:
    if x.dim() != 2 or qdata.dim() != 2 or x.shape[1] != 2 * qdata.shape[1] or x.shape[1] % FORMAT_K:
        raise RuntimeError(f"gemv24: x {tuple(x.shape)} does not fit qdata {tuple(qdata.shape)}, half of its K")
    if x.dtype not in DTYPES:
        raise RuntimeError(f"gemv24: x is {x.dtype}, not {' or '.join(map(str, DTYPES))}")
    k, n = x.shape[1], qdata.shape[0]
    parts = (
        ("qdata", qdata, (n, k // 2), (E4M3,)),
        ("sparse_metadata", sparse_metadata, (n, k // 8), (torch.uint8,)),
        ("scale", scale, (n, 1), (torch.float32,)),
        ("bias", bias, (n,), DTYPES),
    )
    check_parts("gemv24", x.device, parts)
