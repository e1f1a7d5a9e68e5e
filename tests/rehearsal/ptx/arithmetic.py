"""What instructions of a thread for itself do to its registers: moves, conversions, integers, bits, floats."""

from functools import reduce

import numpy as np

from .memory import Fault
from .numbers import (
    E4M3,
    FLOATS,
    UNSIGNED,
    bf16,
    compare,
    divide,
    field,
    flushed,
    fused,
    kind_of,
    larger,
    lop3,
    prmt,
    shift,
    smaller,
    to_bf16,
    to_e4m3,
)

ROUNDINGS = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


class Arithmetic:
    """A part of `machine.Machine`, which has the registers: `get` and `put`."""

    # moves

    def do_mov(self, opcode, to, source):
        kind = kind_of(opcode[-1])
        if isinstance(to, tuple):
            bits = kind.itemsize * 8 // len(to)
            whole = self.get(source, kind)
            for place, register in enumerate(to):
                self.put(register, (whole >> kind.type(bits * place)).astype(UNSIGNED[bits]))
        elif isinstance(source, tuple):
            bits = kind.itemsize * 8 // len(source)
            parts = [
                self.get(one, UNSIGNED[bits]).astype(kind) << kind.type(bits * at) for at, one in enumerate(source)
            ]
            self.put(to, np.bitwise_or.reduce(np.broadcast_arrays(*parts)))
        elif source[0] == "%" and source not in self.registers:
            self.put(to, self.system(source).astype(kind))
        else:
            self.put(to, self.get(source, kind))

    def system(self, name):
        if name == "%tid.x":
            return self.thread
        if name in ("%tid.y", "%tid.z"):
            return np.zeros(1, np.uint32)
        if name == "%laneid":
            return self.thread % 32
        if name == "%ntid.x":
            return np.array([self.kernel.threads], np.uint32)
        if name == "%cluster_ctarank":
            return self.place.astype(np.uint32)
        axis = "xyz".index(name[-1])
        if name.startswith("%cluster_ctaid."):
            before = int(np.prod(self.cluster[:axis], dtype=np.int64))
            return (self.place // before % self.cluster[axis]).astype(np.uint32)
        if name.startswith("%nctaid."):
            return np.array([self.grid[axis]], np.uint32)
        if name.startswith("%ctaid."):
            return self.program // int(np.prod(self.grid[:axis], dtype=np.int64)) % self.grid[axis]
        raise ValueError(f"{name} is not there")

    def do_cvta(self, opcode, to, source):
        self.do_mov(opcode, to, source)

    def do_call(self, opcode, *operands):
        raise Fault(f"{operands[0]} is called")

    def do_selp(self, opcode, to, a, b, chosen):
        kind = kind_of(opcode[-1])
        self.put(to, np.where(self.get(chosen, bool), self.get(a, kind), self.get(b, kind)))

    def do_cvt(self, opcode, to, *sources):
        into, of = opcode[-2:]
        if into in ("bf16x2", "f16x2") and of == "f32":
            high, low = (self.get(one, np.float32) for one in sources)
            bits = to_bf16 if into == "bf16x2" else lambda one: one.astype(np.float16).view(np.uint16)
            self.put(to, bits(high).astype(np.uint32) << np.uint32(16) | bits(low).astype(np.uint32))
        elif into == "e4m3x2":
            if of == "f32":
                high, low = (self.get(one, np.float32) for one in sources)
            else:
                both = self.get(sources[0], np.uint32)
                part = bf16 if of == "bf16x2" else lambda one: one.astype(np.uint16).view(np.float16)
                high, low = part(both >> np.uint32(16)), part(both & np.uint32(0xFFFF))
            self.put(to, to_e4m3(high).astype(np.uint16) << np.uint16(8) | to_e4m3(low).astype(np.uint16))
        elif of == "e4m3x2":
            both = self.get(sources[0], np.uint16)
            high, low = (
                E4M3[part].astype(np.float16).view(np.uint16).astype(np.uint32) for part in (both >> 8, both & 255)
            )
            self.put(to, high << np.uint32(16) | low)
        else:
            value = self.get(sources[0], kind_of(of))
            if of == "bf16":
                value = bf16(value)
            if into == "bf16":
                self.put(to, to_bf16(value if value.dtype.kind == "f" else value.astype(np.float64)))
                return
            kind = kind_of(into)
            if kind.kind == value.dtype.kind == "f" and not ROUNDINGS.keys().isdisjoint(opcode):
                (rounding,) = (ROUNDINGS[part] for part in opcode if part in ROUNDINGS)
                value = rounding(value)
            if kind.kind in "iu" and value.dtype.kind == "f":
                (rounding,) = (ROUNDINGS[part] for part in opcode if part in ROUNDINGS)
                limits = np.iinfo(kind)
                value = np.nan_to_num(rounding(value.astype(np.float64)), nan=0, posinf=limits.max, neginf=limits.min)
                value = np.clip(value, limits.min, limits.max)
            value = value.astype(kind)
            if "sat" in opcode:
                value = np.where(np.isnan(value), 0, np.clip(value, 0, 1)).astype(kind)
            if "ftz" in opcode and kind == np.float32:
                value = flushed(value)
            register = self.registers[to].dtype
            # narrow results lie in registers of 16 bits or more, their sign extended
            self.put(to, value if kind.itemsize == register.itemsize else value.astype(register))

    # integers and bits

    def two(self, opcode, a, b):
        kind = kind_of(opcode[-1])
        return self.get(a, kind), self.get(b, kind)

    def packed(self, opcode, *sources):
        """Operands as floats, and how to put the result back: bf16, bf16x2, f16x2 and f32x2 are bits in registers."""
        name = opcode[-1]
        if not {"rz", "rp"}.isdisjoint(opcode):
            raise ValueError("rounded otherwise")
        if name in FLOATS:
            flush = flushed if "ftz" in opcode else lambda value: value
            return [flush(self.get(one, FLOATS[name])) for one in sources], FLOATS[name], flush
        whole = kind_of(name)
        part = {"bf16": np.uint16, "bf16x2": np.uint16, "f16x2": np.float16, "f32x2": np.float32}[name]
        parts = [np.ascontiguousarray(np.broadcast_to(self.get(one, whole), self.count)).view(part) for one in sources]
        if name[:2] == "bf":
            return [bf16(one) for one in parts], "bf16", lambda value: value.view(whole)
        return parts, part, lambda value: value.astype(part).view(whole)

    def do_add(self, opcode, to, a, b, sign=1):
        name = opcode[-1]
        if opcode[-2] == "f32":  # f32.bf16: the first operand is shorter
            self.put(to, self.longer(name, a) + sign * self.get(b, np.float32))
            return
        if name[1:] == "16x2":
            a, b = (np.ascontiguousarray(np.broadcast_to(one, self.count)) for one in self.two(("b32",), a, b))
            self.put(to, (a.view(np.uint16) + sign * b.view(np.uint16)).astype(np.uint16).view(np.uint32))
            return
        if name[0] in "su":
            a, b = self.two((name.replace("s", "u"),), a, b)
            self.put(to, a + b if sign > 0 else a - b)
            return
        (a, b), kind, back = self.packed(opcode, a, b)
        one = np.ones(1, np.float64)
        self.put(to, back(fused(a, one, sign * b, kind) if kind == "bf16" else a + sign * b))

    def longer(self, name, operand):
        """float32 of an operand of 16 bits."""
        bits = self.get(operand, np.uint16)
        return bf16(bits) if name == "bf16" else bits.view(np.float16).astype(np.float32)

    def do_sub(self, opcode, to, a, b):
        self.do_add(opcode, to, a, b, sign=-1)

    def do_mul(self, opcode, to, a, b):
        name = opcode[-1]
        if name[0] in "su":
            self.put(to, self.product(opcode, a, b))
            return
        (a, b), kind, back = self.packed(opcode, a, b)
        self.put(to, back(to_bf16(a.astype(np.float64) * b) if kind == "bf16" else a * b))

    def product(self, opcode, a, b):
        name = opcode[-1]
        if "wide" in opcode:
            wide = kind_of(name[0] + str(2 * int(name[1:])))
            a, b = self.two(opcode, a, b)
            return a.astype(wide) * b.astype(wide)
        if "lo" in opcode:
            a, b = self.two((name.replace("s", "u"),), a, b)
            return a * b
        bits = int(name[1:])
        wide = {32: kind_of(f"{name[0]}64"), 16: kind_of(f"{name[0]}32"), 64: np.dtype(object)}[bits]
        a, b = self.two(opcode, a, b)
        return (a.astype(wide) * b.astype(wide) >> bits).astype(kind_of(name))

    def do_mad(self, opcode, to, a, b, c):
        product = self.product(opcode, a, b)
        kind = UNSIGNED[product.itemsize * 8]
        self.put(to, product.view(kind) + self.get(c, kind))

    def do_fma(self, opcode, to, a, b, c):
        if opcode[-2] == "f32":
            a, b = (self.longer(opcode[-1], one) for one in (a, b))
            self.put(to, fused(a, b, self.get(c, np.float32), np.float32))
            return
        (a, b, c), kind, back = self.packed(opcode, a, b, c)
        self.put(to, back(fused(a, b, c, kind, "rm" if "rm" in opcode else "rn")))

    def do_div(self, opcode, to, a, b):
        a, b = self.two(opcode, a, b)
        self.put(to, a / b if a.dtype.kind == "f" else divide(a, b))

    def do_rem(self, opcode, to, a, b):
        a, b = self.two(opcode, a, b)
        self.put(to, a - divide(a, b) * b)

    def do_min(self, opcode, to, *sources, choose=(np.minimum, smaller)):
        if opcode[-1][0] in "su":
            self.put(to, choose[0](*self.two(opcode, *sources)))
            return
        values, kind, back = self.packed(opcode, *sources)
        chosen = reduce(choose["NaN" not in opcode], values)
        self.put(to, back(to_bf16(chosen) if kind == "bf16" else chosen))

    def do_max(self, opcode, to, *sources):
        self.do_min(opcode, to, *sources, choose=(np.maximum, larger))

    def signs(self, register, name):
        """The bits of a register that hold signs of floats."""
        bits = self.registers[register].dtype.itemsize * 8
        return UNSIGNED[bits](0x80008000 if name in ("f16x2", "bf16x2") else 1 << bits - 1)

    def do_abs(self, opcode, to, a):
        if opcode[-1][0] == "s":
            self.put(to, np.abs(self.get(a, kind_of(opcode[-1]))))
            return
        signs = self.signs(to, opcode[-1])
        self.put(to, self.get(a, signs.dtype) & ~signs)

    def do_neg(self, opcode, to, a):
        if opcode[-1][0] == "s":
            self.put(to, -self.get(a, kind_of(opcode[-1])))
            return
        signs = self.signs(to, opcode[-1])
        self.put(to, self.get(a, signs.dtype) ^ signs)

    def do_not(self, opcode, to, a):
        self.put(to, ~self.get(a, kind_of(opcode[-1])))

    def do_and(self, opcode, to, a, b):
        self.put(to, np.bitwise_and(*self.two(opcode, a, b)))

    def do_or(self, opcode, to, a, b):
        self.put(to, np.bitwise_or(*self.two(opcode, a, b)))

    def do_xor(self, opcode, to, a, b):
        self.put(to, np.bitwise_xor(*self.two(opcode, a, b)))

    def do_shl(self, opcode, to, a, by):
        self.put(to, shift(self.get(a, kind_of(opcode[-1])), self.get(by, np.uint32), True))

    def do_shr(self, opcode, to, a, by):
        self.put(to, shift(self.get(a, kind_of(opcode[-1])), self.get(by, np.uint32), False))

    def do_bfe(self, opcode, to, a, start, length):
        self.put(to, field(self.get(a, kind_of(opcode[-1])), self.get(start, np.uint32), self.get(length, np.uint32)))

    def do_bfi(self, opcode, to, a, b, start, length):
        a, b = self.two(opcode, a, b)
        start, length = (self.get(one, np.uint32) & np.uint32(0xFF) for one in (start, length))
        ones = shift(np.array([np.iinfo(a.dtype).max], a.dtype), length, True)
        mask = shift(~ones, start, True)
        self.put(to, (shift(a, start, True) & mask) | (b & ~mask))

    def do_lop3(self, opcode, to, a, b, c, table):
        self.put(to, lop3(*(self.get(one, np.uint32) for one in (a, b, c)), int(table, 0)))

    def do_prmt(self, opcode, to, a, b, selector):
        self.put(to, prmt(*(self.get(one, np.uint32) for one in (a, b, selector))))

    def do_popc(self, opcode, to, a):
        bits = np.ascontiguousarray(self.get(a, kind_of(opcode[-1])))
        self.put(to, np.unpackbits(bits.view(np.uint8).reshape(len(bits), -1), axis=1).sum(1, dtype=np.uint32))

    def do_setp(self, opcode, to, a, b, *also):
        if opcode[-1] in ("bf16", "bf16x2", "f16x2"):
            (a, b), _, _ = self.packed(opcode, a, b)
        else:
            a, b = self.two(opcode, a, b)
        answer = compare(opcode[1], a, b)
        if opcode[-1].endswith("x2"):
            for half, register in enumerate(to):
                self.put(register, answer.reshape(-1, 2)[:, half])
            return
        other = ~answer
        if also:
            join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[opcode[2]]
            answer, other = (join(one, self.get(also[0], bool)) for one in (answer, other))
        to = to if isinstance(to, tuple) else (to,)
        for register, value in zip(to, (answer, other), strict=False):
            self.put(register, value)

    # special functions, taken as exact

    def one(self, opcode, to, a, function):
        flush = flushed if "ftz" in opcode else lambda value: value
        self.put(to, flush(function(flush(self.get(a, np.float32)).astype(np.float64)).astype(np.float32)))

    def do_ex2(self, opcode, to, a):
        self.one(opcode, to, a, np.exp2)

    def do_lg2(self, opcode, to, a):
        self.one(opcode, to, a, np.log2)

    def do_rcp(self, opcode, to, a):
        self.one(opcode, to, a, lambda value: 1 / value)

    def do_sqrt(self, opcode, to, a):
        self.one(opcode, to, a, np.sqrt)

    def do_rsqrt(self, opcode, to, a):
        self.one(opcode, to, a, lambda value: 1 / np.sqrt(value))

    def do_tanh(self, opcode, to, a):
        self.one(opcode, to, a, np.tanh)
