"""Instructions of tensor cores: how a warp's registers, shared memory and tensor memory hold matrices.

Fragments are those of the PTX ISA's "Matrix Fragments for ...". Products of 16-bit floats are summed in float64 and
rounded to float32 once per instruction, which no tensor core does so well; those of 8 bits as badly as Hopper does.
"""

import numpy as np

from .memory import Fault, Groups
from .numbers import E4M3, bf16

LANE = np.arange(32)
G, T = LANE // 4, LANE % 4


def floats(words, kind):
    """float64 [..., values] of words [...] of 32 bits: two of 16 bits or four of 8."""
    words = np.ascontiguousarray(words, np.uint32)[..., None]
    if kind == "bf16":
        return bf16(words.view(np.uint16)).astype(np.float64)
    if kind == "f16":
        return words.view(np.float16).astype(np.float64)
    if kind == "e4m3":
        return E4M3[words.view(np.uint8)]
    raise ValueError(f"{kind} is not there")


def fragments(machine, registers, kind=np.uint32):
    """[warps, registers, 32]."""
    values = [np.broadcast_to(machine.get(one, kind), machine.count).reshape(-1, 32) for one in registers]
    return np.stack(values, 1)


def load(machine, opcode, to, source):
    """ldmatrix: row i of matrix j from where thread 8 j + i says; thread 4 g + t gets row g's t-th pair (or, trans,
    column g's)."""
    machine.whole_warps()
    lanes = machine.lanes()
    count = len(to)
    at = machine.address(source, lanes).reshape(-1, 32)[:, : 8 * count].ravel()
    chosen = lanes.reshape(-1, 32)[:, : 8 * count].ravel()
    rows = machine.shared.read(at, 8, 2, machine.place[chosen], machine.warp[chosen])
    rows = np.ascontiguousarray(rows.T).view(np.uint16).reshape(-1, count, 8, 8)
    if "trans" in opcode:
        rows = rows.transpose(0, 1, 3, 2)
    pairs = np.ascontiguousarray(rows).view(np.uint32).reshape(-1, count, 32)
    machine.take(to, pairs.transpose(1, 0, 2).reshape(count, -1), lanes)


def store(machine, opcode, to, sources):
    """stmatrix: the other way."""
    machine.whole_warps()
    lanes = machine.lanes()
    count = len(sources)
    words = machine.words(sources, 4, lanes).reshape(count, -1, 32).transpose(1, 0, 2)
    rows = np.ascontiguousarray(words).view(np.uint16).reshape(-1, count, 8, 8)
    if "trans" in opcode:
        rows = rows.transpose(0, 1, 3, 2)
    data = np.ascontiguousarray(rows).view(np.uint64).reshape(-1, 2).T
    at = machine.address(to, lanes).reshape(-1, 32)[:, : 8 * count].ravel()
    chosen = lanes.reshape(-1, 32)[:, : 8 * count].ravel()
    machine.shared.write(at, np.ascontiguousarray(data), machine.place[chosen], machine.warp[chosen])


