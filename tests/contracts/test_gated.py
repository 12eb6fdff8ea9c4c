"""rms_norm_gated and RMSNormGated: norm(x) * act(z), or norm(x * act(z))."""

import copy
import itertools
import re
from dataclasses import replace

import pytest
import torch
from cases import LAYOUTS, SEEDS, N, affine_type, lay_out, numbers
from gated_families import FAMILIES, fused_twin
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    FLOATS,
    Options,
    arithmetic_type,
    as_exact,
    rms_error,
    rms_norm_gated,
    same_bits,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import silu

from fused_rmsnorm import RMSNorm, RMSNormGated
from fused_rmsnorm import functional as F

ops = torch.ops.fused_rmsnorm
ORDERS = [True, False]
ACTIVATIONS = ["silu", "sigmoid"]


def leaf(shape, device="cpu", seed=0, dtype=torch.float64):
    return numbers(shape, dtype, device, seed).requires_grad_()


def composed(x, z, w, b, o: Options, activation: str, norm_before_gate: bool):
    """What people write: torch's own operations in the arithmetic type, rounded at the end."""
    acc = arithmetic_type(x.dtype)
    act = silu(z.to(acc)) if activation == "silu" else torch.sigmoid(z.to(acc))
    rows = x.to(acc) if norm_before_gate else x.to(acc) * act
    n = x.shape[-1]
    y = torch.rms_norm(rows, (n,), eps=o.eps_for(x.dtype))
    if w is not None:
        y = y * (w.to(acc) + o.weight_offset)
    if b is not None:
        y = y + b.to(acc)
    return (y * act if norm_before_gate else y).to(x.dtype)


def fused(x, z, w, b, o: Options, activation: str, norm_before_gate: bool, norm=F.rms_norm_gated):
    return norm(
        x, z, x.shape[-1], w, o.eps, bias=b, activation=activation,
        norm_before_gate=norm_before_gate, **o.keywords(),
    )  # fmt: skip


def with_gradients(function, tensors, dy):
    leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    given = [t for t in leaves if t is not None]
    return [y.detach(), *torch.autograd.grad(y, given, dy.to(y.dtype))]


