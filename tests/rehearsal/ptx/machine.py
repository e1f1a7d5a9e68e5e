"""A GPU's threads on numpy: all of some programs at once, one instruction after the other.

Where threads part, those that are furthest behind run on until they meet the others. Sources: NVIDIA's PTX ISA, by the
names of instructions.
"""

import re
from functools import reduce

import numpy as np

from . import matrices
from .memory import SHARED_BASE, Copies, Fault, GlobalMemory, SharedMemory
from .numbers import (
    E4M3,
    FLOATS,
    SIGNED,
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
from .source import Kernel, read

AT_ONCE = 1 << 14
"""Threads."""
POISON = 0x7FEDBEEF7FEDBEEF
"""What registers hold before they are written: NaN, or no address."""


def launch(kernel: Kernel, grid, shared, values, ranges) -> None:
    """Run a kernel on this process's memory. grid: programs (x, y, z); shared: bytes; values: its arguments, integers
    and floats; ranges: [(first address, one past the last)] of memory it may touch. Raises Fault."""
    memory = GlobalMemory(ranges)
    programs = np.arange(int(np.prod(grid)))
    step = max(1, AT_ONCE // kernel.threads)
    for first in range(0, len(programs), step):
        Machine(kernel, grid, programs[first : first + step], shared, values, memory).run()


class NotYet(Exception):
    """Threads wait for others."""


ROUNDINGS = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def inline(assembly, constraints, inputs, ranges=()):
    """What `tl.inline_asm_elementwise(assembly, constraints, ...)` gives for arrays `inputs` of one shape, whose
    elements are threads in their order: a list of arrays."""
    bits = [{"h": 16, "r": 32, "f": 32, "l": 64}[kind.strip("=&")] for kind in constraints.split(",")]
    inputs = np.broadcast_arrays(*inputs)
    outputs = len(bits) - len(inputs)
    declared = "".join(f".reg .b{width} %a{place};" for place, width in enumerate(bits))
    body = re.sub(r"\$(\d+)", r"%a\1", assembly)
    kernel = read(f".entry inline() .reqntid {inputs[0].size} {{ {declared} {body}\n ret; }}")
    machine = Machine(kernel, (1, 1, 1), np.arange(1), 0, (), GlobalMemory(ranges))
    for place, value in enumerate(inputs, outputs):
        machine.put(f"%a{place}", np.ascontiguousarray(value).reshape(-1).view(UNSIGNED[8 * value.itemsize]))
    machine.run()
    return [machine.registers[f"%a{place}"].reshape(inputs[0].shape) for place in range(outputs)]


class Machine:
    def __init__(self, kernel, grid, programs, shared, values, memory):
        self.kernel, self.grid, self.memory = kernel, grid, memory
        self.parameters = dict(zip(kernel.parameters, values, strict=True))
        threads = kernel.threads
        self.count = len(programs) * threads
        self.thread = np.tile(np.arange(threads, dtype=np.uint32), len(programs))
        self.place = np.repeat(np.arange(len(programs)), threads)
        """Which of these programs a thread is of."""
        self.warp = np.arange(self.count) // 32
        self.program = np.repeat(programs, threads)
        self.shared = SharedMemory(len(programs), shared)
        self.copies = Copies(self.count)
        self.tensor = matrices.TensorMemory(len(programs))
        self.reads = matrices.Reads(-(-self.count // 128))
        self.barriers = {}
        self.arrivals = 0
        """At any mbarrier."""
        self.everyone = np.ones(self.count, bool)
        # those at work; None: everyone
        self.active = None
        # arrays are never written to, so that they may be shared
        poison = {bits: np.full(self.count, POISON & (1 << bits) - 1, UNSIGNED[bits]) for bits in UNSIGNED}
        poison[1] = np.zeros(self.count, bool)
        self.registers = {name: poison[bits] for name, bits in kernel.registers.items()}

    # what instructions are made of

    def get(self, operand, kind):
        """A source operand as an array of the dtype `kind`, one value a thread or one for all."""
        kind = np.dtype(kind)
        if operand in self.registers:
            value = self.registers[operand]
            if value.dtype == kind:
                return value
            if value.dtype.itemsize == kind.itemsize:
                return value.view(kind)
            if value.dtype.itemsize > kind.itemsize and kind.kind in "iu":  # the lower part
                return value.astype(UNSIGNED[kind.itemsize * 8]).view(kind)
            raise ValueError(f"{operand} has another width than {kind}")
        return np.array([self.constant(operand, kind)], kind)

    def constant(self, text, kind):
        if text == "global_smem":
            return SHARED_BASE
        if text[:2] in ("0f", "0F", "0d", "0D"):
            value = np.array(int(text[2:], 16), np.uint32 if text[1] in "fF" else np.uint64)
            return value.view(kind) if value.itemsize == kind.itemsize else value.view(FLOATS[f"f{value.itemsize * 8}"])
        if re.match(r"[a-zA-Z_$]", text):
            return 0  # where texts of assertions lie
        number = int(text.rstrip("U"), 0)
        if kind.kind in "iu":
            bits = kind.itemsize * 8
            number &= (1 << bits) - 1
            return number - (1 << bits) if kind.kind == "i" and number >> bits - 1 else number
        return number

    def put(self, register, value):
        """Write a register, where threads are active."""
        if register == "_":
            return
        old = self.registers[register]
        value = np.asarray(value)
        if value.dtype != old.dtype:
            value = np.ascontiguousarray(value)
            if value.itemsize == old.itemsize:
                value = value.view(old.dtype)
            else:
                raise ValueError(f"{value.dtype} for {register}")
        if self.active is not None:
            value = np.where(self.active, value, old)
        elif value.shape != old.shape:
            value = np.broadcast_to(value, old.shape).copy()
        self.registers[register] = value

    def lanes(self):
        """Numbers of the threads at work."""
        return np.arange(self.count) if self.active is None else np.flatnonzero(self.active)

    def address(self, operand, lanes):
        if not operand.base:
            return np.full(len(lanes), operand.offset, np.int64)
        if operand.base in self.registers:
            base = self.registers[operand.base]
            return base[lanes].astype(np.int64) + operand.offset
        return np.full(len(lanes), int(self.constant(operand.base, np.dtype(np.int64))) + operand.offset, np.int64)

    def whole_warps(self):
        if self.active is not None:
            warps = self.active.reshape(-1, 32)
            if (warps.any(1) != warps.all(1)).any():
                raise Fault("a warp is not together")

    # the run

    def run(self):
        with np.errstate(all="ignore"):
            self.follow()

    def follow(self):
        instructions = self.kernel.instructions
        parties = [(0, self.everyone)]  # threads that can go on, and where
        waiting = []  # for an mbarrier
        self.at_barrier = []
        seen = -1
        while parties:
            parties.sort(key=lambda party: party[0])
            at, members = parties.pop(0)
            while parties and parties[0][0] == at:
                members = members | parties.pop(0)[1]
            meet = parties[0][0] if parties else len(instructions)
            members = None if members.all() else members
            while at < meet:
                instruction = instructions[at]
                self.active = members
                if instruction.predicate:
                    wanted = self.registers[instruction.predicate] != instruction.negated
                    wanted = wanted if members is None else wanted & members
                    self.active = None if wanted.all() else wanted
                name = instruction.opcode[0]
                at += 1
                if name in ("bra", "ret", "exit"):
                    target = len(instructions) if name != "bra" else self.kernel.labels[instruction.operands[0]]
                    went = self.everyone if self.active is None else self.active
                    stayed = (self.everyone if members is None else members) & ~went
                    if went.any() and target < len(instructions):
                        parties.append((target, went))
                    if stayed.any():
                        parties.append((at, stayed))
                    break
                if self.active is not None and not self.active.any():
                    continue
                if name in ("bar", "barrier") and instruction.opcode[1] != "warp":
                    parties += self.arrive(at, self.everyone if self.active is None else self.active)
                    break
                try:
                    getattr(self, f"do_{name}")(instruction.opcode, *instruction.operands)
                except NotYet:
                    waiting.append((at - 1, self.everyone if members is None else members))
                    break
                except Exception as error:
                    raise type(error)(f"{self.kernel.name}, {instruction.text}: {error}") from error
            else:
                if at < len(instructions):
                    parties.append((at, self.everyone if members is None else members))
            if waiting and not parties and self.arrivals > seen:
                parties, waiting, seen = waiting, [], self.arrivals
        if waiting or self.at_barrier:
            at = (waiting or self.at_barrier)[0][0]
            raise Fault(f"{self.kernel.name}: threads wait for others for ever, near {instructions[at - 1].text}")

    def arrive(self, at, members):
        """Threads come to a barrier and go on at `at`: who can go on now, and where."""
        self.at_barrier.append((at, members))
        there = np.logical_or.reduce([party for _, party in self.at_barrier])
        complete = there.reshape(-1, self.kernel.threads).all(1)
        self.shared.barrier(np.flatnonzero(complete))
        go = np.repeat(complete, self.kernel.threads)
        parties, self.at_barrier = (
            [(at, party & which) for at, party in self.at_barrier if (party & which).any()] for which in (go, ~go)
        )
        return parties

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
        axis = "xyz".index(name[-1])
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

    # memory

    def do_createpolicy(self, opcode, to, *rest):
        self.put(to, np.zeros(1, np.uint64))

    def do_ld(self, opcode, to, source, *policy):
        width = kind_of(opcode[-1]).itemsize
        to = to if isinstance(to, tuple) else (to,)
        if opcode[1] == "param":
            value = self.parameter(source.base, kind_of(opcode[-1]))
            self.take(to, np.broadcast_to(value, (1, self.count)), slice(None), signed=opcode[-1][0] == "s")
            return
        lanes = self.lanes()
        at = self.address(source, lanes)
        if opcode[1].startswith("shared"):
            words = self.shared.read(at, width, len(to), self.place[lanes], self.warp[lanes])
        else:
            words = self.memory.read(at, width, len(to))
        self.take(to, words, lanes, signed=opcode[-1][0] == "s")

    def take(self, to, words, lanes, signed=False):
        """Words [registers, lanes] into registers."""
        for register, values in zip(to, words, strict=True):
            kind = self.registers[register].dtype
            if kind.itemsize > values.itemsize and signed:
                values = values.view(SIGNED[values.itemsize * 8]).astype(SIGNED[kind.itemsize * 8]).view(kind)
            whole = np.zeros(self.count, kind)
            whole[lanes] = values
            self.put(register, whole)

    def parameter(self, name, kind):
        value = self.parameters[name]
        if isinstance(value, float):
            return np.array([value], FLOATS[f"f{kind.itemsize * 8}"]).view(kind)
        return np.array([value & (1 << kind.itemsize * 8) - 1], UNSIGNED[kind.itemsize * 8])

    def words(self, sources, width, lanes):
        kind = UNSIGNED[width * 8]
        return np.stack([np.broadcast_to(self.get(one, kind), self.count)[lanes] for one in sources])

    def do_st(self, opcode, to, sources, *policy):
        if opcode[1] == "param":  # of a call
            return
        lanes = self.lanes()
        sources = sources if isinstance(sources, tuple) else (sources,)
        words = self.words(sources, kind_of(opcode[-1]).itemsize, lanes)
        at = self.address(to, lanes)
        if opcode[1].startswith("shared"):
            self.shared.write(at, words, self.place[lanes], self.warp[lanes])
        else:
            self.memory.write(at, words)

    def do_cp(self, opcode, *operands):
        assert opcode[1] == "async", "bulk copies are not there"
        lanes = self.lanes()
        if opcode[2] == "commit_group":
            self.copies.close(lanes)
            return
        if opcode[2] in ("wait_group", "wait_all"):
            left = int(operands[0], 0) if operands else 0
            if opcode[2] == "wait_all":
                self.copies.close(lanes)
            self.copies.wait(self.shared, lanes, left, self.place)
            return
        to, source, width, *size = operands
        width = int(width, 0)
        wanted = (
            np.broadcast_to(self.get(size[0], np.uint32), self.count)[lanes] if size else np.full(len(lanes), width)
        )
        if not np.isin(wanted, (0, width)).all():
            raise ValueError("part of a copy")
        word = 4 if width == 4 else 8
        data = np.zeros((width // word, len(lanes)), UNSIGNED[word * 8])
        there = wanted == width
        if there.any():
            data[:, there] = self.memory.read(self.address(source, lanes)[there], word, width // word)
        at = self.shared._at(self.address(to, lanes), width, self.place[lanes])
        data = np.ascontiguousarray(data.T).view(np.uint8)
        self.copies.start(self.shared, lanes, at, data, self.warp[lanes], self.shared.turn[self.place[lanes]])

    # threads with each other

    def do_bar(self, opcode, *operands):
        self.whole_warps()

    def do_fence(self, opcode, *operands):
        if opcode[1:3] == ("proxy", "async"):
            self.shared.fence(np.unique(self.warp[self.lanes()]))

    def do_shfl(self, opcode, to, source, by, clamp, members):
        to, inside = to if isinstance(to, tuple) else (to, "_")
        lane = (np.arange(self.count) % 32).astype(np.int64)
        by = np.broadcast_to(self.get(by, np.uint32), self.count).astype(np.int64)
        clamp = np.broadcast_to(self.get(clamp, np.uint32), self.count).astype(np.int64)
        segment, bound = clamp >> 8 & 31, clamp & 31
        last = (lane & segment) | (bound & ~segment)
        wanted = {
            "bfly": lane ^ by, "up": lane - by, "down": lane + by, "idx": (lane & segment) | (by & ~segment)
        }[opcode[2]]  # fmt: skip
        good = wanted >= last if opcode[2] == "up" else wanted <= last
        wanted = np.where(good, wanted, lane)
        at = np.arange(self.count) - lane + wanted
        if self.active is not None and not self.active[at[self.active]].all():
            raise Fault("a value is asked of a thread that is not there")
        self.put(to, np.broadcast_to(self.get(source, np.uint32), self.count)[at])
        if inside != "_":
            self.put(inside, good)

    def do_redux(self, opcode, to, source, members):
        self.whole_warps()
        kind = kind_of(opcode[-1])
        over = {
            "add": lambda a: a.sum(1, dtype=kind), "min": lambda a: a.min(1), "max": lambda a: a.max(1),
            "and": lambda a: np.bitwise_and.reduce(a, 1), "or": lambda a: np.bitwise_or.reduce(a, 1),
        }[opcode[2]]  # fmt: skip
        if kind.kind == "f" and "NaN" not in opcode:
            over = {"min": lambda a: np.fmin.reduce(a, 1), "max": lambda a: np.fmax.reduce(a, 1)}[opcode[2]]
        values = np.broadcast_to(self.get(source, kind), self.count).reshape(-1, 32)
        self.put(to, np.repeat(over(values), 32))

    def do_elect(self, opcode, to, members):
        self.whole_warps()
        leader, chosen = to
        self.put(leader, np.zeros(1, np.uint32))
        self.put(chosen, np.arange(self.count) % 32 == 0)

    def do_ldmatrix(self, opcode, to, source):
        matrices.load(self, opcode, to, source)

    def do_stmatrix(self, opcode, to, sources):
        matrices.store(self, opcode, to, sources)

    def do_mma(self, opcode, *operands):
        matrices.mma(self, opcode, *operands)

    def do_wgmma(self, opcode, *operands):
        matrices.wgmma(self, opcode, *operands)

    def do_tcgen05(self, opcode, *operands):
        matrices.tcgen05(self, opcode, *operands)

    def do_mbarrier(self, opcode, *operands):
        *to, address, number = (*operands, "0") if opcode[1] == "inval" else operands
        lanes = self.lanes()
        keys = list(zip(self.place[lanes].tolist(), self.address(address, lanes).tolist(), strict=True))
        if opcode[1] == "init":
            for key in keys:
                self.barriers[key] = matrices.Barrier(int(number, 0))
        elif opcode[1] == "inval":
            for key in keys:
                del self.barriers[key]
        elif opcode[1:3] == ("try_wait", "parity"):
            parity = np.broadcast_to(self.get(number, np.uint32), self.count)[lanes]
            done = np.array([self.barriers[key].phase % 2 != one for key, one in zip(keys, parity, strict=True)])
            if not done.all():
                raise NotYet
            for key in set(keys):
                self.barriers[key].passed(self.shared)
            self.put(to[0], np.ones(1, bool))
        else:
            raise ValueError("this use of a barrier is not there")
