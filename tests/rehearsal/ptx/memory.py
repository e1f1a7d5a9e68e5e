"""What the threads of a launch read and write: memory of the process as global memory, and shared memory of programs.

Both refuse what compute-sanitizer's memcheck and racecheck report: addresses outside of what the launch was given or
not aligned to their width, and shared bytes that two warps touch, one of them writing, with no barrier in between.
"""

import ctypes

import numpy as np

WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: None, 32: None}
SEVERAL = -2
SHARED_BASE = 1024
"""Where a program's shared memory begins: a multiple of what the widest swizzle wants."""


class Fault(RuntimeError):
    """What a GPU, or compute-sanitizer on one, would stop a kernel for."""


def split(places):
    """Each number among them, and where it is."""
    if (places == places[0]).all():
        return [(int(places[0]), slice(None))]
    return [(place, places == place) for place in np.unique(places)]


class GlobalMemory:
    """Ranges of this process's memory: [(first address, one past the last)]."""

    def __init__(self, ranges):
        self.ranges = sorted({(first, end) for first, end in ranges if end > first})
        self.firsts = np.array([first for first, _ in self.ranges], np.int64)
        self.ends = np.array([end for _, end in self.ranges], np.int64)
        self.views = {}

    def _view(self, width, place):
        """All of a range in words of `width` bytes, and where it begins: both on a multiple of 16."""
        if (width, place) not in self.views:
            first, end = self.ranges[place]
            first, end = first // 32 * 32, -(-end // 32) * 32
            raw = (ctypes.c_uint8 * (end - first)).from_address(first)
            self.views[width, place] = np.frombuffer(raw, WORDS[width]), first
        return self.views[width, place]

    def _places(self, addresses, width):
        if (addresses % width).any():
            raise Fault(f"an address is not aligned to its {width} bytes")
        places = np.searchsorted(self.firsts, addresses, "right") - 1
        inside = (places >= 0) & (addresses + width <= self.ends[places])
        if not inside.all():
            outside = int(addresses[~inside][0])
            raise Fault(f"{hex(outside)}, {width} bytes, is not in the memory of any argument")
        return places

    def read(self, addresses, width, count):
        """Words of `width` bytes [count, n] from addresses [n]."""
        addresses = addresses.astype(np.int64)
        places = self._places(addresses, width * count)
        out = np.empty((count, len(addresses)), WORDS[width])
        for place, chosen in split(places):
            view, first = self._view(width, place)
            at = (addresses[chosen] - first) // width
            for word in range(count):
                out[word, chosen] = view[at + word]
        return out

    def write(self, addresses, words):
        """words [count, n] to addresses [n]."""
        addresses, width = addresses.astype(np.int64), words.itemsize
        places = self._places(addresses, width * len(words))
        for place, chosen in split(places):
            view, first = self._view(width, place)
            at = (addresses[chosen] - first) // width
            for word, values in enumerate(words):
                view[at + word] = values[chosen]


traffic = None
"""Where a list, every access to shared memory adds what it takes and what the same bytes would take at best."""