@given(
    leading=st.sampled_from([(1,), (3,), (5, 1), (3, 4), (2, 3, 2)]),
    n=N,
    dtype=st.sampled_from(FLOATS),
    weight_type=st.sampled_from([None, "same", "fp32"]),
    with_bias=st.booleans(),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    activation=st.sampled_from(ACTIVATIONS),
    norm_before_gate=st.booleans(),
    weight_offset=st.sampled_from([0.0, 1.0]),
    seed=SEEDS,
)
def test_no_less_exact_than_composed_operations(
    device, leading, n, dtype, weight_type, with_bias, layouts, activation, norm_before_gate,
    weight_offset, seed,
):  # fmt: skip
    """Value and every gradient against fp64, judged by the error of torch's own operations."""
    o = Options(1e-5, None, weight_offset if weight_type else 0.0)
    x, z = (
        lay_out(numbers((*leading, n), dtype, device, seed + i), layout)
        for i, layout in enumerate(layouts)
    )
    w = b = None
    if weight_type is not None:
        w = numbers(n, affine_type(weight_type, dtype), device, seed + 2)
        b = numbers(n, w.dtype, device, seed + 3) if with_bias else None
    dy = numbers(x.shape, dtype, device, seed + 4)
    args = (o, activation, norm_before_gate)
    tensors = (x, z, w, b)
    ours = with_gradients(lambda *t: fused(*t, *args), tensors, dy)
    theirs = with_gradients(lambda *t: composed(*t, *args), tensors, dy)
    in_fp64 = [t if t is None else t.double() for t in tensors]
    exact = with_gradients(lambda *t: rms_norm_gated(*t, *args), in_fp64, dy)
    assert ours[0].is_contiguous()
    for name, a, t, e in zip(["y", "x", "z", "w", "b"], ours, theirs, exact, strict=False):
        assert (a.shape, a.dtype) == (t.shape, t.dtype)
        unit = torch.finfo(a.dtype).eps + 4 * torch.finfo(arithmetic_type(dtype)).eps
        exact_e = as_exact(e)
        if not exact_e.any():
            assert not a.any()
            continue
        # A row of one number has a gradient that is all cancellation.
        if n == 1 and name in "xz":
            continue
        assert rms_error(a, exact_e) <= 1.5 * rms_error(t, exact_e) + unit, name


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("norm_before_gate", ORDERS)
@pytest.mark.parametrize("o", [Options(1e-5, 0.25), Options(1e-5, 0.5, 1.0, "llama")], ids=str)
def test_options(device, dtype, norm_before_gate, o):
    """p and llama mode, against the definition in fp64 (llama: to the rounding of the norm)."""
    x, z = (numbers((7, 64), dtype, device, i) for i in (0, 1))
    w = numbers(64, dtype, device, 2)
    y = fused(x, z, w, None, o, "silu", norm_before_gate)
    exact = rms_norm_gated(x, z, w, None, o, "silu", norm_before_gate)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=4 * unit, atol=4 * unit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_type", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_as_in_transformers(device, family, dtype, weight_type):
    """Each family's module: dtype and roundings of the result. The same bits where a family rounds
    before a last product; else single roundings of fp32 that another order of sums may turn."""
    theirs = FAMILIES[family]().to(device, weight_type)
    torch.nn.init.normal_(theirs.weight)
    ours = fused_twin(theirs, family).to(device, weight_type)
    ours.load_state_dict(theirs.state_dict())
    x, z = (numbers((2, 33, 64), dtype, device, seed) for seed in (0, 1))
    y, expected = ours(x, z), theirs(x, z)
    assert y.dtype == expected.dtype
    if dtype == torch.float32:
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    else:
        # fp32 sums in another order turn a rounding now and then; another order of roundings
        # turns every fourth.
        different = (y != expected).float().mean().item()
        assert different <= 2e-3, different
        torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    if "qwen" not in family:  # whose module has no call without a gate
        # Without the gate FalconH1's is the plain norm in fp32, the others' the Llama family's.
        plain, expected = ours(x), theirs(x)
        assert plain.dtype == expected.dtype
        assert (plain != expected).float().mean().item() <= (2e-3 if dtype != torch.float32 else 1)
        torch.testing.assert_close(plain, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm_before_gate", ORDERS)
@pytest.mark.parametrize("affine", list(itertools.product([False, True], repeat=2)), ids=str)
@pytest.mark.parametrize(
    "o", [Options(1e-3), Options(1e-3, 0.3, 1.0), Options(1e-3, None, 0, "llama")]
)
def test_gradcheck(device, o, affine, norm_before_gate, activation):
    """Reverse, forward, batched and second derivatives against finite differences."""
    x, z = leaf((3, 7), device), leaf((3, 7), device, 1)
    w, b = (leaf(7, device, i + 2) if given else None for i, given in enumerate(affine))
    o = o if affine[0] else replace(o, weight_offset=0.0)  # which needs a weight
    norm = lambda *t: fused(*t, o, activation, norm_before_gate)  # noqa: E731
    args = (x, z, w, b)
    assert gradcheck(
        norm, args, check_forward_ad=True, check_batched_grad=True,
        check_batched_forward_grad=True, fast_mode=True,
    )  # fmt: skip
    assert gradgradcheck(
        norm, args, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True
    )


@pytest.mark.parametrize("norm_before_gate", ORDERS)
def test_gradcheck_in_full(device, norm_before_gate):
    x, z, w, b = (
        leaf((2, 4), device),
        leaf((2, 4), device, 1),
        leaf(4, device, 2),
        leaf(4, device, 3),
    )
    norm = lambda *t: fused(*t, Options(0.1, 0.5), "silu", norm_before_gate)  # noqa: E731
    assert gradcheck(norm, (x, z, w, b), check_forward_ad=True)
    assert gradgradcheck(norm, (x, z, w, b))


@pytest.mark.parametrize("norm_before_gate", ORDERS)
def test_third_derivative(device, norm_before_gate):
    x, z = leaf((2, 5), device), leaf((2, 5), device, 1)

    def second(x, z):
        y = F.rms_norm_gated(x, z, 5, norm_before_gate=norm_before_gate)
        g = torch.autograd.grad(y.pow(3).sum(), (x, z), create_graph=True)
        return torch.autograd.grad(sum(t.pow(2).sum() for t in g), (x, z), create_graph=True)

    assert gradcheck(second, (x, z), fast_mode=True)


@pytest.mark.parametrize("norm_before_gate", ORDERS)
def test_only_what_is_asked_for(device, norm_before_gate):
    x, z = (numbers((3, 8), torch.float32, device, i) for i in (0, 1))
    w, b = (numbers(8, torch.float32, device, i) for i in (2, 3))
    y, rstd = ops.rms_norm_gated_fwd(x, z, w, b, "silu", norm_before_gate)
    every = ops.rms_norm_gated_bwd(y, x, z, w, b, rstd, [True] * 4, "silu", norm_before_gate)
    for mask in itertools.product([False, True], repeat=4):
        some = ops.rms_norm_gated_bwd(y, x, z, w, b, rstd, mask, "silu", norm_before_gate)
        for wanted, a, e in zip(mask, some, every, strict=True):
            assert same_bits(a, e) if wanted else a is None or a.numel() == 0


def test_opcheck(device):
    for norm_before_gate in ORDERS:
        x, z = leaf((3, 8), device, 0, torch.float32), leaf((3, 8), device, 1, torch.float32)
        w, b = leaf(8, device, 2, torch.float32), leaf(8, device, 3, torch.float32)
        args = (x, z, w, b, "sigmoid", norm_before_gate, 1e-5, 0.5, 1.0, "llama")
        for op in (ops.rms_norm_gated, ops.rms_norm_gated_fwd, ops.rms_norm_gated_composite):
            torch.library.opcheck(op.default, args)
        rstd = ops.rms_norm_gated_fwd(*args)[1].detach()
        args = (x.detach(), x, z, w, b, rstd, [True] * 4, *args[4:])
        torch.library.opcheck(ops.rms_norm_gated_bwd.default, args)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (8,), (1, 1), (3, 0)], ids=str)
