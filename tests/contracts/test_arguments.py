"""Arguments of types that a caller may well have: numbers of numpy and of torch, tensors that are
sparse, nested or quantised, memory that overlaps. Taken as what they mean, or refused by name;
test_errors.py has values and shapes."""

import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from fused_rmsnorm import RMSNorm
from fused_rmsnorm import functional as F

x, w = torch.arange(32.0).view(4, 8), torch.ones(8)


def add(input, *args, **kwargs):
    return F.add_rms_norm(input, x, *args, **kwargs)


def add_in_place(input, *args, **kwargs):
    into = input.clone() if isinstance(input, torch.Tensor) else input
    return F.add_rms_norm_(into, x.clone(), *args, **kwargs)


FUNCTIONS = [F.rms_norm, F.composite_rms_norm, add, add_in_place]


STRIDED = "must be a strided tensor, but got"
UNUSUAL = {
    "sparse": (lambda t: t.to_sparse(), f"{STRIDED} layout Sparse"),
    "csr": (lambda t: t.expand(4, -1).to_sparse_csr(), f"{STRIDED} layout SparseCsr"),
    "bsr": (lambda t: t.expand(4, -1).to_sparse_bsr((2, 2)), f"{STRIDED} layout SparseBsr"),
    "mkldnn": (lambda t: t.to_mkldnn(), f"{STRIDED} layout (Mkldnn|torch._mkldnn)"),
    "nested": (lambda t: torch.nested.nested_tensor([t, t]), f"{STRIDED} a nested one"),
    "jagged": (
        lambda t: torch.nested.nested_tensor([t.view(-1, 8), x], layout=torch.jagged),
        f"{STRIDED} a nested one",
    ),
    "quantised": (
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8),
        "must have dtype .*, but got QUInt8",
    ),
    "complex32": (lambda t: t.to(torch.complex32), "must have dtype .*, but got ComplexHalf"),
}


@pytest.mark.filterwarnings("ignore")  # torch warns that these are prototypes, or deprecated
@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("name", ["input", "weight", "bias", "residual"])
def test_unusual_tensors(name, kind):
    """Refused by name ahead of the dispatcher, whose error would list every backend."""
    make, message = UNUSUAL[kind]
    if name == "residual":
        if kind in ("quantised", "complex32"):
            message = "must have input's dtype"
        for function in (F.add_rms_norm, F.add_rms_norm_):
            with pytest.raises(TypeError, match=rf"^residual {message}"):
                function(x.clone(), make(x), 8)
        return
    args = {"input": x, "weight": w, name: make(x if name == "input" else w)}
    for function in FUNCTIONS:
        with pytest.raises(TypeError, match=rf"^{name} {message}"):
            function(normalized_shape=8, **args)
    if kind == "mkldnn":  # several dimensions, which Python flattens before the operator looks
        with pytest.raises(TypeError, match=rf"^{name} {message}"):
            F.rms_norm(**{"input": x, "normalized_shape": (4, 8), name: make(x)})


@pytest.mark.parametrize("name", ["p", "eps", "weight_offset"])
@pytest.mark.parametrize(
    "value",
    [1, Fraction(1, 2), Decimal("0.5"), np.float32(0.5), np.int64(1), torch.tensor(0.5)],
    ids=repr,
)
def test_numbers(name, value):
    """What Python's float() takes, and 0-dim tensors, as torch's own functions do."""
    plain = {name: float(value)}
    for function in FUNCTIONS:
        result, expected = function(x, 8, w, **{name: value}), function(x, 8, w, **plain)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    module = RMSNorm(8, **{name: value})
    assert repr(module) == repr(RMSNorm(8, **plain))
    assert type(getattr(module, name)) is float


NOT_NUMBERS = ["0.5", True, [0.5], 1j, np.ones(2), torch.ones(1), torch.tensor(1.0, device="meta")]


@pytest.mark.parametrize("name", ["p", "eps", "weight_offset"])
@pytest.mark.parametrize("value", NOT_NUMBERS, ids=repr)
def test_what_is_no_number(name, value):
    for function in FUNCTIONS:
        with pytest.raises(TypeError, match=rf"^{name} must be a number, but got"):
            function(x, 8, w, **{name: value})
    with pytest.raises(TypeError, match=rf"^{name} must be a number, but got"):
        RMSNorm(8, **{name: value})


@pytest.mark.parametrize("name", ["p", "eps", "weight_offset"])
def test_numbers_that_would_lose_something(name):
    """A gradient, or all but infinity."""
    parameter = torch.tensor(0.5, requires_grad=True)
    for call in (*FUNCTIONS, lambda *_, **kwargs: RMSNorm(8, **kwargs)):
        with pytest.raises(TypeError, match=rf"^{name} must be .* requires grad: it would get no"):
            call(x, 8, w, **{name: parameter})
        with pytest.raises(ValueError, match=rf"^{name} must be a number that a float can hold"):
            call(x, 8, w, **{name: 10**400})


@pytest.mark.parametrize(
    "shape",
    [np.int64(8), np.int32(8), [np.int64(8)], (np.int16(8),), np.array([8]), torch.Size([8])],
    ids=repr,
)
def test_normalized_shape(shape):
    for function in FUNCTIONS:
        for a, b in zip(function(x, shape, w), function(x, 8, w), strict=True):
            assert torch.equal(a, b)
    assert RMSNorm(shape).normalized_shape == (8,)
    assert type(RMSNorm(shape).normalized_shape[0]) is int


