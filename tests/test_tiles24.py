"""The path "tiles" against float64, in Triton's interpreter, or on a GPU where there is one."""

import importlib
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rehearsal
from hwpq_fx.kernels import Float8Sparse24Tensor, quantize_rows, unpack24
from hwpq_fx.kernels import tiles24 as module
from hwpq_fx.kernels.launching import arch_of
from hwpq_fx.kernels.pack24 import PATTERNS
from hwpq_fx.kernels.quantize_rows import E4M3
from hwpq_fx.kernels.tiles24 import Config, candidates, config, deal, launch, product, tiles24, why_not

triton = pytest.importorskip("triton")
tl = triton.language
expand = importlib.import_module("hwpq_fx.kernels.expand24").expand

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALL = Config(16, 16, 32, 4, 2)


def needs_e4m3():
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no e4m3 in hardware")


def arguments(m, n, k, dtype, fp8, bias=torch.float32):
    """What `tiles24` takes."""
    if fp8:
        needs_e4m3()
    x = torch.randn(m, k, device=DEVICE).to(dtype)
    x, x_scale = quantize_rows(x) if fp8 else (x, None)
    w = Float8Sparse24Tensor.from_hp(torch.randn(n, k, device=DEVICE))
    bias = None if bias is None else torch.randn(n, device=DEVICE).to(bias)
    return x, x_scale, w.qdata, w.sparse_metadata, w.scale, bias, dtype


def check(y, x, x_scale, qdata, sparse_metadata, scale, bias, dtype):
    """Against float64: float32 sums in any order, one rounding at the end."""
    w = unpack24(qdata, sparse_metadata).double() * scale.double()
    x = x.double() * (1 if x_scale is None else x_scale.double())
    b = torch.zeros(len(w), dtype=torch.float64, device=DEVICE) if bias is None else bias.double()
    expected, size = x @ w.t() + b, x.abs() @ w.abs().t() + b.abs()
    # the FP8 tensor cores of sm_89 and sm_90 align what they add in one instruction to 14 bits
    unit = 2.0**-13 if DEVICE == "cuda" and x_scale is not None else (x.shape[1] + 8) * 2.0**-24
    assert y.dtype is dtype
    assert y.shape == expected.shape
    assert ((y.double() - expected).abs() <= unit * size + 2 * UNIT[dtype] * expected.abs()).all()


def run(given, cut):
    """The product into memory full of NaN, cut as `cut` says."""
    (m, n), dtype = (len(given[0]), len(given[2])), given[-1]
    y = torch.full((m, n), torch.nan, dtype=dtype, device=DEVICE)
    parts = torch.full((cut.split, m, n), torch.nan, device=DEVICE) if cut.split > 1 else None
    launch(*given[:-1], y, parts, cut)
    return y


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("shape", [(5, 24, 32), (17, 33, 104), (1, 1, 8), (40, 16, 256)])
@pytest.mark.parametrize(("dtype", "fp8"), [(torch.bfloat16, False), (torch.float16, True), (torch.float32, False)])
def test_matches_float64(dtype, fp8, shape, first, split):
    given = arguments(*shape, dtype, fp8)
    check(run(given, SMALL._replace(split=split, weights_first=first)), *given)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 12).map(lambda words: 8 * words),
    st.sampled_from([*UNIT]),
    st.booleans(),
    st.sampled_from([None, *UNIT]),
    st.sampled_from([1, 2, 4]),
)
def test_any_shape(m, n, k, dtype, fp8, bias, split):
    given = arguments(m, n, k, dtype, fp8, bias)
    check(run(given, SMALL._replace(split=split)), *given)


@pytest.mark.parametrize("bias", [None, *UNIT])
@pytest.mark.parametrize(("dtype", "fp8"), [(torch.bfloat16, True), (torch.float16, False), (torch.float32, True)])
def test_product(dtype, fp8, bias):
    given = arguments(3, 40, 64, dtype, fp8, bias)
    check(product(*given[:-1], None, dtype), *given)


@pytest.mark.parametrize(("m", "n"), [(0, 8), (4, 0), (0, 0)])
def test_nothing_to_do(m, n):
    given = arguments(m, 8, 32, torch.bfloat16, False)
    parts = (part[:n] for part in given[2:6])
    assert tiles24(given[0], None, *parts, torch.bfloat16).shape == (m, n)


