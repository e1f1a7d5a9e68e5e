"""What Hopper's kernels meet at, on the machine that runs PTX: mbarriers, barriers of some threads, clusters, boxes.

That whole kernels which use all of it run rightly is what test_cutlass_ptx.py shows.
"""

import numpy as np
import pytest

from rehearsal.ptx import Fault, launch
from rehearsal.ptx.bulk import MAP
from rehearsal.ptx.memory import SHARED_BASE
from snippets import kernel, ran

STORE = "st.global.b32 [%rd2], {};"
ONE = (1, 1, 1)


def test_some_threads_meet_at_a_barrier_with_a_name():
    halves = "shr.u32 %r6, %r1, 6; add.u32 %r6, %r6, {}; bar.sync %r6, 64;"
    swap = "st.shared.b32 [%r4], %r1; {} ld.shared.b32 %r2, [%r5];" + STORE.format("%r2")
    body = "xor.b32 %r5, %r4, 128;" + swap
    assert ran(body.format(halves.format(1)), threads=128, cluster=ONE).tolist() == [place ^ 32 for place in range(128)]
    # one warp stays away
    away = "setp.ge.u32 %p1, %r1, 96; @%p1 bra L1; bar.sync 1, {}; L1: " + STORE.format("%r1")
    assert ran(away.format(96), threads=128, cluster=ONE).tolist() == list(range(128))
    with pytest.raises(Fault, match="wait for others for ever"):
        ran(away.format(128), threads=128, cluster=ONE)


WAIT = """{ .reg .pred P; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 P, [%r3], 0, 10; @P bra DONE;
    bra AGAIN; DONE: }"""  # a block with names of its own, one of them before it is there
INIT = "setp.eq.u32 %p1, %r1, 0; @%p1 mbarrier.init.shared::cta.b64 [%r3], {}; bar.sync 0; add.s32 %r6, %r4, 16;"


def test_threads_arrive_at_an_mbarrier():
    # the first warp writes and arrives, the second waits and reads
    body = INIT + "setp.ge.u32 %p2, %r1, 32; @%p2 bra READ; st.shared.b32 [%r6], %r1; {} bra.uni END; READ: "
    body += "WAIT ld.shared.b32 %r2, [%r6+-128];" + STORE.format("%r2") + "END: "
    arrive = "mbarrier.arrive.shared::cta.b64 _, [%r3];"
    made = ran(body.format(32, arrive).replace("WAIT", WAIT), shared=512, cluster=ONE)
    assert made[32:].tolist() == list(range(32))
    for count, does in [(33, arrive), (32, "")]:
        with pytest.raises(Fault, match=r"wait for others for ever, near mbarrier\.try_wait"):
            ran(body.format(count, does).replace("WAIT", WAIT), shared=512, cluster=ONE)


def test_a_wait_may_end_without():
    """try_wait waits for some time only: who looks once sees that nothing has come, and may do it himself."""
    body = INIT.format(64) + "mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r3], 0; selp.b32 %r2, 1, 0, %p3;"
    body += "mbarrier.arrive.shared::cta.b64 _, [%r3];" + WAIT + STORE.format("%r2")
    assert ran(body, shared=512, cluster=ONE).tolist() == [0] * 64
    # not looked at once, but for ever
    with pytest.raises(Fault, match="wait for others for ever"):
        ran(INIT.format(65) + "mbarrier.arrive.shared::cta.b64 _, [%r3];" + WAIT, shared=512, cluster=ONE)


