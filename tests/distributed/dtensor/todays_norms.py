"""Weights with rows of their own, gated norms and wider residuals on split tensors."""

import itertools

import torch
from cases import numbers
from dtensor.case import WHOLE, communication, leaf, on, placements, whole
from reference import same_bits
from torch.distributed.tensor import Partial, Shard, distribute_tensor

from fused_rmsnorm import functional as F

BATCH, TOKENS, HEADS, D = 4, 2, 6, 16


def operands(weight_shape, n=3):
    x, z, dy = (numbers((BATCH, TOKENS, HEADS, D), torch.float32, "cpu", i) for i in range(n))
    w, b = (numbers(weight_shape, torch.float32, "cpu", i) for i in (3, 4))
    return x, z, dy, w, b


@on(2)
def weight_rows(mesh):
    """A weight is split where it has the dimension that is: then its gradient is, too."""
    for shape, dim in itertools.product(((HEADS, D), (BATCH, 1, 1, D), (D,)), (0, 2)):
        x, _, dy, w, b = operands(shape)
        own = dim - (4 - len(shape))
        is_split = own >= 0 and shape[own] > 1
        placed = Shard(own) if is_split else WHOLE
        norm = lambda x, w, b: F.rms_norm(x, D, w, bias=b)  # noqa: E731
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        y = norm(*leaves)
        alone = [y, *torch.autograd.grad(y, leaves, dy)]
        split = [leaf(x, mesh, [Shard(dim)]), leaf(w, mesh, [placed]), leaf(b, mesh, [placed])]
        y, forward = communication(norm, *split)
        dy = distribute_tensor(dy, mesh, [Shard(dim)])
        grads, backward = communication(torch.autograd.grad, y, split, dy)
        assert (forward, backward) == ({}, {})
        affine = (Shard(own),) if is_split else (Partial(),)
        assert placements(y, *grads) == [(Shard(dim),), (Shard(dim),), affine, affine]
        for a, e in zip((y, *grads), alone, strict=True):
            torch.testing.assert_close(whole(a), e)


@on(2)
def weight_rows_elsewhere(mesh):
    """Replicated weights beside split rows, and a split normalised dimension: moved as it needs."""
    x, _, dy, w, b = operands((HEADS, D))
    expected = F.rms_norm(x, D, w, bias=b)
    for rows, affine in ((Shard(2), WHOLE), (Shard(3), WHOLE), (Shard(3), Shard(1))):
        leaves = [leaf(x, mesh, [rows]), leaf(w, mesh, [affine]), leaf(b, mesh, [affine])]
        y = F.rms_norm(leaves[0], D, leaves[1], bias=leaves[2])
        torch.testing.assert_close(whole(y), expected)
        for g in torch.autograd.grad(y, leaves, distribute_tensor(dy, mesh, y.placements)):
            whole(g)


@on(2)
def gated_rows_split(mesh):
    for dim, first in itertools.product((0, 1, 2, 3), (True, False)):
        x, z, dy, w, b = operands((D,))
        norm = lambda x, z, w, b: F.rms_norm_gated(x, z, D, w, bias=b, norm_before_gate=first)  # noqa: B023, E731
        leaves = [t.clone().requires_grad_() for t in (x, z, w, b)]
        y = norm(*leaves)
        alone = [y, *torch.autograd.grad(y, leaves, dy)]
        rows = [Shard(dim)]
        split = [
            leaf(t, mesh, p)
            for t, p in zip((x, z, w, b), (rows, rows, [WHOLE], [WHOLE]), strict=True)
        ]
        y, forward = communication(norm, *split)
        dy = distribute_tensor(dy, mesh, y.placements)
        grads, backward = communication(torch.autograd.grad, y, split, dy)
        if dim < 3:
            assert (forward, backward) == ({}, {})
            assert placements(y, *grads) == [(rows[0],)] * 3 + [(Partial(),)] * 2
        for a, e in zip((y, *grads), alone, strict=True):
            torch.testing.assert_close(whole(a), e)


@on(2)
def wide_residual(mesh):
    x = numbers((4, 3, 16), torch.bfloat16, "cpu", 0)
    r = numbers((4, 3, 16), torch.float32, "cpu", 1)
    y, s = F.add_rms_norm(x, r, 16)
    for placement in (Shard(0), Shard(2)):
        split = F.add_rms_norm(*(distribute_tensor(t, mesh, [placement]) for t in (x, r)), 16)
        assert [t.dtype for t in split] == [torch.bfloat16, torch.float32]
        assert same_bits(whole(split[1]), s)
        torch.testing.assert_close(whole(split[0]), y)