def left(words, kind):
    """A [warps, 16, K] from its fragments [warps, 4, 32]: K is 16 for 16-bit values, 32 for 8-bit ones."""
    values = floats(words, kind)  # [warps, 4, 32, n]
    n = values.shape[-1]
    a = np.empty((len(values), 16, 8 * n))
    for register in range(4):
        for place in range(n):
            a[:, G + 8 * (register % 2), 4 * n * (register // 2) + n * T + place] = values[:, register, :, place]
    return a


def right(words, kind):
    """B [warps, K, 8] from [warps, registers, 32]."""
    values = floats(words, kind)
    n = values.shape[-1]
    b = np.empty((len(values), 4 * n * values.shape[1], 8))
    for register in range(values.shape[1]):
        for place in range(n):
            b[:, 4 * n * register + n * T + place, G] = values[:, register, :, place]
    return b


def sums(d):
    """Fragments [warps, 4, 32] of D [warps, 16, 8]."""
    return np.stack([d[:, G + 8 * (place // 2), 2 * T + place % 2] for place in range(4)], 1)


def whole(fragments):
    """The other way."""
    d = np.empty((len(fragments), 16, 8))
    for place in range(4):
        d[:, G + 8 * (place // 2), 2 * T + place % 2] = fragments[:, place]
    return d


def sparse(words, indices, selector, kind):
    """A [warps, 16, 32], half of it zeros, from [warps, 4, 32] and the indices [warps, 32] that two lanes of every
    four have."""
    values = floats(words, kind)
    a = np.zeros((len(values), 16, 32))
    for register in range(4):
        group = T + 4 * (register // 2)
        word = indices[:, 4 * G + 2 * selector + group // 4]
        nibble = word >> np.uint32(16 * (register % 2)) + (group % 4 * 4).astype(np.uint32) & np.uint32(15)
        if not np.isin(nibble, (0x4, 0x8, 0xC, 0x9, 0xD, 0xE)).all():
            raise Fault("indices are not in order")
        for half in range(2):
            column = 4 * group + (nibble >> np.uint32(2 * half) & np.uint32(3)).astype(np.int64)
            warp = np.arange(len(values))[:, None]
            a[warp, G + 8 * (register % 2), column] = values[:, register, :, half]
    return a


def summed(a, b, c, kind):
    """c + a b, float64 [.., m, n]. Products of e4m3 and the sum before them are cut off 13 bits below the largest's
    leading one, as "around 14 bits" are kept on Hopper (DeepSeek-V3, arXiv 2412.19437, section 3.3.2)."""
    if kind != "e4m3":
        return c + a @ b
    terms = np.concatenate([a[..., :, :, None] * b[..., None, :, :], c[..., :, None, :]], -2)
    _, exponent = np.frexp(np.abs(terms).max(-2, keepdims=True))
    last = np.ldexp(1.0, exponent - 14)
    return (np.trunc(terms / last) * last).sum(-2)


def mma(machine, opcode, d, a, b, c, *more):
    """mma.sync and mma.sp::ordered_metadata."""
    machine.whole_warps()
    shape, kind = opcode[-7], opcode[-3]
    if opcode[-6:-4] != ("row", "col") or opcode[-4] != "f32" or opcode[-3] != opcode[-2]:
        raise ValueError("these fragments are not there")
    words = fragments(machine, a)
    if more:
        if shape != "m16n8k32" or kind not in ("bf16", "f16"):
            raise ValueError("these fragments are not there")
        indices = fragments(machine, more[:1])[:, 0]
        rows = sparse(words, indices, int(more[1], 0), kind)
    else:
        if shape not in ("m16n8k16", "m16n8k32") or (shape == "m16n8k32") != (kind == "e4m3"):
            raise ValueError("these fragments are not there")
        rows = left(words, kind)
    before = whole(fragments(machine, c, np.float32).astype(np.float64))
    total = sums(summed(rows, right(fragments(machine, b), kind), before, kind))
    for place, register in enumerate(d):
        machine.put(register, total[:, place].astype(np.float32).ravel())


HOPPER, BLACKWELL = {0: 0, 1: 3, 2: 2, 3: 1}, {0: 0, 2: 3, 4: 2, 6: 1}
"""By a descriptor's upper bits: how many bits of the address are xored with those three above."""


def rows_at(descriptor, swizzle, rows, k, size, transposed):
    """Shared addresses [n, rows, k] of matrices of elements of `size` bytes, by matrix descriptors [n].
    transposed: rows lie next to each other, not k."""
    start = (descriptor & np.uint64(0x3FFF)).astype(np.int64) << 4
    leading = (descriptor >> np.uint64(16) & np.uint64(0x3FFF)).astype(np.int64) << 4
    stride = (descriptor >> np.uint64(32) & np.uint64(0x3FFF)).astype(np.int64) << 4
    if (descriptor >> np.uint64(49) & np.uint64(7)).any():
        raise ValueError("a base offset")
    width = 16 << swizzle  # bytes of a row of what is swizzled
    row, column = np.meshgrid(np.arange(rows), np.arange(k), indexing="ij")
    inner, outer = (row, column) if transposed else (column, row)
    inner = inner * size
    start, leading, stride = (one[:, None, None] for one in (start, leading, stride))
    at = start + outer % 8 * width + inner % width + outer // 8 * stride
    if transposed or not swizzle:
        at = at + inner // width * leading
    elif (inner >= width).any():
        raise ValueError("longer than what is swizzled")
    return at ^ ((at >> 7 & (1 << swizzle) - 1) << 4)


class Reads(Groups):
    """Shared memory that wgmma may still be reading, by warpgroup."""

    def start(self, shared, warpgroups, every):
        np.add.at(shared.busy, every, 1)
        self.begin(warpgroups, every.reshape(len(warpgroups), -1))

    def wait(self, shared, warpgroups, left):
        for _, every in self.done(warpgroups, left):
            np.subtract.at(shared.busy, every.ravel(), 1)


def wgmma(machine, opcode, *operands):
    if opcode[1] != "mma_async":
        warpgroups = np.unique(machine.lanes() // 128)
        if opcode[1] == "commit_group":
            machine.reads.close(warpgroups)
        elif opcode[1] == "wait_group":
            machine.reads.wait(machine.shared, warpgroups, int(operands[0], 0))
        return
    shape, kind = opcode[-4], opcode[-2]
    half = opcode[2] == "sp"
    if half:  # of A's values: which, in a register a thread
        d, a, b, indices, selector, accumulate, *flags = operands
        if opcode[-2] != "e4m3" or selector != "0":
            raise ValueError("this product is not there")
    else:
        d, a, b, accumulate, *flags = operands
    flags = [int(one, 0) for one in flags]
    if opcode[-3] != "f32" or opcode[-1] != kind or flags[:2] != [1, 1]:
        raise ValueError("this product is not there")
    groups = (
        machine.active.reshape(-1, 128) if machine.active is not None else np.ones((machine.count // 128, 128), bool)
    )
    if (groups.any(1) != groups.all(1)).any():
        raise Fault("a warpgroup is not together")
    # which operands lie transposed in shared memory: said of 16-bit ones that lie there
    of_a, of_b = (0, 0, *flags[2:])[-2:]
    n = int(shape.split("n")[1].split("k")[0])
    size = 1 if kind == "e4m3" else 2
    k = (64 if half else 32) // size
    chosen = np.flatnonzero(groups[:, 0])
    if half:
        rows = operand(machine, a, chosen, 64, k // 2, size, kind, False)
        rows = expanded(rows, np.broadcast_to(machine.get(indices, np.uint32), machine.count).reshape(-1, 128)[chosen])
    elif isinstance(a, tuple):
        rows = left(fragments(machine, a), kind).reshape(-1, 64, k)[chosen]
    else:
        rows = operand(machine, a, chosen, 64, k, size, kind, bool(of_a))
    columns = operand(machine, b, chosen, n, k, size, kind, bool(of_b))
    warps = (4 * chosen[:, None] + np.arange(4)).ravel()
    kept = np.broadcast_to(machine.get(accumulate, bool), machine.count).reshape(-1, 32)[warps]
    old = np.stack([machine.registers[one].view(np.float32).reshape(-1, 32)[warps] for one in d], 1)
    old = np.where(kept[:, None], old, 0).astype(np.float64)
    before = np.concatenate([whole(old[:, 4 * tile : 4 * tile + 4]) for tile in range(n // 8)], -1)
    total = summed(rows, columns.transpose(0, 2, 1), before.reshape(-1, 64, n), kind).reshape(-1, 16, n)
    for tile in range(n // 8):
        for place, values in enumerate(sums(total[:, :, 8 * tile : 8 * tile + 8]).transpose(1, 0, 2)):
            made = np.zeros((machine.count // 32, 32), np.float32)
            made[warps] = values
            machine.put(d[4 * tile + place], made.ravel())


def expanded(values, indices):
    """A [warpgroups, 64, 64], half of it zeros, from the values [warpgroups, 64, 32] and a word of indices a thread:
    thread 4 g + t of a warp has those of row g + 8 (t % 2), columns 32 (t // 2) on."""
    words = indices.reshape(-1, 4, 8, 2, 2).transpose(0, 1, 4, 2, 3).reshape(-1, 64, 2, 1)
    nibbles = (words >> np.arange(0, 32, 4, dtype=np.uint32) & np.uint32(15)).reshape(-1, 64, 16)
    a = np.zeros((len(values), 64, 16, 4))
    pairs = values.reshape(-1, 64, 16, 2)
    if not np.isin(nibbles[pairs.any(-1)], (0x4, 0x8, 0xC, 0x9, 0xD, 0xE)).all():
        raise Fault("indices are not in order")
    for half in range(2):
        at = (nibbles >> np.uint32(2 * half) & np.uint32(3)).astype(np.int64)[..., None]
        np.put_along_axis(a, at, np.take_along_axis(a, at, -1) + pairs[..., half : half + 1], -1)
    return a.reshape(-1, 64, 64)


def operand(machine, register, groups, rows, k, size, kind, transposed):
    """float64 [groups, rows, k] of shared memory."""
    descriptor = machine.registers[register].reshape(-1, 128)[groups]
    if (descriptor != descriptor[:, :1]).any():
        raise Fault("a warpgroup's threads differ in their descriptor")
    first = 128 * groups
    (mode,) = np.unique(descriptor >> np.uint64(62))
    at = rows_at(descriptor[:, 0], HOPPER[int(mode)], rows, k, size, transposed)
    values, every = read(machine, at, first, kind)
    machine.reads.start(machine.shared, groups, every)
    return values


def read(machine, at, threads, kind):
    """float64 of elements at shared addresses [n, rows, k] of the programs of threads [n], and their bytes' places."""
    size = 1 if kind == "e4m3" else 2
    programs, warps = (
        np.broadcast_to(one[threads][:, None, None], at.shape).ravel() for one in (machine.place, machine.warp)
    )
    found, every = machine.shared.operand(at.ravel(), size, programs, warps)
    found = found.reshape(at.shape)
    if kind == "e4m3":
        return E4M3[found], every
    return (bf16(found) if kind == "bf16" else found.view(np.float16)).astype(np.float64), every


class TensorMemory:
    """sm_100's: 128 lanes of 512 columns of 32 bits for each of some programs, full of NaN to begin with."""

    def __init__(self, programs):
        self.programs, self.words = programs, None
        self.taken = 0
        self.reading = []
        """(program, bytes of shared memory) of products that no commit was for."""

    def begin(self, columns):
        if self.words is None:
            self.words = np.full((self.programs, 128, 512), 0xFFFFFFFF, np.uint32)
        if self.taken + columns > 512:
            raise Fault("tensor memory is full")
        self.taken += columns
        return self.taken - columns


def tcgen05(machine, opcode, *operands):
    """Products of sm_100: done when they are given. Rows of A and D are lanes of tensor memory."""
    name = opcode[1]
    tensor, lanes = machine.tensor, machine.lanes()
    if name == "alloc":
        # by one warp of each program, alike in all
        machine.whole_warps()
        leaders = lanes[::32]
        base = np.full((1, len(leaders)), tensor.begin(int(operands[1], 0)), np.uint32)
        at = machine.address(operands[0], leaders)
        machine.shared.write(at, base, machine.place[leaders], machine.warp[leaders])
    elif name in ("st", "ld"):
        # st: where to, how far on the second half is, what; ld: what first
        registers = operands[-1] if name == "st" else operands[0]
        to, *half = operands[:-1] if name == "st" else operands[1:]
        machine.whole_warps()
        if opcode[-3] not in ("32x32b", "16x32bx2") or (opcode[-3] == "16x32bx2") != bool(half):
            raise ValueError("this shape is not there")
        at = machine.address(to, lanes)
        warp, inside = machine.thread[lanes] // 32 % 4, machine.thread[lanes] % 32
        if (at >> 16 != 32 * warp).any():
            raise Fault("a warp has only its own 32 lanes of tensor memory")
        lane, column = 32 * warp + inside, at & 0xFFFF
        if half:
            lane, column = 32 * warp + inside % 16, column + inside // 16 * int(half[0], 0)
        place = machine.place[lanes]
        if name == "st":
            for offset, values in enumerate(machine.words(registers, 4, lanes)):
                tensor.words[place, lane, column + offset] = values
        else:
            words = np.stack([tensor.words[place, lane, column + offset] for offset in range(len(registers))])
            machine.take(registers, words, lanes)
    elif name == "mma":
        product(machine, opcode, lanes, *operands)
    elif name == "commit":
        for thread, at in zip(lanes.tolist(), machine.address(operands[0], lanes).tolist(), strict=True):
            place = machine.place[thread]
            barrier = machine.barriers[place, at]
            barrier.reading += [every for program, every in tensor.reading if program == place]
            tensor.reading = [(program, every) for program, every in tensor.reading if program != place]
            barrier.arrive()
            machine.arrivals += 1
    elif name not in ("dealloc", "relinquish_alloc_permit", "wait::ld", "wait::st"):
        raise ValueError(f"tcgen05.{name} is not there")


def product(machine, opcode, threads, d, a, b, description, accumulate):
    """d += A B^T (or = where not to accumulate), as told by an instruction descriptor; one thread of a program."""
    tensor = machine.tensor
    (description,) = np.unique(machine.registers[description][threads]).tolist()
    kinds = {"kind::f16": ("f16", "bf16"), "kind::f8f6f4": ("e4m3",)}[opcode[-1]]
    left_kind, right_kind = (kinds[description >> shift & 7] for shift in (7, 10))
    n, m = (description >> 17 & 63) * 8, (description >> 24 & 31) * 16
    if description >> 4 & 3 != 1 or description & 0b1110000000001111 or left_kind != right_kind or m not in (64, 128):
        raise ValueError(f"instruction descriptor {description:#x} is not there")
    size = 1 if right_kind == "e4m3" else 2
    k = 32 // size
    place = machine.place[threads]
    # 64 rows: the first 16 of each warp's lanes
    lane = np.arange(m) if m == 128 else np.arange(m) // 16 * 32 + np.arange(m) % 16

    def shared(register, rows, transposed):
        descriptor = machine.registers[register][threads]
        (mode,) = np.unique(descriptor >> np.uint64(61))
        values, every = read(
            machine, rows_at(descriptor, BLACKWELL[int(mode)], rows, k, size, transposed), threads, right_kind
        )
        np.add.at(machine.shared.busy, every, 1)
        tensor.reading += list(zip(place.tolist(), every.reshape(len(threads), -1), strict=True))
        return values

    if isinstance(a, str):
        rows = shared(a, m, bool(description >> 15 & 1))
    else:
        column = machine.address(a, threads) & 0xFFFF
        words = np.stack([tensor.words[place, :, column + offset][:, lane] for offset in range(8)], -1)
        rows = floats(words, left_kind).reshape(len(threads), m, k)
    columns = shared(b, n, bool(description >> 16 & 1)).transpose(0, 2, 1)
    first = machine.address(d, threads) & 0xFFFF
    at = place[:, None, None], lane[None, :, None], first[:, None, None] + np.arange(n)
    keep = np.broadcast_to(machine.get(accumulate, bool), machine.count)[threads]
    before = np.where(keep[:, None, None], tensor.words[at].view(np.float32), 0).astype(np.float64)
    tensor.words[at] = (before + rows @ columns).astype(np.float32).view(np.uint32)
