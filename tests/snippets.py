"""Kernels of a few lines of PTX, and what they leave in memory."""

import numpy as np

from rehearsal.ptx import launch, read


def kernel(body, threads=64, registers=""):
    """A kernel of one argument, an address in %rd1; %r1 is the number of the thread."""
    return read(
        f""".extern .shared .align 16 .b8 global_smem[];
        .visible .entry test(.param .u64 .ptr .global .align 1 test_param_0) .reqntid {threads} {{
        .reg .pred %p<8>; .reg .b16 %rs<8>; .reg .b32 %r<32>; .reg .b64 %rd<8>; {registers}
        ld.param.b64 %rd1, [test_param_0]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd2, %rd2, %rd1;
        mov.b32 %r3, global_smem; shl.b32 %r4, %r1, 2; add.s32 %r4, %r3, %r4; xor.b32 %r5, %r4, 128;
        {body} ret; }}"""
    )


def ran(body, threads=64, programs=1, given=None, extra=0, registers="", shared=0, cluster=None):
    """What lies in memory afterwards: int32, one word a thread of a program unless `given`."""
    memory = np.zeros(threads, np.int32) if given is None else np.array(given, np.int32)
    first = memory.ctypes.data
    ranges = [(first, first + memory.nbytes + extra)]
    launch(kernel(body, threads, registers), (programs, 1, 1), shared or 4 * threads, [first], ranges, cluster)
    return memory
