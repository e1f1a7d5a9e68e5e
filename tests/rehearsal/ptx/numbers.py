"""Arithmetic of PTX on numpy arrays: what each instruction gives, rounded as the PTX ISA says."""

import numpy as np

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


def kind_of(name):
    """numpy's dtype of a PTX type: bits of bf16 and of packed types stay bits."""
    if name in FLOATS:
        return np.dtype(FLOATS[name])
    if name == "pred":
        return np.dtype(bool)
    bits = {"bf16": 16, "bf16x2": 32, "f16x2": 32, "f32x2": 64, "e4m3x2": 16, "e5m2x2": 16}.get(name) or int(name[1:])
    return np.dtype((SIGNED if name[0] == "s" else UNSIGNED)[bits])


def bf16(bits):
    """float32 of bfloat16's bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(values):
    """Bits of the nearest bfloat16, ties to even, of float32 or float64."""
    if values.dtype == np.float64:
        values = odd(values, np.float32)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def odd(values, kind):
    """float64 to a shorter float, inexact ones to the neighbour with an odd last bit: rounding that again is right."""
    short = values.astype(kind)
    back = short.astype(np.float64)
    bits = short.view(UNSIGNED[short.itemsize * 8])
    even = (back != values) & (bits & 1 == 0) & np.isfinite(values)
    outward = np.abs(back) < np.abs(values)
    return np.where(even, np.where(outward, bits + 1, bits - 1), bits).astype(bits.dtype).view(kind)


def fused(a, b, c, kind, rounding="rn"):
    """a b + c of floats of up to 32 bits, rounded once: to the nearest, or down (rm)."""
    with np.errstate(all="ignore"):
        product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
        total = product + c
        part = total - product
        lost = (product - (total - part)) + (c - part)
        bits = total.view(np.uint64)
        change = (lost != 0) & np.isfinite(lost) & np.isfinite(total) & (bits & np.uint64(1) == 0)
        outward = np.signbit(lost) == np.signbit(total)
        bits = np.where(change, np.where(outward, bits + np.uint64(1), bits - np.uint64(1)), bits)
        total = bits.view(np.float64)
        if kind == "bf16":
            return to_bf16(total)
        rounded = total.astype(kind)
        return np.where(rounded > total, np.nextafter(rounded, kind(-np.inf)), rounded) if rounding == "rm" else rounded


def flushed(values):
    """float32 with zeros for subnormal numbers."""
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)


E4M3 = np.empty(256, np.float64)
for _byte in range(256):
    _exponent, _mantissa = _byte >> 3 & 15, _byte & 7
    _size = _mantissa * 2.0**-9 if _exponent == 0 else (8 + _mantissa) * 2.0 ** (_exponent - 10)
    E4M3[_byte] = np.nan if _byte & 0x7F == 0x7F else -_size if _byte & 0x80 else _size


def to_e4m3(values):
    """Bytes of the nearest e4m3, ties to even, the largest finite one beyond (satfinite); NaN stays NaN."""
    sizes = np.abs(values.astype(np.float64))
    finite = E4M3[:0x7F]
    above = np.clip(np.searchsorted(finite, sizes), 1, 0x7E)
    below = above - 1
    middle = (finite[above] + finite[below]) / 2
    byte = np.where((sizes > middle) | ((sizes == middle) & (above % 2 == 0)), above, below)
    byte = np.where(np.isnan(values), 0x7F, np.where(sizes >= finite[-1], 0x7E, byte))
    return (byte | np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)


def prmt(a, b, selector):
    """Bytes of a (0 to 3) and b (4 to 7) by the selector's nibbles; 8 more: the byte's sign in all its bits."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros(np.broadcast_shapes(both.shape, selector.shape), np.uint32)
    for place in range(4):
        nibble = selector >> np.uint32(4 * place) & np.uint32(15)
        byte = (both >> (nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8) & np.uint64(0xFF)).astype(np.uint32)
        byte = np.where(nibble & np.uint32(8) != 0, (byte >> np.uint32(7)) * np.uint32(0xFF), byte)
        out |= byte << np.uint32(8 * place)
    return out


def lop3(a, b, c, table):
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
    for case in range(8):
        if int(table) >> case & 1:
            out |= (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
    return out


def shift(values, by, left):
    """shl, shr: all bits are gone, or copies of the sign, at shifts beyond the width."""
    bits = values.dtype.itemsize * 8
    count = np.minimum(by, np.uint32(bits - 1)).astype(values.dtype)
    if not left and values.dtype.kind == "i":
        return values >> count
    return np.where(by >= bits, 0, values << count if left else values >> count).astype(values.dtype)


def field(values, start, length):
    """bfe: a field of bits, its sign extended where the type has one."""
    bits = values.dtype.itemsize * 8
    start, length = start & 0xFF, length & 0xFF
    wide = values.astype(object) if bits == 64 else values.astype(np.int64)
    found = wide >> np.minimum(start, bits - 1).astype(np.int64)
    mask = (np.int64(1) << np.minimum(length, 62).astype(np.int64)) - 1
    found = found & mask
    if values.dtype.kind == "i":
        sign = np.int64(1) << np.maximum(length.astype(np.int64) - 1, 0)
        found = np.where(length == 0, 0, (found ^ sign) - sign)
    return found.astype(values.dtype)


def divide(a, b):
    """Integers, towards zero."""
    with np.errstate(all="ignore"):
        if a.dtype.kind == "u":
            return np.where(b == 0, ~a, a // np.where(b == 0, 1, b))
        size = np.abs(a.astype(np.int64)) // np.maximum(np.abs(b.astype(np.int64)), 1)
        return np.where((a < 0) != (b < 0), -size, size).astype(a.dtype)


def smaller(a, b):
    """min of floats: a number beats NaN, -0.0 is less than 0.0."""
    return np.where(np.signbit(a) & (a == b), a, np.fmin(a, b))


def larger(a, b):
    return np.where(~np.signbit(a) & (a == b), a, np.fmax(a, b))


COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def compare(how, a, b):
    if how in COMPARE:
        answer = COMPARE[how](a, b)
        # ordered: NaN makes it false, not equal too
        return answer & ~(np.isnan(a) | np.isnan(b)) if how == "ne" and a.dtype.kind == "f" else answer
    unordered = np.isnan(a) | np.isnan(b)
    if how in ("num", "nan"):
        return unordered == (how == "nan")
    return COMPARE[how[:-1]](a, b) | unordered