def test_shapes(device, shape):
    x, z = leaf(shape, device), leaf(shape, device, 1)
    w = leaf(shape[-1], device, 2)
    y = F.rms_norm_gated(x, z, shape[-1], w)
    assert y.shape == x.shape
    grads = torch.autograd.grad(y.sum(), (x, z, w))
    assert [g.shape for g in grads] == [x.shape, z.shape, w.shape]
    if x.numel() == 0:
        assert not grads[2].any()


def test_normalized_shape_of_several_dimensions_and_groups(device):
    x, z = (numbers((2, 3, 4, 8), torch.float64, device, i) for i in (0, 1))
    w, b = (numbers((4, 8), torch.float64, device, i) for i in (2, 3))
    y = F.rms_norm_gated(x, z, (4, 8), w, bias=b, group_size=16)
    flat = F.rms_norm_gated(
        x.view(6, 2, 16), z.view(6, 2, 16), 16, w.view(2, 16), bias=b.view(2, 16)
    )
    assert same_bits(y, flat.view(x.shape))


def test_large_gates(device):
    """Where exp overflows, and where it vanishes."""
    z = torch.tensor([[-200.0, -104, -88, -30, -1, 0, 1, 30, 88, 104, 200]], device=device)
    x = torch.ones_like(z)
    for activation, norm_before_gate in itertools.product(ACTIVATIONS, ORDERS):
        args = (Options(1e-3), activation, norm_before_gate)
        dy = torch.ones_like(x)
        ours = with_gradients(lambda x, z, a=args: fused(x, z, None, None, *a), (x, z), dy)
        exact = with_gradients(
            lambda x, z, a=args: rms_norm_gated(x, z, None, None, *a), (x.double(), z.double()), dy
        )
        for a, e in zip(ours, exact, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("norm_before_gate", ORDERS)
def test_vmap(device, norm_before_gate):
    x, z = (numbers((5, 3, 8), torch.float64, device, i) for i in (0, 1))
    w = numbers((5, 8), torch.float64, device, 2)
    norm = lambda x, z, w: F.rms_norm_gated(x, z, 8, w, norm_before_gate=norm_before_gate)  # noqa: E731
    loss = lambda *t: norm(*t).pow(3).sum()  # noqa: E731
    leaves = torch.utils._pytree.tree_leaves
    for function in (norm, torch.func.grad(loss, (0, 1, 2))):
        for dims in itertools.product([0, None], repeat=3):
            if dims == (None, None, None):
                continue
            args = [t if d == 0 else t[0] for t, d in zip((x, z, w), dims, strict=True)]
            loop = [
                leaves(
                    function(*(t if d is None else t[i] for t, d in zip(args, dims, strict=True)))
                )
                for i in range(5)
            ]
            batched = leaves(torch.func.vmap(function, dims)(*args))
            for a, b in zip(batched, zip(*loop, strict=True), strict=True):
                torch.testing.assert_close(a, torch.stack(b))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("mode", ["opaque", "fuse"])
def test_compile(device, mode, backend):
    """Opaque: the bits of eager mode, in both directions; fuse: plain operations, near them."""
    norm = RMSNormGated(
        32, group_size=8, bias=True, norm_before_gate=False, compile_mode=mode, dtype=torch.bfloat16
    ).to(device)
    torch.nn.init.normal_(norm.weight)
    x, z = (leaf((3, 5, 32), device, i, torch.bfloat16) for i in (0, 1))
    inputs = (x, z, norm.weight, norm.bias)

    def run(module):
        y = module(x, z)
        return y, *torch.autograd.grad(y.float().pow(2).sum(), inputs)

    compiled = torch.compile(norm, backend=backend, fullgraph=True)
    for a, b in zip(run(compiled), run(norm), strict=True):
        if mode == "opaque":
            assert same_bits(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_compiled_autograd(device):
    norm = RMSNormGated(16, 1e-5, p=0.5, activation="sigmoid", norm_before_gate=False).to(device)
    x, z = leaf((3, 16), device, 0, torch.float32), leaf((3, 16), device, 1, torch.float32)
    expected = torch.autograd.grad(norm(x, z).pow(2).sum(), (x, z))
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        y = norm(x, z).pow(2).sum()
        y.backward()
    assert same_bits(x.grad, expected[0])
    assert same_bits(z.grad, expected[1])


def test_autocast(device):
    """x's dtype out, the bits of the same call outside."""
    norm = RMSNormGated(16).to(device)
    x, z = numbers((3, 16), torch.bfloat16, device, 0), numbers((3, 16), torch.float32, device, 1)
    with torch.autocast(device, torch.bfloat16):
        y = norm(x, z)
    assert y.dtype == torch.bfloat16
    assert same_bits(y, norm(x, z))


def test_export_script_and_copy(device):
    norm = RMSNormGated(16, group_size=8, activation="sigmoid").to(device)
    x, z = (numbers((3, 16), torch.float32, device, i) for i in (0, 1))
    y = norm(x, z)
    assert same_bits(torch.export.export(norm, (x, z)).module()(x, z), y)
    scripted = torch.jit.script(norm)
    assert same_bits(scripted(x, z), y)
    assert same_bits(scripted(x), norm(x))
    assert same_bits(copy.deepcopy(norm)(x, z), y)


def test_module(device):
    norm = RMSNormGated(16, 1e-5, bias=True, norm_before_gate=False, weight_offset=1.0).to(device)
    assert isinstance(norm, torch.nn.RMSNorm)
    assert set(norm.state_dict()) == {"weight", "bias"}
    assert not norm.weight.any()
    assert repr(norm).endswith("activation='silu', norm_before_gate=False)")
    x, z = (numbers((3, 16), torch.float32, device, i) for i in (0, 1))
    expected = F.rms_norm_gated(
        x, z, 16, norm.weight, 1e-5, bias=norm.bias, norm_before_gate=False, weight_offset=1.0
    )
    assert same_bits(norm(x, z), expected)
    plain = RMSNorm(16, 1e-5, bias=True, weight_offset=1.0).to(device)
    assert same_bits(norm(x), plain(x))


class Subclass(torch.Tensor):
    calls: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(getattr(func, "__name__", ""))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_torch_function():
    Subclass.calls.clear()
    x = torch.ones(2, 8)
    F.rms_norm_gated(x, x.as_subclass(Subclass), 8)
    F.composite_rms_norm_gated(x, x.as_subclass(Subclass), 8)
    assert "rms_norm_gated" in Subclass.calls
    assert "composite_rms_norm_gated" in Subclass.calls


x8 = torch.ones(4, 8)
BAD = [
    ({"gate": torch.ones(4, 1)}, RuntimeError, "gate must end in normalized_shape [8]"),
    ({"gate": torch.ones(1, 8)}, RuntimeError, "gate must have input's shape [4, 8], but got"),
    ({"gate": x8.long()}, TypeError, "gate must have dtype float16, bfloat16, float32 or"),
    ({"gate": x8.to(torch.complex64)}, TypeError, "gate must have dtype float16"),
    ({"gate": x8.to("meta")}, RuntimeError, "gate must be on input's device cpu"),
    ({"gate": None}, TypeError, "gate must be a Tensor, but got NoneType"),
    ({"gate": x8.to_sparse()}, TypeError, "gate must be a strided tensor"),
    ({"input": x8.to(torch.complex64)}, TypeError, "input must have dtype float16"),
    ({"weight": torch.ones(7)}, RuntimeError, "weight must have shape [8]"),
    ({"bias": torch.ones(7)}, RuntimeError, "bias must have shape [8]"),
    ({"activation": "gelu"}, ValueError, 'activation must be "silu" or "sigmoid", but got "gelu"'),
    ({"activation": None}, TypeError, "activation must be a string, but got NoneType"),
    ({"norm_before_gate": 1}, TypeError, "norm_before_gate must be a bool, but got int"),
    ({"weight_offset": 1.0}, ValueError, "weight_offset must be 0 without a weight"),
    ({"p": 2.0}, ValueError, "p must be None or a number in (0, 1]"),
    ({"casting_mode": "x"}, ValueError, "casting_mode must be"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "kind", "message"), BAD, ids=lambda v: str(v)[:40])
def test_errors(wrong, kind, message):
    args = {"input": x8, "gate": x8, "normalized_shape": 8, **wrong}
    for function in (F.rms_norm_gated, F.composite_rms_norm_gated):
        with pytest.raises(kind, match=re.escape(message)):
            function(**args)


def test_module_errors():
    with pytest.raises(ValueError, match='activation must be "silu" or "sigmoid"'):
        RMSNormGated(8, activation="relu")
