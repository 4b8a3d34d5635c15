"""Each rule of the interpreter on a few lines of PTX: right with all of them, and named as broken without one.

Only numpy is needed. In a kernel, lines that end in ``//!`` make it right, those that end in ``//~`` are the fault that
stands there without them.
"""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from .machine import PLAIN, How, Kernel
from .memory import Buffer
from .report import Report
from .scalars import Array, PtxError, f4, u1, u4

REGISTERS = """
    .reg .pred %p<20>; .reg .b16 %rs<20>; .reg .b32 %r<80>; .reg .b64 %rd<20>;
    ld.param.b64 %rd1, [k_param_0];
    ld.param.b64 %rd2, [k_param_1];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    shl.b32 %r3, %r1, 2;
    mov.b32 %r4, global_smem;
    add.s32 %r5, %r4, %r3;
    xor.b32 %r6, %r3, 128;
    add.s32 %r7, %r4, %r6;
"""  # x + tid, y + tid; %r5: this thread's word of shared memory, %r7: that of a thread of the other warp


def kernel(body: str, threads: int = 64, shared: int = 4096) -> Kernel:
    text = f"""
.version 8.7
.target sm_90a
.address_size 64
.visible .entry k(
    .param .u64 .ptr .global .align 1 k_param_0,
    .param .u64 .ptr .global .align 1 k_param_1
)
.reqntid {threads}
{{
{REGISTERS}
{body}
    ret;
}}
"""
    return Kernel(text, shared)


def right(body: str) -> str:
    """Without the lines that put a fault in place of another line."""
    return "\n".join(line for line in body.split("\n") if not line.rstrip().endswith("//~"))


def wrong(body: str) -> str:
    """Without what a kernel needs, and with what stands in its place."""
    return "\n".join(line for line in body.split("\n") if not line.rstrip().endswith("//!"))


def run(body: str, programs: int = 1, how: How = PLAIN, threads: int = 64) -> tuple[Report, Array, Array]:
    """x (64 words, read only, twice their number), y (64 words to write) and a counter behind them."""
    x = np.arange(0, 128, 2, dtype=u4)
    y = np.full(64 + 16, 0xFFFFFFFF, u4)
    y[64:] = 0
    buffers = [
        Buffer("x", x.ctypes.data, 256, 4, False, True),
        Buffer("y", y.ctypes.data, 256, 4, True, False),
        Buffer("counter", y.ctypes.data + 256, 64, 4, True, True),
    ]
    report = kernel(body, threads).launch((programs, 1, 1), [x.ctypes.data, y.ctypes.data], buffers, how)
    if buffers[1].missing():
        report.problem("elements of y that nobody writes", "k", buffers[1].missing())
    return report, x, y


