"""Backward: dx, dw and db for any shape, stride, dtype and option against the definition."""

import itertools

import numpy as np
import pytest
import torch
from cases import AFFINE_TYPES, LAYOUTS, LEADING, OPTIONS, SEEDS, N, affine_type, lay_out, numbers
from hypothesis import given
from hypothesis import strategies as st
from reference import FLOATS, Options, as_exact, assert_backward, rms_error, same_bits

from fused_rmsnorm import functional as F

# eps = 0 with one element has a gradient of exactly 0 times anything: all rounding.
BACKWARD_OPTIONS = OPTIONS.filter(lambda o: o.eps != 0)


def leaf(t):
    """A leaf that keeps the strides of t."""
    return None if t is None else t.detach().requires_grad_()


def norm(x, weight, bias, o: Options):
    return F.rms_norm(x, x.shape[-1], weight, o.eps, bias=bias, **o.keywords())


@given(
    leading=LEADING,
    n=N,
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    dtype=st.sampled_from(FLOATS),
    weight=st.one_of(st.none(), AFFINE_TYPES),
    bias=st.booleans(),
    o=BACKWARD_OPTIONS,
    scale=st.sampled_from([1.0, 2.0**-6, 2.0**6]),
    seed=SEEDS,
)
def test_any_input(device, leading, n, layouts, dtype, weight, bias, o, scale, seed):
    o = o.beside(weight)
    x = leaf(lay_out(numbers((*leading, n), dtype, device, seed, scale), layouts[0]))
    w = None if weight is None else numbers(n, affine_type(weight, dtype), device, seed + 1)
    b = numbers(n, w.dtype, device, seed + 2) if bias and w is not None else None
    w, b = leaf(w), leaf(b)
    y = norm(x, w, b, o)
    dy = lay_out(numbers(y.shape, y.dtype, device, seed + 3), layouts[1])
    given = [t for t in (x, w, b) if t is not None]
    found = iter(torch.autograd.grad(y, given, dy))
    grads = [None if t is None else next(found) for t in (x, w, b)]
    assert_backward(grads, x, w, b, dy, o)


@given(
    leading=LEADING,
    n=N,
    dtype=st.sampled_from(FLOATS),
    weight=AFFINE_TYPES,
    bias=AFFINE_TYPES,
    o=BACKWARD_OPTIONS,
    seed=SEEDS,
)
def test_weight_and_bias_of_any_dtype(device, leading, n, dtype, weight, bias, o, seed):
    x = leaf(numbers((*leading, n), dtype, device, seed))
    w = leaf(numbers(n, affine_type(weight, dtype), device, seed + 1))
    b = leaf(numbers(n, affine_type(bias, dtype), device, seed + 2))
    y = norm(x, w, b, o)
    dy = numbers(y.shape, y.dtype, device, seed + 3)
    assert_backward(torch.autograd.grad(y, (x, w, b), dy), x, w, b, dy, o)


@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=3))[1:])
def test_only_what_is_asked_for(device, mask, has_weight):
    """Any subset of x, w and b: the same bits as when all are asked for, and no others."""
    x, w, b = (numbers(s, torch.float32, device, i) for i, s in enumerate([(6, 33), 33, 33]))
    if not has_weight:
        w, mask = None, (mask[0], False, mask[2])
    dy = numbers((6, 33), torch.float32, device, 3)
    everything = [leaf(x), leaf(w), leaf(b)]
    norm(*everything, Options()).backward(dy)
    some = [leaf(t) if m else t for t, m in zip((x, w, b), mask, strict=True)]
    y = norm(*some, Options())
    assert y.requires_grad == any(mask)
    if any(mask):
        y.backward(dy)
    for t, reference, wanted in zip(some, everything, mask, strict=True):
        if wanted:
            assert same_bits(t.grad, reference.grad)
        elif t is not None:
            assert t.grad is None


@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=3)))
def test_output_mask(device, mask):
    x, w = numbers((6, 33), torch.float32, device, 0), numbers(33, torch.float32, device, 1)
    rstd = torch.ops.fused_rmsnorm.rms_norm_fwd(x, w)[1]
    bwd = torch.ops.fused_rmsnorm.rms_norm_bwd
    everything = bwd(x, x, w, rstd, None, [True] * 3)
    for part, whole, wanted in zip(
        bwd(x, x, w, rstd, None, list(mask)), everything, mask, strict=True
    ):
        if wanted:
            assert same_bits(part, whole)
        else:
            assert part is None
    assert bwd(x, x, None, rstd, None, [True] * 3)[1:] == (None, None)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 1)])
def test_empty_batch(device, shape, dtype):
    """The gradients of a sum over no rows are zeros, not whatever was in memory."""
    x, w, b = (
        leaf(torch.ones(s, dtype=dtype, device=device)) for s in (shape, shape[-1], shape[-1])
    )
    norm(x, w, b, Options()).sum().backward()
    assert x.grad.shape == shape
    assert torch.equal(w.grad, torch.zeros_like(w))
    assert torch.equal(b.grad, torch.zeros_like(b))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [128, 1000])
