"""What the products by Triton, `gemv24` and `tiles24`, share around their kernels."""

import os
from collections.abc import Iterable
from functools import cache

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of models and biases that they serve."""

Part = tuple[str, torch.Tensor | None, tuple[int, ...], tuple[torch.dtype, ...]]


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def arch_of(device: torch.device) -> int:
    """Compute capability (90: sm_90) of a CUDA device; where the interpreter runs, that of a Hopper."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def check_parts(op: str, device: torch.device, parts: Iterable[Part]) -> None:
    """Raise RuntimeError, naming the part, where one is not of its shape or dtypes, not contiguous or not on `device`;
    None always fits."""
    for name, part, shape, dtypes in parts:
        if part is None:
            continue
        if part.shape != shape or part.dtype not in dtypes:
            wanted = f"{tuple(shape)} {' or '.join(map(str, dtypes))}"
            raise RuntimeError(f"{op}: {name} is {tuple(part.shape)} {part.dtype}, not {wanted}")
        if not part.is_contiguous():
            raise RuntimeError(f"{op}: {name} is not contiguous")
        if part.device != device:
            raise RuntimeError(f"{op}: {name} is on {part.device}, x on {device}")
