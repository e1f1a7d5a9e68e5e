"""Products of CUDA libraries that no CPU has, on the rehearsed GPU: as strict as the real ones, in plain torch."""

from types import SimpleNamespace

import torch
from torch.library import Library

import hwpq_fx  # noqa: F401  (declares its ops, and imports torchao's)
from doubles import CuSparseLt, torchao_compressor, torchao_op

E4M3 = torch.float8_e4m3fn
kept = [Library("aten", "IMPL"), Library("torchao", "IMPL")]


def host(value):
    """On the CPU, at the same place of a copy of all the memory it lies in."""
    if not isinstance(value, torch.Tensor) or not value.is_cuda:
        return value
    memory = value.untyped_storage().cpu()
    return torch.empty(0, dtype=value.dtype).set_(memory, value.storage_offset(), value.size(), value.stride())


def on_the_cpu(function):
    def run(*args, **kwargs):
        results = function(*map(host, args), **{name: host(value) for name, value in kwargs.items()})
        return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cuda, results)

    return run


def mm_dtype(left, right, out_dtype):
    """`torch.mm(..., out_dtype=...)`: half precision in, summed and given out in float32."""
    if left.dtype not in (torch.bfloat16, torch.float16) or out_dtype is not torch.float32:
        raise RuntimeError(f"out_dtype {out_dtype} of {left.dtype}")
    return left.float() @ right.float()


def scaled_mm(left, right, left_scale, right_scale, bias=None, scale_result=None, out_dtype=None, use_fast_accum=False):
    """`torch._scaled_mm` by rows, as its checks for CUDA have it."""
    (m, k), n = left.shape, right.shape[1]
    if left.dtype is not E4M3 or right.dtype is not E4M3 or not left.is_contiguous() or not right.t().is_contiguous():
        raise RuntimeError("mat_a must be row-major, mat_b column-major, both e4m3")
    if k % 16 or n % 16:
        raise RuntimeError(f"Trailing dimension of mat_a and mat_b must be divisible by 16, not {k} and {n}")
    if (left_scale.shape, right_scale.shape) not in (((m, 1), (1, n)), ((), ()), ((1,), (1,)), ((1, 1), (1, 1))):
        raise RuntimeError(f"Invalid scaling configuration {tuple(left_scale.shape)} {tuple(right_scale.shape)}")
    y = (left.double() @ right.double()).float() * left_scale * right_scale
    return (y if bias is None else y + bias.float()).to(out_dtype)


def install() -> None:
    aten, torchao = kept
    cusparselt = CuSparseLt()
    aten.impl("mm.dtype", on_the_cpu(mm_dtype), "CUDA")
    aten.impl("_scaled_mm", on_the_cpu(scaled_mm), "CUDA")
    aten.impl("_cslt_compress", on_the_cpu(cusparselt.compress), "CUDA")
    aten.impl("_cslt_sparse_mm", on_the_cpu(cusparselt.sparse_mm), "CUDA")
    torch._C._cusparselt = SimpleNamespace(mm_search=on_the_cpu(cusparselt.search))
    torch.backends.cusparselt.version = lambda: cusparselt.version
    torchao.impl("rowwise_scaled_linear_sparse_cutlass_f8f8", on_the_cpu(torchao_op), "CUDA")
    torchao.impl("to_sparse_semi_structured_cutlass_sm9x_f8", on_the_cpu(torchao_compressor), "CUDA")
