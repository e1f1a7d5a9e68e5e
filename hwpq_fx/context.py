"""Where weights are worked out, whatever mode the caller of the library is in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def as_written() -> Iterator[None]:
    """No gradients, no inference mode (what is made inside stays usable outside of it), no autocast: products are in
    the dtypes that the code says."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield
