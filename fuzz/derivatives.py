"""Ways of calling that ask for derivatives, or for many samples at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import oracle
from .case import Case, described


def gradients(case: Case, outs: tuple[Any, ...], wanted: list[Tensor]) -> tuple[Any, Any]:
    graded = [o for o in outs if isinstance(o, Tensor) and o.requires_grad]
    dys = tuple(case.like(o) for o in graded)
    return dys, case.attempt(
        lambda: torch.autograd.grad(graded, wanted, dys, allow_unused=True, retain_graph=True)
    )


def wanted_of(case: Case) -> list[str]:
    asked = [n for n, t in zip(case.names, case.tensors, strict=True) if t.requires_grad]
    chosen = [n for i, n in enumerate(asked) if (case.call["seed"] >> i) & 1 or len(asked) == 1]
    return chosen or asked


def backward(case: Case) -> None:
    outs = case.run()
    case.check(outs)
    names = wanted_of(case)
    if not names or not case.is_plain() or case.target.family.endswith("backward"):
        return
    dys, grads = gradients(case, outs, [case.args[n] for n in names])
    # _fwd operators have rstd for a second or third result, which has no gradient.
    if len(dys) == (2 if case.target.family == "add" else 1):
        oracle.check_gradients(case.call, case.args, dict(zip(names, grads, strict=True)), dys)


def in_fp64(case: Case) -> bool:
    ok = all(t.dtype == torch.float64 and t.numel() for t in case.tensors)
    p = oracle.Problem(case.call, case.args)
    return (
        ok
        and p.x.shape[-1] > 1  # the norm of one number is its sign: derivatives cancel to nothing
        and case.is_plain()
        and case.args["casting_mode"] == "torch"
        and p.is_finite()
        and p.known
    )


def as_definition(case: Case) -> Callable[..., tuple[Tensor, ...]]:
    p = oracle.Problem(case.call, case.args)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        t = {**p.t, **{n: p.rows(t) for n, t in zip(case.names, tensors, strict=True)}}
        outs = oracle.definition(p.family, t, p.o, p.gated)
        return tuple(o.reshape(case.args["input"].shape) for o in outs)

    return function


def close(name: str, actual: Any, expected: Any) -> None:
    for a, e in zip(actual, expected, strict=True):
        if a is None or e is None:
            other = e if a is None else a
            assert other is None or not other.abs().max(), f"{name}: None for a gradient"
            continue
        scale = max(
            [float(x.abs().max()) for x in expected if x is not None and x.numel()] or [0.0]
        )
        error = float((a - e).abs().max()) if e.numel() else 0.0
        assert error <= 1e-8 * scale + 1e-12, f"{name} is off by {error:.3g} of {scale:.3g}"


def second_derivative(case: Case, function: Any, dy: list[Tensor], vs: list[Tensor]) -> list[Any]:
    """Gradients, and those of their products with vs."""
    leaves = [t.detach().clone().requires_grad_() for t in case.tensors]
    dys = [t.clone().requires_grad_() for t in dy]
    outs = case.attempt(function, *leaves)[: len(dy)]
    grad = partial(torch.autograd.grad, allow_unused=True)
    grads = case.attempt(lambda: grad(outs, leaves, dys, create_graph=True))
    pairs = [(g, v) for g, v in zip(grads, vs, strict=True) if g is not None and g.requires_grad]
    total = sum((g * v).sum() for g, v in pairs)
    return [*grads, *case.attempt(lambda: grad(total, [*leaves, *dys]))]


def double_backward(case: Case) -> None:
    eps = case.args["eps"]
    conditioned = (
        case.tensors and case.args["input"].numel() and (eps is None or isinstance(eps, float))
    )
    if not conditioned or case.target.family.endswith("backward") or not in_fp64(case):
        return backward(case)
    count = 2 if case.target.family == "add" else 1
    dy = [case.like(case.args["input"]) for _ in range(count)]
    vs = [case.like(t) for t in case.tensors]
    results = [
        second_derivative(case, function, dy, vs)
        for function in (case.function, as_definition(case))
    ]
    close("second derivative", *results)


def jvp(case: Case) -> None:
    if case.target.family.endswith("backward") or not in_fp64(case):
        return backward(case)
    tangents = tuple(case.like(t) for t in case.tensors)
    outs = case.attempt(torch.func.jvp, case.function, tuple(case.detached()), tangents)
    expected = torch.func.jvp(as_definition(case), tuple(case.detached()), tangents)
    many = 2 if case.target.family == "add" else 1
    close("value under jvp", outs[0][:many], expected[0])
    close("tangent", outs[1][:many], expected[1])


def batched(case: Case) -> tuple[list[Tensor], list[int | None], int]:
    """Each tensor with a batch of three somewhere, or as it is; at least one with."""
    seed, size = case.call["seed"], 1 + case.call["seed"] % 3
    tensors: list[Tensor] = []
    dims: list[int | None] = []
    for i, t in enumerate(case.detached()):
        if (seed >> (2 * i)) & 1 or (
            i == len(case.tensors) - 1 and not any(d is not None for d in dims)
        ):
            dim = (seed >> i) % (t.dim() + 1)
            tensors.append(torch.stack([t * (1 + j) for j in range(size)], dim))
            dims.append(dim)
        else:
            tensors.append(t)
            dims.append(None)
    return tensors, dims, size


def vmap(case: Case) -> None:
    if not case.is_plain() or not case.tensors:
        return backward(case)
    tensors, dims, size = batched(case)
    outs = case.attempt(torch.func.vmap(case.some, tuple(dims)), *tensors)
    for j in range(size):
        chosen = [t if d is None else t.select(d, j) for t, d in zip(tensors, dims, strict=True)]
        args = {**case.args, **dict(zip(case.names, chosen, strict=True))}
        sample = tuple(o[j] for o in outs)
        if case.target.family.endswith("backward"):
            # Their rstd is no row's, and what each route makes of that is its own.
            expected = case.attempt(case.some, *chosen)
            assert [described(o)[::2] for o in sample] == [described(e)[::2] for e in expected]
        else:
            oracle.check_forward(case.call, args, sample, strided=False)


def roughly(actual: Any, expected: Any) -> None:
    for a, e in zip(actual, expected, strict=True):
        if a is None or e is None:
            assert a is e
        elif e.numel() and e.isfinite().all():
            scale = float(e.abs().max()) + 1
            error = float((a.double() - e.double()).abs().max())
            allowed = (torch.finfo(e.dtype).eps * 64 + 1e-4) * scale * max(e.shape or [1]) ** 0.5
            assert error <= allowed, f"off by {error:.3g}, {allowed:.3g} allowed"


def vmap_of_gradients(case: Case) -> None:
    fits = case.is_plain() and case.tensors and not case.target.family.endswith("backward")
    if not fits or not all(t.is_floating_point() for t in case.tensors):
        return vmap(case)
    tensors, dims, size = batched(case)
    dys = [case.like(o) for o in case.attempt(case.function, *case.detached())]

    def loss_of_first(*leaves: Tensor) -> Tensor:
        y = case.function(*leaves)[0]
        return (y * dys[0]).double().sum()

    grad = torch.func.grad(loss_of_first, tuple(range(len(tensors))))
    outs = case.attempt(torch.func.vmap(grad, tuple(dims)), *tensors)
    for j in range(size):
        chosen = [t if d is None else t.select(d, j) for t, d in zip(tensors, dims, strict=True)]
        roughly(tuple(o[j] for o in outs), case.attempt(grad, *chosen))
