"""torch.compile: whole graphs; opaque mode with the bits of eager mode, y and every gradient; fuse
mode, which shows plain operations, within the bounds of the definition."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from cases import LAYOUTS, OPTION_SETS, lay_out, numbers
from compiling import assert_same_bits, bits_of, compiled, leaf, operators_compiled
from reference import Options, assert_backward, assert_forward, same_bits
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache, run_and_get_code

from fused_rmsnorm import AddRMSNorm, PRMSNorm, RMSNorm, replace_rms_norm_
from fused_rmsnorm import functional as F

N = 72
FORWARD = {"fused_rmsnorm.rms_norm_fwd.default", "fused_rmsnorm.add_rms_norm_fwd.default"}
BACKWARD = {"fused_rmsnorm.rms_norm_bwd.default"}
# x and weight
TYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("o", OPTION_SETS, ids=str)
def test_opaque_mode_has_the_bits_of_eager(o, types):
    """Norm and norm with the add, with weight and bias; y, the sum, and every gradient."""
    x, residual = (leaf((5, N), i, types[0]) for i in range(2))
    w, b = (leaf(N, i + 2, types[1]) for i in range(2))

    def norms(x, residual, w, b):
        y = F.rms_norm(x, N, w, o.eps, bias=b, **o.keywords())
        return (y, *F.add_rms_norm(x, residual, N, w, o.eps, bias=b, **o.keywords()))

    assert_same_bits(norms, x, residual, w, b)


@pytest.mark.parametrize(
    "norm",
    [
        RMSNorm(N),
        RMSNorm(N, elementwise_affine=False),
        RMSNorm((8, 9), bias=True),
        PRMSNorm(N, 0.1, weight_offset=1.0, casting_mode="llama"),
        AddRMSNorm((8, 9), bias=True, p=0.5),
    ],
    ids=str,
)
def test_modules(norm):
    shape = (3, 4, *norm.normalized_shape)
    args = [leaf(shape, i) for i in range(1 + isinstance(norm, AddRMSNorm))]
    assert_same_bits(norm, *args)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_input_and_gradient(layout):
    """Also an expanded gradient, as that of a sum is."""
    x = lay_out(numbers((3, 4, N), torch.float32, "cpu", 0), layout).requires_grad_()
    w = leaf(N, 1)
    assert_same_bits(lambda x, w: F.rms_norm(x, N, w), x, w)
    assert_same_bits(lambda x, w: F.rms_norm(x, N, w).sum(), x, w)
    assert_same_bits(lambda x, w: lay_out_gradient(F.rms_norm(x, N, w), layout), x, w)


def lay_out_gradient(y, layout):
    """y in another order, so that its gradient arrives with strides."""
    return y.transpose(0, 1) if "transposed" in layout else y.flip(0)[..., ::2]


class Norms(nn.Module):
    """Every option, each norm with an input of its own: one compilation for all of them."""

    KINDS = (
        (RMSNorm, {}, torch.float32, torch.float32),
        (PRMSNorm, {"p": 0.3, "eps": 1e-3}, torch.float32, torch.float32),
        (RMSNorm, {"weight_offset": 1.0, "bias": True}, torch.bfloat16, torch.float32),
        (RMSNorm, {"casting_mode": "llama"}, torch.bfloat16, torch.bfloat16),
        (RMSNorm, {"p": 0.5, "bias": True}, torch.float16, torch.float16),
        (AddRMSNorm, {}, torch.bfloat16, torch.bfloat16),
    )

    def __init__(self, compile_mode):
        super().__init__()
        norms = []
        for i, (kind, options, _, weight_type) in enumerate(self.KINDS):
            norm = kind(N, dtype=weight_type, compile_mode=compile_mode, **options)
            for j, parameter in enumerate(norm.parameters()):
                parameter.data.copy_(numbers(N, weight_type, "cpu", 10 * i + j))
            norms.append(norm)
        self.norms = nn.ModuleList(norms)

    def inputs(self):
        return [leaf((5, N), i, x_type) for i, (_, _, x_type, _) in enumerate(self.KINDS)]

    def forward(self, *inputs):
        *plain, last = zip(self.norms, inputs, strict=True)
        norm, x = last
        return (*(n(t) for n, t in plain), *norm(x, x))


def test_inductor_opaque():
    """Training, no_grad and inference_mode: one set of bits."""
    norms = Norms("opaque")
    x = norms.inputs()
    assert_same_bits(norms, *x, backend="inductor")
    with torch.no_grad():
        expected = norms(*x)
        actual = compiled(norms, "inductor")(*x)
    assert all(same_bits(a, e) for a, e in zip(actual, expected, strict=True))
    with torch.inference_mode():
        inferred = compiled(norms, "inductor")(*x)
    assert all(t.is_inference() for t in inferred)
    assert all(same_bits(a, e) for a, e in zip(inferred, expected, strict=True))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_fuse_mode_is_right(backend):
    """Forward and backward of every option, against the definition in fp64."""
    model = Norms("fuse")
    inputs = model.inputs()
    y = compiled(model, backend)(*inputs)
    y, total = y[:-1], y[-1]
    dy = [numbers(t.shape, t.dtype, "cpu", 60 + i) for i, t in enumerate(y)]
    parameters = [list(norm.parameters()) for norm in model.norms]
    leaves = [t for x, ps in zip(inputs, parameters, strict=True) for t in (x, *ps)]
    grads = iter(torch.autograd.grad(y, leaves, dy))
    eager = Norms("opaque")
    eager_y = eager(*inputs)
    eager_dx = torch.autograd.grad(eager_y[:-1], inputs, dy)
    for i, norm in enumerate(model.norms):
        o = Options.of(norm)
        x, dx = inputs[i], next(grads)
        dw, db = next(grads), None if norm.bias is None else next(grads)
        if isinstance(norm, AddRMSNorm):
            assert same_bits(total, eager_y[-1])
            x = total
        # A gradient through the sum, or through llama's rounding (as in transformers), is rounded
        # on its way: that is one step of its dtype more than the definition's bound has.
        if isinstance(norm, AddRMSNorm) or o.casting_mode == "llama":
            step = 2 * torch.finfo(dx.dtype).eps * eager_dx[i].abs().amax(-1, keepdim=True)
            assert ((dx - eager_dx[i]).abs() <= step).all()
            dx = None
        assert_forward(y[i], x, norm.weight, norm.bias, o)
        assert_backward((dx, dw, db), x, norm.weight, norm.bias, dy[i], o)


def test_opaque_mode_keeps_the_fused_operators():
    x = leaf((4, N))
    assert operators_compiled(RMSNorm(N), x) >= {"fused_rmsnorm.rms_norm_fwd.default"} | BACKWARD
    seen = operators_compiled(AddRMSNorm(N), x, leaf((4, N), 1))
    assert seen >= {"fused_rmsnorm.add_rms_norm_fwd.default"} | BACKWARD
    plain = {name for name in seen if name.startswith(("aten.", "prims."))}
    assert plain <= {"aten.expand.default", "aten.detach.default"}  # nothing is copied or cast


@pytest.mark.parametrize("kind", [RMSNorm, AddRMSNorm])
def test_fuse_mode_shows_plain_operations(kind):
    args = [leaf((4, N), i) for i in range(1 + (kind is AddRMSNorm))]
    seen = operators_compiled(kind(N, compile_mode="fuse"), *args)
    assert seen
    assert all(name.startswith(("aten.", "prims.")) or "getitem" in name for name in seen)


def test_fuse_mode_fuses_with_its_neighbours():
    """Residual add, norm and activation become one loop nest; opaque, the norm stands between."""

    def code(mode):
        norm = RMSNorm(N, compile_mode=mode)
        model = compiled(lambda x, r: nn.functional.silu(norm(x + r)) * 2, "inductor")
        with torch.no_grad():
            _, (source,) = run_and_get_code(model, leaf((4, N)), leaf((4, N), 1))
        return source

    fuse, opaque = code("fuse"), code("opaque")
    calls = r"^ +cpp_fused\w*\(|= torch\.ops\.fused_rmsnorm\.rms_norm_fwd\.default\("
    assert len(re.findall(calls, fuse, re.MULTILINE)) == 1
    assert len(re.findall(calls, opaque, re.MULTILINE)) == 3


@pytest.mark.parametrize("mode", ["opaque", "fuse"])
def test_autocast_inside(mode):
    """x's dtype out, as in eager mode; and around the call."""
    model = nn.Sequential(nn.Linear(N, N), RMSNorm(N, compile_mode=mode), nn.Linear(N, N))
    x = leaf((4, N))

    def inside(x):
        with torch.autocast("cpu", torch.bfloat16):
            h = model[0](x)
            return h, model[1](h), model[2](model[1](h))

    h, y, out = compiled(inside)(x)
    assert (h.dtype, y.dtype, out.dtype) == (torch.bfloat16,) * 3
    assert_forward(y, h, model[1].weight, None, Options())
    with torch.autocast("cpu", torch.bfloat16):
        around = compiled(model)(x)
        eager = model(x)
    assert same_bits(around, out)
    if mode == "opaque":
        assert same_bits(out, eager)
        assert_same_bits(inside, x)


