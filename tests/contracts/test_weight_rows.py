"""Weights and biases with dimensions before normalized_shape: one per head (QK-norm), one per
sample (AdaLN's scale and shift), and group_size, which is a view onto the same."""

import re

import pytest
import torch
from cases import AFFINE_TYPES, LAYOUTS, OPTIONS, SEEDS, N, affine_type, lay_out, numbers
from hypothesis import given
from hypothesis import strategies as st
from reference import FLOATS, Options, assert_backward, assert_forward, gradients, same_bits
from torch.autograd import gradcheck, gradgradcheck

from fused_rmsnorm import AddRMSNorm, PRMSNorm, RMSNorm
from fused_rmsnorm import functional as F

ops = torch.ops.fused_rmsnorm
BATCH, TOKENS, HEADS, D = 2, 3, 4, 8
# Of a weight over an input of shape (BATCH, TOKENS, HEADS, D).
SHAPES = [
    (D,),
    (HEADS, D),
    (1, D),
    (TOKENS, 1, D),
    (BATCH, 1, 1, D),
    (BATCH, 1, HEADS, D),
    (1, TOKENS, 1, D),
    (BATCH, TOKENS, HEADS, D),
    (1, 1, 1, D),
]
SOME = [(HEADS, D), (BATCH, 1, 1, D), (BATCH, 1, HEADS, D)]


def leaf(shape, device="cpu", seed=0, dtype=torch.float64):
    return numbers(shape, dtype, device, seed).requires_grad_()


def run(x, w, b, dy, o: Options):
    leaves = [t if t is None else t.detach().requires_grad_() for t in (x, w, b)]
    y = F.rms_norm(leaves[0], x.shape[-1], leaves[1], o.eps, bias=leaves[2], **o.keywords())
    given = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(y, given, dy.to(y.dtype)))
    return y.detach(), *(None if t is None else next(found) for t in leaves)


@st.composite
def weight_shapes(draw, leading):
    """What broadcasts to dimensions `leading`: some of the last of them, each whole or 1."""
    kept = draw(st.integers(0, len(leading)))
    return tuple(draw(st.sampled_from([1, size])) for size in leading[len(leading) - kept :])


@given(
    data=st.data(),
    leading=st.sampled_from([(3,), (0,), (5, 1), (3, 4), (2, 3, 2), (2, 1, 2, 3), (17, 2)]),
    n=N,
    dtype=st.sampled_from(FLOATS),
    weight_type=AFFINE_TYPES,
    layout=st.sampled_from(LAYOUTS),
    o=OPTIONS,
    seed=SEEDS,
)
def test_any_shape(device, data, leading, n, dtype, weight_type, layout, o, seed):
    """Values and gradients are those of the definition; dw and db have the shapes of w and b."""
    x = lay_out(numbers((*leading, n), dtype, device, seed), layout)
    w_type = affine_type(weight_type, dtype)
    w = numbers((*data.draw(weight_shapes(leading)), n), w_type, device, seed + 1)
    b = None
    if data.draw(st.booleans()):
        b = numbers((*data.draw(weight_shapes(leading)), n), w_type, device, seed + 2)
    dy = numbers(x.shape, o.output_type(dtype, w_type), device, seed + 3)
    y, *grads = run(x, w, b, dy, o)
    assert_forward(y, x, w, b, o)
    assert_backward(grads, x, w, b, dy, o)


def test_what_is_fused(device):
    """No operation of the composite in either direction, unless rows that share a row of the weight
    lie around and within those of others."""
    x = numbers((BATCH, TOKENS, HEADS, D), torch.bfloat16, device, 0)
    for shape in SHAPES:
        w = numbers(shape, torch.float32, device, 1)
        with torch.profiler.profile() as profile:
            run(x, w, w, x, Options(1e-6))
        composed = "aten::rsqrt" in {event.key for event in profile.key_averages()}
        assert composed == (shape == (BATCH, 1, HEADS, D)), shape


