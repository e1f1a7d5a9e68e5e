"""gemv24 against float64, in Triton's interpreter, or on a GPU where there is one."""

import os
import re
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

import rehearsal
from hwpq_fx.kernels import Float8Sparse24Tensor, pack24, unpack24
from hwpq_fx.kernels.gemv24 import Plain, SparseMma, candidates, config, gemv24, launch, product, why_not
from hwpq_fx.kernels.survey import survey
from rehearsal.ptx.machine import Machine

needs_triton = pytest.mark.skipif(sys.platform != "linux", reason="Triton's wheels are for Linux")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INSTRUCTIONS = 2.1  # per weight, at most: 5.5 would take as long as reading it does on an H100
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def arguments(m, n, k, dtype, bias=torch.float32):
    """What `gemv24` takes."""
    w = Float8Sparse24Tensor.from_hp(torch.randn(n, k, device=DEVICE))
    bias = None if bias is None else torch.randn(n, device=DEVICE).to(bias)
    return torch.randn(m, k, device=DEVICE).to(dtype), w.qdata, w.sparse_metadata, w.scale, bias


def check(y, x, qdata, sparse_metadata, scale, bias):
    """Against float64: float32 sums, one rounding at the end."""
    w = unpack24(qdata, sparse_metadata).double() * scale.double()
    b = torch.zeros(len(w), dtype=torch.float64, device=DEVICE) if bias is None else bias.double()
    expected, size = x.double() @ w.t() + b, x.double().abs() @ w.abs().t() + b.abs()
    allowed = 1e-6 * size + 2 * UNIT[y.dtype] * expected.abs()
    assert ((y.double() - expected).abs() <= allowed).all()


def launched(readable, given, config):
    readable[:] = [(part.data_ptr(), part.data_ptr() + part.nbytes) for part in given[:3]]
    x, *rest = given
    y = torch.full((len(x), len(rest[0])), torch.nan, dtype=x.dtype, device=DEVICE)
    launch(x, *rest, y, config)
    return y


@pytest.mark.parametrize(("wide", "ahead"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(("dtype", "bias"), [(torch.bfloat16, torch.float16), (torch.float16, None)])
@pytest.mark.parametrize(
    ("m", "n", "k", "warps"), [(1, 16, 128, 1), (3, 17, 256, 2), (8, 33, 384, 2), (9, 16, 640, 4), (2, 48, 128, 4)]
)
def test_sparse_tensor_cores(assembly, dtype, bias, m, n, k, warps, wide, ahead):
    given = arguments(m, n, k, dtype, bias)
    check(launched(assembly, given, SparseMma(warps, wide, ahead)), *given)


def every_byte():
    """Values e4m3 [16, 128]: all of them but NaN, -0.0 too, over all six patterns in all 32 groups of 16 rows."""
    pattern = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])
    pattern = pattern[(torch.arange(16)[:, None] + torch.arange(32)) % 6]
    mask = torch.zeros(16, 32, 4, dtype=torch.bool).scatter(-1, pattern, True).view(16, 128)
    kept = torch.arange(1024).to(torch.uint8)
    kept[kept & 0x7F == 0x7F] = 0
    values = torch.zeros(16, 128, dtype=torch.uint8).masked_scatter(mask, kept)
    return [part.to(DEVICE) for part in pack24(values.view(torch.float8_e4m3fn), mask)]


