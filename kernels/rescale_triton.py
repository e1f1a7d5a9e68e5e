"""The end of a cuSPARSELt product in one pass: y = raw * scale * x_scale + bias, rounded once more. In aten it takes
two passes with a float32 matrix between them: 12 bytes an element instead of 4 (bfloat16)."""

import torch
import triton
import triton.language as tl

from .cubin import Specimen

BLOCK_M, BLOCK_N, WARPS = 8, 512, 4


@triton.jit
def _rescale(
    raw, x_scale, scale, bias, out, m, n, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    at = rows.to(tl.int64)[:, None] * n + columns[None, :]
    y = tl.load(raw + at, mask=inside).to(tl.float32) * tl.load(scale + columns, mask=columns < n)[None, :]
    y *= tl.load(x_scale + rows, mask=rows < m)[:, None]
    if HAS_BIAS:
        y += tl.load(bias + columns, mask=columns < n).to(tl.float32)[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


def rescale(
    raw: torch.Tensor, x_scale: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """out [M, N] = raw [M, N] * scale [N, 1] * x_scale [M, 1] + bias [N], in float32, rounded to out's dtype."""
    m, n = out.shape
    grid = triton.cdiv(m, BLOCK_M), triton.cdiv(n, BLOCK_N)
    _rescale[grid](
        raw, x_scale, scale, scale if bias is None else bias, out, m, n, HAS_BIAS=bias is not None,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=WARPS,
    )  # fmt: skip


def specimens(arch: int) -> list[Specimen]:
    """As `cusparselt24.product` launches them."""
    return [
        Specimen(
            f"rescale to {out} bias {bias}",
            _rescale,
            {"raw": raw, "x_scale": "*fp32", "scale": "*fp32", "bias": out, "out": out, "m": "i32", "n": "i32"},
            {"HAS_BIAS": bias, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N},
            {"num_warps": WARPS},
            ("n",),
        )
        for raw, out in (("*bf16", "*bf16"), ("*fp32", "*fp16"), ("*fp32", "*fp32"))
        for bias in (False, True)
    ]
