"""torchao's sparse kernels for sm_90, compiled from CUTLASS's sources, on the machine that runs PTX.

Wants the sources and a compiler, in a folder of their own, named by HWPQ_FX_CUTLASS:

    pip install --no-deps --target FOLDER nvidia-cutlass==4.2.0.0 \\
        nvidia-{cuda-nvcc,nvvm,cuda-crt,cuda-runtime,cuda-cccl}==13.0.*

torchao 0.17 and 0.18 have CUTLASS 4.1.0; tried with both. Other sources: put them in FOLDER/cutlass_library/source.
"""

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from .. import ptx

FOLDER = os.environ.get("HWPQ_FX_CUTLASS")
SOURCE = Path(__file__).with_name("kernels.cu")
ALIGNED = 128
"""Bytes, of every tensor."""


class Launch(ctypes.Structure):
    """As in kernels.cu."""

    _fields_ = (
        ("accepted", ctypes.c_int),
        ("grid", ctypes.c_int * 3),
        ("cluster", ctypes.c_int * 3),
        ("shared", ctypes.c_int),
        ("bytes", ctypes.c_int),
        ("sizes", ctypes.c_int * 3),
        ("parameters", ctypes.c_ubyte * 4096),
    )


@cache
def built() -> Path:
    """A folder with the host's part, kernels.so, and the GPU's, kernels.ptx: compiled once, in a minute or two."""
    assert FOLDER
    folder = Path(FOLDER).resolve()
    cutlass, cuda = folder / "cutlass_library/source", folder / "nvidia/cu13"
    version = (cutlass / "include/cutlass/version.h").read_bytes()
    key = hashlib.sha256(SOURCE.read_bytes() + version + str(folder).encode()).hexdigest()[:16]
    made = Path(tempfile.gettempdir()) / f"hwpq_fx-cutlass-{key}"
    if not made.exists():
        part = Path(tempfile.mkdtemp(dir=tempfile.gettempdir()))
        for tool in (*(cuda / "bin").iterdir(), cuda / "nvvm/bin/cicc"):
            if tool.is_file():
                tool.chmod(tool.stat().st_mode | 0o111)
        command = [str(cuda / "bin/nvcc"), "-std=c++17", "-O3", "-w", "-DNDEBUG", "--expt-relaxed-constexpr"]
        # the driver's functions are then called by name, and kernels.cu has the one that is
        command += ["-DCUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL=1", "-gencode", "arch=compute_90a,code=compute_90a"]
        command += [f"-I{cutlass / part}" for part in ("include", "tools/util/include")]
        command += [f"-I{cuda / 'include/cccl'}", f"-L{cuda / 'lib'}", "-Xcompiler", "-fPIC", "-shared"]
        command += ["--keep", "--keep-dir", str(part), "-o", str(part / "kernels.so"), str(SOURCE)]
        subprocess.run(command, check=True, cwd=part)
        for left in part.iterdir():
            if left.name not in ("kernels.so", "kernels.ptx"):
                left.unlink()
        part.replace(made)
    return made


@cache
def host() -> ctypes.CDLL:
    return ctypes.CDLL(str(built() / "kernels.so"))


@cache
def kernel(part: str) -> ptx.source.Kernel:
    return ptx.read((built() / "kernels.ptx").read_text(), part)


def names() -> list[str]:
    """Of all kernels, template arguments and all."""
    return re.findall(r"\.entry\s+([\w$]+)", (built() / "kernels.ptx").read_text())


def placed(tensor: torch.Tensor) -> torch.Tensor:
    """A copy where CUDA would place it."""
    size = tensor.numel() * tensor.element_size()
    raw = torch.empty(size + ALIGNED, dtype=torch.uint8)
    copy = raw[-raw.data_ptr() % ALIGNED :][:size].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def run(name: str, part: str, shape: tuple[int, ...], tensors: list[torch.Tensor]) -> None:
    """Describe a launch by the function `name` of kernels.cu and run the kernel with `part` in its name."""
    addresses = (ctypes.c_void_p * len(tensors))(*(one.data_ptr() for one in tensors))
    launch = Launch()
    getattr(host(), name)(*shape, addresses, ctypes.byref(launch))
    if not launch.accepted:
        raise RuntimeError("Got CUTLASS error")
    ranges = [(one.data_ptr(), one.data_ptr() + one.numel() * one.element_size()) for one in tensors]
    given = [bytes(launch.parameters[: launch.bytes])]
    ptx.launch(kernel(part), tuple(launch.grid), launch.shared, given, ranges, tuple(launch.cluster))


def compress(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """torchao's to_sparse_semi_structured_cutlass_sm9x_f8: e4m3 [N, K], two nonzeros in four, to values [N, K/2] and
    metadata, of NaN before they are written."""
    n, k = weight.shape
    sizes = Launch()
    host().compressor(n, k, (ctypes.c_void_p * 3)(), ctypes.byref(sizes))
    columns, rows, used = sizes.sizes
    values, metadata = (placed(torch.full(size, 0x7F, dtype=torch.uint8)) for size in ((n, columns), (rows, used)))
    run("compressor", "Compressor", (n, k), [placed(weight), values, metadata])
    return values.view(weight.dtype)[:, : k // 2], metadata


TILES = (
    (64, "up_to_64", "FP8FastAccumE+NS7_IJNSC_ILi64EEENSC_ILi32EEENSC_ILi256EE"),
    (128, "up_to_128", "FP8FastAccumE+NS7_IJNSC_ILi64EEENSC_ILi128EEENSC_ILi256EE"),
    (1 << 30, "more", "FP8FastAccumE+NS7_IJNSC_ILi128EEESI_NSC_ILi256EE"),
)
"""torchao's choice by rows of x: up to how many, the function of kernels.cu, and the tile as kernels' names have it."""


def product(x, x_scale, values, metadata, scale, bias, out_dtype):
    """torchao's rowwise_scaled_linear_sparse_cutlass_f8f8. bias and out_dtype: as kernels.cu has them by rows."""
    (m, k), n = x.shape, len(values)
    _, name, tile = next(one for one in TILES if m <= one[0])
    y = placed(torch.full((m, n), float("nan"), dtype=out_dtype))
    bias = torch.zeros(0) if bias is None else bias
    run(name, tile, (m, n, k), [*map(placed, (values, x, metadata, scale, x_scale, bias)), y])
    return y
