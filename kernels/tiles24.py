"""The path "tiles": y = x W^T + b on dense tensor cores. Packed tiles are expanded in registers, so memory gives 5 bits
per weight whatever the number of rows.

x in bfloat16 or float16 meets weights expanded to its own dtype (e4m3 is exact in both); x in e4m3 meets e4m3 on FP8
tensor cores (sm_89 and newer). float32 is multiplied as float32: right, and slow. Kernels: `tiles24_triton`.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.library import triton_op

from .launching import DTYPES, arch_of, check_parts, kernel_arch, wrapped
from .pack24 import FORMAT_K
from .quantize_rows import E4M3

SMS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 170}
"""Multiprocessors of the GPU that a compute capability stands for: A100, A10, L40S, H100, B200, RTX 5090."""


class Config(NamedTuple):
    """How a product is cut: a program computes y [block_m, block_n], in steps of block_k."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    """Steps under way at once: one in work, the others loading."""
    split: int = 1
    """Programs that share K, each with a part of the sum."""
    weights_first: bool = True
    """W x^T, where a program may have as few as 16 rows of x; otherwise x W^T."""


def config(arch: int, m: int, n: int, k: int, dtype: torch.dtype) -> Config:
    """A config for x [m, k] of `dtype` (e4m3 for the FP8 form) and W [n, k] on compute capability `arch`.

    By reasoning, not yet by measurement. Few rows wait for memory: small programs, several to a multiprocessor, so
    that 30 kB or more are on their way to each. Many rows wait for tensor cores, and for the shared memory that feeds
    them: weights reach them from registers, expanded once for 128 or 256 rows.
    """
    if dtype is torch.float32:
        return _with_split(Config(16, 32, 32, 4, 2), arch, m, n, k)
    if m <= 64:
        rows = max(16, 1 << (m - 1).bit_length())
        # tensor memory takes 128 rows; eight warps: Triton 3.6 writes e4m3 byte by byte where a thread has 128
        columns = 128 if arch == 100 else 64
        # and sm_89 and 120 hold one program of 64 rows of 16 bit, and spill with four
        eight = arch == 100 if dtype is E4M3 else arch in (89, 120) and rows == 64
        # a step is 5 kB of weights: where a multiprocessor has one or two programs, 30 kB ask for more steps
        stages = 4 if arch != 90 else 6 if rows <= 32 or dtype is E4M3 else 5
        return _with_split(Config(rows, columns, 128, 8 if eight else 4, stages), arch, m, n, k)
    if arch in (90, 100):
        # 256 rows where that leaves no multiprocessor idle
        wide = -(-m // 256) * -(-n // 128) >= SMS[arch]
        return Config(256 if wide else 128, 128, 128, 8, 3 if dtype is E4M3 else 2)
    return Config(128, 128, 128, 8, 2 if dtype is not E4M3 else 3, weights_first=arch != 80)


def _with_split(one: Config, arch: int, m: int, n: int, k: int) -> Config:
    """Cut K into parts, a power of two of them: until three in four multiprocessors have a program; on, to four
    each, while a part keeps 8 steps and the parts' bytes are less than a quarter of the weight's."""
    programs = -(-m // one.block_m) * -(-n // one.block_n)
    sms, steps, split = SMS.get(arch, 132), -(-k // one.block_k), 1
    while (4 * programs * split < 3 * sms and steps >= 4 * split) or (
        2 * programs * split <= 4 * sms and steps >= 16 * split and 4 * (2 * split * m * 8) <= k * 5 // 8
    ):
        split *= 2
    return one._replace(split=split)


def candidates(arch: int, m: int, n: int, k: int, dtype: torch.dtype) -> list[Config]:
    """Configs worth measuring for that product; the first is `config`'s."""
    first = config(arch, m, n, k, dtype)
    if dtype is torch.float32:
        return [first]
    if m <= 64:
        others = [first._replace(split=split) for split in (1, 2, 4, 8) if k >= 2 * split * first.block_k]
        changes: list[dict[str, Any]] = [
            {"stages": 3},
            {"stages": 4},
            {"stages": 8},
            {"block_n": 128, "warps": 8},
            {"block_n": 32, "warps": 2},
        ]
        if arch not in (89, 120):  # they spill there
            changes += [{"block_n": 192 - first.block_n}, {"block_k": 256, "stages": 2}]
        others += [_with_split(first._replace(**change), arch, m, n, k) for change in changes]
    else:
        others = [
            Config(rows, columns, steps, warps, stages, weights_first=order)
            for rows, columns, steps, warps, stages, order in (
                (64, 128, 128, 4, 3, True),
                (128, 64, 128, 4, 2, True),
                (128, 128, 128, 8, 2, True),
                (128, 128, 128, 8, 3, True),
                (256, 128, 128, 8, 2, True),
                (256, 128, 128, 8, 3, True),
                (128, 128, 64, 8, 3, False),
                (128, 128, 128, 8, 2, False),
            )
        ]
    return list(dict.fromkeys([first, *others]))


