"""Forward: any shape, stride, dtype and option against the definition."""

import numpy as np
import pytest
import torch
from cases import AFFINE_TYPES, LAYOUTS, LEADING, OPTIONS, SEEDS, N, affine_type, lay_out, numbers
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    FLOATS,
    Options,
    arithmetic_type,
    as_exact,
    assert_forward,
    rms_error,
    same_bits,
)

from fused_rmsnorm import functional as F

HALVES = (torch.float16, torch.bfloat16)


def norm(x, weight, bias, o: Options, function=F.rms_norm):
    return function(x, x.shape[-1], weight, o.eps, bias=bias, **o.keywords())


@given(
    leading=LEADING,
    n=N,
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(FLOATS),
    weight=st.one_of(st.none(), AFFINE_TYPES),
    bias=st.booleans(),
    o=OPTIONS,
    scale=st.sampled_from([1.0, 2.0**-6, 2.0**6]),
    seed=SEEDS,
)
def test_any_input(device, leading, n, layout, dtype, weight, bias, o, scale, seed):
    o = o.beside(weight)
    x = lay_out(numbers((*leading, n), dtype, device, seed, scale), layout)
    w = None if weight is None else numbers(n, affine_type(weight, dtype), device, seed + 1)
    b = numbers(n, dtype if w is None else w.dtype, device, seed + 2) if bias else None
    assert_forward(norm(x, w, b, o), x, w, b, o)
    y, rstd = torch.ops.fused_rmsnorm.rms_norm(x, w, b, **o.kwargs()), None
    assert same_bits(y, norm(x, w, b, o))
    if b is None:
        y, rstd = torch.ops.fused_rmsnorm.rms_norm_fwd(x, w, **o.kwargs())
        assert same_bits(y, norm(x, w, b, o))
        assert rstd.shape == (*leading, 1)
        assert rstd.dtype == arithmetic_type(dtype)


@given(
    leading=LEADING,
    n=N,
    dtype=st.sampled_from(FLOATS),
    weight=st.one_of(st.none(), AFFINE_TYPES),
    bias=st.one_of(st.none(), AFFINE_TYPES),
    o=OPTIONS,
    seed=SEEDS,
)
def test_composite_is_the_same_function(device, leading, n, dtype, weight, bias, o, seed):
    """Every pair of weight and bias dtypes: the composite, the operator and Meta agree."""
    o = o.beside(weight)
    x = numbers((*leading, n), dtype, device, seed)
    w, b = (
        None if t is None else numbers(n, affine_type(t, dtype), device, seed + 1)
        for t in (weight, bias)
    )
    y, c = norm(x, w, b, o), norm(x, w, b, o, F.composite_rms_norm)
    assert_forward(y, x, w, b, o)
    assert_forward(c.contiguous(), x, w, b, o)
    on_meta = [None if t is None else t.to("meta") for t in (x, w, b)]
    m = norm(*on_meta, o)
    assert (m.shape, m.dtype) == (y.shape, y.dtype)
    assert m.stride() == y.stride() or not y.numel()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight_type", [torch.float32, torch.float64], ids=str)
def test_output_is_contiguous_as_meta_says(device, layout, weight_type):
    """Also where the composite serves: an fp64 weight in llama mode has no kernel."""
    x = lay_out(numbers((3, 4, 8), torch.float32, device, 0), layout)
    w = numbers(8, weight_type, device, 1)
    args = {"casting_mode": "llama"}
    ops = torch.ops.fused_rmsnorm
    for actual, meta in (
        (ops.rms_norm_fwd(x, w, **args), ops.rms_norm_fwd(x.to("meta"), w.to("meta"), **args)),
        (
            ops.add_rms_norm_fwd(x, x, w, **args),
            ops.add_rms_norm_fwd(x.to("meta"), x.to("meta"), w.to("meta"), **args),
        ),
    ):
        for a, m in zip(actual, meta, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (m.shape, m.dtype, m.stride())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [128, 1000, 4096])
