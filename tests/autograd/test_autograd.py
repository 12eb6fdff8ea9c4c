"""Derivatives of every order and mode, and what autograd promises around them."""

import gc
import itertools
import weakref
from importlib.util import find_spec

import pytest
import torch
from cases import OPTION_SETS, numbers
from reference import Options, same_bits
from torch.autograd import forward_ad, gradcheck, gradgradcheck, graph

from fused_rmsnorm import functional as F

ops = torch.ops.fused_rmsnorm
AFFINE = [(True, False), (True, True), (False, False), (False, True)]  # weight, bias


def leaf(size, device="cpu", seed=0, dtype=torch.float64):
    return numbers(size, dtype, device, seed).requires_grad_()


def operands(device, affine, shape=(3, 7)):
    x = leaf(shape, device, 0)
    w, b = (leaf(shape[-1], device, i + 1) if given else None for i, given in enumerate(affine))
    return x, w, b


def norm_of(o: Options):
    return lambda x, w, b: F.rms_norm(x, x.shape[-1], w, o.eps, bias=b, **o.beside(w).keywords())


def add_norm_of(o: Options):
    return lambda x, r, w, b: F.add_rms_norm(x, r, x.shape[-1], w, o.eps, bias=b, **o.keywords())


@pytest.mark.parametrize("affine", AFFINE, ids=str)
@pytest.mark.parametrize("o", OPTION_SETS, ids=str)
def test_gradcheck(device, o, affine):
    """Reverse, forward and batched derivatives against finite differences."""
    args = operands(device, affine)
    assert gradcheck(
        norm_of(o), args, check_forward_ad=True, check_batched_grad=True,
        check_batched_forward_grad=True, check_undefined_grad=True,
    )  # fmt: skip


@pytest.mark.parametrize("affine", AFFINE, ids=str)
@pytest.mark.parametrize("o", OPTION_SETS, ids=str)
def test_gradgradcheck(device, o, affine):
    """Second derivatives: reverse over reverse, and forward over reverse."""
    args = operands(device, affine)
    assert gradgradcheck(norm_of(o), args, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("o", OPTION_SETS, ids=str)
def test_add_gradients(device, o):
    x, w, b = operands(device, (True, True))
    args = (x, leaf(x.shape, device, 5), w, b)
    assert gradcheck(add_norm_of(o), args, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(add_norm_of(o), args, check_fwd_over_rev=True)


def definition_of_add(x, residual, w, b, o: Options):
    """(y, sum) in plain operations, whose derivatives are autograd's."""
    s = x + residual
    h = s * (s.square().mean(-1, keepdim=True) + o.eps).rsqrt()
    return h * w + b, s


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4))[1:], ids=str)
def test_add_gradients_of_any_subset(device, wanted):
    """Of input, residual, weight and bias, through both outputs; the others get none."""
    args = [numbers(s, torch.float64, device, i) for i, s in enumerate([(3, 7), (3, 7), 7, 7])]
    grads = [numbers((3, 7), torch.float64, device, i) for i in (8, 9)]
    found = []
    for norm in (add_norm_of(Options(1e-5)), lambda *t: definition_of_add(*t, Options(1e-5))):
        leaves = [t.clone().requires_grad_(w) for t, w in zip(args, wanted, strict=True)]
        outputs = [(y, dy) for y, dy in zip(norm(*leaves), grads, strict=True) if y.requires_grad]
        torch.autograd.backward(*map(list, zip(*outputs, strict=True)))
        found.append([t.grad for t in leaves])
    assert [g is not None for g in found[0]] == list(wanted)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_through_both_outputs_without_a_kernel(device):
    """Llama's rounding under a weight of fp64 is the composite's, and so is its backward."""
    args = [numbers(s, torch.float32, device, i) for i, s in enumerate([(3, 7), (3, 7)])]
    w, b = (numbers(7, torch.float64, device, i) for i in (2, 3))
    dy, ds = numbers((3, 7), torch.float64, device, 8), numbers((3, 7), torch.float32, device, 9)
    leaves = [t.requires_grad_() for t in (*args, w, b)]
    y, s = add_norm_of(Options(1e-5, casting_mode="llama"))(*leaves)
    assert y.dtype == torch.float64
    found = torch.autograd.grad([y, s], leaves, [dy, ds])
    y, s = definition_of_add(*leaves, Options(1e-5))
    for ours, theirs in zip(found, torch.autograd.grad([y, s], leaves, [dy, ds]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_write_in_place_is_counted(device):
    """So that what another operator has saved is known to have changed."""
    x, residual = (numbers((3, 7), torch.float32, device, i) for i in (0, 1))
    w = leaf(7, device, 2, torch.float32)
    before, kept = [t._version for t in (x, residual)], (x * w).sum()
    F.add_rms_norm_(x, residual, 7)
    assert [t._version for t in (x, residual)] == [v + 1 for v in before]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


@pytest.mark.parametrize("which", [0, 1])
def test_add_gradients_of_one_output(device, which):
    """Only y, or only the sum, is used: also in the second derivative."""
    x, w, _ = operands(device, (True, False))
    args = (x, leaf(x.shape, device, 5), w)
    one = lambda x, r, w: F.add_rms_norm(x, r, 7, w)[which]  # noqa: E731
    assert gradcheck(one, args)
    if which == 0:  # the sum is linear
        assert gradgradcheck(one, args)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 5), (5,), (0, 5), (2, 0, 5), (2, 3, 5)])
