"""Triton kernels of the path "tiles" (see `tiles24`).

How 32 weights are expanded: 16 kept bytes in v0 to v3, eight nibbles in m. PTX's `prmt` makes a word of any four bytes
of two words, chosen by four nibbles: 0 to 3 the bytes of the first word, 4 to 7 those of the second, here zero. So a
group of four weights is one `prmt` of its two kept bytes; what remains is to make its nibbles from the group's own.
That is a table of six patterns, and `prmt` looks up four at a time: in `a` the selectors of a group's first two
places, in `b` of the last two, one byte a group. Of m ^ 0x88888888 the patterns 0x8, 0x9, 0xC, 0xD, 0xE are the
entries 0, 1, 4, 5, 6; 0x4 is 0xC, "the sign of entry 4 in all bits", which is 0 in both tables. The tables hold the
selectors xor those of pattern 0x4, and the xor that puts those back adds 2 for the odd groups, whose bytes are the
upper two. 26 instructions for 32 e4m3 weights.

For 16 bits the same `prmt` runs on the upper and on the lower byte of every kept value: its bits moved to where the
16-bit format has sign, exponent and mantissa, subnormals included. A multiplication by the difference of the exponent
biases, 2^120 or 2^8, makes that the value, exactly. 86 instructions for 32 weights; with `cvt` to float16, 42.
NaN (0x7F, 0xFF) becomes 480: a packed weight has none but in rows whose scale is NaN.
Source of the meanings: NVIDIA's PTX ISA.
"""

import torch
import triton
import triton.language as tl

from .cubin import Specimen
from .quantize_rows import E4M3
from .tiles24 import Config, config, constants


