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
from .kernels import SIZE, decode, encode

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


def gate_error(case: Case, z: Array) -> float:
    """Of an activation and the product with it, relative. 7 roundings; of 16-bit numbers more, by a
    power of two that is good to 2^-22, by its argument, and by a reciprocal (gate.cuh)."""
    quick = SIZE[case.x] == 2
    largest = np.abs(z[~np.isnan(z)]).max(initial=0)
    more = 8 + 1.25 * min(float(largest), 87.0) if quick else 0
    return (7 + more) * unit(case)


def activation(case: Case, z: Array) -> tuple[Array, Array, Array]:
    """act(z), its slope, and the sum of the magnitudes of the slope's terms."""
    s, c = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z))
    if case.sigmoid:
        return s, s * c, s * c
    return z * s, s + z * s * c, s + np.abs(z) * s * c


def underflow(case: Case, *factors: Array) -> Array | float:
    """What a few roundings below the normal numbers of fp32 come to, where act(z) or its slope lies
    there, times what these are multiplied by."""
    if not case.gate:
        return 0.0
    most: Array = np.ones(1)
    for factor in factors:
        most = most * (1 + np.abs(factor))
    return 4 * 2.0**-149 * most


def between(value: Array, error: Array, dtype: str) -> tuple[Array, Array]:
    """What is off by up to `error`, rounded: near a tie that may go either way."""
    low, high = (rounded(single(value + s * error), dtype) for s in (-1, 1))
    value = rounded(single(value), dtype)
    return value, np.maximum(high - value, value - low)


def affine(case: Case, v: Array, v_error: Array, given: Mapping[str, Array]) -> tuple[Array, Array]:
    """The weight and bias of a norm before them."""
    c, u = case, unit(case)
    if c.llama:
        v, v_error = between(v, v_error, c.x)
    scale = given["weight"] + c.offset if "weight" in given else np.ones(c.n)
    bias = given["bias"] if "bias" in given else np.zeros(c.n)
    y = v * scale + bias
    error = v_error * np.abs(scale) + 3 * u * (np.abs(v * scale) + np.abs(bias))
    error = error + 2 * u * np.abs(v * c.offset)
    if c.gate == "last" and c.llama and c.w == c.x:
        y, error = between(y, error, c.x)
    return y, error


def forward(case: Case, plan: Mapping[str, int], given: Mapping[str, Array]) -> dict[str, Want]:
    """given: x, and if there are any residual, z, weight, bias; as float64, the latter two for each
    row."""
    c, u, want = case, unit(case), {}
    h, h_error = given["x"], 0.0
    act = activation(c, given["z"])[0] if c.gate else np.ones(1)
    of_gate = gate_error(c, given["z"]) if c.gate else 0.0
    if c.residual:
        total = h + given["residual"]
        h = rounded(total if c.x == "f64" else single(total), c.x)
        want["sum"] = Want(h, 0.0)
    if c.gate == "first":
        h, h_error = h * act, of_gate
    r = 1 / np.sqrt((h[:, : c.columns] ** 2).sum(1, keepdims=True) / c.columns + 1e-6)
    r_error = depth(c, plan) * u / 2 + 4 * u + h_error
    if c.rstd:
        want["rstd"] = Want(r, r * r_error)
    y, error = affine(c, h * r, np.abs(h * r) * (r_error + h_error + u), given)
    if c.gate == "last":
        error = error * np.abs(act) + underflow(c, given["z"], y)
        y, error = y * act, error + of_gate * np.abs(y * act)
    want["y"] = stored(y, error, c.y)
    return want


def backward(case: Case, plan: Mapping[str, int], given: Mapping[str, Array]) -> dict[str, Want]:
    """given: x, dy, rstd, and if there are any dsum, z, weight, bias; as float64, the latter two
    for each row."""
    c, u, want = case, unit(case), {}
    x, dy, r = given["x"], given["dy"], given["rstd"][:, None]
    scale = given["weight"] + c.offset if c.weight else np.ones(c.n)
    size = np.abs(given["weight"]) + abs(c.offset) if c.weight else np.ones(c.n)
    act, slope, slope_size = activation(c, given["z"]) if c.gate else (np.ones(1),) * 3
    of_gate = gate_error(c, given["z"]) if c.gate else 0.0
    v = x * act if c.gate == "first" else x  # what is normalised, under the gradient g
    g = dy * act if c.gate == "last" else dy
    if c.dx:
        extra = given["dsum"] if c.residual else np.zeros(1)
        inside = np.arange(c.n) < c.columns
        dot = (g * scale * v).sum(1, keepdims=True)
        dot_error = (np.abs(g * v) * size).sum(1, keepdims=True)
        dot_error = dot_error * ((depth(c, plan) + 4) * u + of_gate)
        pull = np.where(inside, v * r * r * dot / c.columns, 0)
        error = r * np.where(inside, np.abs(v) * r * r * dot_error / c.columns, 0)
        error += (7 * u + of_gate) * r * (np.abs(pull) + np.abs(g) * size)
        error += 2 * u * np.abs(extra)
        if c.gate:
            error += underflow(c, given["z"], dy, size, r)
        dx = r * (g * scale - pull) + extra
        slope_error = (of_gate + 2 * u) * slope_size
        if c.gate == "last":
            norm, off = affine(c, x * r, np.abs(x * r) * u, given)
            off = np.abs(dy) * (off * np.abs(slope) + np.abs(norm) * (slope_error + 3 * u))
            off = off + underflow(c, given["z"], dy, norm)
            want["dz"] = stored(dy * norm * slope, off, c.x)
        if c.gate == "first":
            off = np.abs(x) * (error * np.abs(slope) + np.abs(dx) * (slope_error + 3 * u))
            off = off + underflow(c, given["z"], dx, x)
            want["dz"] = stored(dx * x * slope, off, c.x)
            dx, error = dx * act, error * np.abs(act) + of_gate * np.abs(dx * act)
        want["dx"] = stored(dx, error, c.x)
    xr, slack = v * r, np.zeros(1)
    if c.llama:
        xr, off = between(xr, np.abs(xr) * (u + of_gate), c.x)
        slack = np.abs(g * off)
    for name, on, terms, more in (("dw", c.dw, g * xr, slack), ("db", c.db, g, np.zeros(1))):
        if on:
            by_row = np.arange(c.weight_rows)[:, None] == c.weight_row  # of the weight
            error = (c.rows + 4) * u * np.abs(terms) + of_gate * np.abs(terms) + more
            want[name] = stored(by_row @ terms, by_row @ error, c.w)
    return want