def test_options_changed_after_compiling():
    """The attributes of a module are guarded: none is baked in for ever."""
    norm = RMSNorm(N)
    model = compiled(norm)
    x = leaf((4, N))
    model(x)
    for name, value in (
        ("eps", 0.5),
        ("p", 0.3),
        ("p", 0.4),
        ("weight_offset", 1.0),
        ("casting_mode", "llama"),
    ):
        setattr(norm, name, value)
        assert same_bits(model(x), norm(x)), name
    norm.compile_mode = "fuse"
    assert FORWARD & operators_compiled(norm, x) == set()


def test_eps_and_p_as_arguments():
    """Numbers that vary from call to call."""
    x = leaf((4, N))
    function = lambda x, eps, p: F.rms_norm(x, N, None, eps, p=p)  # noqa: E731
    model = compiled(function, dynamic=True)
    for eps, p in ((1e-5, 0.5), (0.1, 0.5), (0.2, 0.25), (0.3, 0.07)):
        assert same_bits(model(x, eps, p), function(x, eps, p))


@pytest.mark.parametrize("name", ["eps", "p", "weight_offset"])
@pytest.mark.parametrize("make", [torch.tensor, np.float64, np.float32, Fraction])
@pytest.mark.parametrize("norm", ["rms_norm", "composite_rms_norm", "add_rms_norm"])
def test_numbers_as_in_eager_mode(norm, make, name):
    """Those of torch and numpy, too, made inside of what is compiled."""
    x, w = leaf((4, N)), numbers(N, torch.float32, "cpu", 1)
    xs = (x, x) if norm == "add_rms_norm" else (x,)

    def function(*xs):
        return getattr(F, norm)(*xs, N, w, **{name: make(0.5)})

    model = torch.compile(function, fullgraph=make is not np.float32, backend="aot_eager")
    for a, e in zip(model(*xs), function(*xs), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [torch.tensor(0.5), np.float32(0.5)], ids=repr)
