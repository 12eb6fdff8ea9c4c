"""torch.func and forward mode: every transform, alone and nested, against the same transform of the
definition in fp64; and that a batch of rows stays on the fused operators."""

import pytest
import torch
from cases import OPTION_SETS, numbers
from fused_calls import Calls
from reference import Options, rms_norm, same_bits
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from fused_rmsnorm import AddRMSNorm, PRMSNorm, RMSNorm
from fused_rmsnorm import functional as F

N = 6


def fused(o: Options):
    return lambda x, w, b: F.rms_norm(x, N, w, o.eps, bias=b, **o.keywords())


def defined(o: Options):
    return lambda x, w, b: rms_norm(x, w, b, o)


def operands(*leading, dtype=torch.float64):
    return [numbers(s, dtype, "cpu", i) for i, s in enumerate([(*leading, N), N, N])]


def scalar(function):
    """A loss with curvature of its own."""
    return lambda *args: function(*args).sin().sum()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


TRANSFORMS = {
    "grad": lambda f: grad(scalar(f), argnums=(0, 1, 2)),
    "grad of grad": lambda f: grad(
        lambda *a: sum(g.cos().sum() for g in grad(scalar(f), (0, 1, 2))(*a)), (0, 1, 2)
    ),
    "jacrev": lambda f: jacrev(f, argnums=(0, 1, 2)),
    "jacfwd": lambda f: jacfwd(f, argnums=(0, 1, 2)),
    "jacrev twice": lambda f: jacrev(jacrev(scalar(f), (0, 1)), (0, 1, 2)),
    "jacfwd twice": lambda f: jacfwd(jacfwd(scalar(f), (0, 1)), (0, 1, 2)),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(scalar(f), (0, 1)), (0, 1, 2)),
    "hessian": lambda f: hessian(scalar(f), argnums=(0, 1, 2)),
    "jacfwd of hessian": lambda f: jacfwd(hessian(scalar(f), argnums=(0, 1)), argnums=(0, 1)),
}


@pytest.mark.parametrize("o", OPTION_SETS, ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_derivatives(name, o):
    args = operands(2)
    transform = TRANSFORMS[name]
    close(transform(fused(o))(*args), transform(defined(o))(*args))


def products(f, args, directions):
    """jvp and vjp, each alone, and each through the other."""
    value, pull = vjp(f, *args)
    return (
        jvp(f, args, directions),
        value,
        pull(directions[0]),
        jvp(lambda *a: vjp(f, *a)[1](directions[0]), args, directions),
        vjp(lambda *a: jvp(f, a, directions), *args)[1]((directions[0], args[0])),
    )


@pytest.mark.parametrize("o", OPTION_SETS, ids=str)
def test_products_of_the_jacobian(o):
    args = tuple(operands(2))
    directions = tuple(torch.cos(3 * t) for t in args)
    close(products(fused(o), args, directions), products(defined(o), args, directions))


def test_forward_ad_inside_torch_func_keeps_the_primal():
    """A tangent beside the fused primal, which has the bits that it has without."""
    x, w, b = operands(5, dtype=torch.float32)
    with Calls() as calls:
        y, tangent = jvp(lambda x: F.rms_norm(x, N, w, bias=b), (x,), (b.expand_as(x),))
    assert calls.fused() == {"rms_norm_fwd": 1}
    assert same_bits(y, F.rms_norm(x, N, w, bias=b))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, b.expand_as(x))
        assert same_bits(forward_ad.unpack_dual(F.rms_norm(dual, N, w)).tangent, tangent)


@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize("which", range(4), ids=["input", "gate", "weight", "bias"])
def test_forward_ad_keeps_the_primal_of_gated_norms(norm_before_gate, which):
    args = [numbers(s, torch.float32, "cpu", i) for i, s in enumerate([(64, N), (64, N), N, N])]

    def norm(*args):
        x, z, w, b = args
        return F.rms_norm_gated(x, z, N, w, bias=b, norm_before_gate=norm_before_gate)

    tangents = [torch.zeros_like(t) for t in args]
    tangents[which] = torch.ones_like(args[which])
    with Calls() as calls:
        y, tangent = jvp(norm, tuple(args), tuple(tangents))
    assert calls.fused() == {"rms_norm_gated_fwd": 1}
    assert same_bits(y, norm(*args))
    wide = [t.double() for t in args]
    _, expected = jvp(norm, tuple(wide), tuple(t.double() for t in tangents))
    torch.testing.assert_close(tangent.double(), expected, rtol=1e-4, atol=1e-4)


# in_dims of x, weight and bias; where x is batched, at which of its three dimensions.
IN_DIMS = [
    (0, None, None),
    (1, None, None),
    (2, None, None),
    (-1, None, None),
    (None, 0, None),
    (None, 1, 1),
    (None, None, 0),
    (0, None, 0),
    (1, None, 1),
    (0, 0, None),
    (1, -1, 0),
    (2, 0, 1),
]


