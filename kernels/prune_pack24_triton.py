"""Triton kernel of `prune_pack24`: a program per row of W.

A row is gone through for its power of two, for what stays (the indices, and the largest of it: the scale), and for the
values. Only the first time comes from memory; the indices are read back as they were written.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cubin import Specimen
from .launching import kernel_arch
from .saliency import Terms
from .select24_triton import EXACT, TYPES, best_two, count4, fours, load_row, row_powers, scored, term_types


@triton.jit
def e4m3_bits(x):
    """x float32, |x| <= 448 -> its e4m3 bits as int32: to the nearest, ties to even; zero without a sign."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # normal: 20 of 23 bits of the mantissa go, and the exponent's bias from 127 to 7
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # below 2^-6 values are 2^-9 apart, as float32 is from 2^14 to 2^15
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    rounded = tl.where(size < 0x3C800000, small, normal)
    return rounded | tl.where((bits < 0) & (rounded != 0), 0x80, 0)


@triton.jit
def e4m3(x, HARDWARE: tl.constexpr):
    """x float32 -> e4m3 as uint8, 448 at most; zero without a sign. HARDWARE: converted by the GPU (sm_89 and newer),
    which does the same but for that sign."""
    if HARDWARE:
        bits = tl.where(tl.abs(x) <= 0.0009765625, 0.0, x).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = e4m3_bits(tl.minimum(tl.maximum(x, -448.0), 448.0)).to(tl.uint8)
    return bits


@triton.jit
def kept(w, at, k, first, second, channel_ptr, row, column_ptr, whole_ptr, mask_ptr, SALIENCY: tl.constexpr):
    """Which of the weights w at `at` of a row stay: four flags per group. Past the end of the row two do."""
    if SALIENCY == "":
        a, b, c, d = fours(tl.load(mask_ptr + at, mask=at < k, other=0))
        keep = a != 0, b != 0, c != 0, d != 0
    else:
        a, b, c, d = fours(scored(w, at, k, first, second, channel_ptr, row, column_ptr, whole_ptr, SALIENCY))
        keep = best_two(a, b, c, d)
    return keep