def test_a_number_that_is_only_known_when_it_runs(value):
    """It ends the graph, as in torch.nn.functional.rms_norm, and is taken."""
    x = leaf((4, N))
    function = lambda x, eps: F.rms_norm(x, N, None, eps)  # noqa: E731
    model = torch.compile(function, backend="aot_eager")
    assert same_bits(model(x, value), function(x, value))
    norm = RMSNorm(N)
    norm.eps = value
    assert same_bits(torch.compile(norm, backend="aot_eager")(x), norm(x))


@pytest.mark.parametrize(
    "value", [True, torch.ones(2), torch.ones((), requires_grad=True)], ids=["bool", "dims", "grad"]
)
def test_what_is_no_number_in_eager_mode_is_none_compiled(value):
    with pytest.raises(TypeError, match="eps must be a number"):
        torch.compile(lambda x: F.rms_norm(x, N, None, value), backend="eager")(leaf((4, N)))


def test_a_replaced_model():
    """replace_rms_norm_ before compiling, after it, and through the compiled module."""
    x = leaf((4, N))
    make = lambda: nn.Sequential(nn.Linear(N, N), nn.RMSNorm(N), nn.GELU())  # noqa: E731
    model = make()
    replace_rms_norm_(model)
    assert_same_bits(model, x)
    model = make()
    after = compiled(model)
    after(x)
    replace_rms_norm_(model)
    assert same_bits(after(x), model(x))
    assert "fused_rmsnorm.rms_norm_fwd.default" in operators_compiled(model, x)
    model = make()
    outer = compiled(model)
    replaced = replace_rms_norm_(outer)
    assert len(replaced) == 1
    assert isinstance(model[1], RMSNorm)
    assert same_bits(outer(x), model(x))


