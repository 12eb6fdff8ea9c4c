"""add_rms_norm with a residual wider than the input: an fp32 residual stream."""

from dataclasses import replace

import pytest
import torch
from cases import LAYOUTS, OPTIONS, SEEDS, N, affine_type, lay_out, numbers
from hypothesis import given
from hypothesis import strategies as st
from reference import Options, assert_backward, rms_norm, same_bits
from torch.autograd import gradcheck

from fused_rmsnorm import AddRMSNorm
from fused_rmsnorm import functional as F

ops = torch.ops.fused_rmsnorm
HALF = [torch.bfloat16, torch.float16]
PAIRS = [
    *((h, torch.float32) for h in HALF),
    (torch.bfloat16, torch.float64),
    (torch.float32, torch.float64),
]


@given(
    leading=st.sampled_from([(3,), (0,), (5, 1), (3, 4), (2, 3, 2)]),
    n=N,
    dtypes=st.sampled_from(PAIRS),
    weight_type=st.sampled_from([None, "same", "fp32"]),
    with_bias=st.booleans(),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    o=OPTIONS,
    seed=SEEDS,
)
def test_sum_and_norm(device, leading, n, dtypes, weight_type, with_bias, layouts, o, seed):
    """The sum unrounded but to the residual's dtype; y the norm of it, rounded once."""
    dtype, wide = dtypes
    x = lay_out(numbers((*leading, n), dtype, device, seed), layouts[0])
    r = lay_out(numbers((*leading, n), wide, device, seed + 1), layouts[1])
    w = b = None
    if weight_type is not None:
        w = numbers(n, affine_type(weight_type, dtype), device, seed + 2)
        b = numbers(n, w.dtype, device, seed + 3) if with_bias else None
    else:
        o = replace(o, weight_offset=0.0)  # which needs a weight
    y, s = F.add_rms_norm(x, r, n, w, o.eps, bias=b, **o.keywords())
    assert same_bits(s, (x + r).contiguous())
    assert y.is_contiguous()
    assert y.dtype == o.output_type(dtype, None if w is None else w.dtype)
    assert same_bits(y, F.rms_norm(s, n, w, o.eps, bias=b, **o.keywords()).to(y.dtype))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_what_the_wider_sum_is_for(device, dtype):
    """The result is nearer to fp64 than that of a sum rounded to the half type."""
    x, r = numbers((64, 256), dtype, device, 0), numbers((64, 256), torch.float32, device, 1, 30.0)
    y, _ = F.add_rms_norm(x, r, 256)
    rounded, _ = F.add_rms_norm(x, r.to(dtype), 256)
    exact = rms_norm(x.double() + r.double(), None, None, Options(torch.finfo(torch.float32).eps))
    error, rounded_error = ((t.double() - exact).norm() for t in (y, rounded))
    assert error < 0.8 * rounded_error
    assert same_bits(y, exact.to(dtype)) or error <= torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize(
    "o", [Options(), Options(1e-6, 0.5, 1.0), Options(casting_mode="llama")], ids=str
)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients(device, dtype, o):
    """Each in its input's dtype; that of the residual is not rounded to the half type."""
    x = numbers((6, 40), dtype, device, 0).requires_grad_()
    r = numbers((6, 40), torch.float32, device, 1).requires_grad_()
    w = numbers(40, torch.float32, device, 2).requires_grad_()
    y, s = F.add_rms_norm(x, r, 40, w, o.eps, **o.keywords())
    dy, ds = numbers(y.shape, y.dtype, device, 3), numbers(s.shape, s.dtype, device, 4)
    dx, dr, dw = torch.autograd.grad((y, s), (x, r, w), (dy, ds))
    assert (dx.dtype, dr.dtype, dw.dtype) == (dtype, torch.float32, torch.float32)
    assert_backward((dr, dw, None), s.detach(), w, None, dy, o, ds)
    assert same_bits(dx, dr.to(dtype))


def test_gradcheck(device):
    """fp32 under fp64: finite differences of the residual and the weight."""
    x = numbers((3, 7), torch.float32, device, 0)
    r = numbers((3, 7), torch.float64, device, 1).requires_grad_()
    w = numbers(7, torch.float64, device, 2).requires_grad_()
    both = lambda r, w: F.add_rms_norm(x.double(), r, 7, w)  # noqa: E731
    wide = lambda r, w: F.add_rms_norm(x, r, 7, w)[1]  # noqa: E731
    assert gradcheck(wide, (r, w), check_forward_ad=True)
    for a, b in zip(F.add_rms_norm(x, r, 7, w), both(r, w), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)