@pytest.mark.parametrize(
    ("leading", "weight"),
    [
        ((300, 8), (8,)),
        ((9, 300), (9, 1)),
        ((2, 3, 200), (3, 1)),
        ((200, 5, 3), (5, 1)),
        ((64,), (64,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bits(device, leading, weight, dtype):
    """The same with 1, 2 and 3 threads, each time, and of a row alone under its own weight."""
    n = 65
    x, dy = (numbers((*leading, n), dtype, device, i) for i in (0, 1))
    w, b = (numbers((*weight, n), dtype, device, i) for i in (2, 3))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(x, w, b, dy, Options(1e-6))
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            for a, e in zip(run(x, w, b, dy, Options(1e-6)), expected, strict=True):
                assert same_bits(a, e)
    finally:
        torch.set_num_threads(before)
    i = tuple(size // 2 for size in leading)
    row = lambda t: t.expand_as(x)[i]  # noqa: E731
    # On CUDA a weight that may have rows has kernels of its own, though it be one row.
    alone = run(*(row(t)[None] for t in (x, w, b, dy)), Options(1e-6))
    for a, e in zip(alone[:2], expected, strict=False):
        assert same_bits(a[0], e[i])
    if device == "cpu":
        alone = run(*(row(t) for t in (x, w, b, dy)), Options(1e-6))
        for a, e in zip(alone[:2], expected, strict=False):
            assert same_bits(a, e[i])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_row_has_its_weight(device, shape):
    """The rows under one row of the weight are normalised as under a weight of their own."""
    x = numbers((BATCH, TOKENS, HEADS, D), torch.bfloat16, device, 0)
    w, b = (numbers(shape, torch.float32, device, seed) for seed in (1, 2))
    y = F.rms_norm(x, D, w, bias=b)
    for i in torch.cartesian_prod(*(torch.arange(s) for s in x.shape[:-1])).tolist():
        one = F.rms_norm(x[tuple(i)], D, w.expand_as(x)[tuple(i)], bias=b.expand_as(x)[tuple(i)])
        torch.testing.assert_close(y[tuple(i)], one)


@pytest.mark.parametrize(
    "o", [Options(1e-6), Options(1e-6, 0.5, 1.0), Options(1e-6, None, 0, "llama")]
)
@pytest.mark.parametrize("shape", SOME, ids=str)
def test_gradcheck(device, shape, o):
    args = (leaf((BATCH, TOKENS, HEADS, D), device), leaf(shape, device, 1), leaf(D, device, 2))
    norm = lambda x, w, b: F.rms_norm(x, D, w, o.eps, bias=b, **o.keywords())  # noqa: E731
    assert gradcheck(
        norm, args, check_forward_ad=True, check_batched_grad=True, fast_mode=True,
        check_batched_forward_grad=True,
    )  # fmt: skip
    assert gradgradcheck(norm, args, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("shape", SOME, ids=str)
def test_opcheck(device, shape):
    x, w, b = (
        numbers(s, torch.float32, device, 0) for s in ((BATCH, TOKENS, HEADS, D), shape, shape)
    )
    for t in (x, w, b):
        t.requires_grad_()
    torch.library.opcheck(ops.rms_norm_fwd.default, (x, w, b))
    torch.library.opcheck(ops.add_rms_norm_fwd.default, (x, x.detach(), w, b))
    rstd = ops.rms_norm_fwd(x, w)[1].detach()
    torch.library.opcheck(ops.rms_norm_bwd.default, (x.detach(), x, w, rstd, None, [True] * 3))


def test_only_what_is_asked_for(device):
    x, w = leaf((BATCH, TOKENS, D), device), numbers((BATCH, 1, D), torch.float64, device, 1)
    y, rstd = ops.rms_norm_fwd(x.detach(), w)
    for mask in ([True, False, False], [False, True, False], [False, False, True]):
        grads = ops.rms_norm_bwd(y, x.detach(), w, rstd, None, mask)
        assert [g is not None and g.numel() > 0 for g in grads] == mask


def test_adaptive_layer_norm(device):
    """DiT: scale and shift of a sample, made from its condition, with weight_offset = 1."""
    x = leaf((BATCH, TOKENS, D), device)
    linear = torch.nn.Linear(5, 2 * D, dtype=torch.float64, device=device)
    condition = numbers((BATCH, 5), torch.float64, device, 1)

    def gradients_of(norm):
        scale, shift = linear(condition)[:, None].chunk(2, -1)
        loss = norm(x, scale, shift).pow(3).sum()
        return torch.autograd.grad(loss, (x, *linear.parameters()))

    fused = gradients_of(lambda x, w, b: F.rms_norm(x, D, w, bias=b, weight_offset=1.0))
    plain = gradients_of(lambda x, w, b: torch.rms_norm(x, (D,)) * (1 + w) + b)
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", SOME, ids=str)
def test_vmap(device, shape):
    """Over input, weight and both: what a loop gives, with gradients per sample."""
    x = numbers((5, BATCH, TOKENS, HEADS, D), torch.float64, device, 0)
    w = numbers((5, *shape), torch.float64, device, 1)
    norm = lambda x, w: F.rms_norm(x, D, w)  # noqa: E731
    loss = lambda x, w: norm(x, w).pow(3).sum()  # noqa: E731
    for function in (norm, torch.func.grad(loss, (0, 1))):
        for dims in ((0, 0), (0, None), (None, 0)):
            args = [t if d == 0 else t[0] for t, d in zip((x, w), dims, strict=True)]
            batched = torch.func.vmap(function, dims)(*args)
            loop = [
                function(*(t[i] if d == 0 else t for t, d in zip(args, dims, strict=True)))
                for i in range(5)
            ]
            for a, b in zip(
                torch.utils._pytree.tree_leaves(batched),
                zip(*map(torch.utils._pytree.tree_leaves, loop), strict=True),
                strict=True,
            ):
                torch.testing.assert_close(a, torch.stack(b))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(device, backend):
    """Opaque: the bits of eager mode; the composite: its numbers."""
    x = numbers((BATCH, TOKENS, HEADS, D), torch.bfloat16, device, 0).requires_grad_()
    w = numbers((HEADS, D), torch.bfloat16, device, 1).requires_grad_()
    for norm in (F.rms_norm, F.composite_rms_norm):

        def both(x, w, norm=norm):
            return norm(x, D, w), norm(x.flatten(-2), HEADS * D, w.flatten(), group_size=D)

        compiled = torch.compile(both, backend=backend, fullgraph=True)
        found, expected = compiled(x, w), both(x, w)
        found = (*found, *torch.autograd.grad(found[0].float().pow(2).sum(), (x, w)))
        expected = (*expected, *torch.autograd.grad(expected[0].float().pow(2).sum(), (x, w)))
        for a, b in zip(found, expected, strict=True):
            if norm is F.rms_norm:
                assert same_bits(a, b)
            else:
                torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_compile_with_sizes_that_vary(device):
    norm = torch.compile(lambda x, w: F.rms_norm(x, D, w), backend="aot_eager", dynamic=True)
    for batch in (2, 3, 5):
        x = numbers((batch, TOKENS, D), torch.float32, device, 0)
        w = numbers((batch, 1, D), torch.float32, device, 1)
        assert same_bits(norm(x, w), F.rms_norm(x, D, w))


def test_export(device):
    class PerHead(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(numbers((HEADS, D), torch.float32, device, 1))

        def forward(self, x):
            return F.rms_norm(x, D, self.weight)

    x = numbers((BATCH, TOKENS, HEADS, D), torch.float32, device, 0)
    program = torch.export.export(PerHead(), (x,))
    assert same_bits(program.module()(x), PerHead()(x))


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize(
    "shape", [(3, D), (HEADS, 1), (1, BATCH, TOKENS, HEADS, D), (0, D), ()], ids=str
)
def test_what_does_not_broadcast_is_refused(device, name, shape):
    x = numbers((BATCH, TOKENS, HEADS, D), torch.float32, device, 0)
    message = (
        f"{name} must have shape [8], the size of input's last dimension, or dimensions before it"
    )
    for function in (F.rms_norm, F.composite_rms_norm):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            function(x, D, **{name: torch.ones(shape, device=device)})


def test_a_weight_does_not_widen_the_input(device):
    """(HEADS, D) over one row would broadcast the input to the weight."""
    x = numbers((1, D), torch.float32, device, 0)
    with pytest.raises(RuntimeError, match="weight must have shape"):
        F.rms_norm(x, D, torch.ones(HEADS, D, device=device))


def test_normalized_shape_of_several_dimensions(device):
    x = numbers((BATCH, TOKENS, HEADS, D), torch.float64, device, 0)
    w = numbers((TOKENS, HEADS, D), torch.float64, device, 1)
    y = F.rms_norm(x, (HEADS, D), w)
    assert same_bits(y, F.rms_norm(x.flatten(-2), HEADS * D, w.flatten(-2)).view(x.shape))
    with pytest.raises(
        RuntimeError, match=re.escape("weight must have shape [4, 8], or dimensions")
    ):
        F.rms_norm(x, (HEADS, D), w[..., :2])


def test_in_place(device):
    x, r = (numbers((BATCH, TOKENS, HEADS, D), torch.float32, device, i) for i in (0, 1))
    w = numbers((HEADS, D), torch.float32, device, 2)
    y, s = F.add_rms_norm(x, r, D, w)
    F.add_rms_norm_(x, r, D, w)
    assert same_bits(x, y)
    assert same_bits(r, s)


@pytest.mark.parametrize(
    "o", [Options(), Options(1e-6, 0.5, 1.0), Options(casting_mode="llama")], ids=str
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_group_size(device, dtype, o):
    """Each group is a row of its own, under its part of the weight."""
    x = numbers((BATCH, TOKENS, HEADS * D), dtype, device, 0)
    w, b = (numbers(HEADS * D, dtype, device, i) for i in (1, 2))
    args = dict(bias=b, **o.keywords())
    y = F.rms_norm(x, HEADS * D, w, o.eps, group_size=D, **args)
    for g in range(HEADS):
        part = slice(g * D, (g + 1) * D)
        assert_forward(y[..., part].contiguous(), x[..., part], w[part], b[part], o)
    composite = F.composite_rms_norm(x, HEADS * D, w, o.eps, group_size=D, **args)
    torch.testing.assert_close(y, composite)
    r = numbers(x.shape, dtype, device, 3)
    z, s = F.add_rms_norm(x, r, HEADS * D, w, o.eps, group_size=D, **args)
    assert same_bits(s, x + r)
    assert same_bits(z, F.rms_norm(s, HEADS * D, w, o.eps, group_size=D, **args))
    F.add_rms_norm_(x, r, HEADS * D, w, o.eps, group_size=D, **args)
    assert same_bits(x, z)
    assert same_bits(r, s)


def test_group_size_gradients(device):
    x, w = leaf((BATCH, HEADS * D), device), leaf(HEADS * D, device, 1)
    norm = lambda x, w: F.rms_norm(x, HEADS * D, w, group_size=D)  # noqa: E731
    assert gradcheck(norm, (x, w), check_forward_ad=True, fast_mode=True)
    dx, dw = torch.autograd.grad(norm(x, w).pow(2).sum(), (x, w))
    assert dw.shape == w.shape
    y = norm(x, w).detach()
    grouped = (t.detach().unflatten(-1, (HEADS, D)) for t in (x, w))
    expected = gradients(*grouped, None, 2 * y.unflatten(-1, (HEADS, D)), Options())
    torch.testing.assert_close(dx, expected[0].flatten(-2))
    torch.testing.assert_close(dw, expected[1].flatten(-2))


def test_group_size_of_modules(device):
    x = numbers((BATCH, HEADS * D), torch.float32, device, 0)
    module = RMSNorm(HEADS * D, group_size=D, bias=True).to(device)
    assert "group_size=8" in repr(module)
    assert {k: v.shape for k, v in module.state_dict().items()} == {
        "weight": (HEADS * D,), "bias": (HEADS * D,)
    }  # fmt: skip
    assert same_bits(
        module(x), F.rms_norm(x, HEADS * D, module.weight, bias=module.bias, group_size=D)
    )
    p = PRMSNorm(HEADS * D, 0.25, group_size=D).to(device)
    assert same_bits(p(x), F.rms_norm(x, HEADS * D, p.weight, group_size=D, p=0.25))
    add = AddRMSNorm(HEADS * D, group_size=D).to(device)
    assert same_bits(add(x, x)[0], F.rms_norm(x + x, HEADS * D, add.weight, group_size=D))
    for m, args in ((module, (x,)), (add, (x, x))):
        assert same_bits(torch.jit.script(m)(*args)[0], m(*args)[0])


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (
            3,
            ValueError,
            "group_size must be a positive number that divides the 8 elements of a row, but got 3",
        ),
        (0, ValueError, "group_size must be a positive number that divides"),
        (-8, ValueError, "group_size must be a positive number that divides"),
        (2.0, TypeError, "group_size must be None or an int, but got float"),
        (True, TypeError, "group_size must be None or an int, but got bool"),
    ],
)
def test_what_is_no_group_size(value, kind, message):
    x = torch.ones(2, D)
    for call in (
        lambda: F.rms_norm(x, D, group_size=value),
        lambda: F.composite_rms_norm(x, D, group_size=value),
        lambda: F.add_rms_norm(x, x, D, group_size=value),
        lambda: F.add_rms_norm_(x.clone(), x.clone(), D, group_size=value),
        lambda: F.rms_norm_gated(x, x, D, group_size=value),
        lambda: RMSNorm(D, group_size=value),
    ):
        with pytest.raises(kind, match=re.escape(message)):
            call()
