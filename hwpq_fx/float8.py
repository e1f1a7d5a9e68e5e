"""Dense FP8 weights, for unstructured sparsity: torchao's Float8Tensor as it is."""

from functools import cache

import torch
from torchao.float8.inference import Float8MMConfig
from torchao.quantization import Float8Tensor, PerRow
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

from hwpq_fx.kernels.quantize_rows import E4M3_MAX, MIN_SCALE

HALF_SCALE = 2.0**-24
"""The smallest number over zero in float16, in which torchao works out the scales of float16 tensors."""
HALF_MAX = 65472.0
"""The largest float16 that FP8 gives back: a larger one's scale, in float16, is rounded up, and 448 times it is Inf."""


def mm_compatible(rows: int, cols: int) -> bool:
    """Whether a weight [N, K] fits the FP8 products of GPUs."""
    return rows % 16 == 0 and cols % 16 == 0


@cache
def rowwise_on_cpu() -> bool:
    """Whether torch multiplies FP8 matrices with a scale per row on the CPU: from 2.12 on."""
    x = torch.zeros(16, 16, dtype=torch.float8_e4m3fn, device="cpu")
    scale = torch.ones(16, 1, device="cpu")
    try:
        torch._scaled_mm(x, x.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


def dense_float8(weight: torch.Tensor, activation: str) -> Float8Tensor:
    """`weight` [N, K] as FP8 with a scale per row; activation "dynamic" quantizes the inputs per row too, but not on
    a CPU where that product is missing (`rowwise_on_cpu`). A row of zeros, of either, gives zeros."""
    possible = weight.device.type != "cpu" or rowwise_on_cpu()
    # torchao takes a row's largest value for its scale as it is, and divides by it: zeros would be NaN
    half = weight.dtype is torch.float16
    least = E4M3_MAX * (HALF_SCALE if half else MIN_SCALE)
    dynamic = QuantizeTensorToFloat8Kwargs(granularity=PerRow(), hp_value_lb=least)
    return Float8Tensor.from_hp(
        weight.clamp(-HALF_MAX, HALF_MAX) if half else weight,
        granularity=PerRow(),
        mm_config=Float8MMConfig(use_fast_accum=True),
        hp_value_lb=least,
        act_quant_kwargs=dynamic if activation == "dynamic" and possible else None,
    )