def test_module_compile_in_place():
    norm = RMSNorm(N)
    x = leaf((4, N))
    expected = norm(x)
    norm.compile(fullgraph=True, backend="aot_eager")
    assert same_bits(norm(x), expected)


def test_add_in_place():
    """Written into the arguments, which are also what is returned; over several dimensions, too."""
    for shape in ((N,), (8, 9)):
        x, residual = (numbers((3, *shape), torch.float32, "cpu", i) for i in range(2))
        expected = F.add_rms_norm(x, residual, shape)
        result = compiled(lambda x, r, s=shape: F.add_rms_norm_(x, r, s))(x, residual)
        assert result[0] is x
        assert result[1] is residual
        assert all(same_bits(a, e) for a, e in zip(result, expected, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: F.rms_norm(x, N, p=7.0), r"p must be None or a number in \(0, 1\]"),
        (lambda x: F.rms_norm(x, N, torch.ones(3)), "weight must have shape"),
        (lambda x: F.rms_norm(x, N + 1), "input must end in normalized_shape"),
        (lambda x: F.add_rms_norm(x, x[:1], N), "residual must have input's shape"),
        (lambda x: F.rms_norm(x.long(), N), "input must have a floating-point or complex dtype"),
    ],
    ids=["p", "weight", "input's shape", "residual", "input's dtype"],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(Exception, match=message):
        compiled(call)(torch.ones(4, N))


@pytest.mark.parametrize("mode", ["opaque", "fuse"])
def test_errors_of_the_add(mode):
    """A plain sum would promote and broadcast."""
    x = torch.ones(4, N)
    for residual, message in (
        (x.half(), "residual must have input's dtype"),
        (x[:1], "residual must have input's shape"),
    ):
        with pytest.raises(Exception, match=message):
            compiled(AddRMSNorm(N, compile_mode=mode))(x, residual)


@pytest.mark.skipif(
    torch.compiler.config.force_disable_caches, reason="the environment forces the caches off"
)
def test_compile_caches_take_the_operators():
    """Nothing here keeps a graph out of the cache that makes the next start fast."""
    norm = AddRMSNorm(N, p=0.5, bias=True)
    x, residual = leaf((4, N)), leaf((4, N), 1)
    with fresh_cache():
        for _ in range(2):
            torch._dynamo.reset()
            bits_of(compiled(norm, "inductor"), (x, residual))
    cache = counters["aot_autograd"]
    assert (cache["autograd_cache_saved"], cache["autograd_cache_hit"]) == (1, 1)
    assert cache["autograd_cache_bypass"] == 0