@triton.jit
def _plain(values, metadata, DTYPE: tl.constexpr):
    """`expand` in Triton's own words, for its interpreter."""
    rows: tl.constexpr = values.shape[0]
    words: tl.constexpr = values.shape[1]
    v = tl.broadcast_to(values[:, :, None], (rows, words, 8)).reshape(rows, words * 8)
    m = tl.broadcast_to(metadata[:, :, None], (rows, words // 4, 32)).reshape(rows, words * 8)
    column = tl.arange(0, words * 8)[None, :] % 32
    group, place = column // 4, column % 4
    nibble = m >> (group * 4)
    second = (nibble >> 2 & 3) == place
    byte = v >> (group % 2 * 16 + tl.where(second, 8, 0))
    byte = tl.where(second | ((nibble & 3) == place), byte, 0)
    return (byte & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32).to(DTYPE)


@triton.jit
def _fp8(v0, v1, v2, v3, m):
    """Eight words of four e4m3."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 h, a, b, s;
        xor.b32 h, $12, 0x88888888;
        prmt.b32 a, 0x00541450, 0x00541450, h;
        prmt.b32 b, 0x00000505, 0x00545050, h;
        prmt.b32 s, a, b, 0x5140;
        xor.b32 s, s, 0x66324410;
        prmt.b32 $0, $8, 0, s;
        shr.u32 s, s, 16;
        prmt.b32 $1, $8, 0, s;
        prmt.b32 s, a, b, 0x7362;
        xor.b32 s, s, 0x66324410;
        prmt.b32 $2, $9, 0, s;
        shr.u32 s, s, 16;
        prmt.b32 $3, $9, 0, s;
        shr.u32 h, h, 16;
        prmt.b32 a, 0x00541450, 0x00541450, h;
        prmt.b32 b, 0x00000505, 0x00545050, h;
        prmt.b32 s, a, b, 0x5140;
        xor.b32 s, s, 0x66324410;
        prmt.b32 $4, $10, 0, s;
        shr.u32 s, s, 16;
        prmt.b32 $5, $10, 0, s;
        prmt.b32 s, a, b, 0x7362;
        xor.b32 s, s, 0x66324410;
        prmt.b32 $6, $11, 0, s;
        shr.u32 s, s, 16;
        prmt.b32 $7, $11, 0, s;
        }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r",
        [v0, v1, v2, v3, m],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _fp16(v0, v1, v2, v3, m):
    """16 words of two float16, on sm_89 and newer."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 h, a, b, s, p, q;
        .reg .b16 x, y;
        xor.b32 h, $20, 0x88888888;
        prmt.b32 a, 0x00541450, 0x00541450, h;
        prmt.b32 b, 0x00000505, 0x00545050, h;
        prmt.b32 s, a, b, 0x5140;
        xor.b32 s, s, 0x66324410;
        prmt.b32 p, $16, 0, s;
        shr.u32 s, s, 16;
        prmt.b32 q, $16, 0, s;
        mov.b32 {x, y}, p;
        cvt.rn.f16x2.e4m3x2 $0, x;
        cvt.rn.f16x2.e4m3x2 $1, y;
        mov.b32 {x, y}, q;
        cvt.rn.f16x2.e4m3x2 $2, x;
        cvt.rn.f16x2.e4m3x2 $3, y;
        prmt.b32 s, a, b, 0x7362;
        xor.b32 s, s, 0x66324410;
        prmt.b32 p, $17, 0, s;
        shr.u32 s, s, 16;
        prmt.b32 q, $17, 0, s;
        mov.b32 {x, y}, p;
        cvt.rn.f16x2.e4m3x2 $4, x;
        cvt.rn.f16x2.e4m3x2 $5, y;
        mov.b32 {x, y}, q;
        cvt.rn.f16x2.e4m3x2 $6, x;
        cvt.rn.f16x2.e4m3x2 $7, y;
        shr.u32 h, h, 16;
        prmt.b32 a, 0x00541450, 0x00541450, h;
        prmt.b32 b, 0x00000505, 0x00545050, h;
        prmt.b32 s, a, b, 0x5140;
        xor.b32 s, s, 0x66324410;
        prmt.b32 p, $18, 0, s;
        shr.u32 s, s, 16;
        prmt.b32 q, $18, 0, s;
        mov.b32 {x, y}, p;
        cvt.rn.f16x2.e4m3x2 $8, x;
        cvt.rn.f16x2.e4m3x2 $9, y;
        mov.b32 {x, y}, q;
        cvt.rn.f16x2.e4m3x2 $10, x;
        cvt.rn.f16x2.e4m3x2 $11, y;
        prmt.b32 s, a, b, 0x7362;
        xor.b32 s, s, 0x66324410;
        prmt.b32 p, $19, 0, s;
        shr.u32 s, s, 16;
        prmt.b32 q, $19, 0, s;
        mov.b32 {x, y}, p;
        cvt.rn.f16x2.e4m3x2 $12, x;
        cvt.rn.f16x2.e4m3x2 $13, y;
        mov.b32 {x, y}, q;
        cvt.rn.f16x2.e4m3x2 $14, x;
        cvt.rn.f16x2.e4m3x2 $15, y;
        }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r",
        [v0, v1, v2, v3, m],
        dtype=(
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
        ),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _bf16(v0, v1, v2, v3, m):
    """16 words of two bfloat16."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 h, a, b, s, p, q, r, t, lo, hi, f, z;
        mov.b32 f, 0x7b807b80;
        mov.b32 z, 0x80008000;
        xor.b32 h, $20, 0x88888888;
        prmt.b32 a, 0x00541450, 0x00541450, h;
        prmt.b32 b, 0x00000505, 0x00545050, h;
        prmt.b32 s, a, b, 0x5140;
        xor.b32 s, s, 0x66324410;
        shl.b32 lo, $16, 4;
        and.b32 lo, lo, 0xf0f0f0f0;
        shr.u32 t, $16, 4;
        and.b32 t, t, 0x07070707;
        lop3.b32 hi, $16, 0x80808080, t, 0xEA;
        prmt.b32 p, lo, 0, s;
        prmt.b32 q, hi, 0, s;
        prmt.b32 r, p, q, 0x7362;
        prmt.b32 p, p, q, 0x5140;
        fma.rn.bf16x2 $0, p, f, z;
        fma.rn.bf16x2 $1, r, f, z;
        shr.u32 s, s, 16;
        prmt.b32 p, lo, 0, s;
        prmt.b32 q, hi, 0, s;
        prmt.b32 r, p, q, 0x7362;
        prmt.b32 p, p, q, 0x5140;
        fma.rn.bf16x2 $2, p, f, z;
        fma.rn.bf16x2 $3, r, f, z;
        prmt.b32 s, a, b, 0x7362;
        xor.b32 s, s, 0x66324410;
        shl.b32 lo, $17, 4;
        and.b32 lo, lo, 0xf0f0f0f0;
        shr.u32 t, $17, 4;
        and.b32 t, t, 0x07070707;
        lop3.b32 hi, $17, 0x80808080, t, 0xEA;
        prmt.b32 p, lo, 0, s;
        prmt.b32 q, hi, 0, s;
        prmt.b32 r, p, q, 0x7362;
        prmt.b32 p, p, q, 0x5140;
        fma.rn.bf16x2 $4, p, f, z;
        fma.rn.bf16x2 $5, r, f, z;
        shr.u32 s, s, 16;
        prmt.b32 p, lo, 0, s;
        prmt.b32 q, hi, 0, s;
        prmt.b32 r, p, q, 0x7362;
        prmt.b32 p, p, q, 0x5140;
        fma.rn.bf16x2 $6, p, f, z;
        fma.rn.bf16x2 $7, r, f, z;
        shr.u32 h, h, 16;
        prmt.b32 a, 0x00541450, 0x00541450, h;
        prmt.b32 b, 0x00000505, 0x00545050, h;
        prmt.b32 s, a, b, 0x5140;
        xor.b32 s, s, 0x66324410;
        shl.b32 lo, $18, 4;
        and.b32 lo, lo, 0xf0f0f0f0;
        shr.u32 t, $18, 4;
        and.b32 t, t, 0x07070707;
        lop3.b32 hi, $18, 0x80808080, t, 0xEA;
        prmt.b32 p, lo, 0, s;
        prmt.b32 q, hi, 0, s;
        prmt.b32 r, p, q, 0x7362;
        prmt.b32 p, p, q, 0x5140;
        fma.rn.bf16x2 $8, p, f, z;
        fma.rn.bf16x2 $9, r, f, z;
        shr.u32 s, s, 16;
        prmt.b32 p, lo, 0, s;
        prmt.b32 q, hi, 0, s;
        prmt.b32 r, p, q, 0x7362;
        prmt.b32 p, p, q, 0x5140;
        fma.rn.bf16x2 $10, p, f, z;
        fma.rn.bf16x2 $11, r, f, z;
        prmt.b32 s, a, b, 0x7362;
        xor.b32 s, s, 0x66324410;
        shl.b32 lo, $19, 4;
        and.b32 lo, lo, 0xf0f0f0f0;
        shr.u32 t, $19, 4;
        and.b32 t, t, 0x07070707;
        lop3.b32 hi, $19, 0x80808080, t, 0xEA;
        prmt.b32 p, lo, 0, s;
        prmt.b32 q, hi, 0, s;
        prmt.b32 r, p, q, 0x7362;
        prmt.b32 p, p, q, 0x5140;
        fma.rn.bf16x2 $12, p, f, z;
        fma.rn.bf16x2 $13, r, f, z;
        shr.u32 s, s, 16;
        prmt.b32 p, lo, 0, s;
        prmt.b32 q, hi, 0, s;
        prmt.b32 r, p, q, 0x7362;
        prmt.b32 p, p, q, 0x5140;
        fma.rn.bf16x2 $14, p, f, z;
        fma.rn.bf16x2 $15, r, f, z;
        }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r",
        [v0, v1, v2, v3, m],
        dtype=(
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
        ),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _fp16_by_integers(v0, v1, v2, v3, m):
    """16 words of two float16, anywhere."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 h, a, b, s, p, q, r, t, lo, hi, f;
        mov.b32 f, 0x5c005c00;
        xor.b32 h, $20, 0x88888888;
        prmt.b32 a, 0x00541450, 0x00541450, h;
        prmt.b32 b, 0x00000505, 0x00545050, h;
        prmt.b32 s, a, b, 0x5140;
        xor.b32 s, s, 0x66324410;
        shl.b32 lo, $16, 7;
        and.b32 lo, lo, 0x80808080;
        shr.u32 t, $16, 1;
        and.b32 t, t, 0x3f3f3f3f;
        lop3.b32 hi, $16, 0x80808080, t, 0xEA;
        prmt.b32 p, lo, 0, s;
        prmt.b32 q, hi, 0, s;
        prmt.b32 r, p, q, 0x7362;
        prmt.b32 p, p, q, 0x5140;
        mul.rn.f16x2 $0, p, f;
        mul.rn.f16x2 $1, r, f;
        shr.u32 s, s, 16;
        prmt.b32 p, lo, 0, s;
        prmt.b32 q, hi, 0, s;
        prmt.b32 r, p, q, 0x7362;
        prmt.b32 p, p, q, 0x5140;
        mul.rn.f16x2 $2, p, f;
        mul.rn.f16x2 $3, r, f;
        prmt.b32 s, a, b, 0x7362;
        xor.b32 s, s, 0x66324410;
        shl.b32 lo, $17, 7;
        and.b32 lo, lo, 0x80808080;
        shr.u32 t, $17, 1;
        and.b32 t, t, 0x3f3f3f3f;
        lop3.b32 hi, $17, 0x80808080, t, 0xEA;
        prmt.b32 p, lo, 0, s;
        prmt.b32 q, hi, 0, s;
        prmt.b32 r, p, q, 0x7362;
        prmt.b32 p, p, q, 0x5140;
        mul.rn.f16x2 $4, p, f;
        mul.rn.f16x2 $5, r, f;
        shr.u32 s, s, 16;
        prmt.b32 p, lo, 0, s;
        prmt.b32 q, hi, 0, s;
        prmt.b32 r, p, q, 0x7362;
        prmt.b32 p, p, q, 0x5140;
        mul.rn.f16x2 $6, p, f;
        mul.rn.f16x2 $7, r, f;
        shr.u32 h, h, 16;
        prmt.b32 a, 0x00541450, 0x00541450, h;
        prmt.b32 b, 0x00000505, 0x00545050, h;
        prmt.b32 s, a, b, 0x5140;
        xor.b32 s, s, 0x66324410;
        shl.b32 lo, $18, 7;
        and.b32 lo, lo, 0x80808080;
        shr.u32 t, $18, 1;
        and.b32 t, t, 0x3f3f3f3f;
        lop3.b32 hi, $18, 0x80808080, t, 0xEA;
        prmt.b32 p, lo, 0, s;
        prmt.b32 q, hi, 0, s;
        prmt.b32 r, p, q, 0x7362;
        prmt.b32 p, p, q, 0x5140;
        mul.rn.f16x2 $8, p, f;
        mul.rn.f16x2 $9, r, f;
        shr.u32 s, s, 16;
        prmt.b32 p, lo, 0, s;
        prmt.b32 q, hi, 0, s;
        prmt.b32 r, p, q, 0x7362;
        prmt.b32 p, p, q, 0x5140;
        mul.rn.f16x2 $10, p, f;
        mul.rn.f16x2 $11, r, f;
        prmt.b32 s, a, b, 0x7362;
        xor.b32 s, s, 0x66324410;
        shl.b32 lo, $19, 7;
        and.b32 lo, lo, 0x80808080;
        shr.u32 t, $19, 1;
        and.b32 t, t, 0x3f3f3f3f;
        lop3.b32 hi, $19, 0x80808080, t, 0xEA;
        prmt.b32 p, lo, 0, s;
        prmt.b32 q, hi, 0, s;
        prmt.b32 r, p, q, 0x7362;
        prmt.b32 p, p, q, 0x5140;
        mul.rn.f16x2 $12, p, f;
        mul.rn.f16x2 $13, r, f;
        shr.u32 s, s, 16;
        prmt.b32 p, lo, 0, s;
        prmt.b32 q, hi, 0, s;
        prmt.b32 r, p, q, 0x7362;
        prmt.b32 p, p, q, 0x5140;
        mul.rn.f16x2 $14, p, f;
        mul.rn.f16x2 $15, r, f;
        }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r",
        [v0, v1, v2, v3, m],
        dtype=(
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
            tl.int32,
        ),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _interleave(a, b):
    """Tensors [N, W] to [N, 2 W]: a, b, a, b. Both stay in their thread."""
    return tl.join(a, b).reshape(a.shape[0], a.shape[1] * 2)


