"""Many rows on sparse tensor cores through NVIDIA's cuSPARSELt, by PyTorch's `_cslt_*` functions.

What the library (0.8) allows with e4m3, found in PyTorch's aten/src/ATen/native/sparse/cuda/cuSPARSELtOps.cpp, in the
table of its PyPI page and in its own error messages:

    out       bfloat16, float16 or float32; CUSPARSE_COMPUTE_32F
    layout    the dense operand K-major on both sides only ("tn"), so x [M, K] enters transposed; the result comes out
              as [M, N] with transpose_result
    sizes     N and K multiples of 32, M of 16
    scales    one number: a vector alpha is for INT8 only, so both scales and the bias follow, in one pass
    split_k   1 or -1 on sm_90, so only what a search gave is passed

The sum of up to K/2 products of up to 448 * 448 overflows float16, so it leaves the library in bfloat16 where the model
is in bfloat16 (two roundings then, at half the traffic), else in float32.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .pack24 import unpack24
from .quantize_rows import E4M3

# The first cuSPARSELt with e4m3 kernels for a compute capability, by its release notes; 800 is 0.8.0.
SINCE = {89: 800, 90: 602, 100: 700, 120: 700}

MULTIPLE_NK = 32
MULTIPLE_M = 16
# A search covers all M up to the next power of two, the last one all above: a search needs memory for its own result.
LARGEST_BUCKET = 2**14

Algorithm = tuple[int, int, int]
"""alg_id, split_k, split_k_mode: the last three arguments of `torch._cslt_sparse_mm`."""
DEFAULT: Algorithm = (0, 1, -1)


class Library(NamedTuple):
    """All that is used of torch's cuSPARSELt and of the CUDA runtime."""

    version: int
    compress: Callable[[torch.Tensor], torch.Tensor]
    sparse_mm: Callable[..., torch.Tensor]
    search: Callable[..., tuple[int, int, int, int]]
    """Gives alg_id, split_k, split_k_mode and how many algorithms there are. It waits for the GPU."""
    capturing: Callable[[], bool]
    device_name: Callable[[torch.device], str]


@cache
def library() -> Library | None:
    """cuSPARSELt, or None where this torch was built without it."""
    version = torch.backends.cusparselt.version()
    if version is None:
        return None
    return Library(
        version,
        torch._cslt_compress,
        torch._cslt_sparse_mm,
        # `torch._cslt_sparse_mm_search` is deprecated and drops split_k
        torch._C._cusparselt.mm_search,  # type: ignore[attr-defined]
        torch.cuda.is_current_stream_capturing,
        cache(torch.cuda.get_device_name),
    )


def why_not(arch: int, dtype: torch.dtype, n: int, k: int) -> str:
    """Empty where the path serves a weight [n, k] of a model in `dtype` on sm_`arch`, else the reason."""
    if arch not in SINCE:
        return f"cuSPARSELt has no FP8 kernels for sm_{arch}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"cuSPARSELt's FP8 products do not come in {dtype}"
    if n % MULTIPLE_NK or k % MULTIPLE_NK:
        return f"cuSPARSELt needs N and K to be multiples of {MULTIPLE_NK} for FP8, not {n}x{k}"
    found = library()
    if found is None:
        return "this torch comes without cuSPARSELt"
    if found.version < SINCE[arch]:
        return f"cuSPARSELt {found.version} has no FP8 kernels for sm_{arch}, {SINCE[arch]} has"
    return ""


def make_layout(qdata: torch.Tensor, sparse_metadata: torch.Tensor) -> torch.Tensor:
    """cuSPARSELt's own compressed form: opaque bytes, 1-D uint8, 5 bits a weight or a little more. The dense e4m3
    weight exists for a moment."""
    return _library().compress(unpack24(qdata, sparse_metadata)).view(torch.uint8).view(-1)


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
    """y [M, N] = (x . W) scale x_scale + bias in `out_dtype`; scales and bias in float32.

    x e4m3 [M, K] contiguous, x_scale float32 [M, 1], scale float32 [N, 1], bias [N] of any float dtype, layout from
    `make_layout`. The first product of a kind (see `search`) searches for the fastest algorithm, but never while a
    CUDA graph is captured.
    """
    raw = raw_product(x, layout, qdata.shape[0], out_dtype is torch.bfloat16)
    if not raw.is_cuda:
        return rescaled(raw, x_scale, scale, bias, out_dtype)
    from .rescale_triton import rescale

    y = torch.empty_like(raw, dtype=out_dtype)
    rescale(raw, x_scale, scale, bias, y)
    return y


