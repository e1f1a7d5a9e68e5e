"""Time GPU work and refuse what computes wrongly.

A call is timed many times inside one CUDA graph, so that launches cost what they cost in a compiled model. The calls
rotate among input sets that together are several times the L2 cache: each finds its own set gone from it (cold L2).
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import cycle, islice
from typing import Any, NamedTuple, Protocol

import torch

Outputs = tuple[torch.Tensor, ...]
Call = Callable[[], torch.Tensor | Outputs]

# Relative Frobenius error allowed against float64 on the same operands: bfloat16 rounds the result to 2^-9.
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 5e-3, torch.float32: 1e-3}
# Of products of e4m3: Hopper's tensor cores keep about 14 bits of a sum and cut off the rest, which at K = 4096 has
# been seen to cost up to 2% of an element (arXiv 2412.19437, section 3.3.2), and more the longer the sum.
FP8_BOUND = 4e-2
# One wrong row of thousands hides in the norm of the whole: the worst row and column may stray by this much more.
WORST = 5.0
ROWS_AT_ONCE = 4096

SETS_TIMES_L2 = 3  # the sets together, so that a set has left the cache when its turn comes again
CALLS_TIMES_L2 = 12  # the calls of one graph together: long enough that starting it does not count
MOST_CALLS = 256
FEWEST, MOST = 7, 200  # samples
WARM_UP = 0.05  # seconds: a GPU that waited while something was compiled has lowered its clocks
NODES = 256


class Errors(NamedTuple):
    """Frobenius norms of the difference to the reference, relative to the reference's; those of the worst row and
    column relative to an average one."""

    whole: float
    row: float
    column: float

    def why_refused(self, bound: float) -> str:
        """Why such a result is wrong, or "". NaN never passes."""
        if not self.whole <= bound:
            return f"relative error {self.whole:.2e}, allowed {bound:.0e}"
        for name, error in (("row", self.row), ("column", self.column)):
            if not error <= WORST * bound:
                return f"relative error of the worst {name} {error:.2e}, allowed {WORST * bound:.0e}"
        return ""


def errors_of(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> Errors:
    """How far y [M, N] is from x [M, K] weight^T [N, K] in float64."""
    weight = weight.double().t()
    rows, columns = [], torch.zeros(y.shape[1], dtype=torch.float64, device=y.device)
    energy = torch.zeros((), dtype=torch.float64, device=y.device)
    for part, given in zip(y.split(ROWS_AT_ONCE), x.split(ROWS_AT_ONCE), strict=True):
        wanted = given.double() @ weight
        energy += wanted.square().sum()
        wrong = wanted.sub_(part.double()).square_()
        rows.append(wrong.sum(1))
        columns += wrong.sum(0)
    return _errors(torch.cat(rows), columns, energy)


def errors_between(y: torch.Tensor, wanted: torch.Tensor) -> Errors:
    """How far y is from `wanted`; a row is what the last dimension holds."""
    wanted = wanted.double().flatten(0, -2)
    wrong = (y.double().flatten(0, -2) - wanted).square()
    return _errors(wrong.sum(1), wrong.sum(0), wanted.square().sum())


def _errors(rows: torch.Tensor, columns: torch.Tensor, energy: torch.Tensor) -> Errors:
    worst_row, worst_column = rows.max() * len(rows), columns.max() * len(columns)  # max() keeps NaN
    return Errors(*((part / energy).sqrt().item() for part in (rows.sum(), worst_row, worst_column)))


@dataclass(frozen=True)
class Spread:
    """Microseconds of one call: median and quintiles of `samples` runs of `calls` calls each."""

    median_us: float
    p20_us: float
    p80_us: float
    samples: int


def spread(seconds: Sequence[float]) -> Spread:
    """Of at least two samples, in seconds."""
    p20, *_, p80 = statistics.quantiles(seconds, n=5, method="inclusive")
    return Spread(1e6 * statistics.median(seconds), 1e6 * p20, 1e6 * p80, len(seconds))


class Region(Protocol):
    """Calls made ready to be run as one, again and again."""

    first: Outputs
    """What the first call writes, at every run into the same memory."""
    calls: int
    note: str
    """Why the calls are not replayed from a graph, or ""."""

    def run(self) -> None: ...

    def sample(self, seconds: float) -> list[float]:
        """Seconds of one call in each of many runs."""
        ...


class Clock(Protocol):
    """Makes regions on a device."""

    device: torch.device
    l2_bytes: int

    def region(self, calls: Sequence[Call], length: int) -> Region:
        """`length` calls, going round `calls`."""
        ...

    def check_alive(self) -> None:
        """Raises GpuLost where the device no longer answers."""
        ...


class GpuLost(RuntimeError):
    """An error that ends every further use of the GPU in this process."""


class CudaRegion:
    """A CUDA graph of calls, or, where they cannot be captured, the calls."""

    def __init__(self, calls: Sequence[Call], length: int):
        self.calls, self.note = length, ""
        self._work = list(islice(cycle(calls), length))
        self._graph: torch.cuda.CUDAGraph | None = None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # compilation, library handles and algorithm searches belong here, not into the capture
        with torch.cuda.stream(stream):
            for call in (calls[0], calls[0], *calls):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.note = _why_not_captured(calls[0])
        if not self.note:
            graph = torch.cuda.CUDAGraph()
            try:
                # the outer one puts the current stream back where ending the capture fails
                with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
                    self.first = self._all()
                self._graph = graph
            except RuntimeError as error:
                self.note = one_line(error)
        if self.note:
            torch.cuda.synchronize()
            self.first = self._all()
        torch.cuda.synchronize()

    def _all(self) -> Outputs:
        # the first output stays alive: no later call of the graph writes into its memory
        first = self._work[0]()
        for call in self._work[1:]:
            call()
        return first if isinstance(first, tuple) else (first,)

    def run(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            self.first = ()  # freed, so that the next allocation of that size gets its memory, with what is in it
            self.first = self._all()

    def sample(self, seconds: float) -> list[float]:
        end = time.perf_counter() + WARM_UP
        while True:
            self.run()
            torch.cuda.synchronize()
            if time.perf_counter() >= end:
                break
        (once,) = self._timed(1)
        return [taken / self.calls for taken in self._timed(min(MOST, max(FEWEST, int(seconds / max(once, 1e-6)))))]

    def _timed(self, runs: int) -> list[float]:
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
        for start, end in marks:
            start.record()
            self.run()
            end.record()
        torch.cuda.synchronize()
        return [1e-3 * start.elapsed_time(end) for start, end in marks]


def _why_not_captured(call: Call) -> str:
    """Why a call that waits for the GPU cannot be captured, or "": found out beforehand, because a capture that fails
    leaves the generator of random numbers and the allocator believing that it goes on."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return one_line(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