def why_not(arch: int, dtype: torch.dtype, n: int, k: int) -> str:
    """ "" where this path serves a weight [n, k] of a model in `dtype` on compute capability `arch`, else why not."""
    if arch < 80:
        return f"sm_{arch} has no bfloat16 tensor cores"
    if dtype not in DTYPES:
        return f"models in {dtype} are not served"
    return f"K = {k} is not a multiple of {FORMAT_K}" if k % FORMAT_K else ""


def product(x, x_scale, qdata, sparse_metadata, scale, bias, layout, out_dtype):
    """y [M, N] = (x W^T) * x_scale * scale + bias, in `out_dtype`; see `tiles24`. `layout` is not used."""
    return tiles24(x, x_scale, qdata, sparse_metadata, scale, bias, out_dtype)


def product_cut(x, x_scale, qdata, sparse_metadata, scale, bias, out_dtype, cut: Config):
    """`tiles24`, cut as told; nothing is checked, and there is something to do."""
    m, n = x.shape[0], qdata.shape[0]
    y = x.new_empty((m, n), dtype=out_dtype)
    parts = x.new_empty((cut.split, m, n), dtype=torch.float32) if cut.split > 1 else None
    launch(x, x_scale, qdata, sparse_metadata, scale, bias, y, parts, cut)
    return y


