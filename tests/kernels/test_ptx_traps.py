"""The interpreter in ptx reports what would stop a device, or make it answer with garbage."""

import numpy as np
import pytest
from ptx.isa import Trap
from ptx.machine import Options
from ptx.snippet import run_snippet

FOUR = np.zeros((32, 4), np.uint32)
STORE = "st.global.u32 [%out], %r1;"
# What the interpreter says, and the lines that make it say so; a warp, 64 bytes of shared memory.
TRAPS = {
    r"misaligned: 16 bytes": "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%in+4];",
    r"reads 4 bytes, outside every array: in of 512 bytes, at 512": "ld.global.u32 %r1, [%in+16];",
    r"reads 4 bytes, outside every array: in of 512 bytes, at -4": "ld.global.u32 %r1, [%in+-4];",
    r"writes 4 bytes, outside every array: out": "st.global.u32 [%out+4], %r1;",
    r"writes 4 bytes, read-only: in": "st.global.u32 [%in], %r1;",
    r"no such address: 0x0": "mov.b64 %rd1, 0; ld.global.u32 %r1, [%rd1];",
    r"reads 4 bytes, never written: out": "ld.global.u32 %r1, [%out];",
    r"reads 4 bytes, never written: shared byte 8": "ld.shared.u32 %r1, [dynamic+8];",
    r"outside shared memory of 64 bytes: 4 bytes at 64": "st.shared.u32 [dynamic+64], 1;",
    r"race at shared byte 0: CTA 0 thread \d+ with CTA 0 thread \d+": (
        "st.shared.u32 [dynamic], %r32;"
    ),
    r"race at shared byte 4": """
        setp.ne.s32 %p1, %r32, 0;
        @!%p1 st.shared.u32 [dynamic+4], 7;
        shfl.sync.idx.b32 %r1, %r32, 0, 31, -1;
        @%p1 ld.shared.u32 %r1, [dynamic+4];""",
    r"threads end while copies of theirs are under way": """
        mov.b64 %rd1, dynamic; cvt.u32.u64 %r2, %rd1;
        setp.eq.s32 %p1, %r32, 3;
        @%p1 cp.async.cg.shared.global [%r2], [%in], 16;""",
    r"reads 4 bytes, a cp.async to it is under way: shared byte 0": """
        mov.b64 %rd1, dynamic; cvt.u32.u64 %r2, %rd1;
        setp.ne.s32 %p1, %r32, 0;
        @%p1 bra END;
        cp.async.cg.shared.global [%r2], [%in], 16;
        cp.async.commit_group;
        cp.async.wait_group 1;
        ld.shared.u32 %r1, [dynamic];
        END:""",
    r"a lane shuffles that is not in its own mask": (
        "shfl.sync.idx.b32 %r1, %r32, 0, 31, 0x7fffffff;"
    ),
    r"lanes that name each other give different masks": """
        setp.ne.s32 %p1, %r32, 0; selp.b32 %r2, -1, 0xfffffff, %p1;
        shfl.sync.idx.b32 %r1, %r32, 0, 31, %r2;""",
    r"reads from a lane that takes no part": """
        setp.lt.s32 %p1, %r32, 16; @%p1 bra HERE; bra END;
        HERE: shfl.sync.idx.b32 %r1, %r32, 20, 31, 0xffff;
        END:""",
    r"threads wait for each other: 16 at line \d+: shfl.*; 16 at line \d+: bar.sync 0": """
        setp.lt.s32 %p1, %r32, 16;
        @%p1 bra FIRST;
        shfl.sync.idx.b32 %r1, %r32, 20, 31, -1;
        bra END;
        FIRST: bar.sync 0;
        END:""",
    r"threads wait for each other: 16 at line \d+: bar.sync 0; 16 at line": """
        setp.lt.s32 %p1, %r32, 16;
        @%p1 bra FIRST;
        bar.sync 0;
        bra END;
        FIRST: bar.sync 0;
        END:""",
    r"outside of the parameters": "mov.b64 %rd1, from; ld.param.u64 %rd2, [%rd1+16];",
    r"arrives at the cluster's barrier twice": "barrier.cluster.arrive; barrier.cluster.arrive;",
    r"that has written arrives relaxed": """
        st.global.u32 [%out], 1;
        barrier.cluster.arrive.relaxed;""",
}


