"""What NVIDIA says of its GPUs: limits of a multiprocessor by compute capability, speeds of whole GPUs.

A kernel's instance is a "program" here, as in Triton; CUDA says block.
"""

from typing import NamedTuple

KIB = 1024
REGISTERS = 65536
"""32-bit registers of a multiprocessor, on every compute capability below."""
PARTITIONS = 4
"""Parts of a multiprocessor; each has a quarter of the registers and issues one instruction of a warp per cycle."""
WARP = 32
TENSOR_COLUMNS = 512
"""Columns of a multiprocessor's tensor memory, which sm_100 has (PTX ISA, "Tensor Memory")."""


class Limits(NamedTuple):
    """What a multiprocessor holds at once."""

    warps: int
    programs: int
    shared: int
    """Bytes of shared memory, the driver's share included."""
    program_shared: int
    """Bytes of shared memory one program may have."""


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; cuda_occupancy.h of CUDA 13.0
LIMITS = {
    80: Limits(64, 32, 164 * KIB, 163 * KIB),
    89: Limits(48, 24, 100 * KIB, 99 * KIB),
    90: Limits(64, 32, 228 * KIB, 227 * KIB),
    100: Limits(64, 32, 228 * KIB, 227 * KIB),
    120: Limits(48, 24, 100 * KIB, 99 * KIB),
}


def programs_per_multiprocessor(arch: int, registers: int, warps: int, shared: int) -> int:
    """How many programs of `warps` warps, `registers` registers a thread and `shared` bytes one multiprocessor holds
    at once: the count of cuda_occupancy.h. 0 where not even one fits. Raises KeyError for an unknown `arch`."""
    limits = LIMITS[arch]
    if shared > limits.program_shared:
        return 0
    # registers come in units of 256 a warp, shared memory in units of 128 bytes after 1 KiB for the driver
    warp_registers = _up(max(registers, 1) * WARP, 256)
    if warp_registers * _up(warps, PARTITIONS) > REGISTERS:
        return 0
    resident = PARTITIONS * (REGISTERS // PARTITIONS // warp_registers)
    return min(limits.programs, limits.warps // warps, resident // warps, limits.shared // _up(shared + KIB, 128))


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


class Gpu(NamedTuple):
    """A GPU as its maker describes it. Figures of datasheets: no kernel reaches them."""

    name: str
    arch: int
    multiprocessors: int
    clock: float
    """Boost clock, Hz."""
    bandwidth: float
    """Bytes per second of its memory."""
    bf16: float
    """Floating point operations per second of dense bf16 (and fp16) products, accumulated in float32."""
    fp8: float
    """The same of dense FP8 products."""
    l2: int
    """Bytes of its L2 cache."""

    @property
    def sparse_bf16(self) -> float:
        """The same of 2:4 products, counting the pruned half as done: twice dense on all of them."""
        return 2 * self.bf16

    @property
    def sparse_fp8(self) -> float:
        """The same of 2:4 FP8 products."""
        return 2 * self.fp8

    @property
    def instructions(self) -> float:
        """Thread instructions it can issue per second: one warp a cycle and partition."""
        return self.multiprocessors * PARTITIONS * WARP * self.clock


# Datasheets give products "with sparsity": halved here. Multiprocessors, clocks and L2 are from the architecture white
# papers and, for B200, what its driver reports.
# H100 SXM: NVIDIA H100 datasheet (3.35 TB/s; 1979 and 3958 TFLOPS sparse).
# H200 SXM: NVIDIA H200 datasheet (4.8 TB/s; products as H100).
# L40S: NVIDIA L40S datasheet (864 GB/s; 362.05 and 733 TFLOPS dense, FP8 with float32 accumulation as fast as fp16).
# B200: NVIDIA Blackwell datasheet, HGX B200 column (7.7 TB/s; 4.5 and 9 PFLOPS sparse).
GPUS = {
    "h100": Gpu("H100 SXM", 90, 132, 1.98e9, 3.35e12, 989.5e12, 1979e12, 50 * KIB**2),
    "h200": Gpu("H200 SXM", 90, 132, 1.98e9, 4.8e12, 989.5e12, 1979e12, 50 * KIB**2),
    "l40s": Gpu("L40S", 89, 142, 2.52e9, 0.864e12, 362.05e12, 733e12, 96 * KIB**2),
    "b200": Gpu("B200", 100, 148, 1.965e9, 7.7e12, 2250e12, 4500e12, 126 * KIB**2),
}