def batch(in_dims, dtype=torch.float64, size=4):
    """x, weight and bias with a batch of ``size`` where in_dims says."""
    tensors = []
    for i, (t, dim) in enumerate(zip(operands(3, dtype=dtype), in_dims, strict=True)):
        if dim is not None:
            wide = numbers((size, *t.shape), dtype, "cpu", 10 + i)
            t = wide.movedim(0, dim).contiguous()
        tensors.append(t)
    return tensors


@pytest.mark.parametrize("o", OPTION_SETS, ids=str)
@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_vmap(in_dims, o):
    """Over x, over the weight, over both, at any dimension: forward, and every gradient."""
    args = batch(in_dims)
    for transform in (lambda f: f, TRANSFORMS["grad"], TRANSFORMS["grad of grad"]):
        ours = vmap(transform(fused(o)), in_dims)(*args)
        close(ours, vmap(transform(defined(o)), in_dims)(*args))
    directions = tuple(torch.cos(3 * t) for t in args)
    along = lambda f: lambda a, d: jvp(f, a, d)  # noqa: E731
    ours = vmap(along(fused(o)), (in_dims, in_dims))(tuple(args), directions)
    close(ours, vmap(along(defined(o)), (in_dims, in_dims))(tuple(args), directions))


@pytest.mark.parametrize("out_dims", [0, 1, -1])
def test_vmap_nested(out_dims):
    """Two levels, over different arguments, in both orders."""
    o = Options(p=0.4)
    x = numbers((2, 3, N), torch.float64, "cpu", 0)
    w = numbers((4, N), torch.float64, "cpu", 1)
    b = numbers(N, torch.float64, "cpu", 2)
    for transform in (lambda f: f, TRANSFORMS["grad"]):
        results = []
        for f in (transform(fused(o)), transform(defined(o))):
            rows = vmap(f, (0, None, None))
            results.append(
                (
                    vmap(rows, (1, None, None), out_dims)(x, w[0], b),
                    vmap(rows, (None, 0, None), out_dims)(x, w, b),
                    vmap(vmap(f, (None, 0, None)), (0, None, None), out_dims)(x, w, b),
                    vmap(rows, (0, 0, None), out_dims)(x[None].expand(4, -1, -1, -1), w, b),
                    vmap(rows, chunk_size=2, in_dims=(1, None, None))(x, w[0], b),
                )
            )
        close(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_batched_rows_are_rows(dim, dtype):
    """The fused operator once, no composite, and the bits of the rows without vmap."""
    x, w = numbers((5, 4, N), dtype, "cpu", 0), numbers(N, dtype, "cpu", 1)
    with Calls() as calls:
        y = vmap(lambda x: F.rms_norm(x, N, w), dim, dim)(x)
    assert calls.fused() == {"rms_norm_fwd": 1}
    assert calls.arithmetic() == {}
    assert same_bits(y, F.rms_norm(x, N, w))
    with Calls() as calls:
        nested = vmap(vmap(lambda x: F.rms_norm(x, N, w)))(x)
    assert (calls.fused(), calls.arithmetic()) == ({"rms_norm_fwd": 1}, {})
    assert same_bits(nested, y)
    with Calls() as calls:
        y, s = vmap(lambda x, r: F.add_rms_norm(x, r, N, w), (dim, dim), dim)(x, x.flip(0))
    assert calls.fused() == {"rms_norm_fwd": 1}
    for got, expected in zip((y, s), F.add_rms_norm(x, x.flip(0), N, w), strict=True):
        assert same_bits(got, expected)


def test_operators_under_vmap():
    """torch.ops without the functions: one call for the batch as well, not one for each sample."""
    ops = torch.ops.fused_rmsnorm
    x, w = numbers((5, 4, N), torch.float32, "cpu", 0), numbers(N, torch.float32, "cpu", 1)
    with Calls() as calls:
        y = vmap(lambda x: ops.rms_norm(x, w))(x)
        z, s = vmap(lambda x: ops.add_rms_norm(x, x, w))(x)
    assert calls.fused() == {"rms_norm_fwd": 2}
    assert same_bits(y, F.rms_norm(x, N, w))
    assert same_bits(z, F.rms_norm(s, N, w))
    with Calls() as calls:
        composed = vmap(lambda x: ops.rms_norm_composite(x, w))(x)
    assert calls.count["aten::rsqrt"] == 1
    torch.testing.assert_close(composed, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batched_gradients_of_rows_are_gradients_of_rows(dtype):
    """vmap(grad) of x: one fused backward for the batch, with the bits of the whole."""
    x, w = numbers((5, 4, N), dtype, "cpu", 0), numbers(N, dtype, "cpu", 1)
    loss = lambda x: (F.rms_norm(x, N, w) * x.detach()).sum()  # noqa: E731
    with Calls() as calls:
        dx = vmap(grad(loss))(x)
    assert calls.fused() == {"rms_norm_fwd": 1, "rms_norm_bwd": 1}
    assert calls.arithmetic().keys() <= {"mul", "sum", "ones_like"}
    leaf = x.clone().requires_grad_()
    F.rms_norm(leaf, N, w).backward(x)
    assert same_bits(dx, leaf.grad)


def test_batched_grad_outputs():
    """is_grads_batched and jacrev: many gradients of one forward stay fused, too."""
    x, w = (t.requires_grad_() for t in operands(3)[:2])
    y, expected = F.rms_norm(x, N, w), rms_norm(x, w, None, Options())
    dy = numbers((7, 3, N), torch.float64, "cpu", 5)
    batched = torch.autograd.grad(y, (x, w), dy, is_grads_batched=True, retain_graph=True)
    close(batched, torch.autograd.grad(expected, (x, w), dy, is_grads_batched=True))
    for i in range(7):
        one = torch.autograd.grad(y, (x, w), dy[i], retain_graph=True)
        close(tuple(t[i] for t in batched), one)
    with Calls() as calls:  # torch's older vmap, which calls what it does not know once for each
        torch.autograd.grad(y, x, dy, is_grads_batched=True, retain_graph=True)
    assert calls.fused() == {"rms_norm_bwd": 7}
    assert "rsqrt" not in calls.count
    pull = vjp(lambda x: F.rms_norm(x, N, w), x)[1]
    with Calls() as calls:
        (pulled,) = vmap(pull)(dy)
    assert calls.fused() == {"rms_norm_bwd": 1}
    assert "rsqrt" not in calls.count
    close(pulled, batched[0])
    first = torch.autograd.functional.jacobian(lambda x: F.rms_norm(x, N, w), x, vectorize=True)
    close(first, jacrev(lambda x: rms_norm(x, w, None, Options()))(x))


@pytest.mark.parametrize("kind", [RMSNorm, PRMSNorm, AddRMSNorm])
def test_gradients_per_sample(kind):
    """vmap(grad(f)) of a model by functional_call: what one sample after the other gives."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(4, N, dtype=torch.float64)
            self.norm = kind(N, dtype=torch.float64, bias=True)

        def forward(self, x):
            h = self.inner(x)
            return self.norm(h, h.cos())[0] if kind is AddRMSNorm else self.norm(h)

    torch.manual_seed(0)
    model = Model()
    torch.nn.init.normal_(model.norm.weight)
    x, target = (numbers((5, 3, n), torch.float64, "cpu", n) for n in (4, N))
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(parameters, x, target):
        return (functional_call(model, parameters, (x,)) - target).square().sum()

    per_sample = vmap(grad(loss), (None, 0, 0))(parameters, x, target)
    for i in range(len(x)):
        model.zero_grad()
        (model(x[i]) - target[i]).square().sum().backward()
        close(
            {k: v[i] for k, v in per_sample.items()},
            {k: v.grad for k, v in model.named_parameters()},
        )
    assert (
        functional_call(model, {**parameters, "norm.weight": torch.zeros(N).double()}, (x,))
        .eq(0)
        .all()
    )


def test_ensemble_of_models():
    """torch.func.stack_module_state: a weight for each row of the batch."""
    models = [RMSNorm(N, dtype=torch.float64) for _ in range(3)]
    for m in models:
        torch.nn.init.normal_(m.weight)
    parameters, buffers = torch.func.stack_module_state(models)
    x = numbers((3, 2, N), torch.float64, "cpu", 0)
    y = vmap(lambda p, b, x: functional_call(models[0], (p, b), (x,)))(parameters, buffers, x)
    close(
        y,
        torch.stack(
            [rms_norm(t, m.weight, None, Options()) for t, m in zip(x, models, strict=True)]
        ),
    )


def test_in_place_under_vmap():
    x, r = (numbers((4, N), torch.float64, "cpu", i) for i in range(2))
    w = numbers(N, torch.float64, "cpu", 2)
    y, s = F.add_rms_norm(x, r, N, w)
    a, c = x.clone(), r.clone()
    vmap(lambda a, c: F.add_rms_norm_(a, c, N, w)[0])(a, c)
    assert same_bits(a, y)
    assert same_bits(c, s)


@pytest.mark.parametrize("dims", [(0, 0), (1, 0), (0, 2)], ids=str)
@pytest.mark.parametrize("batched", ["neither", "weight", "bias", "both"])
@pytest.mark.parametrize("rows", [(), (3,)], ids=["a weight", "weights of rows"])
def test_in_place_under_vmap_with_weights_of_each_sample(dims, batched, rows):
    x, r = (numbers((4, 2, 3, N), torch.float32, "cpu", i) for i in range(2))
    w, b = (numbers((4, *rows, N), torch.float32, "cpu", i) for i in (2, 3))
    w_dim, b_dim = (0 if batched in (name, "both") else None for name in ("weight", "bias"))
    w, b = (t if dim == 0 else t[0] for t, dim in ((w, w_dim), (b, b_dim)))
    y, s = vmap(lambda x, r, w, b: F.add_rms_norm(x, r, N, w, bias=b), (0, 0, w_dim, b_dim))(
        x, r, w, b
    )
    a, c = (t.movedim(0, d).contiguous() for t, d in zip((x, r), dims, strict=True))
    versions = a._version, c._version
    vmap(lambda a, c, w, b: F.add_rms_norm_(a, c, N, w, bias=b)[0], (*dims, w_dim, b_dim))(
        a, c, w, b
    )
    torch.testing.assert_close(a.movedim(dims[0], 0), y)
    assert same_bits(c.movedim(dims[1], 0), s)
    assert a._version > versions[0]
    assert c._version > versions[1]


def llama(x, r, w):
    F.add_rms_norm_(x.half(), r.half(), N, torch.ones(N), casting_mode="llama")


# Which of input and residual are batched (a weight always is), the call, and what is said of it.
REFUSED_UNDER_VMAP = {
    "a weight of each": (
        None,
        None,
        lambda x, r, w: F.add_rms_norm_(x, r, N, w),
        "input must be b",
    ),
    "input of each": (0, None, lambda x, r, w: F.add_rms_norm_(x, r[0], N), "residual must be bat"),
    "residual of each": (None, 0, lambda x, r, w: F.add_rms_norm_(x[0], r, N), "input must be bat"),
    "one tensor twice": (0, 0, lambda x, r, w: F.add_rms_norm_(r, r, N), "single memory location"),
    "a weight of the input": (
        0,
        0,
        lambda x, r, w: F.add_rms_norm_(x, r, N, x[0]),
        "weight must n",
    ),
    "a wider weight": (0, 0, llama, "input must have dtype Float"),
}


@pytest.mark.parametrize("kind", REFUSED_UNDER_VMAP)
def test_what_is_refused_in_place_is_refused_under_vmap(kind):
    """And nothing is written before that."""
    x, r, w = (numbers((4, 4, N), torch.float32, "cpu", i) for i in range(3))
    before = [t.clone() for t in (x, r)]
    x_dim, r_dim, call, message = REFUSED_UNDER_VMAP[kind]
    with pytest.raises((RuntimeError, TypeError), match=message):
        vmap(call, (x_dim, r_dim, 0), None)(x, r, w)
    assert same_bits(x, before[0])
    assert same_bits(r, before[1])


def test_functionalization():
    """torch.func.functionalize takes the operators, but no in-place one that is not torch's own."""
    x, w = numbers((4, N), torch.float32, "cpu", 0), numbers(N, torch.float32, "cpu", 1)
    y, s = torch.func.functionalize(lambda x: F.add_rms_norm(x, x, N, w))(x)
    assert same_bits(y, F.rms_norm(x + x, N, w))
    assert same_bits(s, x + x)
    with pytest.raises(RuntimeError, match="alias annotations"):
        torch.func.functionalize(lambda x: F.add_rms_norm_(x.clone(), x.clone(), N))(x)

    @torch.library.custom_op("test_func::double_", mutates_args={"x"})
    def double_(x: torch.Tensor) -> None:
        x.mul_(2)

    with pytest.raises(RuntimeError, match="alias annotations"):  # any such operator
        torch.func.functionalize(lambda x: double_(x.clone()))(x)


@pytest.mark.parametrize("x_dim", [None, 0, 4])
@pytest.mark.parametrize("w_dim", [0, 2, 4])
def test_vmap_of_several_dimensions_in_groups(x_dim, w_dim):
    """A batch that stands between the rows leaves results that cannot be viewed in their shape."""
    x, w = (torch.randn(s, dtype=torch.float64) for s in ((2, 2, 6, 5), (1, 1, 6, 5)))
    xs = x if x_dim is None else torch.stack([x, 2 * x], x_dim)
    ws = torch.stack([w, -w], w_dim)
    norm = lambda x, w: F.rms_norm(x, (6, 5), w, group_size=10)  # noqa: E731
    y = vmap(norm, (x_dim, w_dim))(xs, ws)
    for j in range(2):
        one = x if x_dim is None else xs.select(x_dim, j)
        torch.testing.assert_close(y[j], norm(one, ws.select(w_dim, j)))
