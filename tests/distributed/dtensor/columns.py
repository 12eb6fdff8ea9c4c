"""The normalised dimension split over ranks: one all-reduce in each direction."""

import itertools

import torch
from cases import numbers
from dtensor.case import CASES, COLUMNS, WHOLE, Case, leaf, on, placements, whole
from reference import Options, assert_backward, assert_forward, same_bits
from torch.distributed.tensor import Partial, Shard, distribute_tensor

from fused_rmsnorm import functional


@on(2)
def columns_split(mesh):
    for case, of_weight in itertools.product(CASES, (WHOLE, Shard(0))):
        results, forward, backward = case.split(mesh, [COLUMNS], [of_weight])
        assert (forward, backward) == ({"all_reduce": 1}, {"all_reduce": 1})
        assert placements(*results) == [(COLUMNS,), (COLUMNS,), (Shard(0),), (Shard(0),)]
        case.assert_right(*results)
        # Rounded where one device rounds, too: most results differ by the order of sums only.
        for split, alone in zip(map(whole, results), case.alone(), strict=True):
            assert torch.isclose(split, alone, rtol=3e-6, atol=3e-6).double().mean() > 0.9


@on(4)
def columns_split_with_rows(mesh):
    cases = (*CASES[:2], Case(torch.float64, torch.float64, p=0.5), Case(shape=(4, 6, 3)))
    for case, rows in itertools.product(cases, (Shard(0), Shard(1), WHOLE)):
        results, forward, backward = case.split(mesh, [rows, COLUMNS])
        assert (forward, backward) == ({"all_reduce": 1}, {"all_reduce": 1})
        split, of_weight = (rows, COLUMNS), (WHOLE if rows == WHOLE else Partial(), Shard(0))
        assert placements(*results) == [split, split, of_weight, of_weight]
        case.assert_right(*results)


@on(4)
def columns_split_twice(mesh):
    for case in (*CASES[:2], Case(shape=(2, 3, 3))):  # of three columns, one rank has none
        results, _, _ = case.split(mesh, [COLUMNS, COLUMNS])
        case.assert_right(*results)


@on(2)
def only_the_head_is_read(mesh):
    """pRMSNorm does not see an infinity beyond its columns, which may be on another rank."""
    case = Case(p=0.1)
    case.x[..., -1] = float("inf")
    y = case.norm(distribute_tensor(case.x, mesh, [COLUMNS]), None, None)
    assert same_bits(whole(y)[..., :-1].isfinite(), torch.ones(3, 5, 32, dtype=torch.bool))


@on(2)
def several_normalised_dimensions(mesh):
    case = Case(shape=(4, 6, 32))
    for split, of_weight in ((Shard(0), WHOLE), (Shard(1), Shard(0))):
        x = leaf(case.x.view(4, 2, 3, 32).flatten(1, 2), mesh, [split])
        weight = leaf(numbers((6, 32), torch.float32, "cpu", 7), mesh, [of_weight])
        y = functional.rms_norm(x, (6, 32), weight)
        dy = distribute_tensor(case.dy, mesh, y.placements)
        dx, dw = torch.autograd.grad(y, (x, weight), dy)
        flat = (case.x.flatten(1), whole(weight).flatten(), None)
        assert_forward(whole(y).flatten(1), *flat, Options())
        grads = (whole(dx).flatten(1), whole(dw).flatten(), None)
        assert_backward(grads, *flat, case.dy.flatten(1), Options())