def test_error_beside_native(device, dtype, n):
    """At most 10 % above the error of F.rms_norm on the same input. fp64: 60 %, as the narrowest
    vectors have 8 accumulators where ATen adds pairwise (N = 4096: 1.45e-16 against 0.99e-16)."""
    factor = 1.6 if dtype == torch.float64 else 1.1
    x, w = numbers((64, n), dtype, device, n), numbers(n, dtype, device, 1)
    a = as_exact(x)
    expected = a / np.sqrt(
        (a * a).mean(-1, keepdims=True) + np.longdouble(Options().eps_for(dtype))
    )
    expected = expected * as_exact(w)
    ours = rms_error(F.rms_norm(x, n, w), expected)
    native = rms_error(torch.nn.functional.rms_norm(x, [n], w), expected)
    assert ours <= factor * native, f"ours {ours:.3g}, native {native:.3g}"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [1, 5, 64, 200, 3000])
def test_bad_rows_stay_alone(device, dtype, n):
    """NaN and infinity make their own row NaN (x r = inf * 0) and leave the others' bits alone."""
    clean = numbers((9, n), dtype, device, 3)
    bad = clean.clone()
    bad[1, 0] = float("nan")
    bad[4, n // 2] = float("inf")
    bad[7, n - 1] = -float("inf")
    w = numbers(n, dtype, device, 4)
    y, y_clean = F.rms_norm(bad, n, w), F.rms_norm(clean, n, w)
    others = [0, 2, 3, 5, 6, 8]
    assert same_bits(y[others], y_clean[others])
    assert y[1].isnan().all()
    for row, column in ((4, n // 2), (7, n - 1)):
        assert y[row, column].isnan()
        rest = torch.arange(n) != column
        assert (y[row][rest] == 0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_half_range(device, dtype):
    """Squares that leave fp16's range on either side; they are fp32 inside."""
    n = 100
    for value in (60000.0, 2.0**-24, 2.0**-14):
        x = numbers((4, n), torch.float32, device, 5).sign() * value
        x = x.to(dtype)
        o = Options(eps=0.0)
        y = norm(x, None, None, o)
        assert_forward(y, x, None, None, o)
        rtol = 4 * torch.finfo(dtype).eps  # one number, over and over
        torch.testing.assert_close(y, x.sign(), rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_result_overflows_to_infinity(device, dtype):
    top = torch.finfo(dtype).max
    x = torch.tensor([[1.0, -1.0, 1.0, 0.0]], dtype=dtype, device=device)
    w = torch.full((4,), top, dtype=dtype, device=device)
    y = F.rms_norm(x, 4, w)
    assert torch.equal(y.isinf(), torch.tensor([[True, True, True, False]], device=device))
    assert torch.equal(y.sign(), x.sign())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_subnormal_rows(device, dtype):
    """Squares underflow to 0, r = 1 / sqrt(eps), and the result is an ordinary number."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    o = Options(eps=2.0**-40)
    x = numbers((3, 50), torch.float64, "cpu", 6).mul(tiny).to(device, dtype)
    assert_forward(norm(x, None, None, o), x, None, None, o)
    y = norm(x, None, None, o).double()
    torch.testing.assert_close(y, x.double() * 2.0**20, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_zero_rows_of_zeros(device, dtype):
    x = torch.zeros(3, 20, dtype=dtype, device=device)
    b = numbers(20, dtype, device, 7)
    assert torch.equal(F.rms_norm(x, 20), x)
    assert torch.equal(F.rms_norm(x, 20, b, bias=b), b.expand(3, 20))
    assert F.rms_norm(x, 20, eps=0.0).isnan().all()  # 0 / 0, as the formula has it


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 0)])
def test_rows_of_no_elements(device, shape):
    assert F.rms_norm(torch.empty(shape, device=device), 0).shape == shape


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bias_alone_is_added_to_the_plain_norm(device, dtype):
    """Without a weight the scale is exactly 1, whatever the bias' dtype."""
    x = numbers((5, 40), dtype, device, 8)
    for bias_type in FLOATS:
        b = torch.zeros(40, dtype=bias_type, device=device)
        for mode in ("torch", "llama"):
            o = Options(casting_mode=mode)
            y = norm(x, None, b, o)
            assert y.dtype == dtype
            plain = norm(x, None, None, o)
            if bias_type == torch.float64:  # in llama mode the composite, with a sum of its own
                assert torch.allclose(y, plain, rtol=4 * torch.finfo(dtype).eps, atol=0)
            else:
                assert same_bits(y + 0, plain + 0)  # + 0: a zero has no sign here


def test_complex(device):
    x = torch.randn(4, 10, dtype=torch.complex64, device=device)
    w = torch.randn(10, device=device)
    expected = torch.nn.functional.rms_norm(x, [10], w.to(x.dtype))
    torch.testing.assert_close(F.rms_norm(x, 10, w), expected)
    y, s = F.add_rms_norm(x, x, 10, w)
    torch.testing.assert_close(s, x + x)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x + x, [10], w.to(x.dtype)))


def test_lazy_negation(device):
    """The imaginary part of a conjugate is negated when it is read."""
    x = torch.randn(4, 10, dtype=torch.complex64, device=device).conj().imag
    assert x.is_neg()
    assert same_bits(F.rms_norm(x, 10), F.rms_norm(x.clone(), 10))


@pytest.mark.parametrize("rows", [(), (3,)], ids=str)
def test_weight_and_bias_with_strides(device, rows):
    """A column of a matrix, and every second number: the same bits as contiguous ones."""
    x = numbers((2, 3, 40), torch.float32, device, 0)
    w = numbers((*rows, 40, 3), torch.float32, device, 1)[..., 1]
    b = numbers((*rows, 80), torch.float32, device, 2)[..., ::2]
    assert not w.is_contiguous()
    assert not b.is_contiguous()
    found = F.rms_norm(x, 40, w, bias=b)
    assert same_bits(found, F.rms_norm(x, 40, w.contiguous(), bias=b.contiguous()))
    x.requires_grad_()
    dx, expected = (
        torch.autograd.grad(F.rms_norm(x, 40, weight).sum(), x)[0] for weight in (w, w.contiguous())
    )
    assert same_bits(dx, expected)


def test_several_normalised_dimensions(device):
    x = numbers((2, 3, 4, 5), torch.float32, device, 9)
    w, b = numbers((4, 5), torch.float32, device, 10), numbers((4, 5), torch.float32, device, 11)
    flat = F.rms_norm(x.view(2, 3, 20), 20, w.view(20), bias=b.view(20))
    assert same_bits(F.rms_norm(x, (4, 5), w, bias=b), flat.view(x.shape))
    transposed = x.transpose(0, 1)
    assert same_bits(F.rms_norm(transposed, [4, 5], w, bias=b), flat.view(x.shape).transpose(0, 1))
    swapped = x.transpose(2, 3)
    expected = F.rms_norm(swapped.contiguous(), (5, 4))
    assert same_bits(F.rms_norm(swapped, (5, 4)), expected)


@given(
    leading=LEADING,
    n=N,
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    dtype=st.sampled_from(FLOATS),
    weight=st.one_of(st.none(), AFFINE_TYPES),
    bias=st.booleans(),
    o=OPTIONS,
    seed=SEEDS,
)
def test_add(device, leading, n, layouts, dtype, weight, bias, o, seed):
    """The sum has the bits of x + residual, and y those of the norm of that sum."""
    o = o.beside(weight)
    x, residual = (
        lay_out(numbers((*leading, n), dtype, device, seed + i), layout)
        for i, layout in enumerate(layouts)
    )
    w = None if weight is None else numbers(n, affine_type(weight, dtype), device, seed + 2)
    b = None if w is None or not bias else numbers(n, w.dtype, device, seed + 3)
    y, s = F.add_rms_norm(x, residual, n, w, o.eps, bias=b, **o.keywords())
    assert same_bits(s, (x + residual).contiguous())
    assert same_bits(y, norm(s, w, b, o))
    assert y.is_contiguous()
    assert s.is_contiguous()
    if (
        "expanded" in "".join(layouts)
        or o.output_type(dtype, w.dtype if w is not None else None) != dtype
    ):
        return
    x, residual = (  # fresh: without a copy, and with strides of their own
        lay_out(t.contiguous(), layout) for t, layout in zip((x, residual), layouts, strict=True)
    )
    out = F.add_rms_norm_(x, residual, n, w, o.eps, bias=b, **o.keywords())
    assert out[0] is x
    assert out[1] is residual
    assert same_bits(x, y)
    assert same_bits(residual, s)
