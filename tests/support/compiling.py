"""Compiled calls beside eager ones, and what a compiler is handed."""

import torch
from cases import numbers
from functorch.compile import make_boxed_func
from reference import same_bits
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd


def leaf(size, seed=0, dtype=torch.float32) -> Tensor:
    return numbers(size, dtype, "cpu", seed).requires_grad_()


def compiled(function, backend="aot_eager", **kwargs):
    return torch.compile(function, fullgraph=True, backend=backend, **kwargs)


def as_tuple(y):
    return y if isinstance(y, tuple) else (y,)


def bits_of(function, args, seed=50):
    """Results of a function and the gradients of everything that requires one."""
    y = as_tuple(function(*args))
    leaves = [t for t in args if isinstance(t, torch.Tensor) and t.requires_grad]
    if isinstance(function, nn.Module):
        leaves += function.parameters()
    dy = [numbers(t.shape, t.dtype, "cpu", seed + i) for i, t in enumerate(y)]
    return (*y, *torch.autograd.grad(y, leaves, dy))


def assert_same_results(actual, expected, *args):
    """Two functions give the same bits, strides included, and so do their gradients."""
    pairs = zip(bits_of(actual, args), bits_of(expected, args), strict=True)
    for i, (a, e) in enumerate(pairs):
        assert same_bits(a, e), f"result {i}"
        assert a.stride() == e.stride(), f"result {i}"


def assert_same_bits(function, *args, backend="aot_eager", **kwargs):
    assert_same_results(compiled(function, backend, **kwargs), function, *args)


def operators_compiled(function, *args) -> set[str]:
    """What a compiler such as Inductor is handed for one forward and backward."""
    seen = set()

    def collect(graph: torch.fx.GraphModule, inputs: list):
        seen.update(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=collect, bw_compiler=collect)
    y = as_tuple(compiled(function, backend)(*args))[0]
    if y.requires_grad:
        y.sum().backward()
    return seen
