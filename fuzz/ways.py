"""How a call is made, and what must hold of it: one function for each way.

Each is given a Case and raises AssertionError for a wrong result. What the package itself raises
comes out as Raised, so that it is never taken for one of these.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from . import oracle
from .arguments import plain
from .case import Case, Raised, bits, described, invoke
from .derivatives import (
    backward,
    double_backward,
    gradients,
    jvp,
    vmap,
    vmap_of_gradients,
    wanted_of,
)


def plainly(case: Case) -> None:
    if case.target.in_place:
        return in_place(case, nullcontext)
    before = [plain(t).clone() for t in case.tensors] if case.is_plain() else []
    outs = case.run()
    if case.target.family.endswith("backward"):
        check_backward_operator(case, outs)
    else:
        case.check(outs)
    if before:
        bits("an input was written", case.tensors, before)


def check_backward_operator(case: Case, outs: tuple[Any, ...]) -> None:
    """With the rstd of the forward: the operator's results for it are the gradients."""
    mask = case.args["output_mask"]
    if not isinstance(mask, list) or not case.is_plain() or len(mask) != len(outs):
        return
    with_rstd = dict(case.args)
    shared = [n for n in ("input", "gate", "weight", "bias") if n in case.target.tensors]
    forward = "ops.rms_norm_gated_fwd" if "gate" in shared else "ops.rms_norm_fwd"
    keep = (*shared, "activation", "norm_before_gate", "eps", "p", "weight_offset", "casting_mode")
    args = {k: plain(v) for k, v in case.args.items() if k in keep}
    args.setdefault("bias", None)
    y, rstd = case.attempt(invoke, forward, args)
    with_rstd["rstd"] = rstd
    outs = case.attempt(invoke, case.call["target"], with_rstd)
    names = ("input", "gate", "weight", "bias") if "gate" in shared else ("input", "weight", "bias")
    if args["bias"] is None and args["weight"] is not None:
        args["bias"] = torch.zeros_like(args["weight"])
    for asked, grad in zip(mask, outs, strict=True):
        assert asked or grad is None, "a gradient that was not asked for"
    grads = dict(zip(names, outs, strict=True))
    if case.args.get("grad_sum") is not None and grads["input"] is not None:
        grads["input"] = None  # tested by what the modules' backward does with it
    call = {"target": forward}
    dy = plain(case.args["grad_output"]).to(y.dtype)
    if dy.dtype == case.args["grad_output"].dtype:
        oracle.check_gradients(call, args, grads, (dy,))


def under(context: Callable[[], Any]) -> Callable[[Case], None]:
    def way(case: Case) -> None:
        if case.target.in_place:
            return in_place(case, context)
        with torch.no_grad():
            fused = case.is_plain() and case.target.family != "gated"
            fused = fused and "composite" not in case.call["target"]
            expected = case.run(*case.clones()) if fused else None
        with context():
            outs = case.run()
        case.check(outs)
        if expected is not None:
            bits("with and without a graph", outs, expected)

    return way


def in_place(case: Case, context: Callable[[], Any]) -> None:
    """What add_rms_norm gives, in the arguments; nothing of a refused call is written."""
    names = [n for n in case.target.tensors if isinstance(case.args.get(n), Tensor)]
    if any(t.is_nested for t in case.tensors):
        with context():
            case.run()
        return
    held = [plain(t).clone() for t in case.tensors]
    expected = None
    args = {**case.args, **dict(zip(names, held, strict=True))}
    if not any(t.is_meta for t in held):
        try:
            expected = invoke(case.call["target"].removesuffix("_"), args)
        except Exception:
            expected = None
    try:
        with context():
            case.run()
    except Raised:
        if case.is_plain():
            bits("a refused call has written", case.tensors, held)
        raise
    if expected is not None and not case.tensors[0].is_meta:
        bits("in place", case.tensors[:2], expected)


def autocast(case: Case) -> None:
    expected = case.run()
    with torch.autocast("cpu", torch.bfloat16):
        outs = case.run()
    bits("autocast", outs, expected)


def changed(case: Case) -> None:
    """A tensor changed in place between forward and backward: noticed, or without effect."""
    if not case.is_plain() or case.target.family.endswith("backward"):
        return backward(case)
    outs = case.run()
    names = wanted_of(case)
    if not names:
        return
    dys, expected = gradients(case, outs, [case.args[n] for n in names])
    candidates = [*case.tensors, *(o for o in outs if o.is_floating_point())]
    victim = candidates[case.call["seed"] % len(candidates)]
    with torch.no_grad():
        try:
            victim.add_(1)
        except RuntimeError:
            return  # expanded
    graded = [o for o in outs if o.requires_grad]
    try:
        grads = torch.autograd.grad(graded, [case.args[n] for n in names], dys, allow_unused=True)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise Raised(error) from error
        return
    bits("changed before backward", grads, expected)