def inline(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    qdata: torch.Tensor,
    sparse_metadata: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    layout: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`product` for a compiled graph: Inductor fuses the scales and the bias into what follows."""
    raw = torch.ops.hwpq_fx.cusparselt24.default(x, layout, qdata.shape[0], out_dtype is torch.bfloat16)
    return rescaled(raw, x_scale, scale, bias, out_dtype)


def rescaled(raw, x_scale, scale, bias, out_dtype):
    """raw [M, N] * scale [N, 1] * x_scale [M, 1] + bias [N], in float32, rounded to `out_dtype`."""
    y = raw * scale.view(-1) * x_scale
    return (y if bias is None else y + bias).to(out_dtype)


@torch.library.custom_op("hwpq_fx::cusparselt24", mutates_args=())
def raw_product(x: torch.Tensor, layout: torch.Tensor, n: int, bf16: bool) -> torch.Tensor:
    """x W^T without scales: x e4m3 [M, K], layout of a weight [n, K]; [M, n] in bfloat16 or else float32."""
    m = x.shape[0]
    raw_dtype = torch.bfloat16 if bf16 else torch.float32
    if m == 0:
        return x.new_empty((0, n), dtype=raw_dtype)
    weight = layout.view(E4M3).view(n, -1)
    dense = _with_rows(x, -(-m // MULTIPLE_M) * MULTIPLE_M).t()
    y = _library().sparse_mm(weight, dense, None, None, raw_dtype, True, *_algorithm(weight, x, raw_dtype))
    return y[:m].clone() if len(y) > m else y


@raw_product.register_fake
def _fake(x, layout, n, bf16):
    if x.dim() != 2 or x.dtype is not E4M3 or layout.dim() != 1 or layout.dtype is not torch.uint8:
        raise RuntimeError(f"cusparselt24: x {tuple(x.shape)} {x.dtype} or layout {layout.dtype} does not fit")
    return x.new_empty((x.shape[0], n), dtype=torch.bfloat16 if bf16 else torch.float32)


_found: dict[str, Algorithm] = {}


def export_algorithms() -> dict[str, Algorithm]:
    """What was searched and imported so far, for a file: "device/version/NxK/rows/dtype" to algorithm."""
    return dict(_found)


def import_algorithms(algorithms: Mapping[str, Any]) -> None:
    """Take over what `export_algorithms` gave, here or on another machine: other devices and versions do no harm.

    Raises ValueError where an algorithm is not three integers.
    """
    taken = {}
    for key, algorithm in algorithms.items():
        if not isinstance(algorithm, Sequence) or [type(part) for part in algorithm] != [int] * 3:
            raise ValueError(f"{key}: {algorithm!r} is not alg_id, split_k, split_k_mode")
        alg_id, split_k, split_k_mode = algorithm
        taken[str(key)] = (alg_id, split_k, split_k_mode)
    _found.update(taken)


def _algorithm(weight: torch.Tensor, x: torch.Tensor, raw_dtype: torch.dtype) -> Algorithm:
    """The algorithm for x's device, rows, N, K and dtype; searched at the top of the bucket, once."""
    m, k = x.shape
    lib = _library()
    bucket = bucket_of(m)
    before = f"{lib.device_name(x.device)}/{lib.version}/{weight.shape[0]}x{k}"
    after = str(raw_dtype).removeprefix("torch.")
    key = f"{before}/{bucket}/{after}"
    if key in _found:
        return _found[key]
    if lib.capturing():  # a search waits for the GPU, which breaks the capture
        near = sorted(BUCKETS, key=lambda other: max(other, bucket) // min(other, bucket))
        return next((_found[one] for other in near if (one := f"{before}/{other}/{after}") in _found), DEFAULT)
    *found, _ = lib.search(weight, _with_rows(x[:bucket], bucket).t(), None, None, raw_dtype, True)
    import_algorithms({key: found})
    return _found[key]


def bucket_of(m: int) -> int:
    """The number of rows, a power of two, that stands for `m` in a search."""
    return min(LARGEST_BUCKET, max(MULTIPLE_M, 1 << (m - 1).bit_length()))


BUCKETS = tuple(2**power for power in range(MULTIPLE_M.bit_length() - 1, LARGEST_BUCKET.bit_length()))


def _with_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    """x [M, K] with rows of zeros below, up to `rows`."""
    missing = rows - x.shape[0]
    # padding knows no FP8
    return F.pad(x.view(torch.uint8), (0, 0, 0, missing)).view(x.dtype) if missing else x


def _library() -> Library:
    found = library()
    assert found is not None, "why_not was not asked"
    return found
