"""Packed tiles made dense in registers: how the path "tiles" expands 2:4 weights (see `tiles24`).

32 weights are 16 kept bytes in four words and eight nibbles in a fifth, m. PTX's `prmt` makes a word of any four bytes
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

import triton
import triton.language as tl


def _asm(made: int, group: str, split: str = "", first: str = "", registers: str = "") -> tl.constexpr:
    """PTX that makes `made` words (operands 0 to made - 1) of four words of kept bytes and one of nibbles (the five
    operands after them).

    group: what makes the words {0} and {1} (e4m3: {0} alone) of one group, with its selectors in the lower half of s;
    {v} is the word that holds its kept bytes. split: what comes before, once for each such word; first: once.
    """
    lines = [f".reg .b32 h, a, b, s{registers};", first, f"xor.b32 h, ${made + 4}, 0x88888888;"]
    for word in range(4):
        if word % 2 == 0:
            lines += ["shr.u32 h, h, 16;"] if word else []
            lines += ["prmt.b32 a, 0x00541450, 0x00541450, h;", "prmt.b32 b, 0x00000505, 0x00545050, h;"]
        lines += [f"prmt.b32 s, a, b, {'0x7362' if word % 2 else '0x5140'};", "xor.b32 s, s, 0x66324410;"]
        places = {"v": f"${made + word}"}
        lines.append(split.format(**places))
        for half in range(2):
            lines += ["shr.u32 s, s, 16;"] if half else []
            at = (2 * word + half) * made // 8
            lines.append(group.format(f"${at}", f"${at + 1}", **places))
    return tl.constexpr("{\n" + "\n".join(lines) + "\n}")


# the lower byte of two kept values lies in `lo`, the upper one in `hi`
_BYTES = "prmt.b32 p, lo, 0, s; prmt.b32 q, hi, 0, s; prmt.b32 r, p, q, 0x7362; prmt.b32 p, p, q, 0x5140; "
_MOVED = (
    "shl.b32 lo, {v}, %s; and.b32 lo, lo, %s; shr.u32 t, {v}, %s; and.b32 t, t, %s; "
    "lop3.b32 hi, {v}, 0x80808080, t, 0xEA;"
)

FP8 = _asm(8, "prmt.b32 {0}, {v}, 0, s;")
FP16 = _asm(
    16,
    "prmt.b32 p, {v}, 0, s; mov.b32 {{x, y}}, p; cvt.rn.f16x2.e4m3x2 {0}, x; cvt.rn.f16x2.e4m3x2 {1}, y;",
    registers=", p; .reg .b16 x, y",
)
"""On sm_89 and newer."""
FP16_BY_INTEGERS = _asm(
    16,
    _BYTES + "mul.rn.f16x2 {0}, p, f; mul.rn.f16x2 {1}, r, f;",
    split=_MOVED % (7, "0x80808080", 1, "0x3f3f3f3f"),
    first="mov.b32 f, 0x5c005c00;",  # 2^8, twice
    registers=", p, q, r, t, lo, hi, f",
)
BF16 = _asm(
    16,
    _BYTES + "fma.rn.bf16x2 {0}, p, f, z; fma.rn.bf16x2 {1}, r, f, z;",
    split=_MOVED % (4, "0xf0f0f0f0", 4, "0x07070707"),
    first="mov.b32 f, 0x7b807b80; mov.b32 z, 0x80008000;",  # 2^120 and -0, twice
    registers=", p, q, r, t, lo, hi, f, z",
)


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
def _words8(v0, v1, v2, v3, m, ASM: tl.constexpr):
    return tl.inline_asm_elementwise(
        ASM,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r",
        [v0, v1, v2, v3, m],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _words16(v0, v1, v2, v3, m, ASM: tl.constexpr):
    return tl.inline_asm_elementwise(
        ASM,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r",
        [v0, v1, v2, v3, m],
        dtype=(
            tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32,
            tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32,
        ),
        is_pure=True,
        pack=1,
    )  # fmt: skip


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
            d = _words8(v0, v1, v2, v3, metadata, FP8)
            d = _interleave(_in_turn(d[0], d[2], d[4], d[6]), _in_turn(d[1], d[3], d[5], d[7]))
            d = _in_turn(d.to(tl.int8), (d >> 8).to(tl.int8), (d >> 16).to(tl.int8), (d >> 24).to(tl.int8))
        else:
            if tl.bfloat16 == DTYPE:
                d = _words16(v0, v1, v2, v3, metadata, BF16)
            elif ARCH >= 89:
                d = _words16(v0, v1, v2, v3, metadata, FP16)
            else:
                d = _words16(v0, v1, v2, v3, metadata, FP16_BY_INTEGERS)
            even = _interleave(_in_turn(d[0], d[4], d[8], d[12]), _in_turn(d[2], d[6], d[10], d[14]))
            odd = _interleave(_in_turn(d[1], d[5], d[9], d[13]), _in_turn(d[3], d[7], d[11], d[15]))
            d = _interleave(even, odd)
            d = _interleave(d.to(tl.int16), (d >> 16).to(tl.int16))
        dense = d.to(DTYPE, bitcast=True)
    return dense
