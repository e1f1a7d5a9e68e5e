"""`prune_pack24`: choose two of every four, quantize them and pack them, in one go."""

import torch
from torch import Tensor

from .ewma import DEV_RATE, MEAN_RATE
from .pack24 import FORMAT_K, pack24
from .quantize_rows import E4M3, quantize_weight_rows
from .saliency import DEFAULT_SALIENCY, terms_of
from .select24 import DEFAULT_LAMBDA, DEFAULT_SELECTION, check_select24, has_kernel, select24, select24_reference

Packed = tuple[Tensor, Tensor, Tensor]


def prune_pack24_reference(
    weight: Tensor,
    sum_sq: Tensor | None,
    mask: Tensor | None,
    saliency: str,
    selection: str,
    mean_rate: float,
    dev_rate: float,
    lam: float,
) -> Packed:
    """The definition, in plain torch, on any device. Arguments and errors as `prune_pack24`."""
    check_prune_pack24(weight, sum_sq, mask, saliency, selection, mean_rate, dev_rate)
    if mask is None:
        mask, _ = select24_reference(weight, sum_sq, saliency, selection, mean_rate, dev_rate, lam)
    values, scale = quantize_weight_rows(weight.masked_fill(~mask, 0))
    return *pack24(values, mask), scale


@torch.library.custom_op("hwpq_fx::prune_pack24", mutates_args=())
def prune_pack24(
    weight: Tensor,
    sum_sq: Tensor | None = None,
    mask: Tensor | None = None,
    saliency: str = DEFAULT_SALIENCY,
    selection: str = DEFAULT_SELECTION,
    mean_rate: float = MEAN_RATE,
    dev_rate: float = DEV_RATE,
    lam: float = DEFAULT_LAMBDA,
) -> tuple[Tensor, Tensor, Tensor]:
    """Make a weight 2:4 and FP8: (qdata e4m3 [N, K/2], sparse_metadata uint8 [N, K/8], scale float32 [N, 1]).

    weight: [N, K] of any float dtype, finite (not checked), K a multiple of 8. mask: bool [N, K] that keeps exactly two
    of every four along K; None chooses as `select24` does with the other arguments. The layout is that of `pack24`,
    the rounding that of `quantize_weight_rows`. Raises ValueError, naming the argument that does not fit.
    """
    if not has_kernel(weight):
        return prune_pack24_reference(weight, sum_sq, mask, saliency, selection, mean_rate, dev_rate, lam)
    check_prune_pack24(weight, sum_sq, mask, saliency, selection, mean_rate, dev_rate)
    from .prune_pack24_triton import launch

    if mask is None and selection == "ewma_streaming":
        # every state of the moving average would have to be made twice: for the scale and for the values
        mask, _ = select24(weight, sum_sq, saliency, selection, mean_rate, dev_rate, lam)
    terms = terms_of(weight, sum_sq, saliency) if mask is None else None
    packed = _empty(weight)
    launch(weight, terms, mask, saliency, *packed)
    if mask is not None and bool(packed[2].isnan().any()):
        raise ValueError("the mask does not keep exactly two of every four neighbours along K")
    return packed


@prune_pack24.register_fake
def _fake(weight, sum_sq=None, mask=None, saliency=DEFAULT_SALIENCY, selection=DEFAULT_SELECTION,
          mean_rate=MEAN_RATE, dev_rate=DEV_RATE, lam=DEFAULT_LAMBDA):  # fmt: skip
    check_prune_pack24(weight, sum_sq, mask, saliency, selection, mean_rate, dev_rate)
    return _empty(weight)


def _empty(weight: Tensor) -> Packed:
    rows, cols = weight.shape
    return (
        weight.new_empty((rows, cols // 2), dtype=E4M3),
        weight.new_empty((rows, cols // 8), dtype=torch.uint8),
        weight.new_empty((rows, 1), dtype=torch.float32),
    )


def check_prune_pack24(weight, sum_sq, mask, saliency, selection, mean_rate, dev_rate) -> None:
    check_select24(weight, sum_sq, saliency, selection, mean_rate, dev_rate)
    if weight.shape[1] % FORMAT_K:
        raise ValueError(f"K = {weight.shape[1]} of weight is not a multiple of {FORMAT_K}, which the 2:4 format needs")
    if mask is not None and (mask.shape != weight.shape or mask.dtype is not torch.bool):
        raise ValueError(f"mask is {tuple(mask.shape)} {mask.dtype}, not {tuple(weight.shape)} torch.bool")
    if mask is not None and mask.device != weight.device:
        raise ValueError(f"mask is on {mask.device}, weight on {weight.device}")