@triton.jit
def _in_turn(a, b, c, d):
    """a, b, c, d, a, b, c, d."""
    return _interleave(_interleave(a, c), _interleave(b, d))


@triton.jit
def expand(values, metadata, DTYPE: tl.constexpr, ARCH: tl.constexpr):
    """Dense [N, 8 W] in DTYPE (e4m3, bf16, fp16) from packed tiles.

    values: int32 [N, W], each the four kept bytes of eight weights; metadata: int32 [N, W / 4], each the eight nibbles
    that place those of 32 weights (see `pack24`). ARCH: compute capability, 0 in Triton's interpreter.
    """
    if ARCH == 0:
        dense = _plain(values, metadata, DTYPE)
    else:
        even, odd = tl.split(values.reshape(values.shape[0], values.shape[1] // 2, 2))
        v0, v2 = tl.split(even.reshape(even.shape[0], even.shape[1] // 2, 2))
        v1, v3 = tl.split(odd.reshape(odd.shape[0], odd.shape[1] // 2, 2))
        # whole words to asm and from it, cut by truncation, which costs nothing: asm that saw single elements would
        # rest on the order in which a layout has them
        if tl.float8e4nv == DTYPE:
            d = _fp8(v0, v1, v2, v3, metadata)
            d = _interleave(_in_turn(d[0], d[2], d[4], d[6]), _in_turn(d[1], d[3], d[5], d[7]))
            d = _in_turn(d.to(tl.int8), (d >> 8).to(tl.int8), (d >> 16).to(tl.int8), (d >> 24).to(tl.int8))
        else:
            if tl.bfloat16 == DTYPE:
                d = _bf16(v0, v1, v2, v3, metadata)
            elif ARCH >= 89:
                d = _fp16(v0, v1, v2, v3, metadata)
            else:
                d = _fp16_by_integers(v0, v1, v2, v3, metadata)
            even = _interleave(_in_turn(d[0], d[4], d[8], d[12]), _in_turn(d[2], d[6], d[10], d[14]))
            odd = _interleave(_in_turn(d[1], d[5], d[9], d[13]), _in_turn(d[3], d[7], d[11], d[15]))
            d = _interleave(even, odd)
            d = _interleave(d.to(tl.int16), (d >> 16).to(tl.int16))
        dense = d.to(DTYPE, bitcast=True)
    return dense


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
