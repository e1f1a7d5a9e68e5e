"""Kernels to try the compiler reports on: one that is well, and three that are not."""

import triton
import triton.language as tl

from hwpq_fx.kernels.cubin import Specimen


@triton.jit
def normalize(x, y, BLOCK: tl.constexpr):
    """All of a program's values stay live until their sum is known."""
    at = tl.arange(0, BLOCK)
    values = tl.load(x + at)
    tl.store(y + at, values / tl.sum(values, 0))


@triton.jit
def product(x, y, out, K, BLOCK: tl.constexpr, STEP: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, STEP):
        at = rows[:, None] * K + k + tl.arange(0, STEP)[None, :]
        total += tl.dot(tl.load(x + at), tl.load(y + at).T)
    tl.store(out + rows[:, None] * BLOCK + rows[None, :], total)


@triton.jit
def refuses(x, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK > 16, "BLOCK is too small for this kernel")
    tl.store(x, 1.0)


def specimens(arch):
    one = {"x": "*fp32", "y": "*fp32"}
    two = {"x": "*bf16", "y": "*bf16", "out": "*fp32", "K": "i32"}
    return [
        Specimen("well", normalize, one, {"BLOCK": 1024}, {"num_warps": 4}),
        # 256 values a thread
        Specimen("spills", normalize, one, {"BLOCK": 8192}, {"num_warps": 1}),
        Specimen("product", product, two, {"BLOCK": 64, "STEP": 64}, {"num_warps": 4}),
        # several stages of 2 x 32 KiB
        Specimen("too wide", product, two, {"BLOCK": 128, "STEP": 128}, {"num_warps": 8, "num_stages": 6}),
        Specimen("refuses", refuses, {"x": "*fp32"}, {"BLOCK": 16}),
    ]
