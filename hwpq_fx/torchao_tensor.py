"""Our packed weight as torchao keeps 2:4 FP8 weights for Hopper, `Float8Sparse2x4_2DData2DMetadataTensor`, and back.

The same values, indices and scales, bit for bit, for code that knows only torchao. It takes no GPU to convert; what
torchao does with its tensor (linear, dequantize) needs one of compute capability 9.0.
"""

from collections.abc import Callable
from typing import Any

import torch

from hwpq_fx.kernels import Float8Sparse24Tensor, cutlass24
from hwpq_fx.kernels.paths import target_of
from hwpq_fx.kernels.quantize_rows import E4M3

from .checkpoint import bad_pattern
from .errors import ConfigError


def to_torchao(weight: Float8Sparse24Tensor) -> Any:
    """`weight` [N, K] as torchao's tensor: the memory of its values and scales, and its indices in CUTLASS's order.

    Layouts that `weight` carries are left behind. Raises ValueError where torchao's tensor cannot hold it (`why_not`),
    ConfigError where this torchao has no such tensor.
    """
    if not isinstance(weight, Float8Sparse24Tensor):
        raise ValueError(f"a packed 2:4 weight is wanted, not a {type(weight).__name__}")
    n, half = weight.qdata.shape
    reason = why_not(weight.dtype, n, 2 * half, weight.activation, weight.transposed)
    if reason:
        raise ValueError(f"torchao's tensor cannot hold this weight: {reason}")
    tensor, kwargs = _torchao()
    weight = weight.detach()
    metadata = cutlass24.make_layout(weight.qdata, weight.sparse_metadata).view(cutlass24.blocks(n, half // 4))
    qdata, scale = weight.qdata.contiguous(), weight.scale.contiguous()
    return tensor(qdata, metadata, scale, [1, 2 * half], kwargs(), weight.dtype)


def from_torchao(weight: Any) -> Float8Sparse24Tensor:
    """The packed weight in torchao's tensor: its own memory of values and scales. Without a layout: see `expand`.

    Raises ValueError for another tensor, for FP8 or scales of another kind than per row and e4m3, and for indices that
    are repeated or out of order; ConfigError where this torchao has no such tensor.
    """
    tensor, kwargs = _torchao()
    if not isinstance(weight, tensor):
        raise ValueError(f"a {tensor.__name__} is wanted, not a {type(weight).__name__}")
    weight = weight.detach()
    qdata, metadata, scale = weight.qdata, weight.sparse_metadata, weight.scale
    n, half = qdata.shape
    reason = why_not(weight.dtype, n, 2 * half, "dynamic" if weight.act_quant_kwargs == kwargs() else "another", False)
    if not reason and (qdata.dtype is not E4M3 or scale.dtype is not torch.float32 or scale.numel() != n):
        reason = f"values are {qdata.dtype}, {scale.numel()} scales {scale.dtype}"
    if not reason and metadata.shape != cutlass24.blocks(n, half // 4):
        reason = f"its metadata is {tuple(metadata.shape)}, not {cutlass24.blocks(n, half // 4)}"
    if reason:
        raise ValueError(f"this weight of torchao's cannot be packed: {reason}")
    indices = cutlass24.read_layout(metadata, n, half // 4)
    if (where := bad_pattern(indices)) is not None:
        raise ValueError(f"the indices of a group of four are repeated or out of order, in row {where[0]}")
    return Float8Sparse24Tensor(qdata, indices, scale.view(n, 1), "dynamic", False, weight.dtype)


def why_not(dtype: torch.dtype, n: int, k: int, activation: str = "dynamic", transposed: bool = False) -> str:
    """Why torchao's tensor cannot hold a weight [n, k] of a model in `dtype`, or ""."""
    if activation != "dynamic":
        return "its inputs are quantized per row, to FP8"
    if transposed:
        return "it has no transposed form; .t() first"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, not {dtype}"
    if k % cutlass24.MULTIPLE_K:
        return f"K = {k} is not a multiple of {cutlass24.MULTIPLE_K}"
    # its metadata has max(N, 64) rows, CUTLASS reads whole blocks of 64: what lies in between would be lost in copies
    if n % cutlass24.MULTIPLE_N or cutlass24.blocks(n, k // 8)[0] != max(n, cutlass24.BLOCK_ROWS):
        return f"N = {n} is not a multiple of {cutlass24.BLOCK_ROWS}, nor less than that and one of 8"
    return ""


def why_not_on(device: torch.device) -> str:
    """Why torchao's tensor does not run on `device`, or ""."""
    target = target_of(device)
    if target is None:
        return f"torchao's sparse FP8 op runs on NVIDIA GPUs of compute capability 9.0, not on {device}"
    return cutlass24.why_not(target.arch, torch.bfloat16, cutlass24.BLOCK_ROWS, cutlass24.MULTIPLE_K)


def _torchao() -> tuple[Any, Callable[[], Any]]:
    """The class of torchao's tensor, and what makes the way of quantizing its inputs that is ours too."""
    try:
        from torchao.quantization import PerRow
        from torchao.quantization.quantize_.workflows import (
            Float8Sparse2x4_2DData2DMetadataTensor,
            QuantizeTensorToFloat8Kwargs,
        )
    except ImportError as error:
        raise ConfigError(f"this version of torchao has no sparse FP8 tensor with 2-D metadata ({error})") from error
    return Float8Sparse2x4_2DData2DMetadataTensor, lambda: QuantizeTensorToFloat8Kwargs(granularity=PerRow())
