"""make_fx with symbolic sizes: what was traced at one size is right at every other one.

Nothing guards such a graph, so a size, or a number of columns that follows from one, must not be
written into it as a number.
"""

import pytest
import torch
from cases import numbers
from torch.fx.experimental.proxy_tensor import make_fx

from fused_rmsnorm import functional as F

ops = torch.ops.fused_rmsnorm
# Lengths with k from 1 to all of them; traced at the first.
SIZES = [(3, 40), (5, 100), (2, 7), (4, 101), (1, 1000)]
PS = [None, 0.07, 5 / 7, 0.999, 1.0]


def forward(x, w, dy, p):
    return F.composite_rms_norm(x, x.shape[-1], w, p=p)


def fused(x, w, dy, p):
    return F.rms_norm(x, x.shape[-1], w, p=p)


def added(x, w, dy, p):
    return F.add_rms_norm(x, dy, x.shape[-1], w, p=p)


def backward(norm):
    def grads(x, w, dy, p):
        return torch.func.vjp(lambda x, w: norm(x, w, dy, p), x, w)[1](dy)

    return grads


def tangent(x, w, dy, p):
    return torch.func.jvp(lambda x: fused(x, w, dy, p), (x,), (dy,))


def second(x, w, dy, p):
    """Derivative of the backward, which is composed whatever the forward was."""
    grad = torch.func.grad(lambda x: (fused(x, w, dy, p) * dy).sum())
    return torch.func.vjp(grad, x)[1](dy)


def per_sample(x, w, dy, p):
    """Gradients of the weight per row: composed under vmap."""
    grad = torch.func.grad(lambda w, x, dy: (ops.rms_norm(x, w, p=p) * dy).sum())
    return torch.func.vmap(grad, (None, 0, 0))(w, x, dy)


def several_dimensions(x, w, dy, p):
    return F.rms_norm(x, x.shape, p=p), F.composite_rms_norm(x, x.shape, p=p)


def complex_rows(x, w, dy, p):
    return F.rms_norm(torch.complex(x, dy), x.shape[-1], w, p=p)


WORK = {
    "composite": forward,
    "fused": fused,
    "add": added,
    "composite, backward": backward(forward),
    "fused, backward": backward(fused),
    "tangent": tangent,
    "derivative of the backward": second,
    "gradients per sample": per_sample,
    "complex": complex_rows,
    "several dimensions": several_dimensions,
}


def inputs(rows, n):
    dtype = torch.float64
    return [numbers(s, dtype, "cpu", i) for i, s in enumerate(((rows, n), n, (rows, n)))]


@pytest.mark.parametrize("p", PS, ids=str)
@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_right_at_other_sizes(work, p):
    traced = make_fx(lambda *args: work(*args, p), tracing_mode="symbolic")(*inputs(*SIZES[0]))
    for size in SIZES:
        args = inputs(*size)
        torch.testing.assert_close(traced(*args), work(*args, p), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("work", ["composite", "composite, backward"])
def test_what_lies_beyond_the_columns_is_not_read(work):
    """NaN and infinity there change nothing before them, as with a number of columns."""
    p, function = 0.3, WORK[work]
    traced = make_fx(lambda *args: function(*args, p), tracing_mode="symbolic")(*inputs(*SIZES[0]))
    for filler in (float("nan"), float("inf")):
        args = inputs(4, 20)
        args[0][:, 6:] = filler
        torch.testing.assert_close(traced(*args), function(*args, p), equal_nan=True)


@pytest.mark.parametrize("p", [0.07, 5 / 7])
def test_columns_chosen_by_data(p):
    """A row length that is read from a tensor, of which the compiler knows nothing."""

    def norm(x, w, n):
        n = n.item()
        torch._check(n >= 2)
        torch._check(n <= 100)
        return ops.rms_norm_composite(x[:, :n], w[:n], p=p)

    x, w, _ = inputs(3, 100)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
        for n in (2, 17, 100):
            n = torch.tensor(n)
            torch.testing.assert_close(compiled(x, w, n), norm(x, w, n))
