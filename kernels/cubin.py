"""Compile our Triton kernels for GPUs that are not there, and read what came out: registers, spills, shared memory,
SASS. Triton's wheel brings ptxas, cuobjdump and nvdisasm; no driver is needed. Tried on triton 3.6 and 3.9.

Every `*_triton.py` module lists, in `specimens(arch)`, its kernels as they are launched.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .gpus import LIMITS, TENSOR_COLUMNS, programs_per_multiprocessor

ARCHS = tuple(LIMITS)
MEMORY = ("LDG", "LDGSTS", "STG", "LDS", "STS", "LDL", "STL")
"""SASS instructions that say how many bits a thread moves, 32 where they do not."""

SHORT_LOOP = 8
"""Lines of SASS: no longer, a loop does no work but to try a barrier again."""


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
    """Bytes a thread moves to and from local memory in the SASS (STL, LDL), every instruction counted once: ptxas's
    "spill stores" plus "spill loads". A stack frame that nothing touches is not a spill."""
    shared: int
    """Bytes of shared memory a program uses."""
    sass: str
    stack: int
    """Bytes of a thread's stack frame."""
    warps: int
    """Warps of a program."""
    columns: int
    """Columns of tensor memory a program uses (sm_100)."""

    def loads(self) -> list[str]:
        """Global loads in the SASS, as "LDG.E.128"."""
        return re.findall(r"\b(?:LDG|LDGSTS)\.[A-Z0-9._]*", self.sass)

    def instructions(self) -> Counter[str]:
        """How often each instruction stands in the SASS: by name, or name and bits if it moves memory ("LDG.128")."""
        return Counter(_kind(opcode) for opcode in _opcodes(self.sass.splitlines()))

    def loops(self) -> list[Counter[str]]:
        """The same for every innermost loop, in the order of the SASS; those that only wait for a barrier left out."""
        lines = self.sass.splitlines()
        bodies = [body for body in _natural_loops(lines) if len(body) > SHORT_LOOP]
        inner = [body for body in bodies if not any(other < body for other in bodies)]
        return [Counter(_kind(opcode) for opcode in _opcodes([lines[at] for at in body])) for body in inner]

    def programs(self) -> int:
        """How many programs one multiprocessor holds at once: 0 where a program does not fit."""
        count = programs_per_multiprocessor(self.arch, self.registers, self.warps, self.shared)
        return min(count, TENSOR_COLUMNS // self.columns) if self.columns else count


def _natural_loops(lines: Sequence[str]) -> list[set[int]]:
    """Lines of every loop: of what leads from a label back to it, where there is no way in but by the label. (Waits
    that stand behind the kernel jump back into it and are no loops.)"""
    labels = {line.strip()[:-1]: at for at, line in enumerate(lines) if line.startswith(".L_")}
    after: dict[int, set[int]] = {}
    for at, line in enumerate(lines):
        jump = re.search(r"\bBRA\S* (!?U?P\d, )?`\((\.L_\w+)\)", line)
        never_past = "@" not in line and (bool(jump and not jump[1]) or bool(re.search(r"\b(EXIT|RET)\b", line)))
        after[at] = ({at + 1} if at + 1 < len(lines) and not never_past else set()) | (
            {labels[jump[2]]} if jump and jump[2] in labels else set()
        )
    before: dict[int, set[int]] = {at: set() for at in after}
    for at, following in after.items():
        for one in following:
            before[one].add(at)
    bodies: dict[int, set[int]] = {}
    for at in after:
        for label in (one for one in after[at] if one <= at):
            if at not in _reach(0, after, label):
                bodies.setdefault(label, set()).update(_reach(at, before, label) | {label})
    return [bodies[label] for label in sorted(bodies)]


def _reach(start: int, following: Mapping[int, set[int]], shut: int) -> set[int]:
    """Where one gets from `start` without passing `shut`."""
    found: set[int] = set()
    ahead = [start]
    while ahead:
        at = ahead.pop()
        if at != shut and at not in found:
            found.add(at)
            ahead.extend(following[at])
    return found


def _opcodes(lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        # those under @!PT or @!UPT never run: they only fill a slot
        found = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?([A-Z][\w.]*)", line)
        if found:
            yield found[1]


def _kind(opcode: str) -> str:
    name = opcode.split(".")[0]
    return f"{name}.{bits(opcode)}" if name in MEMORY else name


def bits(opcode: str) -> int:
    """How many bits a thread moves in one of the MEMORY instructions: 128 for "LDG.E.128"."""
    widths = (re.fullmatch(r"[US]?(8|16|32|64|128|256)", part) for part in opcode.split("."))
    return next((int(width[1]) for width in widths if width), 32)


def compile_specimen(specimen: Specimen, arch: int) -> Cubin:
    """Compile for compute capability `arch` (90: sm_90). Raises ImportError without Triton and whatever Triton
    raises where the kernel does not compile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = specimen.kernel.arg_names
    types = {name: specimen.signature.get(name, "constexpr") for name in names}
    aligned = [name for name in names if types[name] == "i32"] if specimen.aligned is None else specimen.aligned
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if types[name].startswith("*") or (name in aligned and types[name] != "constexpr")
    }
    source = ASTSource(specimen.kernel, signature=types, constexprs=dict(specimen.constants), attrs=divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(specimen.options))
    usage, sass = _dump(compiled.asm["cubin"])
    spills = sum(bits(opcode) // 8 for opcode in _opcodes(sass.splitlines()) if opcode.startswith(("STL", "LDL")))
    meta = compiled.metadata
    return Cubin(
        specimen, arch, usage["REG"], spills, meta.shared, sass, usage["STACK"], meta.num_warps, meta.tmem_size or 0
    )


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
