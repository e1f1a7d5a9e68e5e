"""A GPU to rehearse on: `HWPQ_FX_REHEARSE=90 pytest -m gpu` runs what needs a GPU where there is none, as sm_90.

Tensors on "cuda" are CPU memory (cuda.cpp). Triton kernels, ours and those that Inductor writes, are compiled for that
GPU and their PTX runs on the CPU (ptx/), which stops what compute-sanitizer would report: addresses beyond what a
kernel was given, races in shared memory. NVIDIA's and torchao's compiled products are those of doubles.py; torchao's
kernels themselves run in test_cutlass_ptx.py. Nothing is learned of speed, of ptxas or of hardware that does not do
what the PTX ISA says.

Wants a build of torch without CUDA and a C++ compiler, and to start before torch is imported. Tried on torch 2.13, with
triton 3.6 and 3.9.
"""

import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ARCH = os.environ.get("HWPQ_FX_REHEARSE") or None
ON = ARCH is not None
"""Then tests keep sizes small: what a GPU does in microseconds takes milliseconds."""
ARCHS = ("80", "86", "89", "90", "100", "120")
SOURCE = Path(__file__).with_name("cuda.cpp")


def start(arch: str) -> None:
    """From here on this process has a GPU of compute capability `arch` ("90")."""
    if arch not in ARCHS:
        raise ValueError(f"HWPQ_FX_REHEARSE is one of {', '.join(ARCHS)}, not {arch!r}")
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already: it asks once what devices there are")
    os.environ["TRITON_INTERPRET"] = "0"
    torch_folder = Path(find_spec("torch").submodule_search_locations[0])
    for library in (torch_folder / "lib" / "libtorch_cpu.so", built(torch_folder)):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

    from . import gpu

    gpu.install(int(arch))
    from . import inductor, libraries, triton_driver

    triton_driver.install()
    libraries.install()
    inductor.install()


def built(torch_folder: Path) -> Path:
    """cuda.cpp compiled against that torch, once."""
    key = hashlib.sha256(SOURCE.read_bytes() + (torch_folder / "version.py").read_bytes()).hexdigest()[:16]
    made = Path(tempfile.gettempdir()) / f"hwpq_fx-rehearsal-{key}.so"
    if not made.exists():
        headers, libraries = torch_folder / "include", torch_folder / "lib"
        command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-fPIC", "-shared", str(SOURCE)]
        command += [f"-I{headers}", f"-I{headers / 'torch/csrc/api/include'}", f"-L{libraries}", "-ltorch_cpu", "-lc10"]
        part = made.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", str(part)], check=True)
        part.replace(made)
    return made
