"""Rows split over ranks, or whole on each: no communication, and the bits of one device."""

import itertools

import pytest
import torch
from dtensor.case import (
    CASES,
    COLUMNS,
    WHOLE,
    Case,
    communication,
    leaf,
    on,
    placements,
    whole,
)
from reference import assert_forward, same_bits
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.placement_types import _StridedShard

from fused_rmsnorm import distributed


def check_rows(mesh, case, splits):
    """Every rank works alone on its rows: y and dx are bit for bit those of one device."""
    results, forward, backward = case.split(mesh, splits)
    assert (forward, backward) == ({}, {})
    summed = (Partial(),) * len(splits)
    assert placements(*results) == [splits, splits, summed, summed]
    for split, alone in zip(results[:2], case.alone(), strict=False):
        assert same_bits(whole(split), alone)
    case.assert_right(*results)


@on(2)
def rows_split(mesh):
    for case, dim in itertools.product(CASES, (0, 1)):
        check_rows(mesh, case, (Shard(dim),))


@on(4)
def rows_split_twice(mesh):
    for case, splits in itertools.product(CASES[:2], ((Shard(0), Shard(1)), (Shard(1), Shard(1)))):
        check_rows(mesh, case, splits)


@on(4)
def rows_split_in_strides(mesh):
    """Over the inner mesh dimension before the outer one, as FSDP2 splits what is split already."""
    check_rows(mesh, Case(shape=(24, 16)), (_StridedShard(0, split_factor=2), Shard(0)))


@on(2)
def split_dimension_flattened(mesh):
    """A view that flattens a split second dimension leaves each rank with rows in strides."""
    case = Case(shape=(4, 6, 16))
    x = leaf(case.x, mesh, [Shard(1)])
    weight, bias = (leaf(t, mesh, [WHOLE]) for t in (case.weight, case.bias))
    try:
        flat = x.view(24, 16)
    except RuntimeError as error:
        if "Attempted to flatten multiple dimensions" not in str(error):
            raise
        pytest.skip("this torch, as 2.11, has no view that flattens a split second dimension")
    y, forward = communication(case.norm, flat, weight, bias)
    assert forward == {}
    assert placements(y) == placements(flat)
    dy = distribute_tensor(case.dy, mesh, [Shard(1)])
    grads = torch.autograd.grad(y.view(4, 6, 16), (x, weight, bias), dy)
    assert same_bits(whole(y).view(4, 6, 16), case.alone()[0])
    case.assert_right(y.view(4, 6, 16), *grads)


@on(2)
def replicated(mesh):
    for case in CASES:
        results, forward, backward = case.split(mesh, [WHOLE])
        assert (forward, backward) == ({}, {})
        assert placements(*results) == [(WHOLE,)] * 4
        for split, alone in zip(results, case.alone(), strict=True):
            assert same_bits(split.to_local(), alone)


@on(2)
def no_rows_on_one_rank(mesh):
    for shape in ((1, 4, 32), (0, 4, 32)):
        case = Case(shape=shape)
        results, forward, backward = case.split(mesh, [Shard(0)])
        if distributed._FEWER_ROWS_THAN_RANKS:  # an older torch gathers the rows
            assert (forward, backward) == ({}, {})
        case.assert_right(*results)
        assert same_bits(whole(results[0]), case.alone()[0])


@on(2)
def partial_input(mesh):
    """What a row-wise parallel Linear leaves behind: it becomes split rows."""
    case = Case(shape=(4, 6, 32))
    halves = DTensor.from_local(case.x / 2, mesh, [Partial()]).requires_grad_()
    weight, bias = (leaf(t, mesh, [WHOLE]) for t in (case.weight, case.bias))
    y, forward = communication(case.norm, halves, weight, bias)
    assert forward == {"reduce_scatter_tensor": 1}
    dy = distribute_tensor(case.dy, mesh, y.placements)
    case.assert_right(y, *torch.autograd.grad(y, (halves, weight, bias), dy))


@on(2)
def weight_split_under_rows(mesh):
    for case, rows in itertools.product(CASES[:2], (WHOLE, Shard(1))):
        results, forward, _ = case.split(mesh, [rows], [Shard(0)])
        assert forward == {"all_gather_into_tensor": 2}  # weight and bias
        assert same_bits(whole(results[0]), case.alone()[0])
        case.assert_right(*results)


@on(2)
def gradient_placed_otherwise(mesh):
    case = Case()
    for split, of_gradient in itertools.product((Shard(0), COLUMNS), (WHOLE, Shard(1), COLUMNS)):
        x = leaf(case.x, mesh, [split])
        weight, bias = (leaf(t, mesh, [WHOLE]) for t in (case.weight, case.bias))
        y = case.norm(x, weight, bias)
        dy = distribute_tensor(case.dy, mesh, [of_gradient])
        case.assert_right(y, *torch.autograd.grad(y, (x, weight, bias), dy))


@on(2)
def plain_weight(mesh):
    case = Case()
    for split in (Shard(0), COLUMNS):
        x = distribute_tensor(case.x, mesh, [split])
        with pytest.raises(RuntimeError, match="got mixed torch"):
            case.norm(x, case.weight, case.bias)
        with implicit_replication():
            assert_forward(
                whole(case.norm(x, case.weight, case.bias)),
                *(case.x, case.weight, case.bias, case.options),
            )