STORE = """
    st.shared.b32 [%r5], %r1;
"""
OWN = """
    st.global.b32 [%rd5], %r1;
"""
RULES = {
    "shared memory: read after write": (
        "shared race: read after write",
        f"""
    {STORE}
    bar.sync 0; //!
    ld.shared.b32 %r8, [%r7];
    st.global.b32 [%rd5], %r8;
""",
    ),
    "shared memory: read after another lane's write": (
        "shared race: read after write",
        f"""
    {STORE}
    bar.warp.sync 0xffffffff; //!
    xor.b32 %r9, %r5, 4;
    ld.shared.b32 %r8, [%r9];
    st.global.b32 [%rd5], %r8;
""",
    ),
    "shared memory: bar.warp.sync orders one warp only": (
        "shared race: read after write",
        f"""
    {STORE}
    bar.sync 0; //!
    bar.warp.sync 0xffffffff; //~
    ld.shared.b32 %r8, [%r7];
    st.global.b32 [%rd5], %r8;
""",
    ),
    "shared memory: write after read": (
        "shared race: write after read",
        f"""
    {STORE}
    bar.sync 0;
    ld.shared.b32 %r8, [%r7];
    bar.sync 0; //!
    st.shared.b32 [%r5], 7;
    st.global.b32 [%rd5], %r8;
""",
    ),
    "shared memory: two writes": (
        "shared race: two threads write differently",
        f"""
    {STORE}
    bar.sync 0; //!
    st.shared.b32 [%r7], %r1;
    {OWN}
""",
    ),
    "shared memory: nobody has written": (
        "read of shared memory that nobody has written",
        """
    st.shared.b32 [%r5], %r1; //!
    ld.shared.b32 %r8, [%r5];
    st.global.b32 [%rd5], %r8;
""",
    ),
    "shared memory: out of bounds": (
        "shared read out of bounds",
        f"""
    {STORE}
    ld.shared.b32 %r8, [%r5]; //!
    ld.shared.b32 %r8, [%r5+4096]; //~
    {OWN}
""",
    ),
    "shared memory: misaligned": (
        "misaligned shared read of 8 bytes",
        f"""
    {STORE}
    bar.sync 0;
    and.b32 %r8, %r5, 0xfffffff8; //!
    mov.b32 %r8, %r5; //~
    setp.lt.u32 %p1, %r1, 63;
    @%p1 ld.shared.v2.b32 {{%r9, %r10}}, [%r8];
    {OWN}
""",
    ),
    "cp.async: no wait": (
        "shared race: read while cp.async writes",
        """
    cp.async.ca.shared.global [%r5], [%rd4], 4;
    cp.async.commit_group;
    cp.async.wait_group 0; //!
    ld.shared.b32 %r8, [%r5];
    st.global.b32 [%rd5], %r8;
    cp.async.wait_group 0;
""",
    ),
    "cp.async: a wait that leaves the group in flight": (
        "shared race: read while cp.async writes",
        """
    cp.async.ca.shared.global [%r5], [%rd4], 4;
    cp.async.commit_group;
    cp.async.wait_group 0; //!
    cp.async.wait_group 1; //~
    bar.sync 0;
    ld.shared.b32 %r8, [%r7];
    st.global.b32 [%rd5], %r8;
    cp.async.wait_group 0;
""",
    ),
    "cp.async: no commit": (
        "shared race: read while cp.async writes",
        """
    cp.async.ca.shared.global [%r5], [%rd4], 4;
    cp.async.commit_group; //!
    cp.async.wait_group 0;
    ld.shared.b32 %r8, [%r5];
    st.global.b32 [%rd5], %r8;
""",
    ),
    "cp.async: no barrier after the wait": (
        "shared race: read after write",
        """
    cp.async.ca.shared.global [%r5], [%rd4], 4;
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0; //!
    ld.shared.b32 %r8, [%r7];
    st.global.b32 [%rd5], %r8;
""",
    ),
    "cp.async: its destination written": (
        "shared race: write while cp.async writes",
        f"""
    cp.async.ca.shared.global [%r5], [%rd4], 4;
    cp.async.commit_group;
    cp.async.wait_group 0; //!
    {STORE}
    {OWN}
    cp.async.wait_group 0;
""",
    ),
    "cp.async: out of bounds": (
        "global read out of bounds",
        f"""
    cp.async.ca.shared.global [%r5], [%rd4], 4; //!
    cp.async.ca.shared.global [%r5], [%rd4+4], 4; //~
    cp.async.wait_all;
    {OWN}
""",
    ),
    "global memory: a mask": (
        "global read out of bounds, near x",
        f"""
    add.s64 %rd6, %rd4, 4;
    setp.lt.u32 %p1, %r1, 63; //!
    setp.lt.u32 %p1, %r1, 64; //~
    @%p1 ld.global.b32 %r8, [%rd6];
    {OWN}
""",
    ),
    "global memory: a store's mask": (
        "global write out of bounds, near counter",
        """
    setp.eq.u32 %p1, %r2, 0; //!
    setp.ge.u32 %p1, %r2, 0; //~
    mul.wide.u32 %rd6, %r2, 512;
    add.s64 %rd7, %rd5, %rd6;
    @%p1 st.global.b32 [%rd7], %r1;
""",
    ),
    "global memory: misaligned": (
        "misaligned global write of 4 bytes",
        """
    st.global.b32 [%rd5], %r1; //!
    add.s64 %rd6, %rd5, 2; //~
    setp.lt.u32 %p1, %r1, 63; //~
    @%p1 st.global.b32 [%rd6], %r1; //~
""",
    ),
    "global memory: read only": (
        "global write to x, which is read only",
        """
    st.global.b32 [%rd5], %r1;
    ld.global.b32 %r8, [%rd4]; //!
    st.global.b32 [%rd4], %r1; //~
""",
    ),
    "global memory: an element not written": (
        "elements of y that nobody writes",
        """
    setp.lt.u32 %p1, %r1, 64; //!
    setp.lt.u32 %p1, %r1, 63; //~
    @%p1 st.global.b32 [%rd5], %r1;
""",
    ),
    "global memory: nobody has written": (
        "read of y that nobody has written",
        """
    st.global.b32 [%rd5], %r1; //!
    ld.global.b32 %r8, [%rd5];
    st.global.b32 [%rd5], %r1; //~
""",
    ),
    "global memory: a race within a program": (
        "global race on y: read after write",
        """
    st.global.b32 [%rd5], %r1;
    bar.sync 0; //!
    cvt.u64.u32 %rd6, %r6;
    add.s64 %rd7, %rd2, %rd6;
    ld.global.b32 %r8, [%rd7];
""",
    ),
    "global memory: a write after another thread's read": (
        "global race on y: write after read",
        """
    st.global.b32 [%rd5], %r1;
    bar.sync 0;
    cvt.u64.u32 %rd6, %r6;
    add.s64 %rd7, %rd2, %rd6;
    ld.global.b32 %r8, [%rd7];
    bar.sync 0; //!
    add.s32 %r8, %r8, 1;
    st.global.b32 [%rd5], %r8;
""",
    ),
    "global memory: lanes of one store": (
        "lanes of one instruction write y differently",
        """
    st.global.b32 [%rd5], %r1;
    bar.sync 0;
    st.global.b32 [%rd2], 5; //!
    st.global.b32 [%rd2], %r1; //~
""",
    ),
    "two programs: one element": (
        "two programs write y",
        """
    setp.eq.u32 %p1, %r2, 0; //!
    setp.ge.u32 %p1, %r2, 0; //~
    @%p1 st.global.b32 [%rd5], %r2;
""",
    ),
    "atomics: read only": (
        "atomic on x, which is read only",
        f"""
    setp.eq.u32 %p1, %r1, 0;
    add.s64 %rd6, %rd2, 256; //!
    mov.b64 %rd6, %rd1; //~
    @%p1 atom.global.gpu.acq_rel.add.u32 %r8, [%rd6+0], 1;
    {OWN}
""",
    ),
    "barriers: not all warps": (
        "barrier that not all warps reach",
        f"""
    setp.lt.u32 %p1, %r1, 32; //~
    @%p1 bra $L1; //~
    bar.sync 0;
$L1:
    {OWN}
""",
    ),
    "barriers: different ones": (
        "warps meet at different barrier instructions",
        f"""
    setp.lt.u32 %p1, %r1, 32; //~
    @%p1 bra $L1; //~
    bar.sync 0;
    bra $L2;
$L1:
    bar.sync 0;
$L2:
    {OWN}
""",
    ),
}
TWO_PROGRAMS = {"two programs: one element", "global memory: a store's mask"}
BY_WARP = {"barriers: not all warps", "barriers: different ones"}


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_rule_is_named(rule: str) -> None:
    words, body = RULES[rule]
    programs = 2 if rule in TWO_PROGRAMS else 1
    for seed in range(3):
        how = How(seed, by_warp=rule in BY_WARP)
        report, _, _ = run(right(body), programs, how)
        assert not report.problems
        report, _, _ = run(wrong(body), programs, how)
        assert any(words in kind for kind, _ in report.problems), report.problems


