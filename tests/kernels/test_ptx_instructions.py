"""The interpreter in ptx: each instruction against plain Python, rounding against libm and
torch."""

import ctypes
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ptx import arithmetic
from ptx.isa import Unsupported
from ptx.parse import Module
from ptx.program import Program
from ptx.snippet import run_snippet

RANDOM = np.random.default_rng(0)
EDGES = (0, 1, 2, 31, 32, 33, 63, 64, 255, 2**31 - 1, 2**31, 2**32 - 1)
M32, M64 = 2**32 - 1, 2**64 - 1


def signed(v: int, bits: int) -> int:
    return v - (1 << bits) if v >> (bits - 1) & 1 else v


def truncated(a: int, b: int) -> int:
    q = abs(a) // abs(b)
    return q if (a < 0) == (b < 0) else -q


def permuted(a: int, b: int, s: int) -> int:
    pool = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
    out = []
    for n in range(4):
        byte = pool[s >> 4 * n & 7]
        out.append((255 if byte & 128 else 0) if s >> 4 * n & 8 else byte)
    return int.from_bytes(bytes(out), "little")


def shifted(a: int, by: int, bits: int, left: bool, sign: bool = False) -> int:
    if left:
        return a << by if by < bits else 0
    if sign:
        return signed(a, bits) >> min(by, bits - 1)
    return a >> by if by < bits else 0


# Of three 32-bit registers a, b, c.
OF_32_BITS: dict[str, Callable[[int, int, int], int]] = {
    "add.s32 %r4, %r1, %r2": lambda a, b, c: a + b,
    "sub.s32 %r4, %r1, %r2": lambda a, b, c: a - b,
    "neg.s32 %r4, %r1": lambda a, b, c: -a,
    "not.b32 %r4, %r1": lambda a, b, c: ~a,
    "and.b32 %r4, %r1, %r2": lambda a, b, c: a & b,
    "or.b32 %r4, %r1, 0x55": lambda a, b, c: a | 0x55,
    "xor.b32 %r4, %r1, %r2": lambda a, b, c: a ^ b,
    "mul.lo.s32 %r4, %r1, %r2": lambda a, b, c: a * b,
    "mul.hi.u32 %r4, %r1, %r2": lambda a, b, c: a * b >> 32,
    "mul.hi.s32 %r4, %r1, %r2": lambda a, b, c: signed(a, 32) * signed(b, 32) >> 32,
    "mad.lo.s32 %r4, %r1, %r2, %r3": lambda a, b, c: a * b + c,
    "mad.hi.u32 %r4, %r1, %r2, %r3": lambda a, b, c: (a * b >> 32) + c,
    "min.u32 %r4, %r1, %r2": lambda a, b, c: min(a, b),
    "max.s32 %r4, %r1, %r2": lambda a, b, c: max(signed(a, 32), signed(b, 32)),
    "div.u32 %r4, %r1, %r2": lambda a, b, c: a // b if b else M32,
    "rem.u32 %r4, %r1, %r2": lambda a, b, c: a % b if b else a,
    "div.s32 %r4, %r1, 7": lambda a, b, c: truncated(signed(a, 32), 7),
    "div.s32 %r4, %r1, -7": lambda a, b, c: truncated(signed(a, 32), -7),
    "shl.b32 %r4, %r1, %r2": lambda a, b, c: shifted(a, b, 32, True),
    "shr.u32 %r4, %r1, %r2": lambda a, b, c: shifted(a, b, 32, False),
    "shr.s32 %r4, %r1, %r2": lambda a, b, c: shifted(a, b, 32, False, True),
    "shf.r.wrap.b32 %r4, %r1, %r2, %r3": lambda a, b, c: (b << 32 | a) >> (c & 31),
    "shf.l.wrap.b32 %r4, %r1, %r2, %r3": lambda a, b, c: (b << 32 | a) << (c & 31) >> 32,
    "shf.r.clamp.b32 %r4, %r1, %r2, %r3": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "shf.l.clamp.b32 %r4, %r1, %r2, %r3": lambda a, b, c: (b << 32 | a) << min(c, 32) >> 32,
    "prmt.b32 %r4, %r1, %r2, %r3": permuted,
    "prmt.b32 %r4, %r1, %r2, 0x5410U": lambda a, b, c: (b & 0xFFFF) << 16 | (a & 0xFFFF),
    "lop3.b32 %r4, %r1, %r2, %r3, 0xE8": lambda a, b, c: (a & b) | (a & c) | (b & c),
    "lop3.b32 %r4, %r1, %r2, %r3, 0x1E": lambda a, b, c: a ^ (b | c),
    "bfi.b32 %r4, %r1, %r2, 5, 11": lambda a, b, c: (b & ~(2047 << 5)) | (a & 2047) << 5,
    "bfe.u32 %r4, %r1, 7, 9": lambda a, b, c: a >> 7 & 511,
    "popc.b32 %r4, %r1": lambda a, b, c: a.bit_count(),
    "setp.lt.s32 %p1, %r1, %r2; selp.b32 %r4, %r1, %r3, %p1": (
        lambda a, b, c: a if signed(a, 32) < signed(b, 32) else c
    ),
    "setp.ge.u32 %p1, %r1, %r2; @!%p1 mov.b32 %r1, 9; mov.b32 %r4, %r1": (
        lambda a, b, c: a if a >= b else 9
    ),
    "setp.eq.s32 %p1, %r1, %r2; not.pred %p2, %p1; selp.b32 %r4, 1, 0, %p2": (
        lambda a, b, c: int(a != b)
    ),
    "cvt.u16.u32 %h1, %r1; cvt.u32.u16 %r4, %h1": lambda a, b, c: a & 0xFFFF,
    "cvt.s64.s32 %rd4, %r1; shr.u64 %rd4, %rd4, 20; cvt.u32.u64 %r4, %rd4": (
        lambda a, b, c: (signed(a, 32) & M64) >> 20
    ),
    "mov.b64 %rd4, {%r1, %r2}; shr.u64 %rd4, %rd4, 8; cvt.u32.u64 %r4, %rd4": (
        lambda a, b, c: (b << 32 | a) >> 8
    ),
    "mov.b32 {%h1, %h2}, %r1; mov.b32 %r4, {%h2, %h1}": (
        lambda a, b, c: (a & 0xFFFF) << 16 | a >> 16
    ),
}
LOADED = "ld.volatile.global.v4.u32 {%r1, %r2, %r3, %r5}, [%in];\n"