def test_double_backward(device):
    x = numbers((3, 8), torch.bfloat16, device, 0).requires_grad_()
    r = numbers((3, 8), torch.float32, device, 1).requires_grad_()
    y, s = F.add_rms_norm(x, r, 8)
    (g,) = torch.autograd.grad(y.float().pow(2).sum() + s.sum(), r, create_graph=True)
    gx, gr = torch.autograd.grad(g.pow(2).sum(), (x, r))
    assert (gx.dtype, gr.dtype) == (torch.bfloat16, torch.float32)
    assert same_bits(gx, gr.bfloat16())


def test_in_place_where_memory_is_shared(device):
    """Of two dtypes input and residual may not even interleave."""
    memory = torch.zeros(4, 24, device=device)
    residual, halves = memory[:, :8], memory.view(torch.bfloat16)[:, 16:24]
    with pytest.raises(RuntimeError, match="input and residual must not share memory"):
        F.add_rms_norm_(halves, residual, 8)


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_in_place(device, dtypes):
    x, r = (numbers((5, 24), t, device, i) for i, t in enumerate(dtypes))
    y, s = F.add_rms_norm(x, r, 24)
    F.add_rms_norm_(x, r, 24)
    assert same_bits(x, y)
    assert same_bits(r, s)


def test_opcheck(device):
    x = numbers((3, 8), torch.bfloat16, device, 0).requires_grad_()
    r = numbers((3, 8), torch.float32, device, 1).requires_grad_()
    w = numbers(8, torch.float32, device, 2).requires_grad_()
    for mode in ("torch", "llama"):
        torch.library.opcheck(ops.add_rms_norm_fwd.default, (x, r, w, None, 1e-5, 0.5, 1.0, mode))
        torch.library.opcheck(ops.add_rms_norm.default, (x, r, w, None, 1e-5, 0.5, 1.0, mode))


@pytest.mark.parametrize("casting_mode", ["torch", "llama"])
@pytest.mark.parametrize("mode", ["opaque", "fuse"])
def test_compile(device, mode, casting_mode):
    norm = AddRMSNorm(16, casting_mode=casting_mode, compile_mode=mode).to(device)
    x = numbers((3, 16), torch.bfloat16, device, 0).requires_grad_()
    r = numbers((3, 16), torch.float32, device, 1).requires_grad_()

    def run(module):
        y, s = module(x, r)
        return y, s, *torch.autograd.grad(y.float().pow(2).sum() + s.sum(), (x, r, norm.weight))

    found = run(torch.compile(norm, backend="aot_eager", fullgraph=True))
    for a, b in zip(found, run(norm), strict=True):
        if mode == "opaque":
            assert same_bits(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_vmap(device):
    x = numbers((4, 3, 8), torch.bfloat16, device, 0)
    r = numbers((4, 3, 8), torch.float32, device, 1)
    y, s = torch.func.vmap(lambda x, r: F.add_rms_norm(x, r, 8))(x, r)
    for a, b in zip((y, s), F.add_rms_norm(x, r, 8), strict=True):
        assert same_bits(a, b)


def test_module_keeps_the_stream_wide(device):
    """A pre-norm stack whose residual is fp32, as flash-attn's residual_in_fp32."""
    norms = [AddRMSNorm(16).to(device, torch.bfloat16) for _ in range(3)]
    x, stream = (
        numbers((2, 5, 16), torch.bfloat16, device, 0),
        numbers((2, 5, 16), torch.float32, device, 1),
    )
    expected = stream.clone()
    for norm in norms:
        expected = expected + x
        x, stream = norm(x, stream)
        assert x.dtype == torch.bfloat16
        assert same_bits(stream, expected)


@pytest.mark.parametrize(
    ("dtype", "residual"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.int64),
        (torch.float64, torch.float32),
        (torch.float32, torch.complex64),
        (torch.complex64, torch.complex128),
    ],
    ids=str,
)
def test_what_is_not_wider_is_refused(dtype, residual):
    x, r = torch.ones(2, 8, dtype=dtype), torch.ones(2, 8, dtype=residual)
    for function in (F.add_rms_norm, F.add_rms_norm_):
        with pytest.raises(
            TypeError, match=r"^residual must have input's dtype \w+ or a wider one"
        ):
            function(x, r, 8)