@pytest.mark.parametrize("config", [SparseMma(1, False), SparseMma(1, True), Plain(16, 8, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_in_every_place_is_exact(assembly, dtype, config):
    parts = every_byte()
    x = torch.eye(128, dtype=dtype, device=DEVICE)
    y = launched(assembly, (x, *parts, torch.ones(16, 1, device=DEVICE), None), config)
    assert torch.equal(y.t(), unpack24(*parts).to(dtype))


@pytest.mark.skipif(DEVICE == "cuda", reason="needs Triton to number lanes otherwise")
def test_lanes_numbered_otherwise_make_no_silent_mistake(assembly, monkeypatch):
    system = Machine.system
    monkeypatch.setattr(Machine, "system", lambda self, name: system(self, name)[::-1])
    assert launched(assembly, arguments(1, 16, 128, torch.bfloat16), SparseMma(1, False)).isnan().all()


def test_large_and_small(assembly):
    given = arguments(4, 16, 256, torch.bfloat16)
    x, qdata, _, scale, _ = given
    x *= 10.0 ** torch.randint(-12, 5, x.shape, device=DEVICE)
    qdata.view(torch.uint8)[::2] = 0x7E  # 448
    qdata.view(torch.uint8)[1::4] = 0x81  # the least, negative
    scale *= 1e-6
    check(launched(assembly, given, SparseMma(2, False)), *given)
    check(launched(assembly, given, Plain(4, 16, 1)), *given)


@settings(deadline=None, max_examples=10)
@given(
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(1, 12),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([Plain(16, 64, 4), Plain(4, 2, 1)]),
)
def test_any_shape(m, n, eighths, dtype, bias, config):
    parts = arguments(m, n, 8 * eighths, dtype, bias)
    check(launched([], parts, config), *parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [None, torch.bfloat16])
def test_product(dtype, bias):
    x, *rest = arguments(3, 24, 256, dtype, bias)
    y = product(x, None, *rest, None, dtype)
    assert y.dtype is dtype
    check(y, x, *rest)
    # rows that are not contiguous, and rows that no word is aligned with
    check(product(x.t().contiguous().t(), None, *rest, None, dtype), x, *rest)
    shifted = torch.cat([x.new_zeros(1), x.view(-1)])[1:].view(x.shape)
    check(product(shifted, None, *rest, None, dtype), x, *rest)
    zero = product(x * 0, None, *rest, None, dtype)
    assert torch.equal(zero, torch.zeros_like(zero) if bias is None else rest[-1].to(dtype).expand_as(zero))


def test_nothing_to_do():
    x, *rest = arguments(2, 16, 128, torch.bfloat16)
    assert gemv24(x[:0], *rest).shape == (0, 16)
    assert gemv24(x, *(part[:0] for part in rest)).shape == (2, 0)


def test_a_part_of_a_weight_at_an_odd_place():
    x, qdata, metadata, scale, bias = arguments(2, 24, 136, torch.bfloat16)
    given = x, qdata[5:], metadata[5:], scale[5:], bias[5:]
    check(gemv24(*given), *given)


def test_op():
    # of opcheck's tests those that FP8 tensors, and on a CPU Triton's interpreter, can go through
    tests = ["test_faketensor"] + ["test_aot_dispatch_dynamic"] * (DEVICE == "cuda")
    torch.library.opcheck(gemv24, arguments(2, 16, 128, torch.bfloat16), test_utils=tests)


TRACED = """
import torch, triton
from types import SimpleNamespace
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget
from hwpq_fx.kernels import gemv24

triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))
gemv24.arch_of = lambda device: 90

def show(graph, inputs):
    print(graph.code)
    return lambda *given: [torch.empty(1, 64)]

for dtype in (torch.bfloat16, torch.float32):
    x, q = torch.empty(1, 256, dtype=dtype), torch.empty(64, 128, dtype=torch.float8_e4m3fn)
    rest = q, torch.empty(64, 32, dtype=torch.uint8), torch.empty(64, 1), torch.empty(64)
    backend = aot_autograd(fw_compiler=show, inference_compiler=show)
    torch.compile(lambda *given: gemv24.gemv24(*given), backend=backend, fullgraph=True)(x, *rest)
"""


@needs_triton
def test_compiled_graphs_hold_the_kernel_and_copy_no_weight(tmp_path):
    """Traced as on a GPU. What torch cannot analyse (assembly that is not pure) it copies, all of it."""
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", TRACED], env=env, capture_output=True, text=True, check=True)
    calls = [line for line in done.stdout.splitlines() if "triton_kernel_wrapper_functional(" in line]
    assert len(calls) == 2 and all("tensors_to_clone = ['y']" in call for call in calls), done.stdout
    assert "'BF16': True" in calls[0] and "'GROUPS'" in calls[1]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("m", [1, 8])
def test_compiled(m):
    size = 512 if rehearsal.ON else 4096
    given = arguments(m, size, size, torch.bfloat16)
    compiled = torch.compile(lambda x, *rest: gemv24(x * 2, *rest) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(*given), gemv24(given[0] * 2, *given[1:]) + 1)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda x: x[:, :64], "x (2, 64) does not fit qdata (16, 64)"),
        (0, lambda x: x[0], "x (128,) does not fit"),
        (0, lambda x: x.double(), "x is torch.float64"),
        (1, lambda q: q.view(torch.uint8), "qdata is (16, 64) torch.uint8, not (16, 64) torch.float8_e4m3fn"),
        (1, lambda q: q.t().contiguous().t(), "qdata is not contiguous"),
        (2, lambda s: s[:, :8], "sparse_metadata is (16, 8)"),
        (3, lambda s: s.view(-1), "scale is (16,) torch.float32, not (16, 1)"),
        (3, lambda s: s.half(), "scale is (16, 1) torch.float16"),
        (4, lambda b: b[:8], "bias is (8,)"),
        (4, lambda b: b.int(), "bias is (16,) torch.int32"),
        (4, lambda b: b.to("meta"), "bias is on meta"),
    ],
)
@pytest.mark.parametrize("fake", [False, True])
def test_refusals(place, change, message, fake):
    given = list(arguments(2, 16, 128, torch.bfloat16))
    given[place] = change(given[place])
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
    with mode, pytest.raises(RuntimeError, match=re.escape(f"gemv24: {message}")):
        gemv24(*given)


