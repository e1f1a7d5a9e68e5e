"""Triton kernels of `gemv24`: y = x W^T + b for few rows of x; the weight is read once, in its 5 bits per weight.

`sparse_mma_kernel` (x in 16 bit, K a multiple of 128): the sparse tensor cores (PTX `mma.sp`, sm_80 and later) pick
each x by its 2-bit index, which they read as `pack24` writes it. What is left to do is to turn FP8 bytes into 16-bit
floats: exact, as are the products. Up to 8 rows of x cost what one costs.
`plain_kernel` (any dtype, any K): one product at a time, x gathered from memory. Triton without assembly.

Fragments of `mma.sp...m16n8k32`, from the PTX ISA ("Matrix fragments for mma.m16n8k32 with sparse A"): A [16, 32] is
the weight, B [32, 8] is x^T, D [16, 8] is y^T. A lane is 4 g + t, g < 8, t < 4. It holds
    A: the kept pairs of group t and of group 4 + t, of row g and of row g + 8
    B: the words (of two) 4 r + t, r < 4, of column g: half of group 2 r + t / 2
    D: rows g and g + 8, columns 2 t and 2 t + 1
Indices: lanes t = 0, 1 (selector 0) or t = 2, 3 (selector 1) of each g give the nibbles of groups 0 to 3 and of groups
4 to 7, of row g in the low and of row g + 8 in the high 16 bits.
"""

import torch
import triton
import triton.language as tl

from .cubin import Specimen
from .gemv24 import SparseMma, arguments, config