# Two programs of 64 threads: each writes half of y, the last to arrive reads the other half and doubles it in z.
HANDOVER = """
    shl.b32 %r10, %r2, 7;
    cvt.u64.u32 %rd6, %r10;
    add.s64 %rd7, %rd5, %rd6;
    setp.lt.u32 %p1, %r1, 32;
    @%p1 st.global.b32 [%rd7], %r1;
    bar.sync 0; // before
    setp.eq.u32 %p2, %r1, 0;
    @%p2 atom.global.gpu.acq_rel.add.u32 %r11, [%rd2+256], 1;
    @%p2 st.shared.b32 [%r4], %r11;
    bar.sync 0; // after
    ld.shared.b32 %r12, [%r4];
    setp.ne.u32 %p3, %r12, 1;
    @%p3 bra $L1;
    sub.s32 %r13, 128, %r10;
    cvt.u64.u32 %rd8, %r13;
    add.s64 %rd9, %rd5, %rd8;
    @%p1 ld.global.cg.b32 %r14, [%rd9];
$L1:
"""


@pytest.mark.parametrize("by_warp", [False, True])
def test_what_another_program_wrote_is_read_in_order(by_warp: bool) -> None:
    for seed in range(6):
        report, _, _ = run(HANDOVER, 2, How(seed, by_warp))
        assert not report.problems
        assert report.reads_across == 32
        assert report.atomics == 2


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("bar.sync 0; // before", ""),
        ("acq_rel", "relaxed"),
        ("acq_rel", "acquire"),
        ("acq_rel", "release"),
        (".gpu.", ".cta."),
        ("[%rd2+256], 1", "[%rd10], 1"),  # an atomic for each program: no pattern of release and acquire
        ("setp.ne.u32 %p3, %r12, 1", "setp.gt.u32 %p3, %r12, 1"),  # the first goes on too
    ],
)
@pytest.mark.parametrize("by_warp", [False, True])
def test_a_handover_without_order_is_named(old: str, new: str, by_warp: bool) -> None:
    separate = "mul.wide.u32 %rd10, %r2, 4;\nadd.s64 %rd10, %rd10, %rd2;\nadd.s64 %rd10, %rd10, 256;\n"
    assert old in HANDOVER
    body = separate + HANDOVER.replace(old, new)
    if "%rd10" in new:
        body = body.replace("setp.ne.u32 %p3, %r12, 1", "setp.ne.u32 %p3, %r12, 0")
    words = r"another program's, unordered|scope cta|nobody has written"
    found = [kind for seed in range(6) for kind, _ in run(body, 2, How(seed, by_warp))[0].problems]
    assert any(re.search(words, kind) for kind in found)