class CudaClock:
    """Times on the current CUDA device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size

    def region(self, calls: Sequence[Call], length: int) -> Region:
        return CudaRegion(calls, length)

    def check_alive(self) -> None:
        try:
            torch.cuda.synchronize()
            torch.ones(1, device=self.device).item()
        except RuntimeError as error:
            raise GpuLost(one_line(error)) from error


@cache
def generator(device: torch.device) -> torch.Generator:
    """Random numbers of our own: the default generator is no use any more once a capture has failed."""
    return torch.Generator(device).manual_seed(0)


def normal(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Fresh random numbers, standard normal."""
    return torch.randn(tuple(shape), dtype=dtype, device=device, generator=generator(device))


def rotation(bytes_per_call: int, l2_bytes: int) -> tuple[int, int]:
    """How many input sets, and how many calls in one graph, for calls that read and write so many bytes."""
    sets = min(max(2, math.ceil(SETS_TIMES_L2 * l2_bytes / bytes_per_call)), MOST_CALLS)
    return sets, max(sets, min(MOST_CALLS, math.ceil(CALLS_TIMES_L2 * l2_bytes / bytes_per_call)))


def measured(
    clock: Clock, calls: Sequence[Call], length: int, why_wrong: Callable[[Outputs], str], seconds: float
) -> dict[str, Any]:
    """One line of results: {"status": "ok", median_us, ...}, {"status": "wrong", "error"} or {"status": "failed",
    "error"}. A speed is there only where the output was right before and after it was timed, each time written over
    NaN (integers: their largest value). Raises GpuLost.

    why_wrong: of the first call's outputs, why they are wrong, or "".
    """
    try:
        region = clock.region(calls, length)
        samples: list[float] = []
        for when in ("before", "after"):
            _poison(region.first)
            region.run()
            if why := why_wrong(region.first):
                return {"status": "wrong", "error": why}
            if when == "before":
                samples = region.sample(seconds)
    except Exception as error:  # whatever a contender raises is its result
        clock.check_alive()
        return {"status": "failed", "error": one_line(error)}
    return {"status": "ok", **asdict(spread(samples)), "calls": region.calls, "not_replayed": region.note}


def _poison(outputs: Outputs) -> None:
    for output in outputs:
        # 0xFF is no pair of indices either, and in e4m3 it is NaN
        output.fill_(math.nan) if output.is_floating_point() else output.fill_(torch.iinfo(output.dtype).max)


def one_line(error: BaseException) -> str:
    """An exception as one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def copy_bandwidth(clock: Clock, size: int, seconds: float = 0.5) -> float:
    """Bytes per second, read and written, of a copy of `size` bytes on the device: the ceiling of what moves bytes."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=clock.device, generator=generator(clock.device))
    target = torch.empty_like(source)
    region = clock.region([lambda: target.copy_(source)], 1)
    return 2 * size / (1e-6 * spread(region.sample(seconds)).median_us)


def matrix_rate(clock: Clock, size: int, seconds: float = 0.5) -> float:
    """Operations per second of a bf16 product of two random [size, size]: the ceiling of what multiplies."""
    a, b = (normal((size, size), torch.bfloat16, clock.device) for _ in range(2))
    region = clock.region([lambda: a @ b], 1)
    return 2 * size**3 / (1e-6 * spread(region.sample(seconds)).median_us)


def node_us(clock: Clock, seconds: float = 0.05) -> float:
    """Microseconds of a kernel that does next to nothing, in a chain of such in a graph: what of a kernel's time is no
    work of its own."""
    one = torch.zeros(1, device=clock.device)
    return spread(clock.region([lambda: one.add_(1)], NODES).sample(seconds)).median_us