@triton.jit
def _prmt(a, b, selector):
    """Bytes of a (0 to 3) and b (4 to 7), picked by the low four nibbles of the selector."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def _load4(address, ONCE: tl.constexpr):
    """16 bytes as four words; ONCE: nobody reads them again, so that they need no place in the L1 cache."""
    asm: tl.constexpr = (
        "ld.global.nc.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];"
        if ONCE
        else "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];"
    )
    return tl.inline_asm_elementwise(
        asm,
        "=r,=r,=r,=r,l",
        [address],
        dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _load1(address):
    """4 bytes as a word."""
    return tl.inline_asm_elementwise(
        "ld.global.nc.b32 $0, [$1];", "=r,l", [address], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def _ask(start, thread, BYTES: tl.constexpr, THREADS: tl.constexpr):
    """Have BYTES from address `start` on brought to the L2 cache, without waiting. Gives 0, to be added to what is done
    next: else it would be left out."""
    LINES: tl.constexpr = BYTES // 128
    zero = thread * 0
    for turn in tl.static_range((LINES + THREADS - 1) // THREADS):
        line = tl.minimum(thread + turn * THREADS, LINES - 1)
        zero += tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1];\nmov.b32 $0, 0;",
            "=r,l",
            [start + line * 128],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return zero


@triton.jit
def _mma(d, a0, a1, a2, a3, b0, b1, b2, b3, indices, SELECTOR: tl.constexpr, BF16: tl.constexpr):
    """d + A B: every lane of a warp gives its fragments, and all 32 must be there."""
    kind: tl.constexpr = "bf16.bf16" if BF16 else "f16.f16"
    asm: tl.constexpr = (
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32."
        + kind
        + ".f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9, $10, $11}, {$13, $14, $15, $16}, $12, "
        + ("1;" if SELECTOR else "0;")
    )
    return tl.inline_asm_elementwise(
        asm,
        "=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,f,f,f,f",
        [a0, a1, a2, a3, b0, b1, b2, b3, indices, d[0], d[1], d[2], d[3]],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _halves(word, BF16: tl.constexpr):
    """Four e4m3 bytes as two words of two 16-bit floats each, exact.

    Sign, exponent and mantissa fields go where the wider float has them, and a power of two makes up for the bias:
    subnormals come out right too. The upper byte of each 16 bits is made in `high`, the lower one in `low`.
    """
    if BF16:
        high = ((word >> 4) & 0x07070707) | (word & 0x80808080)
        low = (word << 4) & 0xF0F0F0F0
    else:
        high = ((word >> 1) & 0x3F3F3F3F) | (word & 0x80808080)
        low = (word << 7) & 0x80808080
    asm: tl.constexpr = "fma.rn.bf16x2 $0, $1, $2, $3;" if BF16 else "fma.rn.f16x2 $0, $1, $2, $3;"
    factor: tl.constexpr = 0x7B807B80 if BF16 else 0x5C005C00  # 2^120, 2^8
    # + -0.0, which leaves zeros their sign: sm_80 has no bfloat16 multiplication but this
    first = tl.inline_asm_elementwise(
        asm, "=r,r,r,r", [_prmt(low, high, 0x5140), factor, 0x80008000], dtype=tl.uint32, is_pure=True, pack=1
    )
    second = tl.inline_asm_elementwise(
        asm, "=r,r,r,r", [_prmt(low, high, 0x7362), factor, 0x80008000], dtype=tl.uint32, is_pure=True, pack=1
    )
    return first, second


@triton.jit
def _indices(upper, lower, byte):
    """What the tensor cores are to read, from 32 groups of two rows, of which each lane of four holds all the indices.

    In memory four words of eight nibbles belong to the eight pairs of each lane; wanted are words of the nibbles of
    one pair of each lane. `byte` selects byte t of two words: the lane gets the words of its pairs 2 t and 2 t + 1.
    """
    even = _prmt(_prmt(upper[0], upper[2], byte), _prmt(lower[0], lower[2], byte), 0x5410)
    odd = _prmt(_prmt(upper[1], upper[3], byte), _prmt(lower[1], lower[3], byte), 0x5410)
    return (even & 0x0F0F0F0F) | ((odd << 4) & 0xF0F0F0F0), ((even >> 4) & 0x0F0F0F0F) | (odd & 0xF0F0F0F0)


@triton.jit
def _pair(x, PAIR: tl.constexpr, WIDE: tl.constexpr):
    """Words of x that meet pairs PAIR and PAIR + 1 of lanes 0 and 1 (of four), then of lanes 2 and 3.

    x: addresses of the first word of pair 0, even where t is odd if WIDE: then 16 bytes are loaded for every 8 wanted.
    Rows of x lie in the same banks of the cache, so that with many of them the number of loads counts.
    """
    if WIDE:
        odd = (tl.arange(0, 32) % 2 == 1)[None, :]
        a = _load4(x + PAIR * 8, False)
        b = _load4(x + PAIR * 8 + 128, False)
        return (
            tl.where(odd, a[1], a[0]),
            tl.where(odd, b[1], b[0]),
            tl.where(odd, a[3], a[2]),
            tl.where(odd, b[3], b[2]),
        )
    return (
        _load1(x + PAIR * 8),
        _load1(x + PAIR * 8 + 128),
        _load1(x + PAIR * 8 + 8),
        _load1(x + PAIR * 8 + 136),
    )


@triton.jit
def _turn(d, q, indices, x, byte, turn, K: tl.constexpr, BF16: tl.constexpr, WIDE: tl.constexpr):
    """d + 16 rows of weights times 128 of K, in four products of 32: pairs 0 and 2 of each lane, 1 and 3, 4 and 6,
    5 and 7. q, indices, x: addresses at K = 0, those of the weight in row g."""
    q += turn * 64
    indices += turn * 16
    x += turn * 256
    upper = _load4(q, True)
    lower = _load4(q + 8 * (K // 2), True)
    even, odd = _indices(_load4(indices, False), _load4(indices + 8 * (K // 8), False), byte)
    x0 = _pair(x, 0, WIDE)
    x2 = _pair(x, 2, WIDE)
    x4 = _pair(x, 4, WIDE)
    x6 = _pair(x, 6, WIDE)
    u0, u1 = _halves(upper[0], BF16)
    u2, u3 = _halves(upper[1], BF16)
    l0, l1 = _halves(lower[0], BF16)
    l2, l3 = _halves(lower[1], BF16)
    d = _mma(d, u0, l0, u2, l2, x0[0], x0[1], x2[0], x2[1], even, 0, BF16)
    d = _mma(d, u1, l1, u3, l3, x0[2], x0[3], x2[2], x2[3], odd, 0, BF16)
    u4, u5 = _halves(upper[2], BF16)
    u6, u7 = _halves(upper[3], BF16)
    l4, l5 = _halves(lower[2], BF16)
    l6, l7 = _halves(lower[3], BF16)
    d = _mma(d, u4, l4, u6, l6, x4[0], x4[1], x6[0], x6[1], even, 1, BF16)
    return _mma(d, u5, l5, u7, l7, x4[2], x4[3], x6[2], x6[3], odd, 1, BF16)


@triton.jit
def sparse_mma_kernel(
    x,
    qdata,
    sparse_metadata,
    scale,
    bias,
    y,
    M,
    N,
    K: tl.constexpr,
    BF16: tl.constexpr,
    BIAS: tl.constexpr,
    WARPS: tl.constexpr,
    WIDE: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """y [M, N] = (x W^T) * scale + bias. A program makes 16 columns of 8 rows of y; its warps take turns along K.

    x [M, K], y: bfloat16 (BF16) or float16; qdata, sparse_metadata: uint8; bias any float dtype (BIAS); all rows
    contiguous, and aligned to 16 bytes but for scale and bias. WARPS: num_warps. AHEAD: the weight is asked for as a
    whole before any of it is read.
    """
    warp = tl.arange(0, WARPS)[:, None]
    lane = tl.arange(0, 32)[None, :]
    g = lane // 4
    t = lane % 4
    # the last programs may share columns, and write the same twice; rows of x past the end are copies of the last
    first = tl.minimum(tl.program_id(0) * 16, N - 16)
    row = tl.program_id(1) * 8
    n = (first + g).to(tl.int64)
    m = tl.minimum(row + g, M - 1).to(tl.int64)
    q = qdata.to(tl.int64, bitcast=True)
    indices = sparse_metadata.to(tl.int64, bitcast=True)
    if AHEAD:
        thread = warp * 32 + lane
        start = first.to(tl.int64)
        q += _ask(q + start * (K // 2), thread, 8 * K, 32 * WARPS)
        indices += _ask(indices + start * (K // 8), thread, 2 * K, 32 * WARPS)
    q += n * (K // 2) + t * 16
    indices += n * (K // 8)
    words = x.to(tl.int64, bitcast=True) + m * (K * 2) + (t // 2) * 64 + (0 if WIDE else t % 2 * 4)
    byte = (t * 0x11 + 0x40).to(tl.uint32)
    # asked for before the weight, whose time they would add to
    columns = first + tl.arange(0, 32) // 4
    upper = _affine(scale, bias, columns, None, BIAS)
    lower = _affine(scale, bias, columns + 8, None, BIAS)
    zero = tl.zeros((WARPS, 32), tl.float32)
    d = (zero, zero, zero, zero)
    TURNS: tl.constexpr = K // 128
    for start in tl.range(0, TURNS // WARPS * WARPS, WARPS):
        d = _turn(d, q, indices, words, byte, start + warp, K, BF16, WIDE)
    if TURNS % WARPS:
        # warps for which nothing is left do the last turn again, for nothing
        turn = TURNS // WARPS * WARPS + warp
        last = _turn((zero, zero, zero, zero), q, indices, words, byte, tl.minimum(turn, TURNS - 1), K, BF16, WIDE)
        d = (
            d[0] + tl.where(turn < TURNS, last[0], 0),
            d[1] + tl.where(turn < TURNS, last[1], 0),
            d[2] + tl.where(turn < TURNS, last[2], 0),
            d[3] + tl.where(turn < TURNS, last[3], 0),
        )
    # Triton numbers the lanes as mma does, or y is NaN
    thread = tl.inline_asm_elementwise(
        "mov.u32 $0, %tid.x; // $1", "=r,r", [warp * 32 + lane], dtype=tl.int32, is_pure=True, pack=1
    )
    same = tl.min((thread == warp * 32 + lane).to(tl.int32), 1)[:, None]
    unit = tl.where(same == 1, 1.0, float("nan"))
    d = tl.reduce((d[0] * unit, d[1] * unit, d[2] * unit, d[3] * unit), 0, _add4)
    m = row + tl.arange(0, 32) % 4 * 2
    _store(d[0], upper, y, m, columns, m < M, N, BIAS)
    _store(d[1], upper, y, m + 1, columns, m + 1 < M, N, BIAS)
    _store(d[2], lower, y, m, columns + 8, m < M, N, BIAS)
    _store(d[3], lower, y, m + 1, columns + 8, m + 1 < M, N, BIAS)


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _affine(scale, bias, n, there, BIAS: tl.constexpr):
    """Scale and bias of columns n."""
    return tl.load(scale + n, mask=there), tl.load(bias + n, mask=there).to(tl.float32) if BIAS else 0.0


@triton.jit
def _store(total, affine, y, m, n, there, N, BIAS: tl.constexpr):
    total *= affine[0]
    if BIAS:
        total += affine[1]
    tl.store(y + m.to(tl.int64) * N + n, total.to(y.dtype.element_ty), mask=there)


@triton.jit
def _e4m3(byte):
    """float32 of an e4m3 byte, exact: the fields go where float32 has them, and 2^120 makes up for the bias."""
    byte = byte.to(tl.uint32)
    bits = ((byte & 0x7F) << 20) | ((byte & 0x80) << 24)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def plain_kernel(
    x,
    qdata,
    sparse_metadata,
    scale,
    bias,
    y,
    M,
    N,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """y [M, N] = (x W^T) * scale + bias: a program makes BLOCK_N columns of one row, in steps of GROUPS groups of four.

    x [M, K], y, bias (BIAS): float32, bfloat16, float16; qdata, sparse_metadata: uint8; rows contiguous.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1).to(tl.int64)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_N, GROUPS), tl.float32)
    for start in range(0, K // 4, GROUPS):
        group = (start + tl.arange(0, GROUPS))[None, :]
        there = group < K // 4
        nibble = tl.load(sparse_metadata + row * (K // 8) + group // 2, mask=there, other=0) >> (group % 2 * 4)
        at = qdata + row * (K // 2) + group * 2
        v0 = _e4m3(tl.load(at, mask=there, other=0))
        v1 = _e4m3(tl.load(at + 1, mask=there, other=0))
        at = x + m * K + group * 4
        total += v0 * tl.load(at + (nibble & 3), mask=there, other=0).to(tl.float32)
        total += v1 * tl.load(at + (nibble >> 2 & 3), mask=there, other=0).to(tl.float32)
    there = n < N
    _store(tl.sum(total, 1), _affine(scale, bias, n, there, BIAS), y, m, n, there, N, BIAS)


TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
LLAMA = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))


def specimens(arch: int) -> list[Specimen]:
    """The kernels as `gemv24.launch` runs them for the linears [N, K] of LLaMA-3-8B."""

    def one(m: int, n: int, k: int, dtype: torch.dtype, ahead: bool = False) -> Specimen:
        cut = config(arch, m, n, k, dtype)
        if isinstance(cut, SparseMma):
            cut = cut._replace(ahead=ahead)
        kernel, constants, options = arguments(cut, k, dtype, bias=False)
        kind = TYPES[dtype]
        signature = {"x": kind, "qdata": "*u8", "sparse_metadata": "*u8", "scale": "*fp32", "y": kind}
        signature |= {"M": "i32", "N": "i32"}
        name = f"{kind[1:]} M={m} N={n} K={k}" + " ahead" * ahead
        return Specimen(name, kernel, signature, constants | {"bias": None}, options, ("N",))

    rest = [one(1, *LLAMA[0], torch.float16), one(1, *LLAMA[0], torch.float32)]
    rest += [one(1, n, k, torch.bfloat16, True) for n, k in LLAMA]
    return [one(m, n, k, torch.bfloat16) for n, k in LLAMA for m in (1, 2, 4, 8)] + rest
