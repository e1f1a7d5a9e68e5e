"""What Hopper added: programs in clusters, mbarriers, and copies of boxes of tensors that arrive at them.

A tensor map here is plain fields (MAP): what the driver's cuTensorMapEncodeTiled makes of them is not published.
"""

import ctypes

import numpy as np

MAP = np.dtype("u8, 4u8, 5u4, 5u2, u1, u1, u1")
MAP.names = "base", "strides", "sizes", "box", "size", "rank", "swizzle"
"""base: address; strides: bytes, of all dimensions but the first; sizes, box: elements of `size` bytes; swizzle: how
many bits of a shared address are xored with those three above."""
RANK = 24
"""Of a shared address in a cluster: the bits from here on say whose it is, 0 one's own, else a rank and one."""


class Held(int):
    """The address of a parameter that is more than one number."""


def clusters(programs, grid, cluster):
    """Programs of one cluster at a time, in the order of their ranks."""
    x, y, z = (size // by for size, by in zip(grid, cluster, strict=True))
    boxes = programs.reshape(z, cluster[2], y, cluster[1], x, cluster[0]).transpose(0, 2, 4, 1, 3, 5)
    return boxes.reshape(x * y * z, -1)


class Barrier:
    """An mbarrier: `count` arrivals, and the bytes they said to expect, end a phase."""

    def __init__(self, count):
        self.count, self.left, self.missing, self.phase = count, count, 0, 0
        self.reading = []
        """Bytes of shared memory that products read that were to end in the phases before."""

    def arrive(self, threads=1, copied=0):
        self.left -= threads
        self.missing -= copied
        if not self.left and not self.missing:
            self.left, self.phase = self.count, self.phase + 1

    def passed(self, shared):
        for every in self.reading:
            np.subtract.at(shared.busy, every, 1)
        self.reading.clear()


def mbarrier(machine, opcode, *operands):
    """Returns which threads [bool] have to wait, or None."""
    lanes = machine.lanes()
    name = opcode[1]
    to = operands[0] if name in ("arrive", "try_wait") else "_"
    address, *number = operands[1:] if name in ("arrive", "try_wait") else operands
    places, at = owners(machine, lanes, machine.address(address, lanes))
    keys = list(zip(places.tolist(), at.tolist(), strict=True))
    number = np.broadcast_to(machine.get(number[0] if number else "1", np.uint32), machine.count)[lanes].tolist()
    if name == "init":
        for key, count in zip(keys, number, strict=True):
            machine.barriers[key] = Barrier(count)
    elif name == "inval":
        for key in keys:
            del machine.barriers[key]
    elif name == "arrive" and to == "_":
        for key, count in zip(keys, number, strict=True):
            if "expect_tx" in opcode:
                machine.barriers[key].arrive(copied=-count, threads=1)
            else:
                machine.barriers[key].arrive(count)
        machine.arrivals += 1
    elif opcode[1:3] == ("try_wait", "parity"):
        done = np.array([machine.barriers[key].phase % 2 != one for key, one in zip(keys, number, strict=True)])
        for key in {key for key, one in zip(keys, done, strict=True) if one}:
            machine.barriers[key].passed(machine.shared)
        there = np.zeros(machine.count, bool)
        there[lanes[done]] = True
        machine.put(to, there)
        if not done.all():
            return (machine.everyone if machine.active is None else machine.active) & ~there
    else:
        raise ValueError("this use of a barrier is not there")
    return None


def owners(machine, lanes, addresses):
    """Shared addresses in a cluster: the program each is of, and the address there."""
    rank = addresses >> RANK
    return np.where(rank > 0, rank - 1, machine.place[lanes]), addresses & ((1 << RANK) - 1)


class Box:
    """A box of a tensor: where its elements lie."""

    def __init__(self, machine, tensor, lane):
        pointer = int(np.broadcast_to(machine.registers[tensor.base], machine.count)[lane])
        given = np.frombuffer(ctypes.string_at(pointer, MAP.itemsize), MAP)[0]
        rank, self.size, self.swizzle = int(given["rank"]), int(given["size"]), int(given["swizzle"])
        first = [int(np.broadcast_to(machine.get(one, np.int32), machine.count)[lane]) for one in tensor.coordinates]
        box = given["box"][:rank].astype(np.int64)
        if self.swizzle and box[0] * self.size > 16 << self.swizzle:
            raise ValueError("a box wider than what is swizzled")
        at = [one.ravel() + start for one, start in zip(np.indices(box[::-1])[::-1], first, strict=True)]
        strides = [self.size, *given["strides"][: rank - 1].astype(np.int64)]
        self.addresses = int(given["base"]) + sum(one * stride for one, stride in zip(at, strides, strict=True))
        sizes = given["sizes"][:rank]
        self.inside = np.logical_and.reduce([(one >= 0) & (one < size) for one, size in zip(at, sizes, strict=True)])

    def shared(self, start):
        """Places of all bytes [elements, size] of a box that begins at a shared address."""
        at = start + np.arange(len(self.addresses)) * self.size
        at = at ^ ((at >> 7 & (1 << self.swizzle) - 1) << 4)
        return at[:, None] + np.arange(self.size)


def copy(machine, opcode, *operands):
    """cp.async.bulk.tensor, done when it is given; what lies outside of the tensor is zero, and never written."""
    for lane in machine.lanes():
        if opcode[5] == "global":  # to global memory; of a warp that is together one thread does it
            tensor, source = operands
            if lane != machine.lanes()[0] and machine.warp[lane] == machine.warp[lane - 1]:
                continue
            box = Box(machine, tensor, lane)
            start = int(machine.address(source, np.array([lane]))[0]) + machine.place[lane] * machine.shared.size
            found = machine.shared.bytes[box.shared(start)]
            words = found.view(f"u{box.size}")[:, 0]
            if box.inside.any():
                machine.memory.write(box.addresses[box.inside], words[None, box.inside])
            continue
        to, tensor, barrier, *rest = operands
        box = Box(machine, tensor, lane)
        found = np.zeros((1, len(box.addresses)), f"u{box.size}")
        if box.inside.any():
            found[:, box.inside] = machine.memory.read(box.addresses[box.inside], box.size, 1)
        start, arrived = (int(machine.address(one, np.array([lane]))[0]) for one in (to, barrier))
        whom = [int(machine.place[lane])]
        if "multicast::cluster" in opcode:
            mask = int(np.broadcast_to(machine.get(rest[0], np.uint16), machine.count)[lane])
            whom = [place for place in range(16) if mask >> place & 1]
        for place in whom:
            every = box.shared(start)
            machine.shared._at(every.ravel(), 1, place)  # is it in bounds?
            machine.shared.bytes[every + place * machine.shared.size] = found[0, :, None].view(np.uint8)
            machine.barriers[place, arrived].arrive(0, copied=found.nbytes)
        machine.arrivals += 1