def test_error_beside_native(device, dtype, n):
    """Beside the error of F.rms_norm's backward on the same input. dx: within 10 % (fp64: 60 %, see
    test_forward.py). dw: within a factor of 3, as rows are added one after the other within a
    chunk of the batch (256 rows here) while ATen's sum adds pairwise; halves round both away."""
    rows = 200
    x, w = numbers((rows, n), dtype, device, n), numbers(n, dtype, device, 1)
    dy = numbers((rows, n), dtype, device, 2)
    a, g = as_exact(x), as_exact(dy)
    r = 1 / np.sqrt((a * a).mean(-1, keepdims=True) + np.longdouble(Options().eps_for(dtype)))
    u = g * as_exact(w)
    expected = r * u - a * r**3 * (u * a).mean(-1, keepdims=True), (g * a * r).sum(0)
    errors = []
    for function in (F.rms_norm, torch.nn.functional.rms_norm):
        leaves = leaf(x), leaf(w)
        grads = torch.autograd.grad(function(leaves[0], (n,), leaves[1]), leaves, dy)
        errors.append([rms_error(d, e) for d, e in zip(grads, expected, strict=True)])
    factors = {torch.float32: (1.1, 3), torch.float64: (1.6, 3)}.get(dtype, (1.1, 1.1))
    for name, ours, native, factor in zip(("dx", "dw"), *errors, factors, strict=True):
        assert ours <= factor * native, f"{name}: ours {ours:.3g}, native {native:.3g}"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [1, 5, 64, 200])
def test_bad_rows_stay_alone(device, dtype, n):
    """A NaN in one row of x or dy: other rows of dx keep their bits; dw and db are NaN there."""
    x, dy = numbers((9, n), dtype, device, 1), numbers((9, n), dtype, device, 2)
    w, b = numbers(n, dtype, device, 3), numbers(n, dtype, device, 4)
    bad_x, bad_dy = x.clone(), dy.clone()
    bad_x[2, 0] = float("nan")
    bad_x[6, n - 1] = float("inf")
    bad_dy[4, n // 2] = float("nan")
    results = []
    for values, grad in ((x, dy), (bad_x, bad_dy)):
        leaves = leaf(values), leaf(w), leaf(b)
        results.append(torch.autograd.grad(norm(*leaves, Options()), leaves, grad))
    others = [0, 1, 3, 5, 7, 8]
    assert same_bits(results[0][0][others], results[1][0][others])
    assert results[1][0][[2, 4]].isnan().all()
    assert results[1][1].isnan().all()
    nan_db = torch.arange(n) == n // 2
    assert torch.equal(results[1][2].isnan().cpu(), nan_db)
    assert same_bits(results[1][2].cpu()[~nan_db], results[0][2].cpu()[~nan_db])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_whose_rstd_cubed_overflows(device, dtype):
    """r near 1e17 with eps = 0: dx is large and finite, and x . dx is 0, though r^3 is infinite."""
    o = Options(eps=0.0)
    x = numbers((4, 64), torch.float32, "cpu", 1, 1e-17).to(device, dtype)
    dy = numbers((4, 64), dtype, device, 2)
    assert (x.float().square().mean(-1).rsqrt() ** 3).isinf().all()
    (dx,) = torch.autograd.grad(norm(x := leaf(x), None, None, o), x, dy)
    assert dx.isfinite().all()
    assert_backward((dx, None, None), x, None, None, dy, o)


def test_gradient_expanded_from_a_scalar(device):
    x, w = (
        leaf(numbers((5, 40), torch.float32, device, 1)),
        leaf(numbers(40, torch.float32, device, 2)),
    )
    norm(x, w, None, Options()).sum().backward()
    assert_backward((x.grad, w.grad, None), x, w, None, torch.ones(5, 40, device=device), Options())


@given(
    leading=LEADING,
    n=N,
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    dtype=st.sampled_from(FLOATS),
    weight=st.one_of(st.none(), AFFINE_TYPES),
    bias=st.booleans(),
    o=BACKWARD_OPTIONS,
    used=st.sampled_from(["y", "sum", "both"]),
    seed=SEEDS,
)
def test_add(device, leading, n, layouts, dtype, weight, bias, o, used, seed):
    """Gradients of x and residual are the same numbers, that of the sum added before rounding."""
    o = o.beside(weight)
    x, residual = (leaf(numbers((*leading, n), dtype, device, seed + i)) for i in range(2))
    w = None if weight is None else leaf(numbers(n, affine_type(weight, dtype), device, seed + 2))
    b = leaf(numbers(n, w.dtype, device, seed + 3)) if bias and w is not None else None
    y, s = F.add_rms_norm(x, residual, n, w, o.eps, bias=b, **o.keywords())
    dy = lay_out(numbers(y.shape, y.dtype, device, seed + 4), layouts[0])
    ds = lay_out(numbers(s.shape, s.dtype, device, seed + 5), layouts[1])
    outputs = {"y": [y], "sum": [s], "both": [y, s]}[used]
    seeds = {"y": [dy], "sum": [ds], "both": [dy, ds]}[used]
    given = [t for t in (x, residual, w, b) if t is not None]
    found = iter(torch.autograd.grad(outputs, given, seeds, allow_unused=True))
    dx, dr, dw, db = (None if t is None else next(found) for t in (x, residual, w, b))
    assert same_bits(dx, dr)
    if used == "sum":
        assert same_bits(dx, ds)
        assert dw is None or not dw.any()
        return
    assert_backward((dx, dw, db), s, w, b, dy, o, ds if used == "both" else None)


def test_add_gradients_do_not_share_memory_in_leaves(device):
    for used in (lambda y, s: y.sum(), lambda y, s: s.sum(), lambda y, s: (y + s).sum()):
        x, residual = (leaf(numbers((3, 8), torch.float32, device, i)) for i in range(2))
        used(*F.add_rms_norm(x, residual, 8)).backward()
        kept = residual.grad.clone()
        x.grad.zero_()
        assert same_bits(residual.grad, kept)
