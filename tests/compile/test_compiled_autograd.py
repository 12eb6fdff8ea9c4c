"""Compiled autograd: the backward pass as one compiled graph has the gradients of eager mode,
whatever stands before and after the norm, and is compiled anew for whatever it depends on."""

import contextlib
import weakref

import pytest
import torch
from cases import OPTION_SETS
from compiling import leaf
from reference import Options, same_bits
from torch import nn
from torch._dynamo import compiled_autograd
from torch._dynamo.utils import counters

from fused_rmsnorm import AddRMSNorm, RMSNorm
from fused_rmsnorm import functional as F

N = 24


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


def compiled_backward(backend="aot_eager", fullgraph=True):
    """Backward passes inside are compiled; each into one graph, unless hooks break it."""
    return compiled_autograd._enable(
        lambda graph: torch.compile(graph, backend=backend, fullgraph=fullgraph)
    )


def captures() -> int:
    return counters["compiled_autograd"]["captures"]


def assert_same(gradients, new=True, **kwargs):
    """The gradients that a function returns, eager and compiled (anew)."""
    expected = gradients()
    before = captures()
    with compiled_backward(**kwargs):
        actual = gradients()
    assert captures() > before or not new
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert same_bits(a, e), f"gradient {i}"


@pytest.mark.parametrize(
    "types", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str
)
@pytest.mark.parametrize("o", OPTION_SETS, ids=str)
def test_gradients(o, types):
    """Of norm and norm with add, between other operations: none of them sees a norm come first."""
    x, residual = (leaf((4, N), i, types[0]) for i in range(2))
    w, b = (leaf(N, i + 2, types[1]) for i in range(2))

    def gradients():
        h = F.rms_norm(x.cos(), N, w, o.eps, bias=b, **o.keywords()).to(types[0])
        y, s = F.add_rms_norm(h.sin(), residual * 2, N, w, o.eps, bias=b, **o.keywords())
        loss = y.float().sin().sum() + s.float().square().sum()
        return torch.autograd.grad(loss, (x, residual, w, b))

    assert_same(gradients)


def test_gradients_with_inductor():
    x, w = leaf((4, N)), leaf(N, 1)
    assert_same(
        lambda: torch.autograd.grad(F.rms_norm(x, N, w), (x, w), x.detach()), backend="inductor"
    )


@pytest.mark.parametrize("which", ["y", "sum", "both"])
def test_outputs_of_the_add(which):
    """One of them may have no gradient."""
    x, residual, w = leaf((4, N)), leaf((4, N), 1), leaf(N, 2)

    def gradients():
        y, s = F.add_rms_norm(x, residual, N, w)
        used = {"y": y.sin(), "sum": s.sin(), "both": y.sin() + s.cos()}[which]
        return torch.autograd.grad(used.sum(), (x, residual))

    assert_same(gradients)


def test_without_weight():
    x = leaf((4, N))
    assert_same(lambda: torch.autograd.grad(F.rms_norm(x, N).sin().sum(), x))


def test_only_what_is_asked_for():
    """Each set of inputs is a graph of its own, found again."""
    tensors = {"x": leaf((4, N)), "w": leaf(N, 1), "b": leaf(N, 2)}
    x, w, b = tensors.values()
    sets = ["x", "w", "b", "xw", "wb", "xwb"]
    for wanted in sets + sets:
        assert_same(
            lambda names=wanted: torch.autograd.grad(
                F.rms_norm(x, N, w, bias=b).sin().sum(), [tensors[name] for name in names]
            ),
            backend="eager",
            new=False,
        )
    assert captures() == len(sets)


def test_each_option_has_its_own_graph():
    """Nothing that the backward depends on is missing from the key that compiled graphs are found
    by, and nothing else is in it."""
    x, w = leaf((4, N)), leaf(N, 1)
    variants = [
        {"eps": None},
        {"eps": 1e-5},
        {"eps": 0.5},
        {"eps": 0.5, "p": 0.3},
        {"eps": 0.5, "p": 0.5},
        {"eps": 0.5, "weight_offset": 1.0},
        {"eps": 0.5, "weight_offset": -1.0},
        {"eps": 0.5, "casting_mode": "llama"},
    ]
    assert {name for options in variants for name in options} == set(Options().kwargs())

    def first(**options):
        return torch.autograd.grad(F.rms_norm(x, N, w, **options).sin().sum(), (x, w))

    def second(**options):  # the derivative's derivative, too
        y = F.rms_norm(x, N, w, **options)
        with compiled_autograd._disable():
            (dx,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, w))

    for gradients in (first, second):
        expected = [gradients(**options) for options in variants]
        before = captures()
        with compiled_backward("eager"):
            for _ in range(2):
                for options, grads in zip(variants, expected, strict=True):
                    actual = gradients(**options)
                    assert all(same_bits(a, e) for a, e in zip(actual, grads, strict=True))
        assert captures() - before == len(variants)


