"""What launches of Triton kernels share: `gemv24`, `tiles24` and `prune_pack24`."""

import os
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch.library import wrap_triton

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


def kernel_arch(device: torch.device) -> int:
    """`arch_of`, for a kernel that is to know it: 0 in Triton's interpreter."""
    return 0 if interpreted() else arch_of(device)


def wrapped(kernel: Any) -> Any:
    """A kernel that torch.compile sees through; in Triton's interpreter, whose kernels torch 2.11 does not wrap, as it
    is."""
    return kernel if interpreted() else wrap_triton(kernel)


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