def test_rows_of_a_larger_weight():
    given = list(arguments(3, 24, 32, torch.bfloat16, False))
    given[2:6] = [part[5:17] for part in given[2:6]]
    check(tiles24(*given), *given)


def test_x_of_any_strides():
    given = arguments(3, 24, 32, torch.bfloat16, False)
    x = given[0].t().contiguous().t()
    assert torch.equal(tiles24(x, *given[1:]), tiles24(*given))


@pytest.mark.parametrize("fp8", [True, False])
def test_a_default_cut_of_k_is_added_up(fp8):
    given = arguments(2, 16, 2048, torch.bfloat16, fp8)
    assert config(90, 2, 16, 2048, given[0].dtype).split > 1
    check(tiles24(*given), *given)
    assert torch.equal(tiles24(*given), tiles24(*given))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("m", [16, 64, 512, 4096])
def test_configs_of_large_weights(m, fp8):
    given = arguments(min(m, 300), 136, 648, torch.bfloat16, fp8)
    cut = config(arch_of(given[0].device), m, 4096, 4096, given[0].dtype)
    check(run(given, cut._replace(split=1)), *given)


@pytest.mark.skipif(DEVICE == "cpu", reason="these differ in what the compiler makes of them")
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("m", [16, 130])
def test_every_candidate(m, fp8):
    given = arguments(m, 136, 648, torch.bfloat16, fp8)
    for cut in candidates(arch_of(given[0].device), m, 4096, 4096, given[0].dtype):
        try:
            made = run(given, cut)
        except triton.runtime.OutOfResources:
            assert cut != config(arch_of(given[0].device), m, 4096, 4096, given[0].dtype)
            continue
        check(made, *given)