def test_all_threads_know_what_one_acquired_only_after_a_barrier() -> None:
    """Of the lanes that read, only the first made the atomic."""
    early = HANDOVER.replace("bar.sync 0; // after", "").replace("ld.shared.b32 %r12, [%r4];", "mov.b32 %r12, 1;")
    found = [kind for seed in range(6) for kind, _ in run(early, 2, How(seed))[0].problems]
    assert any("another program's, unordered" in kind for kind in found)


def test_a_program_that_writes_what_another_has_read() -> None:
    body = """
    setp.eq.u32 %p1, %r2, 0;
    add.s64 %rd6, %rd2, 256;
    mul.wide.u32 %rd7, %r1, 4;
    and.b64 %rd7, %rd7, 60;
    add.s64 %rd7, %rd7, %rd6;
    @%p1 ld.global.b32 %r8, [%rd7];
    not.pred %p3, %p1;
    @%p3 st.global.b32 [%rd7], 1;
    @%p1 st.global.b32 [%rd5], %r1;
"""
    kinds = {kind for seed in range(6) for kind, _ in run(body, 2, How(seed))[0].problems}
    assert any("write of counter, which another program has read" in kind for kind in kinds)
    assert any("read of counter, another program's, unordered" in kind for kind in kinds)


WGMMA = """
    add.s32 %r8, %r5, 256;
    add.s32 %r9, %r5, 512;
    st.shared.b32 [%r5], 0x3f803f80;
    st.shared.b32 [%r5+512], 0x3f803f80;
    st.shared.b32 [%r5+1024], 0x3f803f80;
    st.shared.b32 [%r5+1536], 0x3f803f80;
    st.shared.b32 [%r5+2048], 0x3f803f80;
    fence.proxy.async.shared::cta; // proxy
    bar.sync 0; // before
    shr.u32 %r10, %r4, 4;
    cvt.u64.u32 %rd6, %r10;
    mov.b64 %rd7, {%r4, 0};
    or.b64 %rd6, %rd6, 0x0000001000080000;
    add.s64 %rd8, %rd6, 128;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r20,%r21,%r22,%r23}, %rd6, %rd8, 0, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0; // wait
    bar.sync 0; // after
    st.shared.b32 [%r5], %r1;
    wgmma.wait_group.sync.aligned 0;
    setp.lt.u32 %p1, %r1, 64;
    @%p1 st.global.b32 [%rd5], %r20;
"""