@pytest.mark.parametrize("shape", [8.0, None, "8", torch.tensor(8), [8.0], [None], True], ids=repr)
def test_what_is_no_normalized_shape(shape):
    """A module refuses what is no int; a function compares it with the input's sizes."""
    message = re.escape("normalized_shape must be an int or a sequence of ints, but got ")
    with pytest.raises(TypeError, match=message):
        RMSNorm(shape)
    if isinstance(shape, (list, bool)):
        return
    for function in FUNCTIONS:
        with pytest.raises(TypeError, match=message + re.escape(repr(shape))):
            function(x, shape)


@pytest.mark.parametrize("as_shape", [lambda n: n, lambda n: [n], lambda n: (n,)])
def test_sizes_that_are_symbols(as_shape):
    """x.shape[-1] while make_fx traces with symbolic sizes, alone and in a sequence."""
    norm = lambda x: F.rms_norm(x, as_shape(x.shape[-1]))  # noqa: E731
    traced = torch.fx.experimental.proxy_tensor.make_fx(norm, tracing_mode="symbolic")(x)
    other = torch.randn(3, 5)
    assert torch.equal(traced(other), F.rms_norm(other, 5))


@pytest.mark.parametrize("where", ["input", "residual"])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_what_is_read_while_it_is_written(name, where):
    written = {"input": x.clone(), "residual": x.clone()}
    message = f"{name} must not share memory with {where}, which is written in place: clone it"
    for vector in (written[where][2], written[where].flatten()[-8:], written[where].view(-1)[::4]):
        args = {"weight": w, name: vector}
        with pytest.raises(RuntimeError, match=r"^" + re.escape(message)):
            F.add_rms_norm_(*written.values(), 8, **args)
    assert all(torch.equal(t, x) for t in written.values())


def test_beside_each_other_in_one_buffer():
    """32 elements that are written and 8 that are read, in both orders: no overlap."""
    for written, read in ((slice(0, 32), slice(32, 40)), (slice(8, 40), slice(0, 8))):
        packed = torch.arange(40.0)
        weight = packed[read].clone()
        y, s = F.add_rms_norm(packed[written].view(4, 8), x, 8, weight)
        residual = x.clone()
        F.add_rms_norm_(packed[written].view(4, 8), residual, 8, packed[read])
        assert torch.equal(packed[written].view(4, 8), y)
        assert torch.equal(residual, s)
        assert torch.equal(packed[read], weight)


def test_true_is_no_size():
    with pytest.raises(TypeError, match=r"^normalized_shape must be an int or a sequence of ints"):
        F.rms_norm(torch.ones(2, 1), True)


def negative(t):
    """The same numbers in memory that holds their negatives, as ``z.conj().imag`` does."""
    view = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert view.is_neg()
    return view


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1), (2,), (0, 1, 2, 3)], ids=str)
def test_negative_views(mode, which):
    """Read and written for what they mean. torch's own fallback takes a result from the stack that
    an operator which returns nothing has not put there: the heap was corrupted."""
    tensors = [x / 7, x.flip(0) - 9, w + 0.5, w * 3]
    y, s = F.add_rms_norm(*tensors[:2], 8, tensors[2], bias=tensors[3])
    for _ in range(50):
        given = [negative(t) if i in which else t.clone() for i, t in enumerate(tensors)]
        with mode():
            F.add_rms_norm_(*given[:2], 8, given[2], bias=given[3])
        assert [t.is_neg() for t in given] == [i in which for i in range(4)]
        assert torch.equal(given[0].resolve_neg(), y)
        assert torch.equal(given[1].resolve_neg(), s)


def test_a_negative_view_of_what_is_written():
    z = torch.complex(x, x + 1).conj()
    before = z.clone()
    with pytest.raises(RuntimeError, match="memory"):
        F.add_rms_norm_(z.imag, z.imag, 8)
    assert torch.equal(z, before)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_nothing_is_written_where_there_are_no_rows(name):
    """No overlap, wherever the empty tensor points: into the weight, or nowhere."""
    vectors = {"weight": torch.ones(8), "bias": torch.ones(8)}
    for empty in (torch.empty(0, 8), vectors[name].as_strided((0, 8), (8, 1), 4)):
        F.add_rms_norm_(empty, torch.empty(0, 8), 8, **vectors)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sparse", "mkldnn", "nested"])
@pytest.mark.parametrize("name", ["input", "weight", "bias"])
def test_unusual_tensors_in_groups(name, kind):
    make, _ = UNUSUAL[kind]
    args = {"input": x, "weight": w, name: make(x if name == "input" else w)}
    for function in (F.rms_norm, F.composite_rms_norm, add):
        with pytest.raises(TypeError, match=rf"^{name} {STRIDED}"):
            function(normalized_shape=8, group_size=4, **args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_results_are_contiguous(dtype):
    """Of the definition and of complex numbers, too, whatever the strides of the input."""
    t = torch.randn(3, 4, 8).to(dtype).transpose(0, 1)
    results = [
        F.rms_norm(t, 8),
        F.composite_rms_norm(t, 8, w),
        F.composite_rms_norm(t, (3, 8)),
        *F.add_rms_norm(t, t, 8),
    ]
    if not dtype.is_complex:
        results += [F.composite_rms_norm_gated(t, t, 8, w), F.rms_norm_gated(t, t, 8)]
    assert all(y.is_contiguous() for y in results)