@pytest.mark.parametrize("text", OF_32_BITS)
def test_of_32_bits(text: str) -> None:
    edges = [(a, b, c, 0) for a in EDGES for b in EDGES for c in (0, 1, 33, M32)]
    drawn = RANDOM.integers(0, 2**32, (1024 - len(edges), 4))
    given = np.array([*edges, *drawn.tolist()], np.uint32)
    got, _ = run_snippet(f"{LOADED}{text};\nst.global.u32 [%out], %r4;", given, threads=1024)
    want = [OF_32_BITS[text](*map(int, row[:3])) & M32 for row in given]
    assert got[:, 0].tolist() == want


OF_64_BITS: dict[str, Callable[[int, int], int]] = {
    "add.s64 %rd3, %rd1, %rd2": lambda a, b: a + b,
    "mul.lo.s64 %rd3, %rd1, %rd2": lambda a, b: a * b,
    "mul.hi.u64 %rd3, %rd1, %rd2": lambda a, b: a * b >> 64,
    "mul.hi.s64 %rd3, %rd1, %rd2": lambda a, b: signed(a, 64) * signed(b, 64) >> 64,
    "div.s64 %rd3, %rd1, %rd2": (
        lambda a, b: truncated(signed(a, 64), signed(b, 64)) if b else M64
    ),
    "cvt.u32.u64 %r1, %rd1; mul.wide.u32 %rd3, %r1, 77": lambda a, b: (a & M32) * 77,
    "cvt.u32.u64 %r1, %rd1; mad.wide.u32 %rd3, %r1, 77, %rd2": lambda a, b: (a & M32) * 77 + b,
    "cvt.u32.u64 %r1, %rd1; mul.wide.s32 %rd3, %r1, -3": lambda a, b: signed(a & M32, 32) * -3,
    "shl.b64 %rd3, %rd1, 13": lambda a, b: a << 13,
    "shr.s64 %rd3, %rd1, 13": lambda a, b: signed(a, 64) >> 13,
    "setp.gt.u64 %p1, %rd1, %rd2; selp.b64 %rd3, %rd1, %rd2, %p1": lambda a, b: max(a, b),
}