@pytest.mark.parametrize("chunk", [2, 4])
@pytest.mark.parametrize(("k", "dtype"), [(256, torch.bfloat16), (136, torch.float16), (392, E4M3)])
def test_deal(chunk, k, dtype):
    x = torch.randn(3, k).to(dtype)
    dealt = deal(x, chunk).float()
    assert dealt.shape == (3, -(-k // 128) * 128)
    padded = torch.nn.functional.pad(x.float(), (0, -k % 128))
    for column in range(dealt.shape[1]):
        inside = column % 128
        # of every 128: which 32 of them, and which chunk of these
        quarter, turn = inside // chunk % 4, inside // chunk // 4
        assert torch.equal(dealt[:, column], padded[:, column - inside + 32 * quarter + turn * chunk + column % chunk])


@pytest.mark.skipif(not rehearsal.ON, reason="counted in rehearsal only")
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("m", [16, 64])
def test_few_rows_have_no_bank_conflicts(monkeypatch, m, fp8):
    from rehearsal.ptx import memory

    if torch.cuda.get_device_capability()[0] == 10:
        pytest.skip("tensor memory takes a whole row from a thread: packed values are read four rows from one bank")
    given = arguments(m, 128, 512, torch.bfloat16, fp8)
    cut = config(arch_of(given[0].device), m, 4096, 4096, given[0].dtype)._replace(split=1)
    monkeypatch.setattr(memory, "traffic", [])
    check(run(given, cut), *given)
    taken, needed = (sum(column) for column in zip(*memory.traffic, strict=True))
    print(f"{taken} wavefronts, {needed} for the same bytes")
    assert taken <= 1.02 * needed


# the format, in every pattern and with every byte


@triton.jit
def _expand(values, metadata, out, ROWS: tl.constexpr, ARCH: tl.constexpr):
    row, word, four = tl.arange(0, ROWS)[:, None], tl.arange(0, 16)[None, :], tl.arange(0, 4)[None, :]
    v, m = tl.load(values + row * 16 + word), tl.load(metadata + row * 4 + four)
    dense = expand(v, m, out.dtype.element_ty, ARCH)
    tl.store(out + row * 128 + tl.arange(0, 128)[None, :], dense)


@pytest.mark.parametrize("arch", [0, 80, 90])
@pytest.mark.parametrize("dtype", [E4M3, torch.bfloat16, torch.float16])
def test_every_pattern_and_byte(assembly, arch, dtype):
    if arch == 0 and DEVICE == "cuda":
        pytest.skip("this is for Triton's interpreter")
    if arch == 90 or dtype is E4M3:
        needs_e4m3()
    # 6 * 256 groups with each pattern and byte first, and again with it second, neighbours drawn at random
    generator = torch.Generator().manual_seed(0)
    pattern = torch.tensor(PATTERNS, dtype=torch.uint8).repeat_interleave(256).repeat(2)
    byte = torch.arange(256, dtype=torch.uint8).repeat(6)
    other = torch.randint(256, (1536,), dtype=torch.uint8, generator=generator)
    kept = torch.cat([torch.stack([byte, other], 1), torch.stack([other, byte], 1)])
    order = torch.randperm(3072, generator=generator)
    kept, pattern = kept[order], pattern[order]
    if dtype is not E4M3:
        kept[(kept & 0x7F) == 0x7F] = 0  # NaN, which no packed weight has: with it the whole row's scale is NaN
    kept, metadata = kept.view(96, 64), (pattern[0::2] | pattern[1::2] << 4).view(96, 16)
    expected = unpack24(kept.view(E4M3), metadata)
    rows = 128
    values = torch.zeros(rows, 16, dtype=torch.int32)
    places = torch.full((rows, 4), 0x44444444, dtype=torch.int32)
    values[:96], places[:96] = kept.view(torch.int32), metadata.view(torch.int32)
    out = torch.full((rows, 128), torch.nan, device=DEVICE).to(dtype)
    _expand[(1,)](values.to(DEVICE), places.to(DEVICE), out, rows, arch)
    if dtype is E4M3:
        assert torch.equal(out[:96].cpu().view(torch.uint8), expected.view(torch.uint8))
    else:
        assert torch.equal(out[:96].cpu(), expected.to(dtype))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("arch", [80, 89, 90, 100])
@pytest.mark.parametrize(("dtype", "fp8"), [(torch.float16, True), (torch.float16, False), (torch.float32, False)])
def test_the_kernel_as_it_is_for_a_gpu(assembly, monkeypatch, dtype, fp8, arch, first):
    if DEVICE == "cuda":
        pytest.skip("the other tests run it")
    monkeypatch.setattr(module, "kernel_arch", lambda device: arch)
    given = arguments(7, 70, 392, dtype, fp8)
    check(run(given, Config(16, 64, 128, 4, 2, 2, first)), *given)


# the op


@pytest.mark.parametrize("fp8", [True, False])
def test_op_is_registered_well(fp8):
    given = arguments(4, 16, 32, torch.bfloat16, fp8)
    names = ["test_autograd_registration", "test_faketensor"]  # the test of the schema adds up e4m3, torch cannot
    torch.library.opcheck(tiles24, given, test_utils=names)


ERRORS = {
    "K": ({"x": torch.ones(3, 40)}, "half of its K"),
    "rank of x": ({"x": torch.ones(2, 3, 32)}, "half of its K"),
    "no scale for e4m3": ({"x": torch.ones(3, 32).to(E4M3)}, "needs x_scale"),
    "a scale for bf16": ({"x_scale": torch.ones(3, 1)}, "no other x takes one"),
    "dtype of x": ({"x": torch.ones(3, 32).half()}, "only an e4m3 x may differ"),
    "dtype of y": ({"x": torch.ones(3, 32).double(), "out_dtype": torch.float64}, "only an e4m3 x may differ"),
    "qdata": ({"qdata": torch.zeros(24, 16, dtype=torch.uint8)}, "qdata is"),
    "metadata": ({"sparse_metadata": torch.zeros(24, 8, dtype=torch.uint8)}, "sparse_metadata is"),
    "scale": ({"scale": torch.ones(24)}, "scale is"),
    "bias": ({"bias": torch.ones(3)}, "bias is"),
    "dtype of bias": ({"bias": torch.ones(24, dtype=torch.int32)}, "bias is"),
    "strides": ({"sparse_metadata": torch.zeros(4, 24, dtype=torch.uint8).t()}, "not contiguous"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    names = ("x", "x_scale", "qdata", "sparse_metadata", "scale", "bias", "out_dtype")
    given = dict(zip(names, arguments(3, 24, 32, torch.bfloat16, False), strict=True))
    change, message = ERRORS[case]
    given |= {name: part.to(DEVICE) if isinstance(part, torch.Tensor) else part for name, part in change.items()}
    with pytest.raises(RuntimeError, match=message):
        tiles24(**given)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match=message):
        tiles24(**given)


def test_why_not():
    assert why_not(80, torch.bfloat16, 64, 64) == ""
    assert "sm_75" in why_not(75, torch.float16, 64, 64)
    assert "float64" in why_not(90, torch.float64, 64, 64)
    assert "20" in why_not(90, torch.float16, 64, 20)


@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, E4M3])
def test_configs(arch, dtype):
    for m, n, k in ((1, 4096, 4096), (17, 1024, 4096), (64, 14336, 4096), (65, 8, 8), (4096, 4096, 14336)):
        some = candidates(arch, m, n, k, dtype)
        assert some[0] == config(arch, m, n, k, dtype)
        assert len(set(some)) == len(some)
        assert all(cut.split == 1 or cut.split * cut.block_k <= k for cut in some)
    # few programs share K, many do not
    assert config(arch, 16, 1024, 4096, dtype).split > 1
    assert config(arch, 4096, 4096, 4096, E4M3).split == 1


# what the compiler makes of it, without a GPU

COMPILE = """
import sys
from hwpq_fx.kernels.cubin import compile_specimen
from hwpq_fx.kernels.tiles24_triton import specimens

arch, limit = int(sys.argv[1]), int(sys.argv[2])
for specimen in specimens(arch):
    if "x 4096 x 4096" not in specimen.name and "parts" not in specimen.name:
        continue
    made = compile_specimen(specimen, arch)
    print(specimen.name, made.registers, made.spills, made.shared)
    assert not made.spills and made.shared <= limit * 1024, specimen.name
    if "float32" in specimen.name or "parts" in specimen.name:
        continue
    # 128 bits at a time go from memory to shared memory, and tensor cores multiply
    assert "LDGSTS.E.BYPASS.128" in made.loads(), specimen.name
    fp8 = "e4m3" in specimen.name
    unit = {80: "HMMA", 89: "QMMA" if fp8 else "HMMA", 90: "QGMMA" if fp8 else "HGMMA",
            100: "UTCQMMA" if fp8 else "UTCHMMA", 120: "QMMA" if fp8 else "HMMA"}[arch]
    assert unit in made.sass, specimen.name
    # weights reach wgmma and mma from the registers they were expanded in
    few = int(specimen.name.split()[2]) <= 64
    loop = made.sass[: made.sass.rindex(unit)]
    assert not few or arch == 100 or ("STS.128" not in loop and "STSM" not in loop), specimen.name
"""


@pytest.mark.parametrize(("arch", "limit"), [(80, 163), (89, 99), (90, 227), (100, 227), (120, 99)])
def test_compiles_without_a_gpu(arch, limit):
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, str(arch), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"{4096 if arch >= 89 else 512} x 4096 x 4096" in done.stdout


TRACE = """
import torch, triton
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from hwpq_fx.kernels.tiles24 import tiles24

class Driver:  # so that torch can ask Triton which arguments a kernel writes to
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

triton.runtime.driver.set_active(Driver())

def compiler(graph, inputs):
    kernels = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    print("written to:", [node.kwargs["tensors_to_clone"] for node in kernels])
    return graph.forward

product = torch.compile(lambda *args: tiles24(args[0], None, *args[1:], None, torch.bfloat16),
                        backend=aot_autograd(fw_compiler=compiler))
with FakeTensorMode():
    qdata, metadata = torch.empty(64, 2048, dtype=torch.float8_e4m3fn), torch.empty(64, 512, dtype=torch.uint8)
    y = product(torch.empty(16, 4096, dtype=torch.bfloat16), qdata, metadata, torch.empty(64, 1))
    assert y.shape == (16, 64)
"""


def test_a_compiled_graph_holds_the_kernels_and_copies_no_weight():
    command = [sys.executable, "-W", "ignore", "-c", TRACE]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert "written to: [['y'], ['y']]" in done.stdout, done.stdout + done.stderr[-3000:]
