"""Derivatives through the modules, over several dimensions as well: what test_autograd.py and
test_func.py check of the functions."""

import pytest
import torch
from cases import numbers
from reference import Options, rms_norm
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, hessian, jvp

from fused_rmsnorm import AddRMSNorm, PRMSNorm, RMSNorm

MODULES = [
    RMSNorm(6, dtype=torch.float64),
    RMSNorm((2, 3), 1e-3, bias=True, weight_offset=1.0, dtype=torch.float64),
    RMSNorm(6, elementwise_affine=False),
    PRMSNorm((2, 3), 0.3, casting_mode="llama", dtype=torch.float64),
    AddRMSNorm(6, bias=True, dtype=torch.float64),
    AddRMSNorm((2, 3), p=0.5, weight_offset=-0.5, dtype=torch.float64),
]


def function_of(module):
    """The module as a function of its inputs and parameters, and such arguments in fp64."""
    inputs = 1 + isinstance(module, AddRMSNorm)
    names = [name for name, _ in module.named_parameters()]

    def call(*args):
        parameters = dict(zip(names, args[inputs:], strict=True))
        return functional_call(module, parameters, args[:inputs])

    shape = tuple(module.normalized_shape)
    sizes = [(3, *shape)] * inputs + [shape] * len(names)
    args = [numbers(s, torch.float64, "cpu", i) for i, s in enumerate(sizes)]
    return call, tuple(t.requires_grad_() for t in args)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_gradcheck(module):
    """Reverse, forward, batched, and both orders of two."""
    call, args = function_of(module)
    assert gradcheck(call, args, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(call, args, check_fwd_over_rev=True)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_against_the_definition(module):
    """jvp, forward_ad and the hessian of a loss, with the numbers of the definition's."""
    call, args = function_of(module)
    args = tuple(t.detach() for t in args)
    o = Options.of(module)
    inputs = 1 + isinstance(module, AddRMSNorm)
    dims = len(module.normalized_shape)

    def defined(*args):
        x = sum(args[:inputs])
        w, b = (*(t.flatten() for t in args[inputs:]), None, None)[:2]
        y = rms_norm(x.flatten(-dims), w, b, o).view(x.shape)
        return (y, x) if inputs == 2 else y

    def loss(function):
        def scalar(*args):
            y = function(*args)
            return sum(t.sin().sum() for t in (y if isinstance(y, tuple) else (y,)))

        return scalar

    directions = tuple(torch.cos(3 * t) for t in args)
    expected = jvp(defined, args, directions)
    torch.testing.assert_close(jvp(call, args, directions), expected)
    with forward_ad.dual_level():
        y = call(*(forward_ad.make_dual(a, d) for a, d in zip(args, directions, strict=True)))
        duals = [forward_ad.unpack_dual(t) for t in (y if isinstance(y, tuple) else (y,))]
    tangents = expected[1] if isinstance(expected[1], tuple) else (expected[1],)
    for dual, tangent in zip(duals, tangents, strict=True):
        torch.testing.assert_close(dual.tangent, tangent)
    argnums = tuple(range(len(args)))
    ours, theirs = (hessian(loss(f), argnums)(*args) for f in (call, defined))
    torch.testing.assert_close(ours, theirs)