@triton.jit
def prune_pack24_kernel(
    w_ptr,
    channel_ptr,
    row_ptr,
    column_ptr,
    whole_ptr,
    mask_ptr,
    qdata_ptr,
    metadata_ptr,
    scale_ptr,
    k,
    SALIENCY: tl.constexpr,
    BLOCK: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """SALIENCY "": by the mask."""
    n = tl.program_id(0).to(tl.int64)
    w_ptr += n * k
    first = 1.0
    second = 1.0
    row = 1.0
    if SALIENCY == "":
        mask_ptr += n * k
    else:
        first, second = row_powers(w_ptr, k, BLOCK)
    if SALIENCY == "relative":
        row = tl.load(row_ptr + n)

    peak = tl.zeros([BLOCK // 4], tl.float32)
    wrong = tl.zeros([BLOCK // 4], tl.int32)
    block = 0
    while block * BLOCK < k:
        at = block * BLOCK + tl.arange(0, BLOCK)
        w = load_row(w_ptr, at, k)
        keep = kept(w, at, k, first, second, channel_ptr, row, column_ptr, whole_ptr, mask_ptr, SALIENCY)
        a, b, c, d = fours(tl.abs(w))
        ab = tl.maximum(tl.where(keep[0], a, 0.0), tl.where(keep[1], b, 0.0))
        peak = tl.maximum(peak, tl.maximum(ab, tl.maximum(tl.where(keep[2], c, 0.0), tl.where(keep[3], d, 0.0))))
        if SALIENCY == "":
            inside = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4) < k // 4
            wrong |= (inside & (count4(keep[0], keep[1], keep[2], keep[3]) != 2)).to(tl.int32)
        # two are kept, so the first and the last flag tell the pattern
        nibble = tl.where(keep[0], 0, tl.where(keep[1], 1, 2)) | tl.where(keep[3], 12, tl.where(keep[2], 8, 4))
        early, late = tl.split(tl.reshape(nibble, [BLOCK // 8, 2]))
        at = block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
        tl.store(metadata_ptr + n * (k // 8) + at, (early | (late << 4)).to(tl.uint8), mask=at < k // 8)
        block += 1
    scale = tl.maximum(tl.div_rn(tl.max(peak), 448.0), 1.1754943508222875e-38)

    tl.debug_barrier()  # other threads' indices
    block = 0
    while block * BLOCK < k:
        at = block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
        pair = tl.load(metadata_ptr + n * (k // 8) + at, mask=at < k // 8, other=0).to(tl.int32)
        nibble = tl.reshape(tl.join(pair & 15, pair >> 4), [BLOCK // 4])
        a, b, c, d = fours(load_row(w_ptr, block * BLOCK + tl.arange(0, BLOCK), k))
        low = tl.where((nibble & 3) == 0, a, tl.where((nibble & 3) == 1, b, c))
        high = tl.where(nibble >= 12, d, tl.where(nibble >= 8, c, b))
        values = tl.reshape(tl.join(low, high), [BLOCK // 2])
        values = e4m3(tl.div_rn(values, scale), HARDWARE)
        at = block * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
        tl.store(qdata_ptr + n * (k // 2) + at, values, mask=at < k // 2)
        block += 1
    if SALIENCY == "":
        scale = tl.where(tl.max(wrong) != 0, float("nan"), scale)
    tl.store(scale_ptr + n, scale)


def launch(
    weight: Tensor,
    terms: Terms | None,
    mask: Tensor | None,
    saliency: str,
    qdata: Tensor,
    sparse_metadata: Tensor,
    scale: Tensor,
) -> None:
    """Fill the last three as `prune_pack24` does, from a weight of one of `KERNEL_DTYPES` and either a mask or the
    `terms` of its score, by comparison. A row whose mask is not 2:4 gets NaN for its scale."""
    rows, cols = weight.shape
    read = [*(terms or Terms()), None if mask is None else mask.contiguous().view(torch.uint8)]
    constants, options = _as_launched(kernel_arch(weight.device), cols, saliency if mask is None else "")
    written = (qdata.view(torch.uint8), sparse_metadata, scale)
    with torch.cuda.device_of(weight):
        prune_pack24_kernel[(rows,)](weight.contiguous(), *read, *written, cols, **constants, **options)


def _as_launched(arch: int, cols: int, saliency: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """arch: 0 for Triton's interpreter."""
    block = min(2048, triton.next_power_of_2(cols))
    constants = {"SALIENCY": saliency, "BLOCK": block, "HARDWARE": arch >= 89}
    return constants, EXACT | {"num_warps": 4}


def specimens(arch: int) -> list[Specimen]:
    return [
        _specimen(arch, dtype, saliency, cols)
        for dtype, saliency, cols in (
            (torch.bfloat16, "", 896),
            (torch.bfloat16, "", 4096),  # the same kernel from 2048 on
            (torch.bfloat16, "", 4104),
            (torch.bfloat16, "magnitude", 4096),
            (torch.bfloat16, "contribution", 4096),
            (torch.bfloat16, "contribution", 4104),
            (torch.bfloat16, "relative", 4096),
            (torch.float16, "contribution", 4096),
            (torch.float32, "rank_one", 4096),
            (torch.float32, "", 4096),
        )
    ]


def _specimen(arch: int, dtype: torch.dtype, saliency: str, cols: int) -> Specimen:
    constants, options = _as_launched(arch, cols, saliency)
    types = term_types(saliency) if saliency else {"mask_ptr": "*u8"}
    read = ("channel_ptr", "row_ptr", "column_ptr", "whole_ptr", "mask_ptr")
    absent = {name: None for name in read if name not in types}
    written = {"qdata_ptr": "*u8", "metadata_ptr": "*u8", "scale_ptr": "*fp32", "k": "i32"}
    name = f"prune_pack24 {str(dtype).removeprefix('torch.')} {saliency or 'mask'} K={cols}"
    signature = {"w_ptr": TYPES[dtype]} | types | written
    aligned = None if cols % 16 == 0 else ()
    return Specimen(name, prune_pack24_kernel, signature, constants | absent, options, aligned)
