"""Results compared with the definition in fp64 of tests/support/reference.py, and its bounds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.support import reference
from tests.support.reference import Options

from .arguments import plain
from .calls import TARGETS, Spec


def number(value: Any) -> Any:
    return None if value is None else float(value)


def mode(value: Any) -> str:
    """torch takes bytes for a string."""
    return value.decode() if isinstance(value, bytes) else value


class Problem:
    """A call with plain arguments, seen as rows: the groups apart, several dimensions made one."""

    def __init__(self, call: Spec, args: dict[str, Any]) -> None:
        self.call, self.family = call, TARGETS[call["target"]].family
        shape = args.get("normalized_shape")
        own = 1 if shape is None or not hasattr(shape, "__len__") else len(shape)
        group = args.get("group_size")

        def rows(t: Any) -> Any:
            if t is None:
                return None
            t = t.flatten(-own)
            return t if group is None else t.unflatten(-1, (t.shape[-1] // int(group), int(group)))

        self.rows = rows
        self.t = {name: rows(plain(args.get(name))) for name in TARGETS[call["target"]].tensors}
        self.x, self.w, self.b = self.t["input"], self.t["weight"], self.t.get("bias")
        self.o = Options(
            number(args["eps"]),
            number(args["p"]),
            number(args["weight_offset"]),
            mode(args["casting_mode"]),
        )
        self.gated = {k: args[k] for k in ("activation", "norm_before_gate") if k in args}
        # Of a negative eps and of an offset beyond fp32 only that there is a result is known.
        self.known = (
            not (self.o.eps is not None and self.o.eps < 0) and abs(self.o.weight_offset) < 1e6
        )

    def is_finite(self) -> bool:
        """Whether bounds can be derived: of numbers, and an eps that is one."""
        tensors = [t for t in self.t.values() if t is not None]
        return self.o.eps == self.o.eps and all(bool(t.isfinite().all()) for t in tensors)

    def normalised(self) -> Tensor:
        """What the norm is taken of, in its own dtype."""
        return self.x if self.family != "add" else self.x + self.t["residual"]

    def definition(self) -> tuple[Tensor, ...]:
        """In fp64, differentiable in self.t."""
        return definition(self.family, self.t, self.o, self.gated)


def definition(family: str, t: dict[str, Any], o: Options, gated: Spec) -> tuple[Tensor, ...]:
    x, w, b = t["input"], t["weight"], t.get("bias")
    if family == "gated":
        return (reference.rms_norm_gated(x, t["gate"], w, b, o, **gated),)
    if family == "add":
        s = x + t["residual"]
        return reference.rms_norm(s, w, b, o), s
    return (reference.rms_norm(x, w, b, o),)


def within(name: str, actual: Tensor, expected: Tensor, bound: Tensor) -> None:
    assert actual.shape == expected.shape, f"{name} has shape {tuple(actual.shape)}"
    reference._assert_within(name, actual, expected, bound)


def check_norm(y: Tensor, x: Tensor, dtype: torch.dtype, p: Problem) -> None:
    """y, of `dtype`, is the norm of x to within reference.py's bound."""
    assert y.dtype == dtype, f"y has dtype {y.dtype}, not {dtype}"
    expected = reference.rms_norm(x, p.w, p.b, p.o)
    h = reference.rms_norm(x, None, None, p.o.exact(x.dtype).statistic()).abs()
    scaled = h * reference.magnitude(p.w, p.o)
    terms = scaled if p.b is None else scaled + p.b.double().abs()
    bound = reference._bound(dtype, terms, expected, x.dtype, reference.growth(x.shape[-1]))
    if p.o.casting_mode == "llama":
        bound = bound + llama_step(x.dtype, p) + torch.finfo(x.dtype).eps * scaled
    within("y", y, expected, bound)


def llama_step(dtype: torch.dtype, p: Problem) -> Any:
    """What rounding x r to x's dtype may lose where the result is subnormal."""
    return (
        torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * reference.magnitude(p.w, p.o)
    )


def check_complex(y: Tensor, x: Tensor, p: Problem) -> None:
    k = reference.stat_columns(p.o.p, x.shape[-1])
    wide = x.to(torch.complex128)
    real = torch.float32 if x.dtype == torch.complex64 else torch.float64
    eps = torch.finfo(real).eps if p.o.eps is None else p.o.eps
    r = ((wide[..., :k] * wide[..., :k]).mean(-1, keepdim=True) + eps).rsqrt()
    expected = wide * r
    if p.w is not None:
        expected = expected * (p.w.to(torch.complex128) + p.o.weight_offset)
    if p.b is not None:
        expected = expected + p.b.to(torch.complex128)
    finite = expected.isfinite() & y.isfinite()
    scale = float(expected[finite].abs().max()) if finite.any() else 0.0
    error = (y.to(torch.complex128) - expected)[finite].abs()
    # The mean of squares of complex numbers may cancel: what is lost there is not a wrong result.
    assert error.numel() == 0 or float(error.median()) <= 1e5 * torch.finfo(real).eps * scale


