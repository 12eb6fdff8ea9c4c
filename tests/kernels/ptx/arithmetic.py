"""Arithmetic of PTX that numpy lacks, exact and to nearest even: fused multiply-add, bf16; and
integer instructions with rules of their own. NaN payloads are not the device's.

Arrays have an element per thread.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

F32, F64 = np.float32, np.float64
U16, U32, U64, I64 = np.uint16, np.uint32, np.uint64, np.int64
Array = NDArray[Any]
_TINY = F32(2.0**-126)  # the least normal number of fp32


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b, and what the rounding of it has lost (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def to_odd(s: Array, error: Array) -> Array:
    """s + error, rounded to odd: rounded again, to fewer bits, it is as if rounded once."""
    bits = s.view(I64)
    inexact = (error > 0) | (error < 0)  # not NaN
    step = np.where((error > 0) == (s > 0), 1, -1)
    return np.where(inexact & (bits & 1 == 0), bits + step, bits).view(F64)


def fma32(a: Array, b: Array, c: Array) -> Array:
    product = a.astype(F64) * b.astype(F64)  # exact
    c = c.astype(F64)
    s = product + c
    bits = s.view(U64)
    # Two roundings differ from one only from the middle of two floats, or below their normal range.
    middle = (bits & U64(0x1FFFFFFF)) == U64(0x10000000)
    if middle.any() or (np.abs(s) < 2.0**-125).any():
        return to_odd(*two_sum(product, c)).astype(F32)
    return s.astype(F32)


def _split(a: Array) -> tuple[Array, Array]:
    t = a * 134217729.0
    high = t - (t - a)
    return high, a - high


def fma64(a: Array, b: Array, c: Array) -> Array:
    """Boldo and Melquiond 2008; exact while no partial product over- or underflows."""
    a, b, c = np.broadcast_arrays(a, b, c)
    uh = a * b
    (ah, al), (bh, bl) = _split(a), _split(b)
    ul = ((ah * bh - uh) + ah * bl + al * bh) + al * bl
    th, tl = two_sum(c, ul)
    vh, vl = two_sum(uh, th)
    exact = vh + to_odd(*two_sum(tl, vl))
    # Of a product of 0 the sum is exact, and has its zero's sign.
    return np.where(np.isfinite(exact) & (uh != 0), exact, uh + c)


def bf16_bits(v: Array) -> Array:
    """float32 to bfloat16, as uint16."""
    bits = v.view(U32)
    rounded = (bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)
    return np.where(np.isnan(v), U32(0x7FFF), rounded).astype(U16)


def bf16_value(bits: Array) -> Array:
    return (bits.astype(U32) << U32(16)).view(F32)


def f16_bits(v: Array) -> Array:
    return v.astype(np.float16).view(U16)


def pack(high: Array, low: Array) -> Array:
    """Two halves, as cvt.rn.f16x2.f32 d, a, b puts them: a on top."""
    return high.astype(U32) << U32(16) | low.astype(U32)


def divide(a: Array, b: Array) -> Array:
    """Integers, towards zero; by zero: all ones."""
    safe = np.where(b == 0, 1, b).astype(b.dtype)
    q = a // safe
    if a.dtype.kind == "i":
        q = np.where((q < 0) & (q * safe != a), q + 1, q).astype(a.dtype)
    return np.where(b == 0, ~np.zeros_like(q), q)


def remainder(a: Array, b: Array) -> Array:
    return np.where(b == 0, a, a - divide(a, b) * b)


def _flushed(a: Array) -> Array:
    """What is below the normal numbers is a zero of the same sign."""
    return np.where(np.abs(a) < _TINY, a * F32(0), a)


def _one_below(exact: Array, off: Array) -> Array:
    """Where `off`, and if normal, nearer to zero by one unit in the last place."""
    off = off & np.isfinite(exact) & (np.abs(exact) > _TINY)
    return _flushed((exact.view(U32) - off.astype(U32)).view(F32))


def nearly_inverse(a: Array) -> Array:
    """rcp.approx.ftz.f32: 1 / a, here as far below it as PTX allows (one unit in the last place),
    so that nothing can rely on more. Except of 2^n (2 - 2^-23): from there one step of Newton's
    does not reach the rounded quotient, and devices, whose own divisions take that step, are
    nearer."""
    last = a.view(U32) & U32(0x7FFFFF) == U32(0x7FFFFF)
    return _one_below(F32(1) / _flushed(a), ~last)


def nearly_exp2(a: Array) -> Array:
    """ex2.approx.ftz.f32: 2^a, here one unit in the last place below the rounded power. PTX allows
    2^-22 of it, which is one to two units."""
    exact = np.exp2(_flushed(a).astype(np.float64)).astype(F32)
    return _one_below(exact, np.ones(a.shape, bool))


def multiply_high(a: Array, b: Array) -> Array:
    """The upper half of the product of two 32-bit or 64-bit integers."""
    bits = 8 * a.dtype.itemsize
    if bits == 32:
        wide = I64 if a.dtype.kind == "i" else U64
        return (a.astype(wide) * b.astype(wide) >> wide(32)).astype(a.dtype)
    x, y = np.broadcast_arrays(a.astype(U64), b.astype(U64))
    low, mask = U64(32), U64(0xFFFFFFFF)
    middle = (x & mask) * (y & mask) >> low
    first, second = (x >> low) * (y & mask), (x & mask) * (y >> low)
    carry = (middle + (first & mask) + (second & mask)) >> low
    high = (x >> low) * (y >> low) + (first >> low) + (second >> low) + carry
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, U64(0)) - np.where(b < 0, x, U64(0))
    return high.astype(a.dtype)


def permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt.b32: each byte of the result is one of the eight of b, a; or the sign of it in all
    bits."""
    both = b.astype(U64) << U64(32) | a
    out: Array = np.zeros(1, U64)
    for n in range(4):
        s = (selector >> U32(4 * n)).astype(U64)
        byte = both >> ((s & U64(7)) * U64(8)) & U64(255)
        byte = np.where(s & U64(8), (byte >> U64(7)) * U64(255), byte)
        out = out | byte << U64(8 * n)
    return out.astype(U32)


