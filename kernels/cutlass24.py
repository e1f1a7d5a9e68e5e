"""Many rows on Hopper's sparse tensor cores: torchao's CUTLASS op, fed with our packed weight itself.

CUTLASS's compressed FP8 operand is plain row-major [N, K/2] (`fill_layoutA` in CUTLASS 4.0's
sm90_sparse_config.inl, lines 230-239), the kept values of a group in order of their index: `qdata` as it is. Its
metadata has our nibbles, two bits an index and the first value in the low bits (`set_metadata_bits` in
sm90_sparse_gemm_compressor.hpp, lines 257-278); only the bytes lie elsewhere. So the layout is 1 bit a weight, and
torchao's compressor is not called: it looks for nonzeros, and pairs a kept zero with another index than ours.
tests/test_cutlass_ptx.py has CUTLASS's own kernels, compiled, agree.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
import torchao.ops  # noqa: F401  (declares the op)

# CUTLASS keeps metadata in blocks of 64 rows by 128 columns of W: 16 bytes a row.
BLOCK_ROWS, BLOCK_BYTES = 64, 16
# What fills the blocks up where W ends: any nibble that is in use, since PTX leaves others undefined.
PADDING = 0x44
# From torchao's checks, and CUTLASS's 16 bytes for the tensor memory accelerator.
MULTIPLE_N, MULTIPLE_K = 8, 32

OP = "rowwise_scaled_linear_sparse_cutlass_f8f8"


@cache
def library() -> Callable[..., torch.Tensor] | None:
    """torchao's op, or None where its compiled library did not load."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"torchao::{OP}", "CUDA"):
        return None
    return getattr(torch.ops.torchao, OP).default


def why_not(arch: int, dtype: torch.dtype, n: int, k: int) -> str:
    """Empty where the path serves a weight [n, k] of a model in `dtype` on sm_`arch`, else the reason."""
    if arch != 90:
        return f"torchao's sparse FP8 op is compiled for sm_90 only, not sm_{arch}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"torchao's sparse FP8 op gives bfloat16 or float16, not {dtype}"
    if n % MULTIPLE_N or k % MULTIPLE_K:
        return f"torchao's sparse FP8 op needs N % {MULTIPLE_N} == 0 and K % {MULTIPLE_K} == 0, not {n}x{k}"
    return "" if library() else "torchao's CUTLASS library did not load"


def make_layout(qdata: torch.Tensor, sparse_metadata: torch.Tensor) -> torch.Tensor:
    """CUTLASS's metadata: 1-D uint8. Byte (row, b) of `sparse_metadata` goes to (b // 16, row, b % 16), with rows
    filled up to a multiple of 64 (`fill_layoutE`, lines 243-264)."""
    n, used = sparse_metadata.shape
    rows, columns = blocks(n, used)
    padded = sparse_metadata.new_full((rows, columns), PADDING)
    padded[:n, :used] = sparse_metadata
    return padded.view(rows, columns // BLOCK_BYTES, BLOCK_BYTES).transpose(0, 1).reshape(-1)


def read_layout(layout: torch.Tensor, n: int, used: int) -> torch.Tensor:
    """`sparse_metadata` [n, used] from what `make_layout` made of it, in any shape."""
    rows, columns = blocks(n, used)
    padded = layout.reshape(columns // BLOCK_BYTES, rows, BLOCK_BYTES).transpose(0, 1).reshape(rows, columns)
    return padded[:n, :used].contiguous()


def product(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    qdata: torch.Tensor,
    sparse_metadata: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    layout: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """y [M, N] = (x . W) x_scale scale + bias in `out_dtype`, one kernel, rounded once.

    x e4m3 [M, K] contiguous, x_scale float32 [M, 1], layout from `make_layout`; bias [N] of any float dtype, which
    CUTLASS wants in `out_dtype`.
    """
    m, n = x.shape[0], qdata.shape[0]
    if m == 0:  # no tensor memory descriptor can be empty
        return x.new_empty((0, n), dtype=out_dtype)
    # torchao asks for [max(N, 64), columns], where CUTLASS goes by the address alone and reads rows up to 64
    columns = blocks(n, sparse_metadata.shape[1])[1]
    rows = max(n, BLOCK_ROWS)
    metadata = layout[: rows * columns].view(rows, columns)
    bias = None if bias is None else bias.to(out_dtype)
    op = library()
    assert op is not None, "why_not was not asked"
    with torch.cuda.device_of(x):  # it launches on whatever device is current
        return op(x, x_scale.reshape(-1), qdata, metadata, scale, bias, out_dtype)


def blocks(n: int, used: int) -> tuple[int, int]:
    """Rows and bytes a row of metadata in whole blocks."""
    return math.ceil(n / BLOCK_ROWS) * BLOCK_ROWS, math.ceil(used / BLOCK_BYTES) * BLOCK_BYTES
