"""Triton kernels of the path "tiles" (see `tiles24`)."""

import torch
import triton
import triton.language as tl

from .cubin import Specimen
from .expand24 import expand
from .quantize_rows import E4M3
from .tiles24 import Config, config, constants


@triton.jit
def _deal(t, CHUNK: tl.constexpr):
    """[rows, K] as `tiles24.deal` has it: the four threads that share a row of a tensor core's operand, CHUNK
    neighbours each, find there what they expanded, 32 neighbours each. Nothing moves."""
    rows: tl.constexpr = t.shape[0]
    columns: tl.constexpr = t.shape[1]
    t = t.reshape(rows, columns // 128, 4, 32 // CHUNK, CHUNK)
    return t.permute(0, 1, 3, 2, 4).reshape(rows, columns)


@triton.jit
def _finish(acc, x_scale, scale, bias, rows, columns, m, n, FP8: tl.constexpr, BIAS: tl.constexpr):
    """Sums [rows, columns] in float32 times the scales, plus the bias."""
    acc *= tl.load(scale + columns, mask=columns < n, other=0.0)[None, :]
    if FP8:
        acc *= tl.load(x_scale + rows, mask=rows < m, other=0.0)[:, None]
    if BIAS:
        acc += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _tiles24(
    x,
    x_scale,
    qdata,
    sparse_metadata,
    scale,
    bias,
    y,
    m,
    n,
    K: tl.constexpr,
    FP8: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    ARCH: tl.constexpr,
):
    """y [m, n] = x [m, K] W^T; with SPLIT > 1, the sums of each part of K to y float32 [SPLIT, m, n].

    With CHUNK, x is what `tiles24.deal` makes of x.
    """
    ROW: tl.constexpr = (K + 127) // 128 * 128 if CHUNK else K
    # programs next to each other share weights: GROUP blocks of rows, then the next block of columns
    GROUP: tl.constexpr = 8
    blocks_m, blocks_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    group = pid // (GROUP * blocks_n)
    height = tl.minimum(blocks_m - group * GROUP, GROUP)
    first_m = (group * GROUP + pid % (GROUP * blocks_n) % height) * BLOCK_M
    first_n = pid % (GROUP * blocks_n) // height * BLOCK_N
    part = tl.program_id(1)
    STEPS: tl.constexpr = (K + SPLIT * BLOCK_K - 1) // (SPLIT * BLOCK_K)
    begin = part * STEPS

    # beyond the edge the last row is read again: its products are not stored
    weights = tl.minimum(tl.arange(0, BLOCK_N), n - 1 - first_n)[:, None]
    tokens = tl.minimum(tl.arange(0, BLOCK_M), m - 1 - first_m)[:, None] * ROW
    column = tl.arange(0, BLOCK_K)[None, :]
    q = qdata.to(tl.pointer_type(tl.int32)) + first_n.to(tl.int64) * (K // 8) + begin * (BLOCK_K // 8)
    q += weights * (K // 8) + tl.arange(0, BLOCK_K // 8)[None, :]
    # four bytes of metadata at once, where every row starts on four
    WORD: tl.constexpr = 4 if K % 32 == 0 else 1
    s = sparse_metadata.to(tl.pointer_type(tl.int32)) if WORD == 4 else sparse_metadata
    s += first_n.to(tl.int64) * (K // 8 // WORD) + begin * (BLOCK_K // 8 // WORD)
    s += weights * (K // 8 // WORD) + tl.arange(0, BLOCK_K // 8 // WORD)[None, :]
    t = x + first_m.to(tl.int64) * ROW + begin * BLOCK_K + tokens + column
    DTYPE: tl.constexpr = tl.bfloat16 if x.dtype.element_ty == tl.float32 else x.dtype.element_ty

    acc = tl.zeros((BLOCK_N, BLOCK_M) if WEIGHTS_FIRST else (BLOCK_M, BLOCK_N), tl.float32)
    for step in range(STEPS):
        if K % (SPLIT * BLOCK_K) == 0:
            values, metadata, tile = tl.load(q), tl.load(s), tl.load(t)
        else:
            inside = K // 8 - (begin + step) * (BLOCK_K // 8)
            word, byte = tl.arange(0, BLOCK_K // 8)[None, :], tl.arange(0, BLOCK_K // 8 // WORD)[None, :] * WORD
            values, metadata = tl.load(q, mask=word < inside, other=0), tl.load(s, mask=byte < inside, other=0)
            tile = tl.load(t, mask=column < ROW - (begin + step) * BLOCK_K, other=0.0)
        if WORD == 1:  # the same word, from bytes
            four = metadata.to(tl.int32).reshape(BLOCK_N, BLOCK_K // 32, 4)
            metadata = tl.sum(four << (8 * tl.arange(0, 4)), axis=2)
        if ARCH == 0:
            tile = tile.to(tl.float32)  # the interpreter multiplies the bits of bfloat16 as integers
        w = expand(values, metadata, DTYPE, ARCH).to(tile.dtype)
        if CHUNK:
            w = _deal(w, CHUNK)
        if WEIGHTS_FIRST:
            acc = tl.dot(w, tile.T, acc, input_precision="ieee", max_num_imprecise_acc=BLOCK_K)
        else:
            acc = tl.dot(tile, w.T, acc, input_precision="ieee", max_num_imprecise_acc=BLOCK_K)
        q += BLOCK_K // 8
        s += BLOCK_K // 8 // WORD
        t += BLOCK_K
    if WEIGHTS_FIRST:
        acc = acc.T
    rows, columns = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    if SPLIT == 1:
        acc = _finish(acc, x_scale, scale, bias, rows, columns, m, n, FP8, BIAS)
    out = y + (part.to(tl.int64) * m + rows[:, None]) * n + columns[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=(rows[:, None] < m) & (columns[None, :] < n))


@triton.jit
def _add_parts(
    parts,
    x_scale,
    scale,
    bias,
    y,
    m,
    n,
    FP8: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y [m, n] from parts float32 [SPLIT, m, n], always added in the same order."""
    rows = tl.program_id(0) + tl.arange(0, 1)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((1, BLOCK_N), tl.float32)
    for part in tl.static_range(SPLIT):
        row = rows.to(tl.int64)[:, None] + part * m
        acc += tl.load(parts + row * n + columns[None, :], mask=columns[None, :] < n, other=0.0)
    acc = _finish(acc, x_scale, scale, bias, rows, columns, m, n, FP8, BIAS)
    tl.store(
        y + rows.to(tl.int64)[:, None] * n + columns[None, :], acc.to(y.dtype.element_ty), mask=columns[None, :] < n
    )


ADD_BLOCK = 1024
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", E4M3: "*fp8e4nv"}
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))
"""[N, K] of LLaMA-3-8B's linears."""


def specimen(arch: int, m: int, n: int, k: int, dtype: torch.dtype, config: Config) -> Specimen:
    """The product of x [m, k] of `dtype` with W [n, k] as `config` runs it."""
    fp8, split = dtype is E4M3, config.split > 1
    y = "*fp32" if split else "*bf16" if fp8 else POINTERS[dtype]
    return Specimen(
        f"tiles24 {str(dtype).removeprefix('torch.')} {m} x {n} x {k}",
        _tiles24,
        {
            "x": POINTERS[dtype],
            "qdata": "*u8",
            "sparse_metadata": "*u8",
            "scale": "*fp32",
            "bias": "*bf16",
            "y": y,
            "n": "i32",
        }
        | ({"m": "i32"} if m > 1 else {})
        | ({"x_scale": "*fp32"} if fp8 else {}),
        {"K": k, "FP8": fp8, "BIAS": True, "SPLIT": config.split}
        | constants(arch, dtype, config)
        | ({} if m > 1 else {"m": 1})  # as Triton has an argument that is 1
        | ({} if fp8 else {"x_scale": None}),
        {"num_warps": config.warps, "num_stages": config.stages},
        ("n",),
    )


def specimens(arch: int) -> list[Specimen]:
    """The kernels of this module as they are launched on compute capability `arch`."""
    problems = [(m, n, k, torch.bfloat16) for m in (16, 64, 512) for n, k in SHAPES]
    problems += [(16, 4096, 4096, torch.float16), (16, 4096, 4096, torch.float32), (1, 4096, 4096, torch.bfloat16)]
    if arch >= 89:
        problems += [(m, n, k, E4M3) for m in (64, 512, 4096) for n, k in SHAPES]
    found = [specimen(arch, m, n, k, dtype, config(arch, m, n, k, dtype)) for m, n, k, dtype in problems]
    pointers = {"parts": "*fp32", "x_scale": "*fp32", "scale": "*fp32", "bias": "*bf16", "y": "*bf16"}
    adding = {"FP8": True, "BIAS": True, "SPLIT": 4, "BLOCK_N": ADD_BLOCK}
    return [*found, Specimen("tiles24 parts", _add_parts, pointers | {"m": "i32", "n": "i32"}, adding, {}, ("n",))]