def test_shapes(device, shape):
    x, w, b = operands(device, (True, True), shape)
    assert gradcheck(norm_of(Options(eps=0.1)), (x, w, b), check_forward_ad=True)
    assert gradgradcheck(norm_of(Options(eps=0.1)), (x, w, b))


def test_strided_input_and_gradient(device):
    x, w, b = operands(device, (True, True))

    def norm(x, w, b):
        return norm_of(Options(p=0.5))(x.t().reshape(7, 3).t()[:, ::1], w, b).t()

    assert gradcheck(norm, (x, w, b))
    assert gradgradcheck(norm, (x, w, b))


def test_third_derivative(device):
    x = leaf((2, 5), device)

    def second(x):
        y = F.rms_norm(x, 5, p=0.5)
        (g,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(g.pow(2).sum(), x, create_graph=True)[0]

    assert gradcheck(second, (x,))


def test_complex(device):
    x = torch.randn(3, 5, dtype=torch.complex128, device=device, requires_grad=True)
    w = torch.randn(5, dtype=torch.complex128, device=device, requires_grad=True)
    assert gradcheck(lambda x, w: F.rms_norm(x, 5, w), (x, w), check_forward_ad=True)
    assert gradgradcheck(lambda x, w: F.rms_norm(x, 5, w), (x, w))


@pytest.mark.parametrize("tangents", list(itertools.product([False, True], repeat=3))[1:])
def test_forward_mode_on_any_subset(device, tangents):
    """The fused primal with its tangent beside it; nothing is dropped."""
    args = [t.detach() for t in operands(device, (True, True))]
    directions = [torch.randn_like(t) for t in args]
    norm = norm_of(Options(p=0.5, weight_offset=1.0))
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(a, d) if wanted else a
            for a, d, wanted in zip(args, directions, tangents, strict=True)
        ]
        y, tangent = forward_ad.unpack_dual(norm(*duals))
    assert same_bits(y, norm(*args))
    composite = lambda *t: F.composite_rms_norm(  # noqa: E731
        t[0], 7, t[1], bias=t[2], p=0.5, weight_offset=1.0
    )
    masked = [d * wanted for d, wanted in zip(directions, tangents, strict=True)]
    _, expected = torch.autograd.functional.jvp(composite, tuple(args), tuple(masked))
    torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight_type", [torch.float32, torch.bfloat16], ids=str)
def test_derivatives_keep_their_dtypes(device, dtype, weight_type):
    x, w = leaf((4, 9), device, 0, dtype), leaf(9, device, 1, weight_type)
    for mode in ("torch", "llama"):
        y = F.rms_norm(x, 9, w, casting_mode=mode)
        dx, dw = torch.autograd.grad(y.float().square().sum(), (x, w), create_graph=True)
        assert (dx.dtype, dw.dtype) == (dtype, weight_type)
        ddx, ddw = torch.autograd.grad((dx.float().sum() + dw.float().sum()), (x, w))
        assert (ddx.dtype, ddw.dtype) == (dtype, weight_type)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
            out = forward_ad.unpack_dual(F.rms_norm(dual, 9, w.detach(), casting_mode=mode))
        assert out.tangent.dtype == out.primal.dtype == y.dtype