def check_gated(y: Tensor, p: Problem) -> None:
    x, z = p.x, p.t["gate"]
    first = p.gated["norm_before_gate"]
    out = x.dtype if first else p.o.output_type(x.dtype, None if p.w is None else p.w.dtype)
    assert y.dtype == out, f"y has dtype {y.dtype}, not {out}"
    o = replace(p.o, eps=p.o.eps_for(x.dtype))
    # What is normalised is rounded by llama's rule to x's dtype, not to that of the fp64 product.
    plain_o = o.exact(x.dtype)
    expected = reference.rms_norm_gated(x, z, p.w, p.b, plain_o, **p.gated)
    act = reference.activate(z.double(), p.gated["activation"])
    # A sigmoid that underflows is still multiplied with its argument, which is large then.
    tiny = torch.finfo(reference.arithmetic_type(x.dtype)).tiny
    act_lost = (z.double().abs().clamp(max=1e9) + 1) * tiny
    rows = x.double() if first else x.double() * act
    h = reference.rms_norm(rows, None, None, o.statistic()).abs()
    magnitude = reference.magnitude(p.w, o)
    terms = h * magnitude
    if p.b is not None:
        terms = terms + p.b.double().abs()
    lost = terms * act_lost
    if first:
        terms = terms * act.abs()
    else:
        k = reference.stat_columns(o.p, x.shape[-1])
        rstd = (rows[..., :k].square().mean(-1, keepdim=True) + o.eps).rsqrt()
        lost = lost + x.double().abs() * act_lost * rstd * magnitude
    bound = reference._bound(out, terms, expected, x.dtype, reference.growth(x.shape[-1]) + 32)
    bound = bound + lost
    if p.o.casting_mode == "llama":
        step = llama_step(x.dtype, p)
        if first:  # what the gate multiplies is rounded, too
            step = (step + torch.finfo(out).smallest_normal * torch.finfo(out).eps) * act.abs()
            # Beyond its dtype's range that is infinite, however small the gate.
            bound = bound.where(h * magnitude < torch.finfo(out).max, torch.inf)
        bound = bound + step + 4 * torch.finfo(x.dtype).eps * terms
    within("y", y, expected, bound)


def check_forward(
    call: Spec, args: dict[str, Any], outs: tuple[Any, ...], strided: bool = True
) -> None:
    """The results of a call; `strided`: and that they are contiguous."""
    p = Problem(call, args)
    for t in outs:
        assert isinstance(t, Tensor), f"a result is {type(t).__name__}"
        if strided:
            assert t.is_contiguous(), f"a result has strides {t.stride()} for {tuple(t.shape)}"
    if not p.known or any(t is not None and t.is_meta for t in p.t.values()):
        return
    # reference.py's rounding has no infinity; eps may be one in fp32; torch's tensors of zeros stay
    # so times infinity, which 1 / sqrt(eps) is, too, without an eps.
    finite, zeros = p.is_finite(), any(t._is_zerotensor() for t in tensors_of(args))
    vague = p.o.casting_mode == "llama" or zeros or (p.o.eps or 0.0) > 1e30
    if not p.x.shape[-1] or (vague and not finite) or (zeros and p.o.eps == 0):
        return
    outs = tuple(plain(t) for t in outs)
    y = p.rows(outs[0])
    if p.family == "gated" and p.t["gate"] is None:  # a module without one is the plain norm
        check_norm(y, p.x, p.o.output_type(p.x.dtype, None if p.w is None else p.w.dtype), p)
    elif p.family == "gated":
        check_gated(y, p)
    elif p.family in ("norm", "add"):
        x = p.normalised()
        if p.family == "add":
            assert torch.equal(p.rows(outs[1]).nan_to_num(7.0), x.nan_to_num(7.0)), (
                "the sum is not input + residual"
            )
        if x.is_complex():
            check_complex(y, x, p)
        else:
            weight = None if p.w is None else p.w.dtype
            check_norm(y, x, p.o.output_type(p.x.dtype, weight), p)
    if call["target"].endswith("_fwd") and p.family == "norm":
        check_rstd(outs[-1], p)