@pytest.mark.parametrize("said", TRAPS)
def test_traps(said: str) -> None:
    with pytest.raises(Trap, match=said):
        run_snippet(f"{TRAPS[said]}\nmov.b32 %r1, 0;\n{STORE}", FOUR, shared=64)


def test_a_parameter_by_an_address_that_some_threads_do_not_have() -> None:
    """Their register holds garbage; the others read what is there, or from another place."""
    body = """
        setp.lt.s32 %p1, %r32, 16; mov.b64 %rd1, 0x7ffd000000000000;
        @%p1 bra HERE;
        bra END;
        HERE: mov.b64 %rd1, from; and.b32 %r2, %r32, 1; mul.wide.u32 %rd3, %r2, 8;
        add.s64 %rd1, %rd1, %rd3;
        ld.param.u64 %rd2, [%rd1]; cvt.u32.u64 %r1, %rd2; st.global.u32 [%out], %r1;
        END: @!%p1 st.global.u32 [%out], 7;"""
    found, _ = run_snippet(body, FOUR)
    assert len(set(found[:16:2, 0])) == len(set(found[1:16:2, 0])) == 1
    assert found[0, 0] != found[1, 0]
    assert (found[16:] == 7).all()


def test_results_that_are_not_written() -> None:
    with pytest.raises(Trap, match="out of 128 bytes, at 124: never written"):
        run_snippet("setp.ne.s32 %p1, %r32, 31;\n@%p1 st.global.u32 [%out], 1;", FOUR)


EXCHANGE = """
    mul.wide.u32 %rd1, %r32, 4; mov.b64 %rd2, dynamic; add.s64 %rd3, %rd1, %rd2;
    st.shared.u32 [%rd3], %r32;
    {barrier}
    xor.b32 %r2, %r32, 63; mul.wide.u32 %rd1, %r2, 4; add.s64 %rd3, %rd1, %rd2;
    ld.shared.u32 %r1, [%rd3];
    st.global.u32 [%out], %r1;"""
TWO_WARPS = np.zeros((64, 1), np.uint32)


def test_a_barrier_orders() -> None:
    got, counts = run_snippet(
        EXCHANGE.format(barrier="bar.sync 0;"), TWO_WARPS, threads=64, shared=256
    )
    assert got[:, 0].tolist() == [63 - t for t in range(64)]
    assert counts.memory["ld.shared", "wavefronts"] == 2


@pytest.mark.parametrize("barrier", ["", "shfl.sync.idx.b32 %r3, %r32, 0, 31, -1;"])
def test_without_a_barrier_it_is_a_race_though_the_result_is_right(barrier: str) -> None:
    body = EXCHANGE.format(barrier=barrier)
    with pytest.raises(Trap, match="race at shared byte"):
        run_snippet(body, TWO_WARPS, threads=64, shared=256)
    got, _ = run_snippet(body, TWO_WARPS, threads=64, shared=256, options=Options(races=False))
    assert got[:, 0].tolist() == [63 - t for t in range(64)]


COPY = """
    mul.wide.u32 %rd1, %r32, 16; mov.b64 %rd2, dynamic; add.s64 %rd2, %rd1, %rd2;
    cvt.u32.u64 %r2, %rd2;
    cp.async.cg.shared.global [%r2], [%in], 16;
    cp.async.commit_group;
    cp.async.wait_group 0;
    ld.shared.v4.u32 {%r3, %r4, %r5, %r6}, [%rd2];
    st.global.u32 [%out], %r6;"""


