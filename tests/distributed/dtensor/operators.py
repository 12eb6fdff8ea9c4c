"""Either split: which gradients, the fused add, and the modes of torch."""

import itertools

import pytest
import torch
from dtensor.case import (
    CASES,
    COLUMNS,
    SHAPE,
    WHOLE,
    Case,
    communication,
    leaf,
    on,
    placements,
    whole,
)
from reference import assert_backward, assert_forward, same_bits
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from fused_rmsnorm import functional

ops = torch.ops.fused_rmsnorm


@on(2)
def only_the_gradients_asked_for(mesh):
    """In orders in which a cache that ignores the mask would give what another call wanted."""
    case = Case()
    for split in (Shard(0), COLUMNS):
        for wanted in ("x", "xwb", "w", "b", "xb", "wb"):
            leaves = {
                name: distribute_tensor(t, mesh, [split if name == "x" else WHOLE])
                for name, t in (("x", case.x), ("w", case.weight), ("b", case.bias))
            }
            y = case.norm(*(t.requires_grad_(k in wanted) for k, t in leaves.items()))
            dy = distribute_tensor(case.dy, mesh, [split])
            found = torch.autograd.grad(y, [leaves[k] for k in wanted], dy)
            found = dict(zip(wanted, found, strict=True))
            case.assert_right(y, *(found.get(k) for k in "xwb"))
        x = distribute_tensor(case.x, mesh, [split]).requires_grad_()
        y = case.norm(x, None, None)
        (dx,) = torch.autograd.grad(y, x, dy)
        assert_backward((whole(dx), None, None), case.x, None, None, case.dy, case.options)


@on(2)
def fused_add(mesh):
    for case, split in itertools.product(CASES, (Shard(0), Shard(1), COLUMNS)):
        tensors = (case.x, case.residual, case.weight, case.bias)
        alone = [t.clone().requires_grad_() for t in tensors]
        out = case.add_norm(*alone)
        want = (*out, *torch.autograd.grad(out, alone, (case.dy, case.dsum)))
        leaves = [leaf(t, mesh, [split if t.dim() > 1 else WHOLE]) for t in tensors]
        split_out, forward = communication(case.add_norm, *leaves)
        outward = [distribute_tensor(t, mesh, [split]) for t in (case.dy, case.dsum)]
        grads, backward = communication(torch.autograd.grad, split_out, leaves, outward)
        reduced = {"all_reduce": 1} if split == COLUMNS else {}
        assert (forward, backward) == (reduced, reduced)
        got = [whole(t) for t in (*split_out, *grads)]
        assert same_bits(got[1], want[1].detach())
        if split != COLUMNS:
            assert all(same_bits(got[i], want[i].detach()) for i in (0, 2, 3))
        s = want[1].detach()
        assert_forward(got[0], s, case.weight, case.bias, case.options)
        dx, dresidual, dw, db = got[2:]
        assert same_bits(dx, dresidual)
        affine = (case.weight, case.bias)
        assert_backward((dx, dw, db), s, *affine, case.dy, case.options, case.dsum)