def functionalize(case: Case) -> None:
    if not case.is_plain():
        return in_place(case, torch.no_grad) if case.target.in_place else plainly(case)
    expected = case.run(*case.clones())
    mine = case.clones()
    outs = case.attempt(torch.func.functionalize(case.function), *mine)
    bits("functionalize", outs, expected)


def traced(case: Case) -> None:
    if not case.is_plain() or case.call["target"].startswith("modules."):
        return plainly(case)  # a module is made in the call, which makes its parameters part of it
    expected = case.run(*case.detached())
    graph = case.attempt(make_fx(case.function), *case.detached())
    bits("make_fx", graph(*case.detached()), expected)


def without_data(kind: str) -> Callable[[Case], None]:
    """Fake or meta: shapes, strides and dtypes of the results, as they are with data."""

    def way(case: Case) -> None:
        if not case.is_plain():
            return under(torch.no_grad)(case)
        with torch.no_grad():
            if kind == "meta":
                outs = case.run(*(t.detach().to("meta") for t in case.tensors))
            else:
                mode = FakeTensorMode()
                fakes = [mode.from_tensor(t.detach()) for t in case.tensors]
                with mode:
                    outs = case.run(*fakes)
            expected = case.run(*case.clones())
        if case.target.in_place:
            return
        assert [described(o) for o in outs] == [described(e) for e in expected], (
            f"{kind}: {[described(o) for o in outs]}, with data {[described(e) for e in expected]}"
        )

    return way


def threads(case: Case) -> None:
    """Four threads with the same arguments (their own, where they are written)."""
    if not case.is_plain():
        return under(torch.no_grad)(case)

    def once(tensors: list[Tensor]) -> list[Any]:
        if case.target.in_place:
            with torch.no_grad():
                case.run(*tensors)
            return tensors[:2]
        outs = case.run(*tensors)
        graded = [o for o in outs if o is not None and o.requires_grad]
        leaves = [t for t in tensors if t.requires_grad]
        if not graded or not leaves:
            return list(outs)
        ones = [torch.ones_like(o) for o in graded]
        return [*outs, *torch.autograd.grad(graded, leaves, ones, allow_unused=True)]

    own = [case.clones() if case.target.in_place else case.tensors for _ in range(5)]
    expected = once(own[4])
    results: list[Any] = [None] * 4

    def work(i: int) -> None:
        try:
            results[i] = once(own[i])
        except BaseException as error:
            results[i] = error

    pool = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
        bits("threads", result, expected)


def own_dims(case: Case) -> int:
    """Dimensions of normalized_shape."""
    shape = case.args.get("normalized_shape")
    return len(shape) if isinstance(shape, list) else 1


def has_kernel(case: Case) -> bool:
    """Whether a kernel computes it (docs/support.md). Else torch's operations do, whose last bits
    depend on an element's position and on the number of threads."""
    x, w, z, b = (case.args.get(name) for name in ("input", "weight", "gate", "bias"))
    dims = own_dims(case)
    if "composite" in case.call["target"] or any(t.is_complex() for t in case.tensors):
        return False
    if any(isinstance(t, Tensor) and t.dim() > dims for t in (w, b)):
        return False  # some of them have one
    fits = isinstance(z, Tensor) and torch.promote_types(z.dtype, x.dtype) == x.dtype
    if isinstance(z, Tensor) and (x.dtype == torch.float64 or not fits):
        return False
    wide = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in (w, b))
    return not wide or x.dtype == torch.float64


def one_thread(case: Case) -> None:
    many = case.run()
    torch.set_num_threads(1)
    try:
        one = case.run()
    finally:
        torch.set_num_threads(2)
    case.check(one)
    if not case.target.in_place and has_kernel(case):
        bits("one thread or two", one, many)


def rows(case: Case) -> None:
    """The first rows alone: the same bits."""
    shape = case.args["input"].shape if isinstance(case.args["input"], Tensor) else ()
    several = len(shape) > own_dims(case) and shape[0] > 1
    forward = not case.target.family.endswith("backward")
    if not (several and forward and case.is_plain() and has_kernel(case)):
        return plainly(case)
    outs = case.run()
    count = 1 + case.call["seed"] % (shape[0] - 1)
    vectors = ("weight", "bias")
    cut = [t if n in vectors else t[:count] for n, t in zip(case.names, case.tensors, strict=True)]
    bits("rows", case.run(*cut), [o[:count] for o in outs])


WAYS: dict[str, Callable[[Case], None]] = {
    "plain": plainly,
    "no_grad": under(torch.no_grad),
    "inference": under(torch.inference_mode),
    "backward": backward,
    "double backward": double_backward,
    "jvp": jvp,
    "vmap": vmap,
    "vmap of gradients": vmap_of_gradients,
    "functionalize": functionalize,
    "make_fx": traced,
    "fake": without_data("fake"),
    "meta": without_data("meta"),
    "threads": threads,
    "autocast": autocast,
    "rows": rows,
    "changed": changed,
    "one thread": one_thread,
}