@pytest.mark.parametrize("late", [True, False])
def test_asynchronous_copies(late: bool) -> None:
    given = np.arange(128, dtype=np.uint32).reshape(32, 4)
    got, counts = run_snippet(COPY, given, shared=512, options=Options(late=late, count=True))
    assert got[:, 0].tolist() == given[:, 3].tolist()
    assert counts.memory["cp.async", "sectors"] == counts.memory["cp.async", "least sectors"] == 16
    assert counts.memory["cp.async.shared", "wavefronts"] == 4


CLUSTER = """
    mov.b64 %rd1, dynamic;
    mov.u32 %r2, %cluster_ctarank; xor.b32 %r3, %r2, 1;
    {begin}
    mapa.shared::cluster.u64 %rd2, %rd1, %r3;
    setp.ne.s32 %p1, %r32, 0;
    cvta.shared.u64 %rd3, %rd1;
    mapa.u64 %rd4, %rd3, %r3;
    @!%p1 st.u32 [%rd4], %r30;
    {end}
    ld.shared.u32 %r1, [dynamic];
    st.global.u32 [%out], %r1;"""
MEET = "barrier.cluster.arrive; barrier.cluster.wait;"


def clusters(begin: str, end: str) -> np.ndarray:
    body = CLUSTER.format(begin=begin, end=end).replace(
        "mapa.shared::cluster.u64 %rd2, %rd1, %r3;", ""
    )
    given = np.zeros((128, 1), np.uint32)
    got, _ = run_snippet(body, given, ctas=4, cluster=2, shared=16)
    return got[:, 0]


def test_clusters() -> None:
    assert clusters(MEET, MEET).tolist() == [1] * 32 + [0] * 32 + [3] * 32 + [2] * 32
    with pytest.raises(Trap, match="shared memory of a CTA that may not have begun"):
        clusters("", MEET)
    with pytest.raises(Trap, match=r"never written|race|has ended|may still be writing"):
        clusters(MEET, "")


def test_global_memory_races_between_ctas() -> None:
    given = np.zeros((64, 1), np.uint32)
    body = "setp.ne.s32 %p1, %r32, 0; @%p1 bra END; {} END: st.global.u32 [%out], 1;"
    mine, theirs = "st.global.u32 [%out], 2;", "sub.s64 %rd1, %out, {}; st.global.u32 [%rd1], 2;"
    run_snippet(body.format(mine), given, ctas=2)
    other = "setp.eq.s32 %p1, %r30, 0; @%p1 bra END; " + theirs.format(32 * 4)
    with pytest.raises(Trap, match="race at out of 256 bytes, at 0: CTA"):
        run_snippet(body.format(other), given, ctas=2)


@pytest.mark.parametrize(
    ("stride", "sectors", "least"), [(4, 4, 4), (8, 8, 4), (32, 32, 4), (0, 1, 1)]
)
def test_sectors(stride: int, sectors: int, least: int) -> None:
    given = np.zeros((32, 8), np.uint32)
    body = f"""
    mul.wide.u32 %rd1, %r32, {32 - stride}; sub.s64 %in, %in, %rd1;
    ld.global.u32 %r1, [%in]; st.global.u32 [%out], %r1;"""
    _, counts = run_snippet(body, given)
    assert counts.memory["ld.global", "sectors"] == sectors
    assert counts.memory["ld.global", "least sectors"] == least


@pytest.mark.parametrize(("stride", "wavefronts"), [(4, 1), (8, 2), (128, 32), (0, 1), (132, 1)])
def test_bank_conflicts(stride: int, wavefronts: int) -> None:
    body = f"""
    mul.wide.u32 %rd1, %r32, {stride}; mov.b64 %rd2, dynamic; add.s64 %rd1, %rd1, %rd2;
    st.shared.u32 [%rd1], 1; st.global.u32 [%out], 1;"""
    options = Options(count=True, races=False)
    _, counts = run_snippet(body, FOUR, shared=8192, options=options)
    assert counts.memory["st.shared", "wavefronts"] == wavefronts