@on(2)
def fused_add_in_place(mesh):
    case = Case()
    want = case.add_norm(case.x, case.residual, case.weight, case.bias)
    weight, bias = (distribute_tensor(t, mesh, [WHOLE]) for t in (case.weight, case.bias))

    def add_norm_(x: DTensor, residual: DTensor):
        o = case.options
        return functional.add_rms_norm_(
            x, residual, SHAPE[-1], weight, o.eps, bias=bias, **o.keywords()
        )

    def split(x_placement, residual_placement):
        pairs = ((case.x, x_placement), (case.residual, residual_placement))
        return [distribute_tensor(t.clone(), mesh, [p]) for t, p in pairs]

    for placement in (WHOLE, Shard(0), Shard(1), COLUMNS):
        x, residual = split(placement, placement)
        memory = [t.to_local().data_ptr() for t in (x, residual)]
        y, s = add_norm_(x, residual)
        assert y is x
        assert s is residual
        assert [t.to_local().data_ptr() for t in (x, residual)] == memory
        assert same_bits(whole(s), want[1])
        assert_forward(whole(y), want[1], case.weight, case.bias, case.options)
        assert placement == COLUMNS or same_bits(whole(y), want[0])
    for placed in ((Shard(0), Shard(1)), (COLUMNS, WHOLE), (WHOLE, COLUMNS)):
        x, residual = split(*placed)
        with pytest.raises(RuntimeError, match="input and residual must have the same placements"):
            add_norm_(x, residual)
        assert same_bits(whole(x), case.x)
    x, residual = (DTensor.from_local(t, mesh, [Partial()]) for t in (case.x, case.residual))
    with pytest.raises(RuntimeError, match="in-place operations that require placement changes"):
        add_norm_(x, residual)
    x, residual = (
        DTensor.from_local(t.mT.contiguous().mT, mesh, [Shard(0)]) for t in (case.x, case.residual)
    )
    with pytest.raises(RuntimeError, match="cannot be viewed as rows"):
        functional.add_rms_norm_(x, residual, SHAPE[1:])


@on(2)
def inference_mode(mesh):
    """In which composite operators arrive whole."""
    case = Case(p=0.3)
    o = case.options
    keywords = {**o.keywords(), "eps": o.eps}
    affine = [distribute_tensor(t, mesh, [WHOLE]) for t in (case.weight, case.bias)]
    for split in (Shard(1), COLUMNS):
        with torch.inference_mode():
            x, residual = (distribute_tensor(t, mesh, [split]) for t in (case.x, case.residual))
            reduced = {"all_reduce": 1} if split == COLUMNS else {}
            for op, moved in (
                (ops.rms_norm, [reduced]),
                # Slicing columns for p gathers them in the composed definition.
                (ops.rms_norm_composite, [reduced, {"all_gather_into_tensor": 1}]),
            ):
                y, counted = communication(lambda op=op, x=x: op(x, *affine, **keywords))
                assert counted in moved
                assert placements(y) == [(split,)]
                assert_forward(whole(y), case.x, case.weight, case.bias, o)
            assert same_bits(
                case.norm(x, *affine).to_local(), ops.rms_norm(x, *affine, **keywords).to_local()
            )
            y, s = ops.add_rms_norm(x, residual, *affine, **keywords)
            assert_forward(whole(y), whole(s), case.weight, case.bias, o)


@on(2)
def double_backward(mesh):
    case = Case(torch.float64, torch.float64, p=0.4, weight_offset=1.0)
    tensors = (case.x, case.weight, case.bias, case.dy)

    def second(x, weight, bias, dy):
        first = torch.autograd.grad(case.norm(x, weight, bias), (x, weight), dy, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), (x, weight, dy))

    want = second(*(t.clone().requires_grad_() for t in tensors))
    for split in (Shard(0), COLUMNS):
        leaves = [leaf(t, mesh, [split if t.dim() > 1 else WHOLE]) for t in tensors]
        for got, expected in zip(second(*leaves), want, strict=True):
            torch.testing.assert_close(whole(got), expected, rtol=1e-10, atol=1e-10)


@on(2)
def compiled(mesh):
    for case, split in itertools.product(CASES[1:2], (Shard(1), COLUMNS)):
        torch._dynamo.reset()
        x = leaf(case.x, mesh, [split])
        affine = [leaf(t, mesh, [WHOLE]) for t in (case.weight, case.bias)]
        dy = distribute_tensor(case.dy, mesh, [split])
        y = torch.compile(case.norm, backend="aot_eager", fullgraph=True)(x, *affine)
        results = [y, *torch.autograd.grad(y, (x, *affine), dy)]
        eager, _, _ = case.split(mesh, [split])
        assert placements(*results) == placements(*eager)
        assert all(map(same_bits, map(whole, results), map(whole, eager)))
