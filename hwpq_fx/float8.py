"""Dense FP8 weights, for unstructured sparsity: torchao's Float8Tensor as it is."""

import torch
from torchao.float8.inference import Float8MMConfig
from torchao.quantization import Float8Tensor, PerRow
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs


def mm_compatible(rows: int, cols: int) -> bool:
    """Whether a weight [N, K] fits the FP8 products of GPUs."""
    return rows % 16 == 0 and cols % 16 == 0


def dense_float8(weight: torch.Tensor, activation: str) -> Float8Tensor:
    """`weight` [N, K] as FP8 with a scale per row; activation "dynamic" quantizes the inputs per row too."""
    dynamic = QuantizeTensorToFloat8Kwargs(granularity=PerRow()) if activation == "dynamic" else None
    return Float8Tensor.from_hp(
        weight,
        granularity=PerRow(),
        mm_config=Float8MMConfig(use_fast_accum=True),
        act_quant_kwargs=dynamic,
    )
