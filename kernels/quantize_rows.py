"""FP8 (e4m3) with one scale per row, for activations and for weights, in plain aten ops.

Inductor fuses `quantize_rows` into whatever made the activation; there is no custom op on purpose.
"""

import torch

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
# The smallest normal float32: a scale under it would lose bits, and zero would divide by zero.
MIN_SCALE = 2.0**-126


def row_scale(x: torch.Tensor) -> torch.Tensor:
    """Scale of each row of `x` [..., K]: its largest magnitude over 448, float32 [..., 1]."""
    return (x.abs().amax(-1, keepdim=True).float() / E4M3_MAX).clamp(min=MIN_SCALE)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dynamic per-row FP8 of an activation.

    x: [..., K], float32, bfloat16 or float16. Returns (values e4m3 [..., K], scale float32 [..., 1]) with
    x ~ values * scale. A row of zeros gives zeros; NaN and Inf spread over their row as NaN.
    """
    scale = row_scale(x)
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scale


def quantize_weight_rows(weight: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantize_rows`, for a weight [N, K]; -0.0 is written as +0.0.

    `scale` float32 [N, 1] is used where given. A negative zero has counted as a nonzero in CUTLASS's
    compressor, which then refuses the row.
    """
    if scale is None:
        peak = weight.abs().amax(-1, keepdim=True).float()
        # by a tensor: to divide by a number, CUDA multiplies with its rounded inverse
        scale = (peak / torch.full_like(peak, E4M3_MAX)).clamp(min=MIN_SCALE)
    values = (weight.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).view(torch.uint8)
    return values.masked_fill(values == 0x80, 0).view(E4M3), scale
