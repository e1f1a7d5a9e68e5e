"""torch.func's transforms and forward-mode derivatives, as they stand while a product runs.

torch has no public way to ask. Tried on torch 2.11.0 and 2.13.0.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad


def is_transformed(value: torch.Tensor) -> bool:
    """Whether it stands for more than it shows, inside `vmap`, `grad` and their like."""
    return torch._C._functorch.is_functorch_wrapped_tensor(value)


@contextmanager
def outside_transforms(value: torch.Tensor) -> Iterator[torch.Tensor]:
    """All that it stands for, with the dimensions that `vmap` runs over in front; no transform follows what is done
    with it inside."""
    while is_transformed(value):
        inner = torch._C._functorch.get_unwrapped(value)
        batched = torch._C._functorch.is_batchedtensor(value)
        value = inner.movedim(torch._C._functorch.maybe_get_bdim(value), 0) if batched else inner
    with temporarily_clear_interpreter_stack():
        yield value


def derivatives_are_taken() -> bool:
    """Whether torch.func (`grad`, `jvp` and what is made of them) or a level of forward mode follows what runs."""
    if forward_ad._current_level >= 0:
        return True
    standing = torch._C._functorch.get_interpreter_stack() or ()
    return any(one.key() in (TransformType.Grad, TransformType.Jvp) for one in standing)
