"""What a call is to compute, in float64 and by the definitions of csrc/norm.h; and how far off it
may be.

The bounds count roundings: u per operation, along the longest chain of additions that the launch
plan makes, and half the spacing of what is stored.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .cases import Case
from .kernels import decode, encode

Array = NDArray[Any]
_STORED = {"bf16": (7, -133), "f16": (10, -24), "f32": (23, -149), "f64": (52, -1074)}


class Want(NamedTuple):
    value: Array
    bound: Array | float


def unit(case: Case) -> float:
    """The relative error of one operation: half of the arithmetic type's epsilon."""
    return 2.0**-53 if case.x == "f64" else 2.0**-24


def rounded(v: Array, dtype: str) -> Array:
    return decode(encode(v, dtype), dtype)


def single(v: Array) -> Array:
    """Rounded to float32."""
    return np.asarray(v, np.float32)


def half_spacing(v: Array, dtype: str) -> Array:
    """Half the distance of neighbours of v; from the subnormals on it no longer shrinks."""
    bits, least = _STORED[dtype]
    _, e = np.frexp(np.abs(v))
    return np.ldexp(0.5, np.maximum(e - 1 - bits, least)) * (1 + 1e-9)


def depth(case: Case, plan: Mapping[str, int]) -> int:
    """Roundings between one term of a row's sum and the sum: a thread's own, five of a warp's
    lanes, its warps, the cluster's CTAs."""
    vectors = -(-case.n // (plan["threads"] * plan["cluster"] * plan["vector"]))
    warps = min(32, plan["threads"] // 32)
    return vectors * plan["vector"] + 5 + warps + plan["cluster"] + 1


def stored(value: Array, error: Array, dtype: str) -> Want:
    return Want(value, error + half_spacing(np.abs(value) + error, dtype))


def forward(case: Case, plan: Mapping[str, int], given: Mapping[str, Array]) -> dict[str, Want]:
    """given: x, and if there are any residual, weight, bias; as float64."""
    c, u, want = case, unit(case), {}
    h = given["x"]
    if c.residual:
        total = h + given["residual"]
        h = rounded(total if c.x == "f64" else single(total), c.x)
        want["sum"] = Want(h, 0.0)
    r = 1 / np.sqrt((h[:, : c.columns] ** 2).sum(1, keepdims=True) / c.columns + 1e-6)
    r_error = depth(c, plan) * u / 2 + 4 * u
    if c.rstd:
        want["rstd"] = Want(r, r * r_error)
    v, v_error = h * r, np.abs(h * r) * (r_error + u)
    if c.llama:
        low, high = (rounded(single(v + s * v_error), c.x) for s in (-1, 1))
        v = rounded(single(v), c.x)
        v_error = np.maximum(high - v, v - low)
    scale = given["weight"] + c.offset if c.weight else np.ones(c.n)
    bias = given["bias"] if c.bias else np.zeros(c.n)
    y = v * scale + bias
    error = v_error * np.abs(scale) + 3 * u * (np.abs(v * scale) + np.abs(bias))
    want["y"] = stored(y, error + 2 * u * np.abs(v * c.offset), c.y)
    return want


def backward(case: Case, plan: Mapping[str, int], given: Mapping[str, Array]) -> dict[str, Want]:
    """given: x, dy, rstd, and if there are any dsum, weight; as float64."""
    c, u, want = case, unit(case), {}
    x, dy, r = given["x"], given["dy"], given["rstd"][:, None]
    scale = given["weight"] + c.offset if c.weight else np.ones(c.n)
    size = np.abs(given["weight"]) + abs(c.offset) if c.weight else np.ones(c.n)
    if c.dx:
        extra = given["dsum"] if c.residual else np.zeros(1)
        g, inside = dy * scale, np.arange(c.n) < c.columns
        dot = (g * x).sum(1, keepdims=True)
        dot_error = (np.abs(dy * x) * size).sum(1, keepdims=True) * (depth(c, plan) + 4) * u
        pull = np.where(inside, x * r * r * dot / c.columns, 0)
        error = r * np.where(inside, np.abs(x) * r * r * dot_error / c.columns, 0)
        error += 7 * u * r * (np.abs(pull) + np.abs(dy) * size) + 2 * u * np.abs(extra)
        want["dx"] = stored(r * (g - pull) + extra, error, c.x)
    xr, slack = x * r, np.zeros(1)
    if c.llama:
        low, high = (rounded(single(xr * (1 + s * u)), c.x) for s in (-1, 1))
        xr, slack = rounded(single(xr), c.x), np.abs(dy * (high - low)).sum(0)
    for name, on, terms, more in (("dw", c.dw, dy * xr, slack), ("db", c.db, dy, np.zeros(1))):
        if on:
            error = (c.rows + 4) * u * np.abs(terms).sum(0) + more
            want[name] = stored(terms.sum(0), error, c.w)
    return want