def samples(name):
    """Arguments and keyword arguments that reach every branch of an operator."""
    for affine, o, dtype in itertools.product(AFFINE, OPTION_SETS, (torch.float32, torch.bfloat16)):
        x, residual = leaf((2, 3, 8), seed=0, dtype=dtype), leaf((2, 3, 8), seed=1, dtype=dtype)
        w, b = (
            leaf(8, seed=i + 2, dtype=dtype) if given else None for i, given in enumerate(affine)
        )
        o = o.beside(w)
        has_bias_alone = w is None and b is not None
        if name in ("rms_norm", "rms_norm_composite"):
            yield (x, w, b), o.kwargs()
        elif name == "add_rms_norm":
            yield (x, residual, w, b), o.kwargs()
        elif has_bias_alone:
            continue
        elif name == "rms_norm_fwd":
            yield (x, w, b), o.kwargs()
        elif name == "add_rms_norm_fwd":
            yield (x, residual, w, b), o.kwargs()
        elif name == "add_rms_norm_":
            detached = [None if t is None else t.detach() for t in (x, residual, w, b)]
            yield tuple(detached), o.kwargs()
        else:
            rstd = ops.rms_norm_fwd(x, w, **o.kwargs())[1]
            mask = [True, w is not None, b is not None]
            for grad_sum in (None, residual):
                yield (leaf((2, 3, 8), seed=4, dtype=dtype), x, w, rstd, grad_sum, mask), o.kwargs()


OPERATORS = [
    "rms_norm",
    "rms_norm_composite",
    "rms_norm_fwd",
    "rms_norm_bwd",
    "add_rms_norm",
    "add_rms_norm_fwd",
    "add_rms_norm_",
]
needs_expecttest = pytest.mark.skipif(
    find_spec("expecttest") is None, reason="torch.library.opcheck needs the package expecttest"
)
STATIC = ("test_schema", "test_autograd_registration", "test_faketensor")


@needs_expecttest
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    """Schema, fake tensors and registration on every sample; AOT dispatch (slow) on some."""
    op = getattr(ops, name).default
    for i, (args, kwargs) in enumerate(samples(name)):
        checks = (*STATIC, "test_aot_dispatch_dynamic") if i % 8 == 3 else STATIC
        torch.library.opcheck(op, args, kwargs, test_utils=checks)


@needs_expecttest
@pytest.mark.parametrize("layout", ["transposed", "empty", "one row", "slice"])
@pytest.mark.parametrize("weight_type", [torch.float32, torch.float64], ids=str)
def test_opcheck_layouts(layout, weight_type):
    """In llama mode, where an fp64 weight has no kernel and takes the composite."""
    x = {
        "transposed": torch.randn(3, 4, 8).transpose(0, 1),
        "empty": torch.randn(0, 8),
        "one row": torch.randn(8),
        "slice": torch.randn(4, 24)[:, 8:16],
    }[layout]
    w = torch.randn(8, dtype=weight_type, requires_grad=True)
    leaves = x.detach().requires_grad_(), x.detach().clone().requires_grad_()
    llama = {"casting_mode": "llama"}
    torch.library.opcheck(ops.rms_norm_fwd.default, (leaves[0], w), llama, test_utils=STATIC)
    torch.library.opcheck(ops.add_rms_norm_fwd.default, (*leaves, w), llama, test_utils=STATIC)
    rstd = ops.rms_norm_fwd(x, w)[1]
    args = (leaves[1], leaves[0], w, rstd, None, [True] * 3)
    torch.library.opcheck(ops.rms_norm_bwd.default, args, llama, test_utils=STATIC)


