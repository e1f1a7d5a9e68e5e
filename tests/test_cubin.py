"""Kernels compiled without a GPU: what a report says is so, and ours are well on every GPU we name."""

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from hwpq_fx.kernels.cubin import ARCHS, Cubin, bits
from hwpq_fx.kernels.gpus import LIMITS, programs_per_multiprocessor
from hwpq_fx.kernels.roofline import GEMV
from hwpq_fx.kernels.survey import kernel_modules, survey

needs_triton = pytest.mark.skipif(sys.platform != "linux", reason="Triton's wheels are for Linux")
# all kernels for all GPUs: ten minutes where two slow cores have other work as well
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture
def samples(monkeypatch):
    """The module of sample kernels, importable where they are compiled."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return ["sample_triton"]


def cubin(sass="", registers=32, shared=0, columns=0):
    return Cubin(None, 90, registers, 0, shared, sass, 0, 4, columns)


@pytest.fixture(scope="module")
def sampled():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        return list(survey([80, 90, 100, 120], ["sample_triton"], jobs=2))


@needs_triton
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_survey_tells_well_from_unwell(sampled, arch):
    found = {one.specimen: one for one in sampled if one.arch == arch}
    for name in ("well", "product"):
        one = found[name]
        assert one.passed and one.spills == one.stack == 0 < one.registers <= 255 and one.warps == 4
    well, product, spilled, wide = (found[name] for name in ("well", "product", "spills", "too wide"))
    assert well.kernel == "normalize" and well.arch == arch and well.instructions["LDG.128"] == 2 and not well.loop
    assert any(name.endswith("MMA") for name in product.loop)
    assert product.shared >= 64 * 64 * 2 * 2
    moved = sum(count * bits(name) // 8 for name, count in spilled.instructions.items() if name[:3] in ("STL", "LDL"))
    assert spilled.spills == moved > 0 and spilled.stack > 0 and not spilled.passed
    assert wide.shared > LIMITS[arch].program_shared and wide.programs == 0 and not wide.passed
    assert "too small for this kernel" in found["refuses"].error and not found["refuses"].passed


@needs_triton
def test_survey_of_one_name(samples):
    assert [(one.arch, one.specimen) for one in survey([89], samples, name="well")] == [(89, "well")]


@needs_triton
def test_spills_are_those_of_ptxas(samples, tmp_path):
    script = (
        "from sample_triton import specimens; from hwpq_fx.kernels.cubin import compile_specimen\n"
        "found = compile_specimen(specimens(80)[1], 80)\n"
        "import triton; print(found.spills, found.stack, triton.__file__)"
    )
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    spills, stack, triton = done.stdout.split()
    (ptx,) = tmp_path.glob("*/*.ptx")
    ptxas = Path(triton).parent / "backends/nvidia/bin/ptxas"
    said = subprocess.run([ptxas, "-v", "--gpu-name=sm_80", ptx, "-o", os.devnull], capture_output=True, text=True)
    frame, stores, loads = re.search(r"(\d+) bytes stack frame, (\d+) \D+(\d+)", said.stderr).groups()
    assert int(spills) == int(stores) + int(loads) > 0
    assert stack == frame


@needs_triton
def test_survey_says_what_died(samples):
    with pytest.raises(RuntimeError, match="No module named 'no_such_kernels'"):
        list(survey([90], ["no_such_kernels"]))


@needs_triton
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_survey_ends_when_it_is_told_to(samples, how):
    """Not once every kernel that was queued is compiled."""
    kill = "me.children()[0].terminate()" if how is signal.SIGTERM else "os.killpg(0, signal.SIGINT)"  # as a terminal
    script = (
        "import os, signal, time, psutil; from hwpq_fx.kernels.survey import kernel_modules, survey\n"
        "me = psutil.Process()\n"
        "try:\n"
        "    for number, one in enumerate(survey([80, 90, 100, 120], kernel_modules(), jobs=2)):\n"
        "        if number:\n"
        "            continue\n"
        "        children = me.children(recursive=True)\n"
        f"        {kill}\n"
        "except (KeyboardInterrupt, RuntimeError):\n"
        "    print(len(psutil.wait_procs(children, timeout=20)[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, start_new_session=True
    )
    assert done.stdout == "0\n", done.stderr


SASS = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!PT LDS RZ, [RZ] ;
.L_x_1:
        /*0020*/                   LDG.E.LTC128B.U8 R2, [R4.64] ;
.L_x_0:
        /*0030*/              @!P0 LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0040*/                   PRMT R3, R4, R5, R6 ;
        /*0041*/                   PRMT R3, R4, R5, R6 ;
        /*0042*/                   PRMT R3, R4, R5, R6 ;
        /*0043*/                   PRMT R3, R4, R5, R6 ;
        /*0044*/                   PRMT R3, R4, R5, R6 ;
        /*0045*/                   PRMT R3, R4, R5, R6 ;
        /*0050*/              @UP1 LDGSTS.E.BYPASS.LTC128B.128 [R3], [R4.64] ;
        /*0060*/               @P0 BRA `(.L_x_0) ;
        /*0070*/                   STS.U16 [R3], R4 ;
.L_x_3:
        /*0074*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R2], R3 ;
        /*0078*/              @!P1 BRA `(.L_x_3) ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
.L_x_2:
        /*00a0*/                   BRA `(.L_x_2);
"""

