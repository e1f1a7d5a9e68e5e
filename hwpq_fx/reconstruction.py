"""What the kept weights can do for the pruned ones: least squares by conjugate gradients, no Hessian to factor.

For a layer with inputs X [R, K] and weight W [N, K], G = X^T X [K, K] is all that is asked of the inputs: the output
error ||X (W - W')^T||_F^2 is the sum over the rows of e G e^T with e = w' - w.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from hwpq_fx.kernels.saliency import unit_scaled

from .gram import SINGULAR, Gram, MatrixFree, Product, Rounded, size_of
from .preconditioner import QUIET, Preconditioner

__all__ = ["lead", "rechoose", "reconstruct", "reconstruction_loss", "refine"]

EPS = torch.finfo(torch.float32).eps
# Of the squared slope: about what float32 products can resolve. What follows is rounding, and may lead anywhere; what
# is quiet of it counts 1 / QUIET times.
CONVERGED = 2.0**-40
PAIRS = tuple(combinations(range(4), 2))


def reconstruct(
    weight: Tensor,
    mask: Tensor,
    gram: Gram,
    steps: int = 10,
    damping: float = 1e-2,
    diagonal: Tensor | None = None,
    drift: Tensor | None = None,
    fast: Rounded | None = None,
    led_by: Preconditioner | None = None,
) -> Tensor:
    """The kept weights that best make up for the pruned ones: float32 [N, K], zero where pruned.

    Minimises (w' - w) (G + damping * mean(diag G) * I) (w' - w)^T over the kept weights of every row: conjugate
    gradients with a preconditioner (Saad, Iterative Methods for Sparse Linear Systems, algorithm 9.1) from the masked
    weight, at most `steps` of them, steps + 2 products with G in all, and what `Preconditioner` takes. The undamped
    loss of a row, as `reconstruction_loss` gives it, is never above that of its masked weight. The rows do not know of
    each other: a weight may come in parts. Kept weights of dead channels (zero diagonal) stay as they are, and so do
    all-zero rows; a row times a power of two gives the same bits times it, G times one the same bits.

    weight: [N, K], any float dtype; computed in float32. mask: bool [N, K], True = kept, in any pattern. gram: X^T X
    [K, K], or a function V -> V X^T X; with a function, diagonal float32 [K] is that of X^T X. drift: W (D - X)^T X
    float32 [N, K], where the outputs to aim at are those of other inputs D than X, say of the layers before as they
    were: then ||D W^T - X W'^T||^2 is what is minimised and what does not rise. fast: multiplies instead
    of gram, but for the first product and the last, which judge. led_by: the preconditioner for this gram and damping
    (`lead`), where several parts of a weight are to share it.

    Raises ValueError: shapes or dtypes that do not fit, a function without its diagonal, weights or a diagonal that
    are not finite, a negative diagonal or damping.
    """
    problem = _problem(weight, mask, gram, damping, diagonal, drift, fast, led_by)
    begin = _measured(problem, problem.unit * mask)
    loss, new = begin.loss, _solve(problem, begin, mask, steps).new
    return (torch.where(_no_worse(problem, new, loss), new, problem.unit * mask) * problem.back).float()


def refine(
    weight: Tensor,
    mask: Tensor,
    gram: Gram,
    rounds: int = 1,
    steps: int = 5,
    damping: float = 1e-2,
    blocks: Tensor | None = None,
    drift: Tensor | None = None,
    fast: Rounded | None = None,
    led_by: Preconditioner | None = None,
) -> tuple[Tensor, Tensor]:
    """`reconstruct` with half the steps, and as often as `rounds` says `rechoose` and more steps from there; the last
    time all of them. The new weight float32 [N, K] and its mask, bool [N, K].

    A row takes a new mask where that lowers its loss, and none ends above its weight masked by `mask`. With h the
    half of the steps, rounded up, rounds * (h + 1) + steps + 2 products with G in all, two of them not `fast`, and what
    `Preconditioner` takes. The arguments and errors are those of `reconstruct` and `rechoose`; mask keeps two of every
    four, and with a function blocks are needed.
    """
    blocks = _blocks(gram, blocks, weight.shape[-1])
    problem = _problem(weight, mask, gram, damping, _block_diagonal(blocks), drift, fast, led_by)
    blocks = blocks / problem.size
    begin = _measured(problem, problem.unit * mask)
    loss, half = begin.loss, -(-steps // 2)
    fit, kept = _solve(problem, begin, mask, half if rounds else steps), mask
    for left in reversed(range(rounds)):
        chosen = _best_pairs(fit, blocks)
        other = _solve(problem, _pruned(problem, fit, chosen), chosen, half if left else steps)
        better = other.loss < fit.loss
        fit = _Fit(*(torch.where(better, a, b) for a, b in zip(other, fit, strict=True)))
        kept = torch.where(better, chosen, kept)
    better = _no_worse(problem, fit.new, loss)
    new, mask = torch.where(better, fit.new, problem.unit * mask), torch.where(better, kept, mask)
    return (new * problem.back).float(), mask


def lead(gram: Gram, damping: float = 1e-2, diagonal: Tensor | None = None) -> Preconditioner:
    """The preconditioner that `reconstruct` and `refine` make for these arguments, of theirs."""
    channels = len(gram) if isinstance(gram, Tensor) else 0 if diagonal is None else len(diagonal)
    diagonal = _diagonal(gram, diagonal, channels)
    size = size_of(diagonal)
    product, diagonal = _unit_product(gram, size), diagonal / size
    return Preconditioner(product, diagonal, _shift(diagonal, damping))


def reconstruction_loss(weight: Tensor, new: Tensor, gram: Gram) -> Tensor:
    """e G e^T of every row, e = new - weight: the squared error of its output over the calibration rows, float64 [N].

    weight, new: [N, K], any float dtype. gram: as in `reconstruct`. The product is float32, at the scale of the
    weight's row, and its sum float64; what rounding leaves below zero counts as zero.

    Raises ValueError: shapes that do not fit, weights or a diagonal that are not finite, a negative diagonal.
    """
    _check(weight, new)
    diagonal = gram.diagonal if isinstance(gram, MatrixFree) else None
    known = diagonal is not None or isinstance(gram, Tensor)
    size = size_of(_diagonal(gram, diagonal, weight.shape[1])) if known else 1.0
    product = _unit_product(gram, size)
    unit, back = _unit_rows(weight)
    error = (new.detach() / back).float().sub_(unit)
    return (_dot(error, product(error), torch.float64) * back.square() * size).clamp_min_(0).squeeze(1)


def rechoose(
    weight: Tensor, new: Tensor, gram: Gram, blocks: Tensor | None = None, drift: Tensor | None = None
) -> Tensor:
    """The two of every four neighbours that are worth most beside the rest of new: bool [N, K], two True in each four.

    With the other groups as they are in new, the loss of a group's weights t [4] is a constant - 2 t h^T + t B t^T,
    where B [4, 4] is the group's block of G and h = w' B - (w' - w) G (+ drift), both over the group. Of a pair p
    alone, the best t takes h_p B_p^-1 h_p^T off it. The pair that takes most stays, of equals the one with the lower
    indices. That is exact for one group; as all groups move at once, the loss after another `reconstruct` falls for
    most rows and not for every one: see `refine`.

    weight, new: [N, K], any float dtype, K a multiple of 4. gram: as in `reconstruct`; with a function, blocks
    float32 [K/4, 4, 4] are those of X^T X along its diagonal (`MatrixFree.blocks`).

    Raises ValueError: as `reconstruct`, and a K that is not a multiple of 4.
    """
    _check(weight, new)
    channels = weight.shape[1]
    blocks = _blocks(gram, blocks, channels)
    size = size_of(_diagonal(gram, _block_diagonal(blocks), channels))
    product = _unit_product(gram, size)
    unit, back = _unit_rows(weight)
    now = (new.detach() / back).float()
    slope = product(now - unit).sub_(_unit_drift(drift, back, size))
    return _best_pairs(_Fit(now, slope, back), blocks / size)


class _Problem(NamedTuple):
    """At unit scale: unit [N, K] the weight, the product with G, exact and fast, and what to add to its diagonal; back
    [N, 1] and size undo it."""

    unit: Tensor
    product: Product
    fast: Product
    led_by: Preconditioner
    shift: float
    drift: Tensor
    back: Tensor
    size: float


class _Fit(NamedTuple):
    """At unit scale: new [N, K], half the loss's slope there [N, K], and the loss, float64 [N, 1].

    With e = new - unit: e G - drift, and e G e - 2 e drift, which without drift is the output error and otherwise off
    by a constant.
    """

    new: Tensor
    slope: Tensor
    loss: Tensor


def _problem(
    weight: Tensor,
    mask: Tensor,
    gram: Gram,
    damping: float,
    diagonal: Tensor | None,
    drift: Tensor | None,
    fast: Rounded | None,
    led_by: Preconditioner | None,
) -> _Problem:
    _check(weight, mask)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}")
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping must be finite and not negative, got {damping}")
    diagonal = _diagonal(gram, diagonal, weight.shape[1])
    size = size_of(diagonal) if fast is None else fast.size
    product = _unit_product(gram, size)
    diagonal = diagonal / size
    unit, back = _unit_rows(weight)
    if drift is not None:
        _check(weight, drift)
    drift = _unit_drift(drift, back, size)
    shift = _shift(diagonal, damping)
    led_by = led_by or Preconditioner(product, diagonal, shift)
    return _Problem(unit, product, fast or product, led_by, shift, drift, back, size)


def _shift(diagonal: Tensor, damping: float) -> float:
    return damping * float(diagonal.mean())


def _measured(problem: _Problem, new: Tensor) -> _Fit:
    error = new - problem.unit
    slope = problem.product(error).sub_(problem.drift)
    return _Fit(new, slope, _loss(problem, error, slope))


def _loss(problem: _Problem, error: Tensor, slope: Tensor) -> Tensor:
    return _dot(error, slope - problem.drift, torch.float64)


def _no_worse(problem: _Problem, new: Tensor, loss: Tensor) -> Tensor:
    """Rows, bool [N, 1], whose loss by an exact product is no larger."""
    # In exact arithmetic all are: the damped loss falls with every step and is the undamped one plus what was moved.
    return _measured(problem, new).loss <= loss


def _pruned(problem: _Problem, fit: _Fit, kept: Tensor) -> _Fit:
    """Where to start from with another mask; the loss is still that of `fit`."""
    new = fit.new * kept
    return _Fit(new, fit.slope + problem.fast(new - fit.new), fit.loss)


def _solve(problem: _Problem, start: _Fit, kept: Tensor, steps: int) -> _Fit:
    """Conjugate gradients over the kept weights, from a start that is zero elsewhere and is used up. A row that stalls
    stays put.

    The slope follows from the products that are made anyway, so it can be read where nothing is kept as well.
    """
    new, slope = start.new, start.slope.add_(start.new - problem.unit, alpha=problem.shift)
    downhill = problem.led_by.among(kept)
    direction = downhill(slope)
    size = -_dot(slope, direction)
    scale = problem.led_by.scale
    by_diagonal = _dot(slope.square(), torch.where(scale > 0, 1 / scale, 0) * kept)
    enough, span, going = by_diagonal * (CONVERGED / QUIET), size, torch.ones_like(size, dtype=torch.bool)
    for _ in range(steps):
        curved = problem.fast(direction).add_(direction, alpha=problem.shift)
        curvature = _dot(direction, curved)
        # Next to the preconditioner's share a curvature this small is rounding, and the step would be enormous.
        going &= (size > enough) & (curvature > EPS / QUIET * span)
        if not bool(going.any()):
            break
        step = torch.where(going, size / curvature, 0)
        new.addcmul_(direction, step)
        slope.addcmul_(curved, step)
        new_direction = downhill(slope)
        old, size = size, -_dot(slope, new_direction)
        turn = torch.where(going, size / old, 0)
        direction = new_direction.addcmul_(direction, turn)
        # direction . P . direction: what is downhill now is orthogonal to the directions before
        span = size + turn.square() * span
    error = new - problem.unit
    slope.sub_(error, alpha=problem.shift)
    return _Fit(new, slope, _loss(problem, error, slope))


def _best_pairs(fit: _Fit, blocks: Tensor) -> Tensor:
    """The pair of each four with the largest h_p B_p^-1 h_p^T, by elimination; duplicate channels count once."""
    curvature = blocks.permute(1, 2, 0)  # [4, 4, K/4]
    diagonal = torch.stack([curvature[i, i] for i in range(4)])
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0)
    new, pull = _planes(fit.new), _planes(fit.slope).neg_()
    for i in range(4):
        for j in range(4):
            pull[j].addcmul_(new[i], curvature[i, j])
    alone = pull.square().mul_(inverse[:, None])
    best = torch.full_like(alone[0], -1.0)
    choice = torch.zeros_like(best, dtype=torch.uint8)
    for i, j in PAIRS:
        ratio = curvature[i, j] * inverse[i]
        rest = diagonal[j] - ratio * curvature[i, j]
        inverse_rest = torch.where(rest > SINGULAR * diagonal[j], 1 / rest, 0)
        gain = torch.addcmul(pull[j], pull[i], -ratio).square_().mul_(inverse_rest).add_(alone[i])
        choice = torch.where(gain > best, 1 << i | 1 << j, choice)
        best = torch.maximum(best, gain)
    places = torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=choice.device)
    return (choice[..., None] & places).ne(0).view(fit.new.shape)


def _planes(x: Tensor) -> Tensor:
    """[N, K] as [4, N, K/4]."""
    return x.view(x.shape[0], -1, 4).permute(2, 0, 1).contiguous()


def _unit_product(gram: Gram, size: float) -> Product:
    """The product with G / size."""
    # large inputs' G is out of range before all of the scale is off: half of it then goes on the way in
    before = 1.0 if abs(math.frexp(size)[1]) < 64 else 2.0 ** -(math.frexp(size)[1] // 2)
    after = 1 / (before * size)

    def of(rows: Tensor) -> Tensor:
        return rows if before == 1 else rows * before

    if isinstance(gram, Tensor):
        matrix = gram.detach().float()
        nothing = matrix.new_zeros(())
        return lambda rows: torch.addmm(nothing, of(rows), matrix, beta=0, alpha=after)
    return lambda rows: gram(of(rows)) * after


def _unit_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`unit_scaled` rows float32 [N, K], and the powers of two float64 [N, 1] that lead back."""
    weight = weight.detach().float()
    unit = unit_scaled(weight)
    peak, unit_peak = (rows.abs().amax(1, keepdim=True).double() for rows in (weight, unit))
    return unit, torch.where(peak > 0, peak / unit_peak, 1.0)


def _unit_drift(drift: Tensor | None, back: Tensor, size: float) -> Tensor:
    if drift is None:
        return torch.zeros((), dtype=torch.float32, device=back.device)
    return (drift.detach() / (back * size)).float()


def _diagonal(gram: Gram, diagonal: Tensor | None, channels: int) -> Tensor:
    if isinstance(gram, Tensor):
        if gram.shape != (channels, channels):
            raise ValueError(f"gram must be [{channels}, {channels}], got {list(gram.shape)}")
        diagonal = gram.diagonal()
    elif diagonal is None or diagonal.shape != (channels,):
        shape = None if diagonal is None else list(diagonal.shape)
        raise ValueError(f"a gram that is a function needs its diagonal [{channels}], got {shape}")
    diagonal = diagonal.detach().float()
    if not bool(((diagonal >= 0) & (diagonal < math.inf)).all()):
        raise ValueError("the diagonal of X^T X must be finite and not negative")
    return diagonal


def _blocks(gram: Gram, blocks: Tensor | None, channels: int) -> Tensor:
    if channels % 4:
        raise ValueError(f"2:4 needs a multiple of 4 columns, got {channels}")
    if isinstance(gram, Tensor):
        _diagonal(gram, None, channels)
        return gram.detach().float().view(channels // 4, 4, channels // 4, 4).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    if blocks is None or blocks.shape != (channels // 4, 4, 4):
        shape = None if blocks is None else list(blocks.shape)
        raise ValueError(f"a gram that is a function needs its blocks [{channels // 4}, 4, 4], got {shape}")
    return blocks.detach().float()


def _block_diagonal(blocks: Tensor) -> Tensor:
    return blocks.diagonal(dim1=1, dim2=2).flatten()


def _check(weight: Tensor, other: Tensor) -> None:
    if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(f"weight must be floating point [N, K], got {weight.dtype} {list(weight.shape)}")
    if other.shape != weight.shape:
        raise ValueError(f"mask, new and drift must be {list(weight.shape)} like the weight, got {list(other.shape)}")


def _dot(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return (a * b).sum(1, keepdim=True, dtype=dtype)