def note(addresses, width, warps):
    """Wavefronts: one word from each of 32 banks. Accesses of 16 bytes go by eight threads, of 8 bytes by 16."""
    at_once = min(32, 128 // max(width, 4))
    words = addresses[:, None] // 4 + np.arange(-(-width // 4))
    for warp in np.unique(warps):
        mine = words[warps == warp]
        parts = [np.unique(mine[first : first + at_once]) for first in range(0, len(mine), at_once)]
        traffic.append((sum(np.bincount(part % 32).max() for part in parts), -(-len(np.unique(mine)) // 32)))


class SharedMemory:
    """`size` bytes for each of some programs, full of NaN (0xFF) to begin with. checked: races are looked for."""

    def __init__(self, programs, size, checked=True):
        self.checked = checked
        self.size = SHARED_BASE + -(-size // 16) * 16
        total = programs * self.size
        self.bytes = np.full(total, 0xFF, np.uint8)
        self.views = {width: self.bytes.view(kind) for width, kind in WORDS.items() if kind}
        # by byte: the turn (number of barriers passed) and the warp of the last write and of the last read
        self.turn = np.zeros(programs, np.int32)
        self.written, self.writer = np.full(total, -1, np.int32), np.full(total, -1, np.int32)
        self.was_read, self.reader = np.full(total, -1, np.int32), np.full(total, -1, np.int32)
        self.pending = np.zeros(total, bool)
        self.unfenced = np.zeros(total, bool)
        """Written, and not yet for tensor cores to see."""
        self.busy = np.zeros(total, np.int16)
        """How many products of tensor cores may still be reading a byte."""

    def barrier(self, programs):
        self.turn[programs] += 1

    def fence(self, warps):
        """What these warps wrote tensor cores may read (fence.proxy.async)."""
        self.unfenced &= ~np.isin(self.writer, warps)

    def operand(self, addresses, width, programs, warps):
        """Words [n] for tensor cores, and their bytes."""
        at = self._at(addresses, width, programs)
        every, _, _ = self._looked_at(at, width, programs, warps)
        if self.checked and self.unfenced[every].any():
            raise Fault("tensor cores read what was written with no fence.proxy.async after it")
        return self.views[width][at // width], every

    def _at(self, addresses, width, programs):
        addresses = addresses.astype(np.int64)
        if (addresses % width).any():
            raise Fault(f"a shared address is not aligned to its {width} bytes")
        outside = (addresses + width > self.size) | (addresses < SHARED_BASE)
        if outside.any():
            at, size = int(addresses[outside][0]) - SHARED_BASE, self.size - SHARED_BASE
            raise Fault(f"shared address {at}, {width} bytes, of {size} bytes")
        return addresses + programs * self.size

    def _looked_at(self, at, size, programs, warps):
        """The bytes of `size` from each place [n] on, and by byte the warp that reads and its turn."""
        every = (at[:, None] + np.arange(size)).ravel()
        warps, turn = np.repeat(warps, size), np.repeat(self.turn[programs], size)
        if not self.checked:
            return every, warps, turn
        if self.pending[every].any():
            raise Fault("shared memory is read before the copy to it was waited for")
        if ((self.written[every] == turn) & (self.writer[every] != warps)).any():
            raise Fault("a race: shared memory is read that another warp wrote, with no barrier in between")
        return every, warps, turn

    def read(self, addresses, width, count, programs, warps):
        """Words [count, n] from addresses [n] of the programs [n], for the warps [n] (numbered through)."""
        at = self._at(addresses, width * count, programs)
        if traffic is not None:
            note(addresses.astype(np.int64), width * count, warps)
        every, warps, turn = self._looked_at(at, width * count, programs, warps)
        others = (self.was_read[every] == turn) & (self.reader[every] != warps)
        self.reader[every], self.was_read[every] = np.where(others, SEVERAL, warps), turn
        # several warps at once
        self.reader[every[self.reader[every] != warps]] = SEVERAL
        return np.stack([self.views[width][at // width + word] for word in range(count)])

    def write(self, addresses, words, programs, warps):
        width, count = words.itemsize, len(words)
        at = self._at(addresses, width * count, programs)
        if traffic is not None:
            note(addresses.astype(np.int64), width * count, warps)
        for word, values in enumerate(words):
            self.claim(at + word * width, values, warps, self.turn[programs])
            self.views[width][at // width + word] = values

    def claim(self, at, values, warps, turn):
        """Warps [n] write words [n] at [n]: bytes that others touched since the last barrier must stay as they are."""
        if not self.checked:
            return
        width = values.itemsize
        every = (at[:, None] + np.arange(width)).ravel()
        warps, turn = np.repeat(warps, width), np.repeat(turn, width)
        touched = (self.was_read[every] == turn) & (self.reader[every] != warps)
        touched |= (self.written[every] == turn) & (self.writer[every] != warps)
        if (touched & (self.bytes[every] != np.ascontiguousarray(values).view(np.uint8))).any() or (
            self.pending[every].any()
        ):
            raise Fault("a race: shared memory is written that another warp touched, with no barrier in between")
        if self.busy[every].any():
            raise Fault("a race: shared memory is written that tensor cores may be reading")
        self.written[every], self.writer[every], self.unfenced[every] = turn, warps, True
        if (self.writer[every] != warps).any() and not (  # several warps at once: the same, or a race
            self._agree(every, values)
        ):
            raise Fault("a race: two warps write different values to the same shared memory")

    @staticmethod
    def _agree(every, values):
        order = np.argsort(every, kind="stable")
        place, value = every[order], np.ascontiguousarray(values).view(np.uint8)[order]
        return not ((place[1:] == place[:-1]) & (value[1:] != value[:-1])).any()


class Groups:
    """What is under way in groups that threads, or warpgroups, close and wait for."""

    def __init__(self, members):
        self.closed = np.zeros(members, np.int64)
        """How many each has closed."""
        self.under_way = []

    def begin(self, members, *parts):
        """parts: arrays [n, ...] of what the members [n] begin."""
        self.under_way.append((self.closed[members], members, *parts))

    def close(self, members):
        self.closed[members] += 1

    def done(self, members, left):
        """(members, *parts) of what `members` began, but for their last `left` groups: no longer under way."""
        chosen = np.zeros(len(self.closed), bool)
        chosen[members] = True
        ended, rest = [], []
        for group, began, *parts in self.under_way:
            done = chosen[began] & (group < self.closed[began] - left)
            ended.append([part[done] for part in (began, *parts)])
            if not done.all():
                rest.append([part[~done] for part in (group, began, *parts)])
        self.under_way = rest
        return ended


class Copies(Groups):
    """cp.async: bytes on their way from global to shared memory, by thread."""

    def start(self, shared, threads, at, data, warps, turn):
        """data [n, width] to the bytes from at [n] on."""
        if traffic is not None:
            note(at, data.shape[1], warps)
        every = at[:, None] + np.arange(data.shape[1])
        shared.claim(every.ravel(), data.ravel(), np.repeat(warps, data.shape[1]), np.repeat(turn, data.shape[1]))
        shared.pending[every] = True
        self.begin(threads, every, data, warps)

    def wait(self, shared, threads, left, programs):
        for began, every, data, warps in self.done(threads, left):
            shared.pending[every] = False
            shared.bytes[every] = data
            # tensor cores see it without a fence: CUTLASS's loops of cp.async have none, nor has Triton before 3.9
            shared.unfenced[every] = False
            shared.written[every] = shared.turn[programs[began], None]
            shared.writer[every] = warps[:, None]