def test_operators_are_differentiable_themselves(device):
    """torch.ops without a wrapper; rstd carries no derivative and says so."""
    x, w, _ = operands(device, (True, False))
    y, rstd = ops.rms_norm_fwd(x, w)
    assert y.requires_grad
    assert not rstd.requires_grad
    assert y.grad_fn.name() == "RmsNormBackward"
    edges = [node.variable for node, _ in y.grad_fn.next_functions[:2]]
    assert edges[0] is x
    assert edges[1] is w
    y, s, rstd = ops.add_rms_norm_fwd(x, x, w)
    assert y.grad_fn.name() == s.grad_fn.name() == "AddRmsNormBackward"
    assert not rstd.requires_grad


def saved_shapes(function):
    shapes = []
    with graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        function()
    return shapes


def test_saved_tensors(device):
    """x, weight and rstd, once each: neither the output nor a widened copy of x."""
    x, w, b = operands(device, (True, True))
    assert sorted(saved_shapes(lambda: F.rms_norm(x, 7, w, bias=b))) == [(3, 1), (3, 7), (7,)]
    assert sorted(saved_shapes(lambda: F.rms_norm(x, 7))) == [(3, 1), (3, 7)]
    expected = [(3, 1), (3, 7), (7,)]  # of the two inputs and the sum, the sum alone
    assert sorted(saved_shapes(lambda: F.add_rms_norm(x, leaf((3, 7), device), 7, w))) == expected
    with torch.no_grad():
        assert saved_shapes(lambda: F.rms_norm(x, 7, w)) == []
    saved = []
    half, w32 = leaf((3, 7), device, 0, torch.bfloat16), leaf(7, device, 1, torch.float32)
    with graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        F.rms_norm(half, 7, w32)
    assert {t.data_ptr() for t in saved[:2]} == {half.data_ptr(), w32.data_ptr()}


def test_saved_tensor_hooks_are_used(device):
    """What the hooks return is what the backward computes with: offloading, quantised saving."""
    x, w, b = operands(device, (True, True))
    expected = torch.autograd.grad(F.rms_norm(x, 7, w, bias=b).square().sum(), (x, w, b))
    store, unpacked = {}, []

    def pack(t):
        store[len(store)] = t.detach().clone()
        return len(store) - 1

    def unpack(i):
        unpacked.append(i)
        return store[i]

    with graph.saved_tensors_hooks(pack, unpack):
        y = F.rms_norm(x, 7, w, bias=b)
        y_add, s = F.add_rms_norm(x, x, 7, w)
    grads = torch.autograd.grad(y.square().sum(), (x, w, b))
    assert all(same_bits(a, e) for a, e in zip(grads, expected, strict=True))
    assert sorted(unpacked) == [0, 1, 2]
    torch.autograd.grad((y_add + s).sum(), (x, w))
    assert sorted(unpacked) == [0, 1, 2, 3, 4, 5]
    with graph.save_on_cpu():
        y = F.rms_norm(x, 7, w, bias=b)
    grads = torch.autograd.grad(y.square().sum(), (x, w, b))
    assert all(same_bits(a, e) for a, e in zip(grads, expected, strict=True))


@pytest.mark.parametrize("add", [False, True])
def test_retain_graph_and_freed_graph(device, add):
    x, w, _ = operands(device, (True, False))
    y = F.add_rms_norm(x, x, 7, w)[0] if add else F.rms_norm(x, 7, w)
    first = torch.autograd.grad(y.sum(), (x, w), retain_graph=True)
    second = torch.autograd.grad(y.sum(), (x, w))
    assert all(same_bits(a, e) for a, e in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y.sum(), (x, w))
    y = F.rms_norm(x, 7, w)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.autograd.grad(dx.sum(), x)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(dx.sum(), x)


