"""A GPU's threads on numpy: all of some programs at once, one instruction after the other.

Where threads part, those that are furthest behind run on until they meet the others. Sources: NVIDIA's PTX ISA, by the
names of instructions.
"""

import ctypes
import re

import numpy as np

from . import bulk, matrices
from .arithmetic import Arithmetic
from .memory import SHARED_BASE, Copies, Fault, GlobalMemory, SharedMemory
from .numbers import FLOATS, SIGNED, UNSIGNED, kind_of
from .source import Kernel, read

AT_ONCE = 1 << 14
"""Threads."""
POISON = 0x7FEDBEEF7FEDBEEF
"""What registers hold before they are written: NaN, or no address."""


def launch(kernel: Kernel, grid, shared, values, ranges, cluster=None) -> None:
    """Run a kernel on this process's memory. grid: programs (x, y, z); shared: bytes; values: its arguments, integers,
    floats, and bytes for what is more than one number; ranges: [(first address, one past the last)] of memory it may
    touch; cluster: programs (x, y, z) of one. Raises Fault.

    Of a kernel with clusters races are not looked for: its warps meet at more than barriers of a whole program."""
    held = {
        place: ctypes.create_string_buffer(value, len(value))
        for place, value in enumerate(values)
        if isinstance(value, bytes)
    }
    at = {place: bulk.Held(ctypes.addressof(buffer)) for place, buffer in held.items()}
    ranges = [*ranges, *((first, first + len(held[place])) for place, first in at.items())]
    values = [at.get(place, value) for place, value in enumerate(values)]
    memory = GlobalMemory(ranges)
    programs = np.arange(int(np.prod(grid)))
    if cluster:
        for together in bulk.clusters(programs, grid, cluster):
            Machine(kernel, grid, together, shared, values, memory, cluster).run()
        return
    step = max(1, AT_ONCE // kernel.threads)
    for first in range(0, len(programs), step):
        Machine(kernel, grid, programs[first : first + step], shared, values, memory).run()


class NotYet(Exception):
    """Its threads [bool] wait for others; those at work beside them are done."""


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


class Machine(Arithmetic):
    def __init__(self, kernel, grid, programs, shared, values, memory, cluster=None):
        self.kernel, self.grid, self.memory, self.cluster = kernel, grid, memory, cluster
        self.parameters = dict(zip(kernel.parameters, values, strict=True))
        threads = kernel.threads
        self.count = len(programs) * threads
        self.thread = np.tile(np.arange(threads, dtype=np.uint32), len(programs))
        self.place = np.repeat(np.arange(len(programs)), threads)
        """Which of these programs a thread is of."""
        self.warp = np.arange(self.count) // 32
        self.program = np.repeat(programs, threads)
        self.shared = SharedMemory(len(programs), shared, checked=not cluster)
        self.local = np.zeros((self.count, kernel.local[1]), np.uint8)
        self.copies = Copies(self.count)
        self.tensor = matrices.TensorMemory(len(programs))
        self.reads = matrices.Reads(-(-self.count // 128))
        self.barriers = {}
        self.arrivals = 0
        """At any mbarrier, of threads and of copies."""
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
        if text == self.kernel.shared:
            return SHARED_BASE
        if isinstance(self.parameters.get(text), bulk.Held):
            return self.parameters[text]
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
        waiting = []  # for an mbarrier, or for the rest of their warp
        self.at_barrier = []
        seen, given_up = None, set()
        while parties:
            parties.sort(key=lambda party: party[0])
            at, members = parties.pop(0)
            while parties and parties[0][0] == at:
                members = members | parties.pop(0)[1]
            meet = parties[0][0] if parties else len(instructions)
            here = members
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
                    stayed = here & ~went
                    if went.any() and target < len(instructions):
                        parties.append((target, went))
                    if stayed.any():
                        parties.append((at, stayed))
                    break
                if self.active is not None and not self.active.any():
                    continue
                if name in ("bar", "barrier") and instruction.opcode[1] != "warp":
                    came = self.everyone if self.active is None else self.active
                    parties += self.arrive(at, came, instruction)
                    if (here & ~came).any():
                        parties.append((at, here & ~came))
                    break
                try:
                    getattr(self, f"do_{name}")(instruction.opcode, *instruction.operands)
                except NotYet as rest:
                    (held,) = rest.args
                    waiting.append((at - 1, held))
                    if (here & ~held).any():
                        parties.append((at, here & ~held))
                    break
                except Exception as error:
                    raise type(error)(f"{self.kernel.name}, {instruction.text}: {error}") from error
            else:
                if at < len(instructions):
                    parties.append((at, here))
            if waiting and not parties:
                state = self.arrivals, *sorted((at, held.tobytes()) for at, held in waiting)
                if state != seen:
                    parties, waiting, seen = waiting, [], state
                elif state not in given_up:
                    given_up.add(state)
                    parties, waiting = self.time_out(waiting)
        if waiting or self.at_barrier:
            at = waiting[0][0] if waiting else self.at_barrier[0][1] - 1
            raise Fault(f"{self.kernel.name}: threads wait for others for ever, near {instructions[at].text}")

    def time_out(self, waiting):
        """Waits for an mbarrier end some time without it: who goes on, and who waits for other reasons."""
        parties, left = [], []
        for at, held in waiting:
            instruction = self.kernel.instructions[at]
            if instruction.opcode[0] == "mbarrier":
                self.active = held
                self.put(instruction.operands[0], np.zeros(1, bool))
                parties.append((at + 1, held))
            else:
                left.append((at, held))
        return parties, left

    def arrive(self, at, members, instruction):
        """Threads come to a barrier and go on at `at`: who can go on now, and where."""
        threads = self.kernel.threads
        if instruction.opcode[1] == "cluster":
            if instruction.opcode[2] == "arrive":  # who waits has arrived
                return [(at, members)]
            return self.meet("cluster", at, members, self.count, self.count)
        names, *counts = (
            np.broadcast_to(self.get(one, np.uint32), self.count) for one in (*instruction.operands, str(threads))
        )
        parties = []
        for name, count in np.unique(np.stack([names, counts[0]])[:, members], axis=1).T:
            here = members & (names == name) & (counts[0] == count)
            parties += self.meet(int(name), at, here, threads, int(count))
        return parties

    def meet(self, name, at, members, of, count):
        """Threads come to the barrier `name`, one for every `of` threads: it opens once `count` are there."""
        self.at_barrier.append((name, at, members))
        there = np.logical_or.reduce([party for which, _, party in self.at_barrier if which == name])
        complete = there.reshape(-1, of).sum(1) == count
        if count == self.kernel.threads:
            self.shared.barrier(np.flatnonzero(complete))
        go = np.repeat(complete, of)
        parties, left = [], []
        for which, goes_on, party in self.at_barrier:
            going = party & go if which == name else np.zeros_like(party)
            if going.any():
                parties.append((goes_on, going))
            if (party & ~going).any():
                left.append((which, goes_on, party & ~going))
        self.at_barrier = left
        return parties

    # memory

    def do_createpolicy(self, opcode, to, *rest):
        self.put(to, np.zeros(1, np.uint64))

    def do_ld(self, opcode, to, source, *policy):
        width = kind_of(opcode[-1]).itemsize
        to = to if isinstance(to, tuple) else (to,)
        value = self.parameters.get(source.base)
        if opcode[1] == "param" and value is not None and not isinstance(value, bulk.Held):
            value = self.parameter(source.base, kind_of(opcode[-1]))
            self.take(to, np.broadcast_to(value, (1, self.count)), slice(None), signed=opcode[-1][0] == "s")
            return
        lanes = self.lanes()
        at = self.address(source, lanes)
        if opcode[1].startswith("shared"):
            words = self.shared.read(at, width, len(to), self.place[lanes], self.warp[lanes])
        elif opcode[1] == "local":
            found = self.local[lanes[:, None], at[:, None] + np.arange(width * len(to))]
            words = found.view(UNSIGNED[8 * width]).T
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
        elif opcode[1] == "local":
            data = np.ascontiguousarray(words.T).view(np.uint8)
            self.local[lanes[:, None], at[:, None] + np.arange(data.shape[1])] = data
        else:
            self.memory.write(at, words)

    def do_cp(self, opcode, *operands):
        if opcode[2] == "bulk":
            if opcode[3] == "tensor":
                bulk.copy(self, opcode, *operands)
            elif opcode[3] not in ("commit_group", "wait_group"):
                raise ValueError("this copy is not there")
            return
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
        working = self.everyone if self.active is None else self.active
        together = np.repeat(working.reshape(-1, 32).all(1), 32)
        self.active = together
        leader, chosen = to
        self.put(leader, np.zeros(1, np.uint32))
        self.put(chosen, np.arange(self.count) % 32 == 0)
        if (working & ~together).any():
            raise NotYet(working & ~together)

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
        held = bulk.mbarrier(self, opcode, *operands)
        if held is not None:
            raise NotYet(held)

    def do_mapa(self, opcode, to, address, rank):
        self.put(to, self.get(address, np.uint32) | (self.get(rank, np.uint32) + np.uint32(1)) << np.uint32(bulk.RANK))

    def hint(self, opcode, *operands):
        """Changes nothing that is seen here."""

    do_prefetch = do_setmaxnreg = hint