def check_rstd(rstd: Tensor, p: Problem) -> None:
    x = p.normalised()
    k = reference.stat_columns(p.o.p, x.shape[-1]) if x.shape[-1] else 0
    if not k:
        return
    if p.o.eps is not None and p.o.eps > 1e30:
        return  # beyond what fp32 holds of its inverse
    mean = x[..., :k].double().square().mean(-1, keepdim=True)
    expected = (mean + p.o.eps_for(x.dtype)).rsqrt()
    assert rstd.dtype == reference.arithmetic_type(x.dtype)
    u = torch.finfo(rstd.dtype).eps
    within("rstd", rstd, expected, expected.abs() * u * reference.growth(k))


def check_gradients(
    call: Spec, args: dict[str, Any], grads: dict[str, Any], dys: tuple[Tensor, ...]
) -> None:
    """grads by name, those that were asked for, of sum(dy * result)."""
    p = Problem(call, args)
    for name, grad in grads.items():
        if grad is None:
            continue
        given = args[name]
        assert grad.shape == given.shape, f"gradient of {name} has shape {tuple(grad.shape)}"
        assert grad.dtype == given.dtype, f"gradient of {name} has dtype {grad.dtype}"
    gate = p.family == "gated" and p.t["gate"] is None
    if gate or not p.known or not p.is_finite() or p.x.is_complex() or not p.x.shape[-1]:
        return
    grads = {name: p.rows(plain(g)) for name, g in grads.items()}
    dys = tuple(p.rows(plain(dy)) for dy in dys)
    if any(t is not None and not t.isfinite().all() for t in (*grads.values(), *dys)):
        return  # a half type's range; check_forward has seen the values
    same = all(t.dtype == p.x.dtype for t in p.t.values() if t is not None)
    composite = "composite" in call["target"]  # in llama mode rounded once more on the way back
    if (
        composite
        or p.family == "gated"
        or p.normalised().dtype != p.x.dtype
        or not (same or p.b is None or p.w is None)
    ):
        close_gradients(p, grads, dys)
        return
    ds = dys[1] if p.family == "add" else None
    dx = grads.get("input")
    if p.family == "add" and dx is not None and grads.get("residual") is not None:
        assert reference.same_bits(dx, grads["residual"])
    dx = grads.get("residual") if dx is None else dx
    found = (dx, grads.get("weight"), grads.get("bias"))
    reference.assert_backward(found, p.normalised(), p.w, p.b, dys[0], p.o, ds)


def close_gradients(p: Problem, grads: dict[str, Any], dys: tuple[Tensor, ...]) -> None:
    """Gradients against fp64's, to within what the largest terms of each may lose."""
    wide = {k: None if t is None else t.double().requires_grad_() for k, t in p.t.items()}
    o = p.o.exact(p.normalised().dtype)
    outs = definition(p.family, wide, o, p.gated)
    names = [k for k, g in grads.items() if g is not None]
    if not names or not p.x.numel():
        return
    expected = torch.autograd.grad(
        outs, [wide[k] for k in names], [dy.double() for dy in dys], allow_unused=True
    )
    x = p.normalised().detach().double()
    n = x.shape[-1]
    k = reference.stat_columns(p.o.p, n)
    if p.family == "gated" and not p.gated["norm_before_gate"]:
        x = x * reference.activate(p.t["gate"].double(), p.gated["activation"])
    r = float(((x[..., :k].square().mean(-1) + o.eps).rsqrt()).max())
    top = max(float(x.abs().max()), 1.0)
    m = p.w.double().abs().max() + abs(o.weight_offset) if p.w is not None else 1.0
    gate = float(p.t["gate"].double().abs().max()) + 1 if p.family == "gated" else 1.0
    dy = max(float(t.abs().max()) for t in dys)
    rows = math.prod(x.shape[:-1])
    # Of sum(g x) / k and what it is multiplied with; the sum over rows for weight and bias.
    terms = dy * (float(m) + 1) * gate**2 * max(r, 1.0) * (1 + r * r * top * top * n / k) * top
    half = min((p.x.dtype, *(g.dtype for g in grads.values() if g is not None)), key=width)
    unit = torch.finfo(half).eps + (n + rows) * torch.finfo(reference.arithmetic_type(half)).eps
    for name, e in zip(names, expected, strict=True):
        if e is None:
            continue
        error = float((grads[name].double() - e).abs().max()) if e.numel() else 0.0
        allowed = 8 * unit * (float(e.abs().max()) if e.numel() else 0.0)
        allowed += 8 * unit * terms * (max(1, rows) ** 0.5 if name in ("weight", "bias") else 1)
        assert error <= allowed, f"gradient of {name} is off by {error:.3g}, {allowed:.3g} allowed"


def width(dtype: torch.dtype) -> float:
    return -torch.finfo(dtype).eps


def tensors_of(args: dict[str, Any]) -> list[Tensor]:
    return [t for t in args.values() if isinstance(t, Tensor)]