@pytest.mark.parametrize("text", OF_64_BITS)
def test_of_64_bits(text: str) -> None:
    edges = [(a, b) for a in (*EDGES, M64, 2**63) for b in (*EDGES, M64, 2**63)]
    drawn = RANDOM.integers(0, 2**64, (1024 - len(edges), 2), dtype=np.uint64)
    given = np.array([*edges, *drawn.tolist()], np.uint64)
    body = f"ld.global.v2.u64 {{%rd1, %rd2}}, [%in];\n{text};\nst.global.u64 [%out], %rd3;"
    got, _ = run_snippet(body, given, np.uint64, threads=1024)
    assert got[:, 0].tolist() == [OF_64_BITS[text](int(a), int(b)) & M64 for a, b in given]


@pytest.mark.parametrize(("name", "dtype"), [("fmaf", np.float32), ("fma", np.float64)])
def test_fused_multiply_add_rounds_once(name: str, dtype: type) -> None:
    """Random numbers, sums that cancel or are near the middle of two floats, subnormals, zeros."""
    libm, count = ctypes.CDLL("libm.so.6"), 20000
    theirs = getattr(libm, name)
    number = ctypes.c_float if dtype is np.float32 else ctypes.c_double
    theirs.restype, theirs.argtypes = number, [number] * 3
    ours = arithmetic.fma32 if dtype is np.float32 else arithmetic.fma64

    def normal() -> np.ndarray:
        return RANDOM.standard_normal(count).astype(dtype)

    def short() -> np.ndarray:
        return (1 + RANDOM.integers(0, 4096, count) / 4096).astype(dtype)

    def zeros() -> np.ndarray:
        return RANDOM.choice(np.array([-0.0, 0.0], dtype), count)

    a, b = normal(), normal()
    near = 1 + RANDOM.integers(-3, 4, count) * np.finfo(dtype).eps
    tiny = RANDOM.choice([-1, 1], count) * 2.0 ** -RANDOM.integers(20, 80, count)
    sets = [
        (a, b, normal() * 2.0 ** RANDOM.integers(-60, 60, count)),
        (a, b, -(a * b) * near),
        (short(), short(), tiny),
        (normal(), zeros(), zeros()),
    ]
    if dtype is np.float32:
        any_bits = (RANDOM.integers(0, 2**32, count, dtype=np.uint32) for _ in range(3))
        sets.append(tuple(bits.view(np.float32) for bits in any_bits))
        sets.append((normal() * dtype(1e-20), normal() * dtype(1e-21), normal() * dtype(1e-40)))
    for numbers in sets:
        with np.errstate(all="ignore"):
            x, y, z = (np.asarray(v, dtype) for v in numbers)
            got = ours(x, y, z)
        each = zip(x.tolist(), y.tolist(), z.tolist(), strict=True)
        want = np.array([theirs(*v) for v in each], dtype)
        np.testing.assert_array_equal(got, want)
        zero = want == 0
        np.testing.assert_array_equal(np.signbit(got[zero]), np.signbit(want[zero]))


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_rounding_to_half_precision(kind: str, dtype: torch.dtype) -> None:
    """To nearest even, as torch rounds: halves between neighbours, subnormals, overflow,
    infinity."""
    bits = RANDOM.integers(0, 2**32, 1024, dtype=np.uint32)
    bits[:256] = (bits[:256] & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    bits[256:512] = (bits[256:512] & np.uint32(0xFFFFE000)) | np.uint32(0x1000)
    given = bits.view(np.float32)
    given[:8] = [0.0, -0.0, np.inf, -np.inf, 65504, 65519.9, 65520, 1e-8]
    given[512:640] = RANDOM.uniform(-1e-4, 1e-4, 128)
    given = np.nan_to_num(given, nan=1.5, posinf=np.inf, neginf=-np.inf)
    want = torch.from_numpy(given).to(dtype).view(torch.int16).numpy().astype(np.uint16)
    body = f"ld.global.f32 %f1, [%in];\ncvt.rn.{kind}.f32 %h1, %f1;\nst.global.u16 [%out], %h1;"
    got, _ = run_snippet(body, given[:, None], np.uint16, threads=1024)
    np.testing.assert_array_equal(got[:, 0], want)
    both = f"ld.global.f32 %f1, [%in];\ncvt.rn.{kind}x2.f32 %r1, %f1, 0f3F800000;\n"
    got, _ = run_snippet(both + "st.global.u32 [%out], %r1;", given[:, None], threads=1024)
    np.testing.assert_array_equal(got[:, 0] >> 16, want)
    assert set((got[:, 0] & 0xFFFF).tolist()) == {0x3C00 if kind == "f16" else 0x3F80}


OF_FLOATS: dict[str, Callable[[float, float], float]] = {
    "add.rn.f32 %f3, %f1, %f2": lambda a, b: np.float32(a) + np.float32(b),
    "mul.rn.f32 %f3, %f1, %f2": lambda a, b: np.float32(a) * np.float32(b),
    "div.rn.f32 %f3, %f1, %f2": lambda a, b: np.float32(a) / np.float32(b),
    "sqrt.rn.f32 %f3, %f1": lambda a, b: np.sqrt(np.float32(a)),
    "rcp.rn.f32 %f3, %f2": lambda a, b: np.float32(1) / np.float32(b),
    "rcp.approx.ftz.f32 %f3, %f2": (
        lambda a, b: np.nextafter(np.float32(1) / np.float32(b), np.float32(0))
    ),
    "ex2.approx.ftz.f32 %f3, %f1": (
        lambda a, b: np.nextafter(np.float32(np.exp2(np.float64(np.float32(a)))), np.float32(0))
    ),
    "neg.f32 %f3, %f1": lambda a, b: -np.float32(a),
    "abs.f32 %f3, %f2": lambda a, b: np.abs(np.float32(b)),
    "setp.lt.f32 %p1, %f1, %f2; selp.f32 %f3, %f1, %f2, %p1": lambda a, b: a if a < b else b,
    "setp.leu.f32 %p1, %f1, %f2; selp.f32 %f3, 0f3F800000, 0f00000000, %p1": (
        lambda a, b: float(a <= b or math.isnan(a) or math.isnan(b))
    ),
    "cvt.f64.f32 %fd1, %f1; mul.rn.f64 %fd1, %fd1, %fd1; cvt.rn.f32.f64 %f3, %fd1": (
        lambda a, b: np.float32(np.float64(np.float32(a)) ** 2)
    ),
}


def test_approximate_reciprocal() -> None:
    """Of every mantissa: not the rounded quotient, which one step of Newton's reaches from it."""
    ones = np.arange(1 << 23, dtype=np.uint32) | np.uint32(0x3F800000)
    for exponent in (-124, 0, 124):
        d = np.ldexp(ones.view(np.float32), exponent)
        near, exact = arithmetic.nearly_inverse(d), np.float32(1) / d
        last = ones == 0x3FFFFFFF
        assert (near == exact).nonzero()[0].tolist() == last.nonzero()[0].tolist()
        assert (np.nextafter(exact, np.float32(0)) == near)[~last].all()
        error = arithmetic.fma32(-d, near, np.ones(1, np.float32))
        np.testing.assert_array_equal(arithmetic.fma32(near, error, near), exact)
    ends = np.array([2.0**127, -(2.0**127), 1e-39, 0, np.inf], np.float32)
    with np.errstate(divide="ignore"):
        assert arithmetic.nearly_inverse(ends).tolist() == [0, 0, np.inf, np.inf, 0]


def test_approximate_power() -> None:
    """One unit below the rounded power, and within what PTX says; subnormals are flushed."""
    a = np.linspace(-125.9, 127.9, 100_001).astype(np.float32)
    near, exact = arithmetic.nearly_exp2(a), np.exp2(a.astype(np.float64))
    np.testing.assert_array_equal(near, np.nextafter(exact.astype(np.float32), np.float32(0)))
    assert (np.abs(near / exact - 1) <= 2.0**-22).all()
    ends = np.array([0, 1e-39, -126.5, -1000, 128, np.inf, -np.inf, np.nan], np.float32)
    below_one = float(np.nextafter(np.float32(1), np.float32(0)))
    with np.errstate(over="ignore", invalid="ignore"):
        got = arithmetic.nearly_exp2(ends).tolist()
    assert got[:7] == [below_one, below_one, 0, 0, np.inf, np.inf, 0]
    assert math.isnan(got[7])


@pytest.mark.parametrize("text", OF_FLOATS)
def test_of_floats(text: str) -> None:
    given = RANDOM.standard_normal((256, 2)).astype(np.float32)
    given[:, 0] = np.abs(given[:, 0])
    given[:4] = [[0, 1], [1, np.inf], [np.nan, 1], [2, 2]]
    body = f"ld.global.v2.f32 {{%f1, %f2}}, [%in];\n{text};\nst.global.f32 [%out], %f3;"
    got, _ = run_snippet(body, given, np.float32, threads=256)
    with np.errstate(all="ignore"):
        want = np.array([OF_FLOATS[text](*map(float, row)) for row in given], np.float32)
    np.testing.assert_array_equal(got[:, 0], want)


def shuffle_source(mode: str, lane: int, by: int, width: int) -> int:
    """CUDA's definition, of __shfl_*_sync with a width."""
    first = lane // width * width
    j = {"idx": first + by % width, "up": lane - by, "down": lane + by, "bfly": lane ^ by}[mode]
    inside = {"idx": True, "up": j >= first, "down": j < first + width, "bfly": j < first + width}
    return j if inside[mode] else lane


@pytest.mark.parametrize("width", [32, 16, 8, 2])
@pytest.mark.parametrize("mode", ["idx", "up", "down", "bfly"])
def test_shuffles(mode: str, width: int) -> None:
    given = RANDOM.integers(0, 2**32, (64, 1), dtype=np.uint32)
    for by in (0, 1, 3, 7, 16, 31):
        clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
        shuffle = f"shfl.sync.{mode}.b32 %r2|%p1, %r1, {by}, {clamp}, -1;\n"
        body = f"ld.global.u32 %r1, [%in];\n{shuffle}st.global.u32 [%out], %r2;"
        got, _ = run_snippet(body, given, threads=64)
        sources = [t // 32 * 32 + shuffle_source(mode, t % 32, by, width) for t in range(64)]
        assert got[:, 0].tolist() == given[sources, 0].tolist()


def test_divergent_threads_meet_again() -> None:
    """A loop that each thread leaves after a number of turns of its own; then all go on
    together."""
    body = """
    ld.global.u32 %r1, [%in];
    mov.b32 %r2, 0;
    LOOP:
    setp.ge.u32 %p1, %r2, %r1;
    @%p1 bra DONE;
    add.u32 %r2, %r2, 1;
    bra.uni LOOP;
    DONE:
    shfl.sync.idx.b32 %r3, %r2, 5, 31, -1;
    mad.lo.u32 %r4, %r3, 1000, %r2;
    st.global.u32 [%out], %r4;"""
    given = np.arange(32, dtype=np.uint32)[::-1, None] % 11
    got, counts = run_snippet(body, given)
    assert got[:, 0].tolist() == [given[5, 0] * 1000 + g for g in given[:, 0]]
    assert counts.memory["st.global", "requests"] == 1


@pytest.mark.parametrize(
    "text",
    [
        "lg2.approx.ftz.f32 %f1, %f2",
        "fma.rz.f32 %f1, %f2, %f3, %f4",
        "mul.f16 %h1, %h2, %h3",
        "mad.f32 %f1, %f2, %f3, %f4",
        "atom.global.add.f32 %f1, [%in], %f2",
        "cvt.rz.f16.f32 %h1, %f1",
        "cp.async.ca.shared.global [dynamic], [%in], 16, 8",
        "cp.async.bulk.commit_group",
        "ld.local.u32 %r1, [%in]",
        "bar.sync 1",
        "bar.red.popc.u32 %r1, 0, %p1",
        "shfl.up.b32 %r1, %r2, 1, 0",
        "st.release.gpu.global.u32 [%in], %r1",
        "call.uni (%r1), f, (%r2)",
        "add.u32 %r1, %clock, 1",
    ],
)
def test_what_is_not_known_is_refused_with_its_line(text: str) -> None:
    source = f"""
.visible .entry e()
{{
    .reg .b32 %r<9>; .reg .f32 %f<9>; .reg .b64 %in; .reg .b16 %h<9>; .reg .pred %p<3>;
    // a comment
    {text};
}}"""
    with pytest.raises(Unsupported, match=r"^e line 6: ") as told:
        Program(Module(source).entry("e"))
    assert text in str(told.value)


def test_functions_and_local_memory_are_refused() -> None:
    with pytest.raises(Unsupported, match="line 2: a function that is not inlined"):
        Module("\n.func f()\n{\n}\n")
    with pytest.raises(Unsupported, match="local memory"):
        Module(".entry e()\n{\n.local .align 8 .b8 depot[16];\n}").entry("e")