def test_which_weights_are_served():
    assert why_not(90, torch.bfloat16, 4096, 4096) == why_not(80, torch.float32, 3, 8) == ""
    assert "sm_75" in why_not(75, torch.bfloat16, 16, 128)
    assert "float64" in why_not(90, torch.float64, 16, 128)
    assert "K = 12" in why_not(90, torch.bfloat16, 16, 12)


@pytest.mark.parametrize("m", [1, 8, 33])
@pytest.mark.parametrize(
    ("n", "k"), [(4096, 4096), (14336, 4096), (1024, 4096), (512, 3584), (16, 128), (128256, 2048)]
)
def test_warps_are_resident_at_once(m, n, k):
    cut = config(90, m, n, k, torch.bfloat16)
    warps = cut.warps * -(-n // 16) * -(-m // 8)
    assert cut.warps <= k // 128
    most = min(32, 2 ** int(np.log2(k // 128)))
    # where there is a second round in any case, its programs take few turns
    assert warps <= 40 * 132 or cut.warps == min(most, 8)
    assert warps * 2 > 40 * 132 or cut.warps == most


def test_candidates():
    some = candidates(90, 1, 4096, 1024, torch.bfloat16)
    assert some[0] == config(90, 1, 4096, 1024, torch.bfloat16) and len(set(some)) == len(some) == 8
    assert {cut.warps for cut in some} == {4, 8}
    assert all(cut.wide for cut in candidates(90, 8, 4096, 4096, torch.bfloat16))
    assert candidates(90, 1, 64, 136, torch.bfloat16) == [config(90, 1, 64, 136, torch.bfloat16)]


@needs_triton
@pytest.mark.parametrize("arch", [80, 90])
def test_sass(arch):
    """Spills nothing, reads the weight 16 bytes at a time, and is bound by memory rather than by issue."""
    found = list(survey([arch], ["hwpq_fx.kernels.gemv24_triton"], jobs=2))
    assert len(found) == 22 and all(one.passed for one in found)
    for one in found:
        if one.kernel != "sparse_mma_kernel":
            continue
        m, n, k = map(int, re.findall(r"=(\d+)", one.specimen))
        cut = config(arch, m, n, k, torch.bfloat16)
        assert one.programs * cut.warps >= 32
        loads = re.findall(r"LDG[.\w]*", one.sass)
        turns = one.instructions["HMMA"] // 4
        assert sum(".128" in load for load in loads) == turns * (12 if cut.wide else 4)
        # scales are asked for before the weight is read, and warps add up what they have all at once
        _, *ends = one.sass.split("BAR.SYNC")
        assert len(ends) <= 9 and not any("LDG" in end for end in ends)  # triton 3.6 makes 2 of them
        assert ("PF2" in one.sass) == one.specimen.endswith("ahead")
        if one.loop:
            # a lane has 64 of the 16 x 128 weights of a turn
            per_weight = sum(one.loop.values()) / (one.loop["HMMA"] // 4 * 64)
            print(f"sm_{arch} {one.specimen}: {per_weight:.2f} instructions per weight, {one.registers} registers")
            assert per_weight <= INSTRUCTIONS