def test_programs_of_a_cluster_arrive_at_each_others_mbarriers():
    body = "setp.eq.u32 %p1, %r1, 0; @%p1 mbarrier.init.shared::cta.b64 [%r3], 64; mov.u32 %r6, %cluster_ctarank;"
    body += "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; xor.b32 %r7, %r6, 1;"
    body += "mapa.shared::cluster.u32 %r8, %r3, {}; mbarrier.arrive.shared::cluster.b64 _, [%r8]; WAIT"
    body += "mov.u32 %r2, %ctaid.x; mad.lo.s32 %r2, %r2, 64, %r1; mul.wide.u32 %rd3, %r2, 4; add.s64 %rd3, %rd3, %rd1;"
    body += "st.global.b32 [%rd3], %r6;"
    made = ran(body.format("%r7").replace("WAIT", WAIT), programs=4, given=[9] * 256, cluster=(2, 1, 1))
    assert made.tolist() == [place // 64 % 2 for place in range(256)]
    with pytest.raises(Fault, match="wait for others for ever"):  # at the first one's, twice too many
        ran(body.format("0").replace("WAIT", WAIT), programs=4, given=[9] * 256, cluster=(2, 1, 1))


def test_each_thread_has_memory_of_its_own():
    body = """.local .align 8 .b8 depot[16]; mov.u64 %rd3, depot; st.local.v2.b32 [%rd3+8], {%r1, %r4};
    ld.local.u8 %r2, [%rd3+8];""" + STORE.format("%r2")
    assert ran(body, threads=320).tolist() == [place % 256 for place in range(320)]


def box_copied(coordinates, swizzle=0, box=(4, 2), bytes_=32):
    """A tensor of 5 x 3 words, 8 words from row to row; one box of it comes to shared memory, is written out by
    threads, and goes back from there to a tensor of the same form."""
    given = np.arange(100, 132, dtype=np.int32)
    back = np.zeros(32, np.int32)
    maps = np.zeros(2, MAP)
    for one, where in zip(maps, (given, back), strict=True):
        one["base"], one["strides"][0], one["size"], one["rank"] = where.ctypes.data, 32, 4, 2
        one["sizes"][:2], one["box"][:2], one["swizzle"] = (5, 3), box, swizzle
    at = f"{{{coordinates[0]}, {coordinates[1]}}}"
    body = f"""add.s32 %r8, %r3, 1024; setp.eq.u32 %p1, %r1, 0; @%p1 mbarrier.init.shared::cta.b64 [%r8], 1; bar.sync 0;
    ld.param.b64 %rd4, [maps]; cvta.param.u64 %rd3, maps; add.s64 %rd4, %rd3, {MAP.itemsize};
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r8], {bytes_};
    @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd3, {at}], [%r8];
    {WAIT.replace("%r3", "%r8")} ld.shared.b32 %r2, [%r4]; st.global.b32 [%rd2], %r2;
    @%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd4, {at}], [%r3];
    cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;"""
    made = kernel(body)._replace(parameters=("test_param_0", "maps"))
    shown = np.zeros(64, np.int32)
    ranges = [(one.ctypes.data, one.ctypes.data + one.nbytes) for one in (given, back, shown)]
    launch(made, (1, 1, 1), 1040, [shown.ctypes.data, maps.tobytes()], ranges, ONE)
    return shown, back.reshape(4, 8)


def test_boxes_of_tensors_are_copied():
    shown, back = box_copied((1, 1))
    assert shown[:8].tolist() == [109, 110, 111, 112, 117, 118, 119, 120]
    assert back[1, 1:5].tolist() == [109, 110, 111, 112] and back[2, 1:5].tolist() == [117, 118, 119, 120]
    assert (back != 0).sum() == 8


def test_what_lies_outside_of_a_tensor_is_zero_and_is_not_written():
    shown, back = box_copied((3, -1))
    assert shown[:8].tolist() == [0, 0, 0, 0, 103, 104, 0, 0]
    assert back[0, 3:5].tolist() == [103, 104] and (back != 0).sum() == 2
    assert (box_copied((0, 3))[1] == 0).all()


def test_bytes_that_do_not_come_are_waited_for():
    with pytest.raises(Fault, match="wait for others for ever"):
        box_copied((1, 1), bytes_=36)


def test_boxes_are_swizzled():
    """Rows of 32 bytes, four to each 128: bit 7 of the address flips bit 4."""
    shown, back = box_copied((0, 0), swizzle=1, box=(8, 3), bytes_=96)
    rows = np.zeros((3, 8), int)
    rows[:, :5] = 100 + 8 * np.arange(3)[:, None] + np.arange(5)
    assert shown[:24].tolist() == rows.ravel().tolist()  # below 128 bytes nothing moves
    assert (back[:3, :5] == rows[:, :5]).all()
    assert SHARED_BASE % 256 == 0
    shown, back = box_copied((0, -4), swizzle=1, box=(8, 6), bytes_=192)
    assert shown[32:40].tolist() == [104, 0, 0, 0, 100, 101, 102, 103]
    assert (back[:2, :5] == rows[:2, :5]).all()
    with pytest.raises(ValueError, match="wider than what is swizzled"):
        box_copied((0, 0), swizzle=1, box=(16, 2))
