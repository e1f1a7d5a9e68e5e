"""`select24`: which two of every four weights stay, from a score of each and by a moving threshold, without sorting."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from types import MappingProxyType

import torch
from torch import Tensor

from .ewma import DEV_RATE, MEAN_RATE, check_rates, ewma
from .saliency import DEFAULT_SALIENCY, check_saliency, score_with, terms_of

# Threshold = mean + lambda * dev. Share of groups settled, measured on w^2 * s, 1024x4096 ("ewma" with
# Gaussian w / with Laplace w; "ewma_streaming" the same):
#   lambda   -1.0         -0.875       -0.75        -0.625       -0.5         -0.25        0
#   ewma     0.352 0.299  0.359 0.330  0.357 0.334  0.350 0.318  0.340 0.295  0.312 0.250  0.282 0.211
#   stream.  0.118 0.056  0.220 0.139  0.334 0.275  0.403 0.392  0.411 0.395  0.368 0.306  0.308 0.239
# For scores drawn alike no threshold fixed before its group can settle more than 6/16 = 0.375 of them
# (streaming's moves within the group). -0.5 serves both: streaming then keeps 0.89 of the score that the
# exact choice keeps, 0.77 at -0.75.
DEFAULT_LAMBDA = -0.5

# What Triton's kernels read; other dtypes take the reference.
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def best_two(groups: Tensor) -> Tensor:
    """Bool mask of the two largest of every four: groups [..., 4], any dtype. Of equals the lower index wins; NaN is
    not expected. Six comparisons, no sort."""
    a, b, c, d = groups.unbind(-1)
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
    # Kept: lost to at most one of the other three, that is, won at least two of three.
    return torch.stack(
        [
            _two_of(ab, ac, ad),
            _two_of(~ab, bc, bd),
            _two_of(~ac, ~bc, cd),
            _two_of(~ad, ~bd, ~cd),
        ],
        dim=-1,
    )


def _two_of(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return (x & y) | (z & (x | y))


Choice = tuple[Tensor, Tensor]


def _exact(scores: Tensor, mean_rate: float, dev_rate: float, lam: float) -> Choice:
    """The best two of every four, by comparison alone; the rates and lam are not used."""
    return best_two(_groups(scores)).view_as(scores), torch.zeros((), dtype=torch.int64, device=scores.device)


def _ewma(scores: Tensor, mean_rate: float, dev_rate: float, lam: float) -> Choice:
    """The best two of every four, by threshold where it settles a group and by comparison elsewhere.

    The threshold comes from the earlier groups' mean scores. When exactly two of a group's scores are
    above it, they beat the other two: the exact choice. So the mask always equals that of "exact", and is
    computed as such, since comparing everywhere costs less than telling apart where; what the threshold
    would have settled is counted.
    """
    groups = _groups(scores)
    a, b, c, d = groups.unbind(-1)
    mean, dev = ewma(((a + b) + (c + d)) * 0.25, mean_rate, dev_rate)
    above = groups > (mean + lam * dev).unsqueeze(-1)
    return best_two(groups).view_as(scores), _settled(above)


def _ewma_streaming(scores: Tensor, mean_rate: float, dev_rate: float, lam: float) -> Choice:
    """One pass that looks neither back nor ahead (arXiv 2501.16376): first come, first pruned.

    An element goes while fewer than two of its group went and it is below the threshold from the elements
    before it, or when only just enough elements are left to reach two.
    """
    mean, dev = ewma(scores, mean_rate, dev_rate)
    below = _groups(scores < mean + lam * dev)
    pruned = torch.zeros_like(below[..., 0], dtype=torch.uint8)
    mask = torch.empty_like(below)
    for i in range(4):
        wanted = 2 - pruned
        goes = (wanted > 0) & (below[..., i] | (wanted == 4 - i))
        mask[..., i] = ~goes
        pruned += goes
    # Fewer than two below forces a prune, more than two forces a keep, two forces neither.
    return mask.view_as(scores), _settled(below)


def _settled(flags: Tensor) -> Tensor:
    # Four bytes added up by hand are several times as fast as a sum over an axis of four.
    a, b, c, d = flags.view(torch.uint8).unbind(-1)
    return (a + b + c + d == 2).sum()


def _groups(x: Tensor) -> Tensor:
    return x.view(x.shape[0], -1, 4)


DEFAULT_SELECTION = "ewma"

SELECTIONS: Mapping[str, Callable[[Tensor, float, float, float], Choice]] = MappingProxyType(
    {"ewma": _ewma, "ewma_streaming": _ewma_streaming, "exact": _exact}
)


def choose24(
    scores: Tensor,
    selection: str = DEFAULT_SELECTION,
    mean_rate: float = MEAN_RATE,
    dev_rate: float = DEV_RATE,
    lam: float = DEFAULT_LAMBDA,
) -> Choice:
    """Keep exactly two of every four neighbours in a row: (mask bool [N, K], True = keep; settled int64 []).

    scores: [N, K], K a multiple of 4, not NaN, non-negative, larger = keep. selection: a key of `SELECTIONS`:

    - "exact": the two largest; of equal scores the one with the lower index. `settled` is 0.
    - "ewma": the same mask; `settled` is the number of groups that needed no comparison.
    - "ewma_streaming": the paper's single pass; `settled` is the number of groups without a forced
      decision. Of equal scores below the threshold it prunes the first, as it cannot look ahead.

    mean_rate, dev_rate, lam: of the threshold mean + lam * dev, see `ewma`.
    Every row is decided on its own: the mask of some rows is those rows of the mask.
    Raises ValueError: unknown selection, scores empty or not 2-D, K not a multiple of 4, bad rates.
    """
    check_selection(scores, "scores", selection, mean_rate, dev_rate)
    return SELECTIONS[selection](scores.detach().float().contiguous(), mean_rate, dev_rate, lam)


def check_selection(matrix: Tensor, name: str, selection: str, mean_rate: float, dev_rate: float) -> None:
    """ValueError where the arguments of `choose24` do not fit; the matrix goes by `name`."""
    if selection not in SELECTIONS:
        raise ValueError(f"unknown selection {selection!r}; known: {', '.join(SELECTIONS)}")
    if matrix.dim() != 2 or matrix.numel() == 0:
        raise ValueError(f"{name} must be [N, K] and not empty, got {list(matrix.shape)}")
    if matrix.shape[1] % 4:
        raise ValueError(f"2:4 needs a multiple of 4 columns, got {name} {list(matrix.shape)}")
    check_rates(mean_rate, dev_rate)


def select24_reference(
    weight: Tensor,
    sum_sq: Tensor | None,
    saliency: str,
    selection: str,
    mean_rate: float,
    dev_rate: float,
    lam: float,
) -> Choice:
    """The definition, in plain torch, on any device. Arguments and errors as `select24`."""
    check_select24(weight, sum_sq, saliency, selection, mean_rate, dev_rate)
    scores = score_with(weight, terms_of(weight, sum_sq, saliency), saliency)
    return choose24(scores, selection, mean_rate, dev_rate, lam)


def has_kernel(weight: Tensor) -> bool:
    """Whether a Triton kernel serves this weight."""
    return weight.is_cuda and weight.dtype in KERNEL_DTYPES and find_spec("triton") is not None


@torch.library.custom_op("hwpq_fx::select24", mutates_args=())
def select24(
    weight: Tensor,
    sum_sq: Tensor | None = None,
    saliency: str = DEFAULT_SALIENCY,
    selection: str = DEFAULT_SELECTION,
    mean_rate: float = MEAN_RATE,
    dev_rate: float = DEV_RATE,
    lam: float = DEFAULT_LAMBDA,
) -> tuple[Tensor, Tensor]:
    """Score a weight and keep two of every four: (mask bool [N, K], True = keep; settled int64 []: see `choose24`).

    weight: [N, K] of any float dtype, finite, K a multiple of 4. sum_sq: [K] float32, finite and non-negative, sums of
    squares per input channel; None counts all channels alike. saliency: see `score`. The others: see `choose24`.
    What the tensors hold is not checked. Raises ValueError, naming the argument that does not fit.
    """
    if not has_kernel(weight):
        return select24_reference(weight, sum_sq, saliency, selection, mean_rate, dev_rate, lam)
    check_select24(weight, sum_sq, saliency, selection, mean_rate, dev_rate)
    from .select24_triton import launch

    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    settled = torch.empty(weight.shape[0], dtype=torch.int32, device=weight.device)
    launch(weight, terms_of(weight, sum_sq, saliency), saliency, selection, mean_rate, dev_rate, lam, mask, settled)
    return mask, settled.sum()


@select24.register_fake
def _fake(weight, sum_sq=None, saliency=DEFAULT_SALIENCY, selection=DEFAULT_SELECTION,
          mean_rate=MEAN_RATE, dev_rate=DEV_RATE, lam=DEFAULT_LAMBDA):  # fmt: skip
    check_select24(weight, sum_sq, saliency, selection, mean_rate, dev_rate)
    return weight.new_empty(weight.shape, dtype=torch.bool), weight.new_empty((), dtype=torch.int64)


def check_select24(weight: Tensor, sum_sq: Tensor | None, saliency: str, selection: str, mean_rate, dev_rate) -> None:
    """ValueError where the arguments of `select24` do not fit, whatever they hold."""
    check_saliency(weight, sum_sq, saliency)
    if sum_sq is not None and (sum_sq.dtype is not torch.float32 or sum_sq.device != weight.device):
        raise ValueError(f"sum_sq must be float32 on {weight.device}, got {sum_sq.dtype} on {sum_sq.device}")
    check_selection(weight, "weight", selection, mean_rate, dev_rate)