@pytest.mark.parametrize("by_warp", [False, True])
def test_wgmma_reads_what_is_fenced_and_stays_as_it_is(by_warp: bool) -> None:
    report, _, y = run(WGMMA, how=How(by_warp=by_warp), threads=128)
    assert not report.problems
    assert (y[:64].view(f4) == 16).all()  # ones times ones, over 16
    for missing, words in {
        "fence.proxy.async.shared::cta; // proxy": "wgmma reads what was written without fence.proxy.async",
        "bar.sync 0; // before": "wgmma reads what was written since the last barrier",
        "wgmma.wait_group.sync.aligned 0; // wait": "write while wgmma reads",
        "bar.sync 0; // after": "shared race: write after read",
    }.items():
        assert missing in WGMMA
        report, _, _ = run(WGMMA.replace(missing, ""), how=How(by_warp=by_warp), threads=128)
        if "after" in missing and by_warp:
            words = "shared race: write after read|write while wgmma reads"
        assert any(re.search(words, kind) for kind, _ in report.problems), (missing, report.problems)


def test_what_would_stop_a_gpu_stops_the_interpreter() -> None:
    branch = "setp.lt.u32 %p1, %r1, 5;\n@%p1 bra $L1;\nadd.s32 %r8, %r1, 1;\n$L1:\n"
    with pytest.raises(PtxError, match="branch that differs between the threads"):
        run(branch)
    with pytest.raises(PtxError, match=r"brev\.b32 %r8, %r1: not known"):
        run("brev.b32 %r8, %r1;")
    with pytest.raises(PtxError, match=r"expected a kernel with \.entry"):
        Kernel(".version 8.7", 0)


def test_programs_and_warps_are_in_another_order_with_every_seed() -> None:
    """Which program arrives first is what the atomic returns."""
    body = HANDOVER + "@%p2 st.global.b32 [%rd2], %r11;"
    first = {int(run(body, 2, How(seed))[2][0]) for seed in range(8)}
    assert first == {0, 1}
    assert np.array_equal(run(body, 2, How(3))[2], run(body, 2, How(3))[2])


def test_slices_of_a_tensor_leave_out_what_lies_between() -> None:
    """The second half of every row belongs to another tensor."""
    x = np.arange(64, dtype=u4)
    y = np.zeros(64, u4)
    member = np.arange(64) % 8 < 4
    buffers = [
        Buffer("x", x.ctypes.data, 256, 4, False, True, member),
        Buffer("y", y.ctypes.data, 256, 4, True, True),
    ]
    body = "and.b32 %r8, %r1, 4;\nsetp.eq.u32 %p1, %r8, 0;\n@%p1 ld.global.b32 %r9, [%rd4];"
    for text, problems in ((body, 0), (body.replace("@%p1 ld", "ld"), 1)):
        report = kernel(text).launch((1, 1, 1), [x.ctypes.data, y.ctypes.data], buffers)
        assert len(report.problems) == problems


# arithmetic, lane by lane, against Python's integers


def signed(n: int) -> int:
    n &= 0xFFFFFFFF
    return n - 2**32 if n >= 2**31 else n


