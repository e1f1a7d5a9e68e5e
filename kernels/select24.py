"""Which two of four stay: the comparison every exact 2:4 choice comes down to."""

import torch


def best_two(groups: torch.Tensor) -> torch.Tensor:
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


def _two_of(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return (x & y) | (z & (x | y))
