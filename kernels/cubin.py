"""Compile our Triton kernels for GPUs that are not there, and read what came out: registers, spills, shared memory,
SASS. Triton's wheel brings ptxas, cuobjdump and nvdisasm; no driver is needed. Tried on triton 3.6 and 3.9.

Every `*_triton.py` module lists, in `specimens(arch)`, its kernels as they are launched.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

ARCHS = (80, 89, 90, 100, 120)


class Specimen(NamedTuple):
    """One kernel as it is launched for one kind of problem."""

    name: str
    kernel: Any
    """What triton.jit gave."""
    signature: Mapping[str, str]
    """Triton's type of every argument that is not a constant: "*bf16", "*fp8e4nv", "*u8", "i32", "fp32"."""
    constants: Mapping[str, Any]
    """The tl.constexpr arguments."""
    options: Mapping[str, Any] = {}
    """num_warps, num_stages, enable_fp_fusion and the like, as at launch."""
    aligned: tuple[str, ...] | None = None
    """Arguments that are multiples of 16 (pointers always are): None means every i32 is."""


class Cubin(NamedTuple):
    """What the compiler made of a specimen."""

    specimen: Specimen
    arch: int
    registers: int
    spills: int
    """Bytes of stack a thread uses."""
    shared: int
    """Bytes of shared memory a program uses."""
    sass: str

    def loads(self) -> list[str]:
        """Global loads in the SASS, as "LDG.E.128"."""
        return re.findall(r"\b(?:LDG|LDGSTS)\.[A-Z0-9._]*", self.sass)


def compile_specimen(specimen: Specimen, arch: int) -> Cubin:
    """Compile for compute capability `arch` (90: sm_90). Raises ImportError without Triton and whatever Triton
    raises where the kernel does not compile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = specimen.kernel.arg_names
    types = {name: specimen.signature.get(name, "constexpr") for name in names}
    aligned = specimen.aligned
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if types[name].startswith("*") or (types[name] == "i32" if aligned is None else name in aligned)
    }
    source = ASTSource(specimen.kernel, signature=types, constexprs=dict(specimen.constants), attrs=divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(specimen.options))
    usage, sass = _dump(compiled.asm["cubin"])
    return Cubin(specimen, arch, usage["REG"], usage["STACK"], compiled.metadata.shared, sass)


def _dump(cubin: bytes) -> tuple[dict[str, int], str]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        env = os.environ | {"PATH": f"{tools}:{os.environ.get('PATH', '')}"}
        usage = _output([tools / "cuobjdump", "-res-usage", file], env)
        sass = _output([tools / "nvdisasm", "-c", file], env)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}, sass


def _output(command: list[Any], env: Mapping[str, str]) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=env, check=True)
    return done.stdout + done.stderr