def funnel(low: Array, high: Array, by: Array, left: bool, wrap: bool) -> Array:
    """shf: 32 bits of high, low, shifted."""
    both = high.astype(U64) << U64(32) | low
    n = (by & U32(31) if wrap else np.minimum(by, U32(32))).astype(U64)
    # To the left it is the upper half, and by 32 at most: two shifts stay below 64 bits.
    return ((both << n) >> U64(32) if left else both >> n).astype(U32)


def look_up(a: Array, b: Array, c: Array, table: int) -> Array:
    """lop3.b32: any function of three bits, by its table of truth."""
    out: Array = np.zeros(1, U32)
    for n in range(8):
        if table >> n & 1:
            terms = [x if n & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1))]
            out = out | terms[0] & terms[1] & terms[2]
    return out


def insert(a: Array, b: Array, start: Array, length: Array) -> Array:
    """bfi.b32: the low bits of a, put into b."""
    start, length = (np.minimum(x & U32(255), U32(32)).astype(U64) for x in (start, length))
    mask = ((U64(1) << length) - U64(1)) << start
    return (b.astype(U64) & ~mask | (a.astype(U64) << start) & mask).astype(U32)


def extract(a: Array, start: Array, length: Array) -> Array:
    """bfe.u32."""
    start, length = (np.minimum(x & U32(255), U32(32)).astype(U64) for x in (start, length))
    return (a.astype(U64) >> start & ((U64(1) << length) - U64(1))).astype(U32)


def count_bits(a: Array) -> Array:
    """popc."""
    out: Array = np.zeros(a.shape, U32)
    for n in range(8 * a.dtype.itemsize):
        out += (a >> a.dtype.type(n) & a.dtype.type(1)).astype(U32)
    return out