# as ptxas lays out a wait: behind the kernel, from where it comes back into the loop
WAIT = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   HMMA R1, R2, R3 ;
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R2], R3 ;
        /*0030*/              @!P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0040*/                   PRMT R3, R4, R5, R6 ;
        /*0050*/                   PRMT R3, R4, R5, R6 ;
        /*0060*/                   BRA.U UP0, `(.L_x_0) ;
        /*0070*/                   STG.E.128 [R2], R4 ;
        /*0080*/                   EXIT ;
.L_x_1:
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R2], R3 ;
        /*00a0*/              @!P1 BRA `(.L_x_1) ;
        /*00b0*/                   BRA `(.L_x_2) ;
"""


def test_instructions_and_loops():
    found = cubin(SASS)
    inner = Counter({"LDG.128": 1, "PRMT": 6, "LDGSTS.128": 1, "BRA": 1})
    assert found.instructions() == inner + Counter({"LDC": 1, "LDG.8": 1, "STS.16": 1, "SYNCS": 1, "BRA": 3, "EXIT": 1})
    # the outer loop holds another one, waiting is no work, the jump to itself at the end is none
    assert found.loops() == [inner]
    assert cubin(WAIT).loops() == [Counter({"HMMA": 1, "PRMT": 2, "SYNCS": 2, "BRA": 4})]
    assert found.loads() == ["LDG.E.LTC128B.U8", "LDG.E.128.CONSTANT", "LDGSTS.E.BYPASS.LTC128B.128"]


@pytest.mark.parametrize(
    ("opcode", "width"), [("LDG.E", 32), ("LDG.E.S8", 8), ("LDG.E.EF.64.CONSTANT", 64), ("STL.128", 128)]
)
def test_bits(opcode, width):
    assert bits(opcode) == width


# (arch, registers, warps, shared) and what cuda_occupancy.h of CUDA 13.0 says
@pytest.mark.parametrize(
    ("kernel", "programs"),
    [
        ((90, 32, 4, 0), 16),  # warps
        ((90, 128, 4, 0), 4),  # registers
        ((90, 129, 4, 0), 3),
        ((90, 168, 1, 0), 12),
        ((90, 16, 1, 0), 32),  # programs
        ((120, 16, 1, 0), 24),
        ((80, 32, 4, 32768), 4),  # shared memory, with the driver's KiB
        ((89, 32, 4, 32768), 3),
        ((90, 32, 4, 227 * 1024), 1),
        ((90, 32, 4, 227 * 1024 + 1), 0),
        ((90, 255, 16, 0), 0),
    ],
)
def test_programs_per_multiprocessor(kernel, programs):
    assert programs_per_multiprocessor(*kernel) == programs


def test_tensor_memory_counts():
    assert cubin().programs() == 16
    assert cubin(columns=256).programs() == 2


@pytest.fixture(scope="module")
def ours():
    return list(survey(ARCHS, kernel_modules()))


@needs_triton
@pytest.mark.parametrize("arch", ARCHS)
def test_our_kernels_compile_without_spills(ours, arch):
    here = [one for one in ours if one.arch == arch]
    for one in here:
        print(
            f"{one.kernel}, {one.specimen}: {one.registers} registers, {one.shared} bytes shared, {one.spills} spilled"
        )
    assert {one.module for one in here} == set(kernel_modules()), "a module lists no specimens"
    assert [(one.kernel, one.specimen, one.error, one.spills, one.shared) for one in here if not one.passed] == []


@needs_triton
def test_roofline_knows_what_the_few_rows_kernel_issues(ours):
    # a sparse product of 16 x 32 weights, by 32 lanes: 16 weights each
    loops = [one.loop for one in ours if one.arch == 90 and one.kernel == "sparse_mma_kernel" and one.loop.get("HMMA")]
    assert len(loops) > 0
    for loop in loops:
        assert sum(loop.values()) / (16 * loop["HMMA"]) == pytest.approx(GEMV, rel=0.15)