def launch(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    qdata: torch.Tensor,
    sparse_metadata: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    parts: torch.Tensor | None,
    config: Config,
) -> None:
    """Write x [M, K] W^T to y [M, N]. parts: float32 [config.split, M, N] to work in, None where split is 1."""
    from . import tiles24_triton as kernels

    (m, k), n = x.shape, qdata.shape[0]
    known = constants(kernel_arch(x.device), x.dtype, config)
    flags = {"FP8": x_scale is not None, "BIAS": bias is not None, "SPLIT": config.split}
    tiles = -(-m // config.block_m) * -(-n // config.block_n)
    wrapped(kernels._tiles24)[tiles, config.split](
        deal(x, known["CHUNK"]) if known["CHUNK"] else x.contiguous(),
        x_scale,
        qdata.view(torch.uint8),
        sparse_metadata,
        scale,
        bias,
        y if parts is None else parts,
        m,
        n,
        k,
        **flags,
        **known,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if parts is not None:
        block = kernels.ADD_BLOCK
        wrapped(kernels._add_parts)[m, -(-n // block)](
            parts, x_scale, scale, bias, y, m, n, **flags, BLOCK_N=block, num_warps=4
        )


def deal(x: torch.Tensor, chunk: int) -> torch.Tensor:
    """x [M, K] with zeros up to a multiple of 128 columns, and in every 128 the chunks of the first 32, of the second,
    third and last 32 in turns.

    Any order of K serves a product that has both factors in it. Weights come in this order from the registers in which
    they were expanded; x takes it here, where Inductor makes it part of what wrote x. In the kernel it would cost x a
    second way through shared memory.
    """
    m, k = x.shape
    if k % 128:
        bits = x.contiguous().view(torch.uint8)  # e4m3 is not padded everywhere
        x = F.pad(bits, (0, -k % 128 * x.element_size())).view(x.dtype)
    return x.reshape(m, -1, 4, 32 // chunk, chunk).transpose(2, 3).reshape(m, -1)


def constants(arch: int, dtype: torch.dtype, config: Config) -> dict[str, Any]:
    """What of `config` the kernel knows as constants, for x in `dtype`. arch: 0 for Triton's interpreter."""
    tall = (config.block_n if config.weights_first else config.block_m) >= 64 and config.warps % 4 == 0
    # how many neighbours along K a thread has in a register of the instruction's operand (see `deal`): wgmma with
    # 16 bit two, Triton gives the others four
    chunk = 2 if arch == 90 and tall and dtype is not E4M3 else 4
    # weights that go on to shared or tensor memory keep their order, and so do those that no tensor core multiplies
    moved = tall and (arch == 100 or (arch == 90 and not config.weights_first))
    if moved or config.block_k % 128 or dtype is torch.float32:
        chunk = 0
    return {
        "WEIGHTS_FIRST": config.weights_first,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "CHUNK": chunk,
        "ARCH": arch,
    }


@triton_op("hwpq_fx::tiles24", mutates_args={})
def tiles24(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    qdata: torch.Tensor,
    sparse_metadata: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """y [M, N] = x [M, K] W^T + bias, accumulated in float32 and returned in `out_dtype`.

    x: e4m3 with x_scale float32 [M, 1], or `out_dtype` with x_scale None; qdata [N, K/2], sparse_metadata [N, K/8]:
    see `pack24`; scale float32 [N, 1]; bias [N] of any float dtype, or None. Raises RuntimeError where shapes or
    dtypes do not fit.
    """
    _check(x, x_scale, qdata, sparse_metadata, scale, bias, out_dtype)
    (m, k), n = x.shape, qdata.shape[0]
    if not m or not n:
        return x.new_empty((m, n), dtype=out_dtype)
    cut = config(arch_of(x.device), m, n, k, x.dtype)
    return product_cut(x, x_scale, qdata, sparse_metadata, scale, bias, out_dtype, cut)


@tiles24.register_fake
def _fake(x, x_scale, qdata, sparse_metadata, scale, bias, out_dtype):
    _check(x, x_scale, qdata, sparse_metadata, scale, bias, out_dtype)
    return x.new_empty((x.shape[0], qdata.shape[0]), dtype=out_dtype)


def _check(x, x_scale, qdata, sparse_metadata, scale, bias, out_dtype) -> None:
    if x.dim() != 2 or qdata.dim() != 2 or x.shape[1] != 2 * qdata.shape[1] or x.shape[1] % FORMAT_K:
        raise RuntimeError(f"tiles24: x {tuple(x.shape)} does not fit qdata {tuple(qdata.shape)}, half of its K")
    (m, k), n, fp8 = x.shape, qdata.shape[0], x.dtype is E4M3
    if fp8 != (x_scale is not None):
        raise RuntimeError("tiles24: an e4m3 x needs x_scale, and no other x takes one")
    if out_dtype not in DTYPES or not (fp8 or x.dtype is out_dtype):
        raise RuntimeError(f"tiles24: x is {x.dtype}, the output {out_dtype}: only an e4m3 x may differ")
    parts = (
        ("x_scale", x_scale, (m, 1), (torch.float32,)),
        ("qdata", qdata, (n, k // 2), (E4M3,)),
        ("sparse_metadata", sparse_metadata, (n, k // 8), (torch.uint8,)),
        ("scale", scale, (n, 1), (torch.float32,)),
        ("bias", bias, (n,), DTYPES),
    )
    check_parts("tiles24", x.device, parts)