ARITHMETIC = {
    "add.s32 %r9, %r8, 0x7fffffff;": lambda x, i: x + 0x7FFFFFFF,
    "sub.s32 %r9, %r1, %r8;": lambda x, i: i - x,
    "neg.s32 %r9, %r8;": lambda x, i: -x,
    "mul.lo.s32 %r9, %r8, %r8;": lambda x, i: x * x,
    "mul.hi.u32 %r9, %r8, 0xdeadbeef;": lambda x, i: x * 0xDEADBEEF >> 32,
    "mul.hi.s32 %r9, %r8, 1000000007;": lambda x, i: signed(x) * 1000000007 >> 32,
    "mad.lo.s32 %r9, %r8, 3, %r1;": lambda x, i: x * 3 + i,
    "div.s32 %r9, %r8, 7;": lambda x, i: int(abs(signed(x)) // 7) * (1 if signed(x) > 0 else -1),
    "rem.s32 %r9, %r8, 7;": lambda x, i: abs(signed(x)) % 7 * (1 if signed(x) > 0 else -1),
    "div.u32 %r9, %r8, 7;": lambda x, i: x // 7,
    "min.s32 %r9, %r8, 5;": lambda x, i: min(signed(x), 5),
    "max.u32 %r9, %r8, 5;": lambda x, i: max(x, 5),
    "abs.s32 %r9, %r8;": lambda x, i: abs(signed(x)),
    "not.b32 %r9, %r8;": lambda x, i: ~x,
    "lop3.b32 %r9, %r8, %r1, %r3, 0x96;": lambda x, i: x ^ i ^ (i << 2),
    "lop3.b32 %r9, %r8, %r1, %r3, 0xea;": lambda x, i: (x & i) | (i << 2),
    "shl.b32 %r9, %r8, %r1;": lambda x, i: x << i if i < 32 else 0,
    "shr.u32 %r9, %r8, %r1;": lambda x, i: x >> i if i < 32 else 0,
    "shr.s32 %r9, %r8, %r1;": lambda x, i: signed(x) >> min(i, 31),
    "shf.l.wrap.b32 %r9, %r8, %r1, 5;": lambda x, i: (i << 5) | (x >> 27),
    "shf.r.wrap.b32 %r9, %r8, %r1, 5;": lambda x, i: (i << 27) | (x >> 5),
    "bfe.u32 %r9, %r8, 3, 9;": lambda x, i: x >> 3 & 511,
    "bfe.s32 %r9, %r8, 3, 9;": lambda x, i: (x >> 3 & 511) - (512 if x >> 11 & 1 else 0),
    "bfi.b32 %r9, %r1, %r8, 4, 6;": lambda x, i: (x & ~(63 << 4)) | ((i & 63) << 4),
    "prmt.b32 %r9, %r8, %r1, 0x5140;": lambda x, i: (x & 255) | (i & 255) << 8 | (x >> 8 & 255) << 16,
    "prmt.b32 %r9, %r8, %r1, 0x8888;": lambda x, i: 0xFFFFFFFF if x & 128 else 0,
    "popc.b32 %r9, %r8;": lambda x, i: x.bit_count(),
    "setp.lt.s32 %p1, %r8, 0;\nselp.b32 %r9, %r1, %r3, %p1;": lambda x, i: i if signed(x) < 0 else 4 * i,
    "setp.gt.u32 %p1, %r8, 99;\nsetp.lt.and.u32 %p2, %r1, 9, %p1;\nselp.b32 %r9, 1, 2, %p2;": lambda x, i: (
        1 if x > 99 and i < 9 else 2
    ),
    "cvt.u16.u32 %rs1, %r8;\ncvt.u32.u16 %r9, %rs1;": lambda x, i: x & 0xFFFF,
    "cvt.u16.u32 %rs1, %r8;\ncvt.s32.s16 %r9, %rs1;": lambda x, i: ((x & 0xFFFF) ^ 0x8000) - 0x8000,
    "cvt.s32.s8 %r9, %r8;": lambda x, i: ((x & 0xFF) ^ 0x80) - 0x80,
    "mov.b32 {%rs1, %rs2}, %r8;\nmov.b32 %r9, {%rs2, %rs1};": lambda x, i: (x >> 16) | (x & 0xFFFF) << 16,
    "cvt.s64.s32 %rd6, %r8;\nshr.s64 %rd6, %rd6, 32;\ncvt.u32.u64 %r9, %rd6;": lambda x, i: -1 if signed(x) < 0 else 0,
    "mov.b32 %r9, 0f3FC00000;": lambda x, i: 0x3FC00000,
    "@%p1 mov.b32 %r9, 7;\nmov.b32 %r9, %r8;": lambda x, i: x,
}


@pytest.mark.parametrize("code", ARITHMETIC)
def test_arithmetic(code: str) -> None:
    rng = random.Random(0)
    x = np.array([*(rng.randrange(2**32) for _ in range(58)), 0, 1, 2**31, 2**31 - 1, 2**32 - 1, 100], u4)
    y = np.zeros(64, u4)
    buffers = [Buffer("x", x.ctypes.data, 256, 4, False, True), Buffer("y", y.ctypes.data, 256, 4, True, False)]
    body = f"ld.global.b32 %r8, [%rd4];\n{code}\nst.global.b32 [%rd5], %r9;"
    report = kernel(body).launch((1, 1, 1), [x.ctypes.data, y.ctypes.data], buffers)
    assert not report.problems
    assert y.tolist() == [ARITHMETIC[code](int(value), i) & 0xFFFFFFFF for i, value in enumerate(x)]


SHUFFLES = {
    "shfl.sync.bfly.b32 %r9, %r8, 5, 31, -1;": lambda i: i ^ 5,
    "shfl.sync.idx.b32 %r9, %r8, 9, 31, -1;": lambda i: 9,
    "shfl.sync.up.b32 %r9, %r8, 3, 0, -1;": lambda i: i - 3 if i >= 3 else i,
    "shfl.sync.down.b32 %r9, %r8, 3, 31, -1;": lambda i: i + 3 if i + 3 < 32 else i,
}


@pytest.mark.parametrize("code", SHUFFLES)
def test_shuffles(code: str) -> None:
    _, x, y = run(f"ld.global.b32 %r8, [%rd4];\n{code}\nst.global.b32 [%rd5], %r9;")
    assert y[:64].tolist() == [int(x[(i & 32) + SHUFFLES[code](i & 31)]) for i in range(64)]


def test_ldmatrix_and_stmatrix_undo_each_other() -> None:
    """Four 8 x 8 matrices; transposed twice, and read by hand as the ISA draws them."""
    for trans in ("", ".trans"):
        body = f"""
    mad.lo.s32 %r8, %r1, 16, %r4;
    st.shared.v4.b32 [%r8], {{%r1, %r3, %r5, %r6}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r8];
    ld.shared.v4.b32 {{%r30, %r31, %r32, %r33}}, [%r8];
    bar.sync 0;
    st.shared.v4.b32 [%r8], {{0, 0, 0, 0}};
    bar.sync 0;
    stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r8], {{%r20, %r21, %r22, %r23}};
    bar.sync 0;
    ld.shared.v4.b32 {{%r40, %r41, %r42, %r43}}, [%r8];
    xor.b32 %r50, %r30, %r40;
    xor.b32 %r51, %r31, %r41;
    xor.b32 %r52, %r32, %r42;
    xor.b32 %r53, %r33, %r43;
    or.b32 %r50, %r50, %r51;
    or.b32 %r50, %r50, %r52;
    or.b32 %r50, %r50, %r53;
    st.global.b32 [%rd5], %r50;
"""
        report, _, y = run(body)
        assert not report.problems
        assert not y[:64].any()
        report, _, y = run(body.replace("st.global.b32 [%rd5], %r50", "st.global.b32 [%rd5], %r20"))
        # thread t of matrix 0: two halves of row t / 4, or of column t / 4; its row i holds thread i's four words
        halves = np.array([[t, 4 * t, 1024 + 4 * t, (4 * t) ^ 128] for t in range(8)], u4).view("u2").reshape(8, 8)
        wanted = np.ascontiguousarray(halves.T if trans else halves).view(u4).reshape(32)
        assert np.array_equal(y[:32], wanted)


def test_junk_at_first() -> None:
    """Neither registers nor shared memory begin as zeros."""
    _, _, y = run("st.global.b32 [%rd5], %r60;")
    assert (y[:64] != 0).all()
    _, _, y = run("ld.shared.b32 %r8, [%r5];\nst.global.b32 [%rd5], %r8;")
    assert np.unique(y[:64].view(u1)).size > 100
