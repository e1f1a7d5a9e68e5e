"""Triton kernel of `select24`: a program per row of W, and the pieces `prune_pack24` shares with it."""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cubin import Specimen
from .ewma import decays, tree_size
from .saliency import Terms

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
# Every rounding is the reference's: no multiply and add becomes one operation.
EXACT = {"enable_fp_fusion": False}


@triton.jit
def fours(x):
    """x [4 G] -> the four members of each group, [G] each."""
    groups: tl.constexpr = x.shape[0] // 4
    even, odd = tl.split(tl.reshape(x, [groups, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def from_fours(a, b, c, d):
    """The inverse of `fours`."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [a.shape[0] * 4])


@triton.jit
def load_row(row_ptr, at, k):
    return tl.load(row_ptr + at, mask=at < k, other=0).to(tl.float32)


@triton.jit
def power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def unit_powers(peak):
    """The two powers of two of `unit_scaled` for a vector whose largest magnitude is `peak`."""
    small = peak < 1.1754943508222875e-38
    # 2^24 makes a subnormal a normal number, and exactly
    bits = (peak * tl.where(small, 16777216.0, 1.0)).to(tl.int32, bitcast=True)
    exponent = tl.where(peak == 0, 0, 126 - (bits >> 23) + tl.where(small, 24, 0))
    half = exponent >> 1  # rounds down, as torch's // does
    return power_of_two(half), power_of_two(exponent - half)


@triton.jit
def row_powers(row_ptr, k, BLOCK: tl.constexpr):
    """`unit_powers` of a row."""
    peak = tl.zeros([BLOCK], tl.float32)
    block = 0
    while block * BLOCK < k:
        peak = tl.maximum(peak, tl.abs(load_row(row_ptr, block * BLOCK + tl.arange(0, BLOCK), k)))
        block += 1
    return unit_powers(tl.max(peak))


@triton.jit
def scored(w, at, k, first, second, channel_ptr, row, column_ptr, whole_ptr, SALIENCY: tl.constexpr):
    """`score_with` of a piece of a row; past its end everything is 0."""
    unit = w * first * second
    if SALIENCY != "magnitude":
        channel = tl.load(channel_ptr + at, mask=at < k, other=1)
    if SALIENCY == "contribution":
        score = unit * unit * channel
    elif SALIENCY == "rank_one":
        score = tl.div_rn(unit * unit, channel)
    elif SALIENCY == "relative":
        column = tl.load(column_ptr + at, mask=at < k, other=1)
        whole = w * tl.load(whole_ptr) * tl.load(whole_ptr + 1)
        score = (tl.div_rn(tl.abs(unit), row) + tl.div_rn(tl.abs(whole), column)) * channel
    else:
        score = tl.abs(unit)
    return score


@triton.jit
def two_of(x, y, z):
    return (x & y) | (z & (x | y))


@triton.jit
def best_two(a, b, c, d):
    """Which two of four are the largest, the lower index on ties."""
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
    return two_of(ab, ac, ad), two_of(~ab, bc, bd), two_of(~ac, ~bc, cd), two_of(~ad, ~bd, ~cd)


@triton.jit
def states(steps, entering, DECAY: tl.constexpr, LEVEL: tl.constexpr):
    """`_states` of the reference for one tree: steps [T], entering [1] -> the state before each step [T], and after
    the last [1]."""
    if steps.shape[0] == 1:
        before = entering
        after = steps + entering * DECAY[LEVEL]
    else:
        half: tl.constexpr = steps.shape[0] // 2
        left, right = tl.split(tl.reshape(steps, [half, 2]))
        entered, after = states(left * DECAY[LEVEL] + right, entering, DECAY, LEVEL + 1)
        before = tl.reshape(tl.join(entered, entered * DECAY[LEVEL] + left), [half * 2])
    return before, after


@triton.jit
def moved(x, at, mean, dev, mean_rate, dev_rate, MEAN_DECAY: tl.constexpr, DEV_DECAY: tl.constexpr):
    """`ewma` of x [T], entries `at` of a row, from the states [1] that enter: mean and dev before each entry, and the
    states that leave."""
    first = at == 0
    before, mean = states(tl.where(first, x, x * mean_rate), mean, MEAN_DECAY, 0)
    before = tl.where(first, x, before)
    distance = tl.abs(x - before)
    dev_before, dev = states(tl.where(first, x * 0.5, distance * dev_rate), dev, DEV_DECAY, 0)
    return before, tl.where(first, x * 0.5, dev_before), mean, dev


@triton.jit
def streamed(below_0, below_1, below_2):
    """First come, first pruned: which of four stay. Both of the first two below: the rest stays. One of them: with it
    goes the third if below, else the fourth. Neither: the last two have to go."""
    both = below_0 & below_1
    one = below_0 ^ below_1
    return ~below_0, ~below_1, both | (one & ~below_2), both | (one & below_2)


@triton.jit
def count4(a, b, c, d):
    return a.to(tl.int32) + b.to(tl.int32) + c.to(tl.int32) + d.to(tl.int32)


@triton.jit
def select24_kernel(
    w_ptr,
    channel_ptr,
    row_ptr,
    column_ptr,
    whole_ptr,
    mask_ptr,
    settled_ptr,
    k,
    mean_rate,
    dev_rate,
    lam,
    SALIENCY: tl.constexpr,
    SELECTION: tl.constexpr,
    MEAN_DECAY: tl.constexpr,
    DEV_DECAY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    w_ptr += n * k
    first, second = row_powers(w_ptr, k, BLOCK)
    row = 1.0
    if SALIENCY == "relative":
        row = tl.load(row_ptr + n)
    mean = tl.zeros([1], tl.float32)
    dev = tl.zeros([1], tl.float32)
    settled = tl.zeros([BLOCK // 4], tl.int32)
    block = 0
    while block * BLOCK < k:
        at = block * BLOCK + tl.arange(0, BLOCK)
        w = load_row(w_ptr, at, k)
        score = scored(w, at, k, first, second, channel_ptr, row, column_ptr, whole_ptr, SALIENCY)
        a, b, c, d = fours(score)
        group = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        if SELECTION == "ewma_streaming":
            before, deviation, mean, dev = moved(score, at, mean, dev, mean_rate, dev_rate, MEAN_DECAY, DEV_DECAY)
            e, f, g, h = fours(before + deviation * lam)
            e, f, g, h = a < e, b < f, c < g, d < h
            keep = streamed(e, f, g)
            settled += ((count4(e, f, g, h) == 2) & (group < k // 4)).to(tl.int32)
        else:
            keep = best_two(a, b, c, d)
            if SELECTION == "ewma":
                middle = ((a + b) + (c + d)) * 0.25
                before, deviation, mean, dev = moved(
                    middle, group, mean, dev, mean_rate, dev_rate, MEAN_DECAY, DEV_DECAY
                )
                above = before + deviation * lam
                count = count4(a > above, b > above, c > above, d > above)
                settled += ((count == 2) & (group < k // 4)).to(tl.int32)
        kept = from_fours(keep[0].to(tl.uint8), keep[1].to(tl.uint8), keep[2].to(tl.uint8), keep[3].to(tl.uint8))
        tl.store(mask_ptr + n * k + at, kept, mask=at < k)
        block += 1
    tl.store(settled_ptr + n, tl.sum(settled))


def launch(
    weight: Tensor,
    terms: Terms,
    saliency: str,
    selection: str,
    mean_rate: float,
    dev_rate: float,
    lam: float,
    mask: Tensor,
    settled: Tensor,
) -> None:
    """Fill mask bool [N, K] and settled int32 [N], groups settled in each row. Arguments as `select24`, of one of
    `KERNEL_DTYPES`, with the `terms` of its score."""
    rows, cols = weight.shape
    constants, options = _as_launched(cols, saliency, selection, mean_rate, dev_rate)
    tensors = (weight.contiguous(), *terms, mask.view(torch.uint8), settled)
    with torch.cuda.device_of(weight):
        select24_kernel[(rows,)](*tensors, cols, mean_rate, dev_rate, lam, **constants, **options)


def _as_launched(
    cols: int, saliency: str, selection: str, mean_rate: float, dev_rate: float
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    if selection == "exact":
        block = min(2048, triton.next_power_of_2(cols))
    else:  # one tree of the moving average a turn: over elements where streaming, else over groups
        block = tree_size(cols) if selection == "ewma_streaming" else 4 * tree_size(cols // 4)
    constants = {
        "SALIENCY": saliency,
        "SELECTION": selection,
        "MEAN_DECAY": decays(mean_rate),
        "DEV_DECAY": decays(dev_rate),
        "BLOCK": block,
    }
    return constants, EXACT | {"num_warps": 4 if selection == "exact" else 1}


def term_types(saliency: str) -> dict[str, str]:
    """Types of the `Terms` a saliency has, by the kernels' names for them."""
    used = {
        "magnitude": (),
        "contribution": ("channel_ptr",),
        "rank_one": ("channel_ptr",),
        "relative": ("channel_ptr", "row_ptr", "column_ptr", "whole_ptr"),
    }
    return dict.fromkeys(used[saliency], "*fp32")


def specimens(arch: int) -> list[Specimen]:
    return [
        _specimen(dtype, saliency, selection, cols)
        for dtype, saliency, selection, cols in (
            (torch.bfloat16, "contribution", "ewma", 96),
            (torch.bfloat16, "contribution", "ewma", 4096),  # the same kernel from 512 on, and exact from 2048 on
            (torch.bfloat16, "contribution", "ewma", 4100),
            (torch.bfloat16, "contribution", "ewma_streaming", 4096),
            (torch.bfloat16, "relative", "exact", 4096),
            (torch.float16, "relative", "ewma", 4096),
            (torch.float16, "relative", "ewma_streaming", 4096),
            (torch.float32, "rank_one", "ewma_streaming", 4096),
            (torch.float32, "magnitude", "ewma", 4096),
        )
    ]


def _specimen(dtype: torch.dtype, saliency: str, selection: str, cols: int) -> Specimen:
    constants, options = _as_launched(cols, saliency, selection, 1 / 8, 1 / 4)
    types = term_types(saliency)
    absent = {name: None for name in ("channel_ptr", "row_ptr", "column_ptr", "whole_ptr") if name not in types}
    numbers = dict.fromkeys(("mean_rate", "dev_rate", "lam"), "fp32")
    signature = {"w_ptr": TYPES[dtype], "mask_ptr": "*u8", "settled_ptr": "*i32", "k": "i32"} | numbers | types
    name = f"select24 {str(dtype).removeprefix('torch.')} {saliency} {selection} K={cols}"
    return Specimen(name, select24_kernel, signature, constants | absent, options, None if cols % 16 == 0 else ())