def test_batch_sizes():
    """A size is no part of the key: one capture, and in it one recompilation."""
    w = leaf(N, 1)
    for rows in (2, 3, 5, 8):
        x = leaf((rows, N))
        expected = torch.autograd.grad(F.rms_norm(x, N, w).sin().sum(), (x, w))
        with compiled_backward():
            actual = torch.autograd.grad(F.rms_norm(x, N, w).sin().sum(), (x, w))
        assert all(same_bits(a, e) for a, e in zip(actual, expected, strict=True))
        assert captures() == 1
    assert counters["stats"]["unique_graphs"] <= 2


def test_hooks():
    """On tensors, on the node before and after it, and on accumulation."""
    log = []

    def gradients():
        x, w = leaf((4, N)), leaf(N, 1)
        w.register_hook(lambda g: g * 2)
        w.register_post_accumulate_grad_hook(lambda p: log.append("accumulated"))
        y = F.rms_norm(x, N, w)
        y.register_hook(lambda g: g + 1)
        y.grad_fn.register_prehook(lambda grads: (grads[0] * 3,))
        y.grad_fn.register_hook(lambda inputs, outputs: (inputs[0] + 1, *inputs[1:]))
        y.sin().sum().backward()
        return x.grad, w.grad

    assert_same(gradients, fullgraph=False)
    assert log == ["accumulated"] * 2


def test_saved_tensor_hooks():
    """What is saved is packed and unpacked as the hooks say, inside the graph."""
    x, w = leaf((4, N)), leaf(N, 1)
    unpacked = []

    def unpack(t):
        unpacked.append(t.shape)
        return t * 2

    def gradients():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach() / 2, unpack):
            y, s = F.add_rms_norm(F.rms_norm(x, N, w), x, N, w)
        return torch.autograd.grad((y + s).sin().sum(), (x, w))

    expected = gradients()
    eager = len(unpacked)
    assert eager == 6  # x, w and rstd of the one; sum, w and rstd of the other
    with compiled_backward(fullgraph=False):
        actual = gradients()
    assert len(unpacked) == 2 * eager
    assert all(same_bits(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("where", ["first", "second", "both"])
def test_double_backward(where):
    """The first, the second, or both backward passes compiled."""
    x, w = leaf((4, N)), leaf(N, 1)

    def gradients(first=contextlib.nullcontext, second=contextlib.nullcontext):
        y = F.rms_norm(x, N, w, p=0.5)
        loss = y.sin().sum()
        with first():
            (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        square = dx.square().sum()
        with second():
            return torch.autograd.grad(square, (x, w))

    expected = gradients()
    if where == "first":
        actual = gradients(first=compiled_backward)
    elif where == "second":
        actual = gradients(second=compiled_backward)
    else:  # torch refuses this for its own operators, too
        for norm in (F.rms_norm, nn.functional.layer_norm):
            with compiled_backward():
                (dx,) = torch.autograd.grad(norm(x, (N,), w).sin().sum(), x, create_graph=True)
                with pytest.raises(RuntimeError, match=r"higher order gradients|double backward"):
                    torch.autograd.grad(dx.square().sum(), (x, w), create_graph=True)
        return
    assert captures() == 1
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("kind", [RMSNorm, AddRMSNorm])
def test_a_graph_used_again_and_freed(kind):
    norm = kind(N)
    x = leaf((4, N))
    y = norm(x, x)[0] if kind is AddRMSNorm else norm(x)
    leaves = (x, norm.weight)
    with compiled_backward():
        first = torch.autograd.grad(y.sin().sum(), leaves, retain_graph=True)
        second = torch.autograd.grad(y.sin().sum(), leaves)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(y.sin().sum(), leaves)
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


def test_what_was_saved_is_modified_in_place():
    x, w = leaf((4, N)), leaf(N, 1)
    y = F.rms_norm(x, N, w)
    with torch.no_grad():
        x.add_(1)
    with compiled_backward(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), (x, w))


def test_nothing_is_kept_alive():
    """After the pass neither the graph nor what was saved."""
    w = leaf(N, 1)

    def step():
        x = leaf((4, N))
        h = x * 1
        y = F.rms_norm(h, N, w)
        with compiled_backward():
            y.sin().sum().backward()
        return weakref.ref(h)

    step()
    assert step()() is None


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(N, N)
        self.norm = RMSNorm(N, p=0.5)
        self.add = AddRMSNorm(N, bias=True)

    def forward(self, x):
        h = self.norm(self.linear(x))
        y, s = self.add(h, x)
        return y * s


@pytest.mark.parametrize("forward", ["compiled", "eager"])
def test_training_step_by_the_configuration(forward):
    """torch._dynamo.config.compiled_autograd around a training step: the losses of eager mode."""
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = Block()
        call = torch._dynamo.disable(model) if forward == "eager" else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(x, call=call, optimizer=optimizer):
            loss = call(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        with torch._dynamo.config.patch(compiled_autograd=enabled):
            step = torch.compile(step, backend="aot_eager") if enabled else step
            losses.append([step(leaf((4, N), i)) for i in range(3)])
    assert captures() == 1
    torch.testing.assert_close(losses[1], losses[0])