@pytest.mark.parametrize("which", ["x", "w", "residual sum"])
def test_what_was_saved_is_modified_in_place(device, which):
    x, w, _ = operands(device, (True, False))
    if which == "residual sum":
        y, changed = F.add_rms_norm(x, x, 7, w)
    else:
        y, changed = F.rms_norm(x, 7, w), {"x": x, "w": w}[which]
    with torch.no_grad():
        changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_was_not_saved_may_be_modified(device):
    """The output, the bias, and with a fused add both inputs."""
    x, w, b = operands(device, (True, True))
    expected = torch.autograd.grad(2 * F.rms_norm(x, 7, w, bias=b).sum(), (x, w, b))
    y = F.rms_norm(x, 7, w, bias=b)
    with torch.no_grad():
        b.add_(1)
    y.mul_(2)
    grads = torch.autograd.grad(y.sum(), (x, w, b))
    assert all(same_bits(a, e) for a, e in zip(grads, expected, strict=True))
    r = leaf((3, 7), device, 9)
    y, s = F.add_rms_norm(x, r, 7, w)
    with torch.no_grad():
        x.add_(1)
        r.add_(1)
    (y.sum() + s.sum()).backward()


def test_no_graph_without_need(device):
    x, w, _ = operands(device, (True, False))
    with torch.no_grad():
        assert F.rms_norm(x, 7, w).grad_fn is None
        assert all(t.grad_fn is None for t in F.add_rms_norm(x, x, 7, w))
    assert F.rms_norm(x.detach(), 7, w.detach()).grad_fn is None
    with torch.inference_mode():
        assert F.rms_norm(x, 7, w).is_inference()


def test_create_graph(device):
    x, w, _ = operands(device, (True, False))
    y = F.rms_norm(x, 7, w)
    (plain,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    assert plain.grad_fn is None
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert dx.requires_grad
    assert same_bits(dx.detach(), plain)


def test_graph_goes_with_its_output(device):
    """The sum is saved by the node that made it: no cycle keeps the node alive."""

    class Hook:
        def __call__(self, grads, outputs):
            return None

    gc.disable()
    try:
        for which in (0, 1):
            x, w, _ = operands(device, (True, False))
            output = F.add_rms_norm(x, leaf((3, 7), device), 7, w)[which]
            hook = Hook()
            output.grad_fn.register_hook(hook)
            alive = weakref.ref(hook)
            del hook
            assert alive() is not None
            del output
            assert alive() is None
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected in")
def test_hooks_on_the_node_and_anomaly_mode(device):
    x, w, _ = operands(device, (True, False))
    seen = []
    with torch.autograd.detect_anomaly(check_nan=True):
        y = F.rms_norm(x, 7, w)
        y.grad_fn.register_hook(lambda grads, outputs: seen.append(len(grads)))
        y.sum().backward()
    assert seen == [3]
    x.grad = None
    with (
        torch.autograd.detect_anomaly(check_nan=True),
        pytest.raises(RuntimeError, match="RmsNormBackward"),
    ):
        F.rms_norm(x, 7, w).backward(torch.full((3, 7), float("nan"), device=device))


def test_gradients_accumulate_in_place(device):
    """Two uses of a module: the weight's gradients add, and into the same memory."""
    x, w, _ = operands(device, (True, False))
    F.rms_norm(x, 7, w).sum().backward()
    first, memory = w.grad.clone(), w.grad.data_ptr()
    F.rms_norm(x, 7, w).sum().backward()
    assert same_bits(w.grad, first + first)
    assert w.grad.data_ptr() == memory


@pytest.mark.parametrize("shape", [(2, 3), (2, 1), (1, 3)], ids=str)
def test_a_bias_of_the_inputs_shape(shape):
    """Nothing is summed for its gradient, which is a tensor of its own all the same: grad_output
    would else be given the history of db, and lose its own."""
    torch.manual_seed(0)
    x, w, b, dy, v = (torch.randn(shape, dtype=torch.float64).requires_grad_() for _ in range(5))
    y = F.rms_norm(x, shape[-1], w, bias=b)
    grads = torch.autograd.grad(y, (x, w, b), dy, create_graph=True)
    assert dy.grad_fn is None
    assert all(g is not dy and g.data_ptr() != dy.data_ptr() for g in grads)
    (again,) = torch.autograd.grad((grads[2] * v).sum(), dy)
    assert torch.equal(again, v)
    rstd = torch.ops.fused_rmsnorm.rms_norm_fwd(x.detach(), w.detach())[1]
    db = torch.ops.fused_rmsnorm.rms_norm_bwd(dy, x, w, rstd, None, [False, False, True])[2]
    assert db.data_ptr() != dy.data_ptr()
    assert dy.grad_fn is None
