"""A model, not a measurement: the bytes and operations of every op at every shape, and the floor under its time.

W is [N, K], x is [M, K], y is [M, N]; x and y are bf16 in memory. Every byte crosses the memory bus once, at the
datasheet's bandwidth, with a cold L2; every operation runs at the datasheet's dense (or 2:4 sparse) speed; launches
cost nothing. Real kernels take longer. Steps of an op run one after the other, what a step does runs at once.
"""

from collections.abc import Callable, Iterable, Mapping
from math import ceil
from typing import NamedTuple

from .gpus import Gpu

# Linears of one decoder layer, (N, K), from each model's config.json on the Hugging Face hub: hidden_size,
# intermediate_size, num_key_value_heads x head_dim.


def _decoder(hidden: int, keys: int, feed_forward: int) -> dict[str, tuple[int, int]]:
    return {
        "q_proj": (hidden, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (feed_forward, hidden),
        "up_proj": (feed_forward, hidden),
        "down_proj": (hidden, feed_forward),
    }


MODELS: Mapping[str, Mapping[str, tuple[int, int]]] = {
    "llama-3-8b": _decoder(4096, 1024, 14336),
    "qwen2.5-7b": _decoder(3584, 512, 18944),
    "llama-3.2-1b": _decoder(2048, 512, 8192),
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)

# Thread instructions per weight, kept or pruned, to bring it from packed to what the tensor cores take: counted in the
# SASS of gemv24's inner loop on sm_90, and in the assembly of tiles24's expansions.
GEMV = 2.0
EXPAND = 2.75
EXPAND_FP8 = 0.8
# Rows of x that one such effort serves
GEMV_ROWS = 8
TILE_ROWS = 128


class Work(NamedTuple):
    """What one step moves and does."""

    bytes: float
    flops: float = 0
    rate: str = "bf16"
    """Which of Gpu's speeds the flops run at."""
    instructions: float = 0
    """Thread instructions, where their number may bound the step."""


class Floor(NamedTuple):
    """The least time a step, an op or a sum of them can take, in seconds. A model."""

    bytes: float
    flops: float
    memory_s: float
    math_s: float
    issue_s: float
    seconds: float
    bound: str
    """What it waits for: "memory", "math" (tensor cores) or "issue" (slots for instructions); of a sum, most of it."""


def _activations(m: int, n: int, k: int) -> int:
    return 2 * m * k + 2 * m * n


def _rows(m: int, n: int, k: int) -> Work:
    """bf16 x to e4m3 and a float32 scale per row."""
    return Work(2 * m * k + m * k + 4 * m)


def _from_rows(weight: float, m: int, n: int, k: int, rate: str, instructions: float = 0) -> Work:
    """The product of quantized rows with `weight` bytes of weight."""
    return Work(m * k + 4 * m + weight + 2 * m * n, 2 * m * n * k, rate, instructions)


def packed_bytes(n: int, k: int) -> int:
    """Bytes of a packed weight: values, indices, and a float32 scale per row."""
    return n * k // 2 + n * k // 8 + 4 * n


Steps = Mapping[str, Work]
OPS: Mapping[str, Callable[[int, int, int], Steps]] = {
    "bf16": lambda m, n, k: {"product": Work(_activations(m, n, k) + 2 * n * k, 2 * m * n * k, "bf16")},
    # dense FP8, a scale per row of x and of W
    "fp8_dynamic": lambda m, n, k: {
        "quantize_rows": _rows(m, n, k),
        "product": _from_rows(n * k + 4 * n, m, n, k, "fp8"),
    },
    "fp8_weight_only": lambda m, n, k: {
        "product": Work(_activations(m, n, k) + n * k + 4 * n, 2 * m * n * k, "bf16"),
    },
    # a bf16 scale and zero for every 128 weights, torchao's default
    "int4_weight_only": lambda m, n, k: {
        "product": Work(_activations(m, n, k) + n * k / 2 + 4 * n * k / 128, 2 * m * n * k, "bf16"),
    },
    # ours, 16-bit activations: on sparse tensor cores a few rows at a time, and expanded to dense
    "gemv": lambda m, n, k: {
        "product": Work(
            _activations(m, n, k) + packed_bytes(n, k),
            2 * m * n * k,
            "sparse_bf16",
            n * k * GEMV * ceil(m / GEMV_ROWS),
        ),
    },
    "tiles": lambda m, n, k: {
        "product": Work(
            _activations(m, n, k) + packed_bytes(n, k), 2 * m * n * k, "bf16", n * k * EXPAND * ceil(m / TILE_ROWS)
        ),
    },
    # ours, FP8 activations: expanded to dense, and on sparse tensor cores (cuSPARSELt, CUTLASS)
    "tiles_fp8": lambda m, n, k: {
        "quantize_rows": _rows(m, n, k),
        "product": _from_rows(packed_bytes(n, k), m, n, k, "fp8", n * k * EXPAND_FP8 * ceil(m / TILE_ROWS)),
    },
    "sparse_fp8": lambda m, n, k: {
        "quantize_rows": _rows(m, n, k),
        "product": _from_rows(packed_bytes(n, k), m, n, k, "sparse_fp8"),
    },
    "quantize_rows": lambda m, n, k: {"quantize_rows": _rows(m, n, k)},
    # on the weight alone, whatever M: bf16 W and float32 sums of squares to a bool mask, or to a packed weight
    "select24": lambda m, n, k: {"select": Work(2 * n * k + 4 * k + n * k)},
    "prune_pack24": lambda m, n, k: {"prune_pack": Work(2 * n * k + 4 * k + packed_bytes(n, k))},
}
DENSE_FP8 = ("fp8_dynamic", "fp8_weight_only")
OURS = ("gemv", "tiles", "tiles_fp8", "sparse_fp8")
OURS_16BIT = OURS[:2]
"""Those that multiply activations as they are."""


def steps(op: str, m: int, n: int, k: int, gpu: Gpu) -> dict[str, Floor]:
    """The floor under each step of an op of OPS. Raises KeyError for an unknown op, ValueError for a shape without
    rows, columns or with K not a multiple of 8."""
    if min(m, n, k) < 1 or k % 8:
        raise ValueError(f"no such product: M = {m}, N = {n}, K = {k}")
    return {name: _step(work, gpu) for name, work in OPS[op](m, n, k).items()}


def floor(op: str, m: int, n: int, k: int, gpu: Gpu) -> Floor:
    """The floor under an op of OPS: the sum of its steps. Raises as `steps` does."""
    return total(steps(op, m, n, k, gpu).values())


def layer(op: str, m: int, model: str, gpu: Gpu) -> Floor:
    """The floor under an op summed over the linears of a decoder layer of MODELS, each on its own."""
    return total(floor(op, m, n, k, gpu) for n, k in MODELS[model].values())


def best(ops: Iterable[str], m: int, model: str, gpu: Gpu) -> Floor:
    """The same with the fastest of `ops` for each linear."""
    return total(
        min((floor(op, m, n, k, gpu) for op in ops), key=lambda one: one.seconds) for n, k in MODELS[model].values()
    )


def ratios(m: int, model: str, gpu: Gpu) -> tuple[float, float]:
    """How many times faster than bf16, and than the best dense FP8, the best of ours could be: floor over floor."""
    ours = best(OURS, m, model, gpu).seconds
    return layer("bf16", m, model, gpu).seconds / ours, best(DENSE_FP8, m, model, gpu).seconds / ours


def _step(work: Work, gpu: Gpu) -> Floor:
    memory = work.bytes / gpu.bandwidth
    math = work.flops / getattr(gpu, work.rate)
    issue = work.instructions / gpu.instructions
    seconds, bound = max((memory, "memory"), (math, "math"), (issue, "issue"))
    return Floor(work.bytes, work.flops, memory, math, issue, seconds, bound)


def total(floors: Iterable[Floor]) -> Floor:
    """One after the other."""
    floors = list(floors)
    waits = {bound: sum(one.seconds for one in floors if one.bound == bound) for bound in ("memory", "math", "issue")}
    return Floor(
        sum(one.bytes for one in floors),
        sum(one.flops for one in floors),
        sum(one.memory_s for one in floors),
        sum(one.math_s for one in floors),
        sum(one.issue_s for one in floors),
        sum(one.seconds for one in floors),
        max(waits, key=waits.__getitem__),
    )
