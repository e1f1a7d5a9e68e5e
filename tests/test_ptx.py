"""The machine that runs PTX in rehearsal: its arithmetic is right, and it stops what a GPU or compute-sanitizer would.

That it runs whole kernels rightly is what the rehearsal shows.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rehearsal.ptx import Fault, numbers, read
from rehearsal.ptx.memory import SHARED_BASE
from snippets import ran

WORD = st.integers(0, 2**32 - 1)
FLOAT = st.floats(width=32, allow_nan=False, allow_infinity=False)


# faults


def test_addresses_are_those_of_arguments():
    body = "ld.global.b32 %r2, [%rd2 + {}]; st.global.b32 [%rd2], %r1;"
    assert ran(body.format(0)).tolist() == list(range(64))
    with pytest.raises(Fault, match=r"ld.global.*is not in the memory of any argument"):
        ran(body.format(4))
    with pytest.raises(Fault, match="not aligned to its 4 bytes"):
        ran(body.format(-2))
    # predicated off, nothing is read
    assert ran("setp.lt.u32 %p1, %r1, 63; @%p1 ld.global.b32 %r2, [%rd2 + 4]; st.global.b32 [%rd2], %r1;")[63] == 63


def test_shared_memory_ends():
    with pytest.raises(Fault, match="shared address 256, 4 bytes, of 256 bytes"):
        ran("st.shared.b32 [%r4 + 256], %r1;")
    with pytest.raises(Fault, match="shared address -4"):
        ran("add.s32 %r4, %r4, -4; ld.shared.b32 %r2, [%r4];")


SWAP = "st.shared.b32 [%r4], %r1; {} ld.shared.b32 %r2, [%r5]; st.global.b32 [%rd2], %r2;"


def test_a_race_between_warps_is_seen():
    assert ran(SWAP.format("bar.sync 0;"), programs=3).tolist() == [place ^ 32 for place in range(64)]
    with pytest.raises(Fault, match="another warp wrote"):
        ran(SWAP.format(""))
    with pytest.raises(Fault, match="another warp wrote"):
        ran(SWAP.format("bar.warp.sync -1;"))
    with pytest.raises(Fault, match="another warp touched"):  # written again while the other warp may still read
        ran(SWAP.format("bar.sync 0;") + "st.shared.b32 [%r4], %r2;")
    assert ran(SWAP.format("bar.sync 0;") + "bar.sync 0; st.shared.b32 [%r4], %r2;")[0] == 32
    # among the threads of a warp there is none
    assert ran(SWAP.replace("%r5", "%r4").format("")).tolist() == list(range(64))
    with pytest.raises(Fault, match="two warps write different values"):
        ran("and.b32 %r6, %r1, 31; shl.b32 %r6, %r6, 2; add.s32 %r6, %r3, %r6; st.shared.b32 [%r6], %r1;")


COPY = (
    "cp.async.ca.shared.global [ %r4 + 0 ], [ %rd2 + 0 ], 0x4, 4; cp.async.commit_group; {} ld.shared.b32 %r2, [%r5];"
)


def test_a_copy_has_to_be_waited_for():
    store = "add.s32 %r2, %r2, 1; st.global.b32 [%rd2], %r2;"
    given = [7 * place for place in range(64)]
    made = ran(COPY.format("cp.async.wait_group 0; bar.sync 0;") + store, given=given)
    assert made.tolist() == [7 * (place ^ 32) + 1 for place in range(64)]
    with pytest.raises(Fault, match="before the copy to it was waited for"):
        ran(COPY.format("cp.async.wait_group 1; bar.sync 0;") + store)
    with pytest.raises(Fault, match="another warp wrote"):
        ran(COPY.format("cp.async.wait_group 0;") + store)
    # the second of two is still under way
    two = "cp.async.ca.shared.global [ %r5 + 0 ], [ %rd2 + 0 ], 0x4, 4; cp.async.commit_group;"
    with pytest.raises(Fault):
        ran(COPY.format(two + "cp.async.wait_group 1; bar.sync 0;") + store)


def test_a_copy_of_nothing_is_zeros():
    body = COPY.format("cp.async.wait_group 0; bar.sync 0;").replace("0x4, 4", "0x4, %r9")
    store = "st.global.b32 [%rd2], %r2;"
    made = ran("setp.lt.u32 %p1, %r1, 32; selp.b32 %r9, 4, 0, %p1;" + body + store, given=range(1, 65))
    assert made.tolist() == [0] * 32 + list(range(1, 33))


def test_threads_part_and_meet():
    # thread i goes round i times
    loop = """mov.b32 %r6, 0; mov.b32 %r7, 0;
    L1: setp.ge.u32 %p1, %r6, %r1; @%p1 bra L2; add.s32 %r6, %r6, 1; add.s32 %r7, %r7, %r6; bra.uni L1;
    L2: st.shared.b32 [%r4], %r7; bar.sync 0; ld.shared.b32 %r8, [%r5]; st.global.b32 [%rd2], %r8;"""
    assert ran(loop).tolist() == [sum(range((place ^ 32) + 1)) for place in range(64)]
    early = "setp.lt.u32 %p1, %r1, 40; @%p1 ret; st.global.b32 [%rd2], %r1;"
    assert ran(early).tolist() == [0] * 40 + list(range(40, 64))


def test_a_barrier_is_for_all_threads_and_a_warp_keeps_together():
    apart = "setp.lt.u32 %p1, %r1, {}; @%p1 bra L1; {} L1: st.global.b32 [%rd2], %r1;"
    assert ran(apart.format(32, "bar.warp.sync -1;"))[5] == 5
    with pytest.raises(Fault, match=r"wait for others for ever, near bar\.sync 0"):
        ran(apart.format(32, "bar.sync 0;"))
    with pytest.raises(Fault, match="not together"):
        ran(apart.format(40, "redux.sync.add.s32 %r2, %r1, -1;"))
    with pytest.raises(Fault, match="not there"):
        ran(apart.format(40, "shfl.sync.bfly.b32 %r2, %r1, 16, 31, -1;"))


ONES = 0x3C003C00  # of float16
WGMMA = """mov.b32 %r2, {ones}; st.shared.b32 [%r4], %r2; {fence} bar.sync 0;
    mov.b64 %rd4, {descriptor}; mov.pred %p1, 0; wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16
    {{%r10, %r11, %r12, %r13}}, {{%r2, %r2, %r2, %r2}}, %rd4, %p1, 1, 1, 0;
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    add.f32 %r10, %r10, %r13; st.global.b32 [%rd2], %r10;"""


def test_tensor_cores_see_what_is_fenced():
    descriptor = SHARED_BASE >> 4 | 128 >> 4 << 16
    body = WGMMA.format(ones=ONES, descriptor=descriptor, fence="fence.proxy.async.shared::cta;")
    assert (ran(body, threads=128).view(np.float32) == 2 * 16).all()
    with pytest.raises(Fault, match=r"no fence\.proxy\.async"):
        ran(WGMMA.format(ones=ONES, descriptor=descriptor, fence=""), threads=128)
    waited = "wgmma.wait_group.sync.aligned 0;"
    write = "bar.sync 0; st.shared.b32 [%r4], %r1;"
    assert (ran(body.replace(waited, waited + write), threads=128).view(np.float32) == 2 * 16).all()
    with pytest.raises(Fault, match="tensor cores may be reading"):
        ran(body.replace(waited, write + waited), threads=128)
    with pytest.raises(Fault, match="a warpgroup is not together"):
        ran(f"setp.lt.u32 %p2, %r1, 64; @%p2 ret; {body.replace('bar.sync 0;', '')}", threads=128)


TCGEN05 = f"""setp.lt.u32 %p1, %r1, 32; setp.eq.u32 %p2, %r1, 0; mov.pred %p3, 0; add.s32 %r8, %r3, 4624;
    @%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r3+4608], 32;
    {"".join(f"st.shared.b32 [%r4+{512 * part}], {ONES};" for part in range(9))}
    fence.proxy.async.shared::cta; @%p2 mbarrier.init.shared::cta.b64 [%r8], 1; bar.sync 0;
    ld.shared.b32 %r6, [%r3+4608]; mov.b64 %rd4, {{a}}; mov.b64 %rd5, {{b}}; mov.b32 %r7, {{description}};
    @%p2 tcgen05.mma.cta_group::1.kind::f16 [ %r6 + 0 ], %rd4, %rd5, %r7, %p3; {{then}}
    L1: mbarrier.try_wait.parity.shared::cta.b64 %p4, [%r8], 0; @!%p4 bra L1; {{last}}
    and.b32 %r9, %r1, 96; shl.b32 %r9, %r9, 16; add.s32 %r9, %r9, %r6;
    tcgen05.ld.sync.aligned.32x32b.x1.b32 {{{{%r10}}}}, [%r9 + {{column}}]; tcgen05.wait::ld.sync.aligned;
    st.global.b32 [%rd2], %r10;"""
COMMIT = "@%p2 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r8];"


def blackwell(then, last="", column=15):
    a, b = ((SHARED_BASE + at) >> 4 | 128 >> 4 << 16 | 256 >> 4 << 32 | 1 << 46 for at in (0, 4096))
    description = 1 << 4 | 16 // 8 << 17 | 128 // 16 << 24  # float32 from float16, N = 16, M = 128
    body = TCGEN05.format(a=a, b=b, description=description, then=then, last=last, column=column)
    return ran(body, threads=128, programs=2, shared=4640).view(np.float32)


def test_tensor_memory_and_what_a_product_still_reads():
    assert (blackwell(COMMIT) == 16).all()
    assert np.isnan(blackwell(COMMIT, column=16)).all()  # beyond the product nothing was written
    write = "st.shared.b32 [%r4], %r1;"
    assert (blackwell(COMMIT, last=write) == 16).all()
    with pytest.raises(Fault, match="tensor cores may be reading"):
        blackwell(COMMIT + write)
    with pytest.raises(Fault, match="wait for others for ever"):
        blackwell("")


def test_what_is_not_understood_is_said():
    with pytest.raises(AttributeError, match=r"test, brev\.b32 %r2, %r1"):
        ran("brev.b32 %r2, %r1;")
    with pytest.raises(ValueError, match="no kernel"):
        read("")


# blocks, programs, lanes


def test_names_of_a_block_are_its_own():
    block = "{{ .reg .b32 a, %t; mov.b32 a, {}; add.s32 %t, a, %r1; mov.b32 %r{}, %t; }} "
    body = block.format(5, 2) + block.format("0x10U", 6) + "add.s32 %r2, %r2, %r6; st.global.b32 [%rd2], %r2;"
    assert ran(body).tolist() == [2 * place + 21 for place in range(64)]


def test_lanes_and_programs():
    sums = "redux.sync.add.s32 %r2, %r1, -1; st.global.b32 [%rd2], %r2;"
    assert ran(sums).tolist() == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32
    moved = "shfl.sync.idx.b32 %r2|%p1, %r1, 3, 31, -1; selp.b32 %r2, %r2, -1, %p1; st.global.b32 [%rd2], %r2;"
    assert ran(moved).tolist() == [3] * 32 + [35] * 32
    up = "shfl.sync.up.b32 %r2|%p1, %r1, 4, 0, -1; selp.b32 %r2, %r2, -1, %p1; st.global.b32 [%rd2], %r2;"
    assert ran(up).tolist()[:6] == [-1] * 4 + [0, 1]
    where = "mov.u32 %r2, %ctaid.x; mad.lo.s32 %r6, %r2, 64, %r1; mul.wide.u32 %rd3, %r6, 4; add.s64 %rd3, %rd3, %rd1;"
    made = ran(where + "st.global.b32 [%rd3], %r2;", programs=300, given=[9] * 64 * 300)
    assert made.tolist() == [place // 64 for place in range(64 * 300)]


def words(*values, kind=np.uint32):
    return [np.array([value], kind) for value in values]


def test_bits_are_put_into_others():
    body = "mov.b32 %r2, -1; bfi.b32 %r6, %r1, %r2, 8, {}; st.global.b32 [%rd2], %r6;"
    assert ran(body.format(4)).view(np.uint32)[[0, 3, 21]].tolist() == [0xFFFFF0FF, 0xFFFFF3FF, 0xFFFFF5FF]
    assert ran(body.format(0)).tolist() == [-1] * 64
    assert ran(body.replace("8, {}", "0, 32")).tolist() == list(range(64))


# arithmetic


@given(WORD, WORD, WORD)
def test_prmt(a, b, selector):
    both = (a | b << 32).to_bytes(8, "little")
    made = 0
    for place in range(4):
        nibble = selector >> 4 * place & 15
        byte = both[nibble & 7]
        made |= (byte if nibble < 8 else 255 * (byte >> 7)) << 8 * place
    assert int(numbers.prmt(*words(a, b, selector))[0]) == made


@given(WORD, WORD, WORD)
def test_lop3(a, b, c):
    a_, b_, c_ = words(a, b, c)
    assert numbers.lop3(a_, b_, c_, 0xEA)[0] == (a & b) | c
    assert numbers.lop3(a_, b_, c_, 0x96)[0] == a ^ b ^ c


@given(FLOAT, FLOAT, FLOAT)
@settings(max_examples=300)
def test_fma_rounds_once(a, b, c):
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    made = numbers.fused(*words(a, b, c, kind=np.float32), np.float32)[0]
    down = numbers.fused(*words(a, b, c, kind=np.float32), np.float32, "rm")[0]
    if math.isinf(made) or math.isinf(down):
        assert abs(exact) > 3.4028234e38
        return
    distance = abs(Fraction(float(made)) - exact)
    for neighbour in (np.nextafter(made, np.float32(np.inf)), np.nextafter(made, np.float32(-np.inf))):
        assert math.isinf(neighbour) or distance <= abs(Fraction(float(neighbour)) - exact)
    above = np.nextafter(down, np.float32(np.inf))
    assert Fraction(float(down)) <= exact and (math.isinf(above) or Fraction(float(above)) > exact)


@given(FLOAT)
def test_bfloat16_rounds_as_torch(value):
    here = numbers.to_bf16(np.array([value], np.float32)).view(np.int16)
    assert here[0] == torch.tensor(value).bfloat16().view(torch.int16)
    # a float64 just beside the middle of two
    middle = (np.array([value], np.float32).view(np.uint32) & np.uint32(0xFFFF0000) | np.uint32(0x8000)).view(
        np.float32
    )
    beside = np.nextafter(middle.astype(np.float64), -np.inf)
    lower, upper = (
        numbers.bf16(numbers.to_bf16(one))[0] for one in (beside, np.nextafter(middle.astype(np.float64), np.inf))
    )
    if np.isfinite([lower, upper]).all():
        assert lower < middle[0] < upper


def test_e4m3_is_torchs():
    every = torch.arange(256, dtype=torch.uint8)
    there = every.view(torch.float8_e4m3fn).double().numpy()
    assert np.array_equal(numbers.E4M3, there, equal_nan=True)
    values = torch.cat([torch.randn(4000) * 10.0 ** torch.randint(-4, 3, (4000,)), torch.tensor([0.0, -0.0, 2**-10])])
    values = values.clamp(-448, 448)
    middles = torch.tensor((there[:0x7E] + there[1:0x7F]) / 2).float()
    values = torch.cat([values, middles, -middles])
    made = numbers.to_e4m3(values.numpy())
    assert np.array_equal(made, values.to(torch.float8_e4m3fn).view(torch.uint8).numpy())
    # saturated, where torch has NaN
    assert numbers.to_e4m3(np.array([1e9, -np.inf, np.nan])).tolist() == [0x7E, 0xFE, 0x7F]


@given(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1).filter(bool))
def test_division_goes_towards_zero(a, b):
    if (a, b) != (-(2**31), -1):
        assert numbers.divide(*words(a, b, kind=np.int32))[0] == math.trunc(Fraction(a, b))


@given(WORD, st.integers(0, 40), st.integers(0, 32))
def test_shifts_and_fields(value, start, length):
    unsigned, signed = words(value)[0], words(value)[0].view(np.int32)
    by = np.array([start], np.uint32)
    assert numbers.shift(unsigned, by, True)[0] == value << start & 0xFFFFFFFF
    assert numbers.shift(unsigned, by, False)[0] == value >> start
    assert numbers.shift(signed, by, False)[0] == int(signed[0]) >> start
    if start < 32:
        found = value >> start & (1 << length) - 1
        assert numbers.field(unsigned, by, np.array([length], np.uint32))[0] == found
        if length and start + length <= 32:
            wanted = found - (1 << length) if found >> length - 1 else found
            assert numbers.field(signed, by, np.array([length], np.uint32))[0] == wanted


def test_comparisons_with_nan():
    one, nan = np.array([1.0], np.float32), np.array([np.nan], np.float32)
    for how, wanted in {
        "eq": 0,
        "ne": 0,
        "lt": 0,
        "ge": 0,
        "equ": 1,
        "neu": 1,
        "ltu": 1,
        "geu": 1,
        "nan": 1,
        "num": 0,
    }.items():
        assert numbers.compare(how, one, nan)[0] == wanted
    assert numbers.compare("num", one, one)[0] and not numbers.compare("ltu", one, one)[0]
    assert numbers.smaller(one, nan)[0] == numbers.larger(nan, one)[0] == 1
    zeros = np.array([0.0, -0.0], np.float32)
    assert (
        np.signbit(numbers.smaller(zeros, zeros[::-1])).all()
        and not np.signbit(numbers.larger(zeros, zeros[::-1])).any()
    )
