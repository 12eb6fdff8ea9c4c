"""torch.func, second derivatives and tensor subclasses inside of torch.compile."""

import pytest
import torch
from cases import numbers
from compiling import assert_same_bits, compiled, leaf, operators_compiled
from reference import same_bits
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.testing._internal.two_tensor import TwoTensor

from fused_rmsnorm import RMSNorm
from fused_rmsnorm import functional as F

N = 72


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


TRANSFORMS = {
    "grad": lambda f: grad(lambda x, w: f(x, w).sin().sum(), (0, 1)),
    "grad of grad": lambda f: grad(
        lambda x, w: grad(lambda x: f(x, w).sin().sum())(x).square().sum(), (0, 1)
    ),
    "jvp": lambda f: lambda x, w: jvp(f, (x, w), (x.cos(), w.cos())),
    "jacrev": lambda f: jacrev(f, (0, 1)),
    "jacfwd over x": lambda f: jacfwd(f),
    "jacfwd": lambda f: jacfwd(f, (0, 1)),
    "hessian": lambda f: hessian(lambda x, w: f(x, w).sin().sum()),
    "vmap over weights": lambda f: lambda x, w: vmap(f, (None, 0))(x, w * x),
    "vmap of grad": lambda f: vmap(grad(lambda x, w: f(x, w).sin().sum(), (0, 1)), (0, None)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func_inside(name):
    """fp64, for the compiled graph may order the composite's sums in its own way."""
    x, w = (numbers(s, torch.float64, "cpu", i) for i, s in enumerate([(2, 6), 6]))
    function = TRANSFORMS[name](lambda x, w: F.rms_norm(x, 6, w, p=0.5))
    if name == "jacfwd":
        try:
            compiled(TRANSFORMS[name](torch.mul), "eager")(x, w)
        except torch._dynamo.exc.UserError:
            pytest.skip("this torch, as 2.11, compiles jacfwd over one argument only")
    torch.testing.assert_close(compiled(function)(x, w), function(x, w), rtol=1e-12, atol=1e-13)


def test_vmap_inside_stays_fused():
    """One call for the batch: under vmap the operators decompose as they do without."""
    x, w = numbers((4, 3, N), torch.float32, "cpu", 0), numbers(N, torch.float32, "cpu", 1)
    function = lambda x, w: vmap(lambda x: F.rms_norm(x, N, w))(x)  # noqa: E731
    seen = operators_compiled(function, x, w)
    assert {name for name in seen if "getitem" not in name} - {"aten.permute.default"} == {
        "fused_rmsnorm.rms_norm_fwd.default"
    }
    assert same_bits(compiled(function)(x, w), F.rms_norm(x, N, w))


def test_functional_call_inside():
    norm = RMSNorm(N, bias=True)
    x, w, b = leaf((4, N)), leaf(N, 1), leaf(N, 2)

    def call(x, w, b):
        return functional_call(norm, {"weight": w, "bias": b}, (x,))

    assert_same_bits(call, x, w, b)


def test_tensor_subclass():
    """A wrapper subclass goes through; one with a __torch_function__ fails for torch's own, too."""
    both = TwoTensor(
        numbers((4, N), torch.float32, "cpu", 0), numbers((4, N), torch.float32, "cpu", 1)
    )
    w = numbers(N, torch.float32, "cpu", 2)
    y = compiled(lambda x: F.rms_norm(x, N, w))(both)
    assert same_bits(y.a, F.rms_norm(both.a, N, w))
    assert same_bits(y.b, F.rms_norm(both.b, N, w))

    class Named(torch.Tensor):
        pass

    x = both.a.as_subclass(Named)
    assert type(F.rms_norm(x, N, w)) is Named
    for function in (F.rms_norm, nn.functional.rms_norm):
        with pytest.raises(torch._dynamo.exc.Unsupported, match="no implementation found"):
            compiled(lambda x, norm=function: norm(x, (N,), w))(x)


def test_second_derivatives():
    """Of a compiled function PyTorch gives none, of its own operators neither; inside of one, it
    does."""
    x, w = leaf((4, N)), leaf(N, 1)
    for norm in (F.rms_norm, nn.functional.layer_norm):
        y = compiled(lambda x, norm=norm: norm(x, (N,), w))(x)
        (dx,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            torch.autograd.grad(dx.sum(), x)

    def second(x, w):
        (dx,) = torch.autograd.grad(F.rms_norm(x, N, w).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, w))

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        actual = compiled(second)(x, w)
    assert all(same_bits(a, e) for a, e in zip(actual, second(x, w), strict=True))
