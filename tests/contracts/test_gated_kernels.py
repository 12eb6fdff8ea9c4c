"""The fused kernels of gated norms: what they cover, how exact they are beside the composite, and
the contracts of the design by bits."""

from dataclasses import replace

import pytest
import torch
from cases import LAYOUTS, SEEDS, N, affine_type, lay_out, numbers
from gated_families import FAMILIES, fused_twin
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Options, arithmetic_type, as_exact, rms_error, rms_norm_gated, same_bits

from fused_rmsnorm import functional as F

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)
ORDERS = [True, False]
OPTIONS = [Options(1e-5), Options(1e-5, 0.3, 1.0), Options(1e-5, None, 0.0, "llama")]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def everything(x, z, w, b, dy, o: Options, norm_before_gate=True, activation="silu", group=None,
               norm=F.rms_norm_gated):  # fmt: skip
    """y, and the gradients of those of x, z, w and b that are given."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in (x, z, w, b)]
    y = norm(
        leaves[0], leaves[1], x.shape[-1], leaves[2], o.eps, bias=leaves[3], activation=activation,
        norm_before_gate=norm_before_gate, group_size=group, **o.keywords(),
    )  # fmt: skip
    given = [t for t in leaves if t is not None]
    return y.detach(), *torch.autograd.grad(y, given, dy.to(y.dtype))


def inputs(shape, dtype, weight_shape=None, w_type=None, seed=0, device="cpu"):
    """x, z, w, b, dy"""
    weight_shape = shape[-1:] if weight_shape is None else weight_shape
    types = (dtype, dtype, w_type or dtype, w_type or dtype, dtype)
    shapes = (shape, shape, weight_shape, weight_shape, shape)
    return [
        numbers(s, t, device, seed + i) for i, (s, t) in enumerate(zip(shapes, types, strict=True))
    ]


def operations(run) -> set[str]:
    with torch.profiler.profile() as profile:
        run()
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("norm_before_gate", ORDERS)
def test_what_is_fused(device, norm_before_gate):
    """In both directions no operation of the composite, but for what the kernels do not cover."""

    def composed(x, z, w, group=None):
        dy = torch.ones_like(x)
        seen = operations(
            lambda: everything(x, z, w, None, dy, Options(1e-5), norm_before_gate, group=group)
        )
        return bool(seen & {"aten::sigmoid", "aten::silu"})

    for dtype in DTYPES:
        x, z, w, _, _ = inputs((2, 3, 4, 8), dtype, device=device)
        for weight in (w, w.float(), None):
            assert not composed(x, z, weight)
        assert not composed(x.transpose(0, 1), z[..., :1].expand_as(z).transpose(0, 1), w)
        assert not composed(x, z, w, group=2)
        for shape in ((4, 8), (3, 1, 8), (2, 1, 1, 8), (3, 4, 8), (1, 3, 4, 8)):
            assert not composed(x, z, w.expand(shape).contiguous())
        assert composed(x, z, w.expand(2, 1, 4, 8).contiguous())  # with a gap between the two
        assert composed(x, z.double(), w)
        assert composed(x.double(), z, w)
    x, z, w, _, _ = inputs((3, 8), torch.float32, device=device)
    assert not composed(x, z.half(), w)
    assert composed(x.half(), z, w)


@st.composite
def calls(draw, device):
    leading = draw(st.sampled_from([(3,), (5, 1), (3, 4), (2, 3, 2), (2, 1, 2, 3), (17, 2)]))
    n = draw(N)
    kept = draw(st.integers(0, len(leading)))
    weight = tuple(draw(st.sampled_from([1, s])) for s in leading[len(leading) - kept :])
    dtype = draw(st.sampled_from(DTYPES))
    w_type = affine_type(draw(st.sampled_from(["same", "fp32", torch.float64])), dtype)
    layouts = draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 3))
    seed = draw(SEEDS)
    x, z, w, b, dy = inputs((*leading, n), dtype, (*weight, n), w_type, seed, device)
    x, z, dy = (lay_out(t, layout) for t, layout in zip((x, z, dy), layouts, strict=True))
    if draw(st.booleans()):
        b = None
    return x, z, w, b, dy


@settings(max_examples=150)
@given(
    data=st.data(),
    p=st.one_of(st.none(), st.floats(0.1, 1)),
    offset=st.sampled_from([0.0, 1.0]),
    mode=st.sampled_from(["torch", "torch", "llama"]),
    activation=st.sampled_from(["silu", "sigmoid"]),
    norm_before_gate=st.booleans(),
)
def test_no_less_exact_than_the_composite(
    device, data, p, offset, mode, activation, norm_before_gate
):
    """The value and every gradient, in any layout, under weights of any shape, against fp64."""
    call = x, z, w, b, dy = data.draw(calls(device))
    args = (Options(1e-5, p, offset, mode), norm_before_gate, activation)
    ours = everything(*call, *args)
    theirs = everything(*call, *args, norm=F.composite_rms_norm_gated)
    leaves = [t if t is None else t.detach().double().requires_grad_() for t in (x, z, w, b)]
    # The definition rounds in llama mode to x's dtype, of which it is told by a narrow copy.
    o = args[0]
    exact = definition(leaves, x.dtype, w.dtype, o, activation, norm_before_gate)
    wanted = [t for t in leaves if t is not None]
    exact = (exact, *torch.autograd.grad(exact, wanted, dy.double()))
    for name, a, t, e in zip("yxzwb", ours, theirs, exact, strict=False):
        assert (a.shape, a.dtype) == (t.shape, t.dtype)
        unit = torch.finfo(a.dtype).eps + 4 * torch.finfo(arithmetic_type(x.dtype)).eps
        if x.shape[-1] == 1 and name in "xz":
            continue  # all cancellation
        if not as_exact(e).any():
            assert not a.any()
            continue
        assert rms_error(a, as_exact(e)) <= 1.5 * rms_error(t, as_exact(e)) + unit, name


def definition(leaves, x_type, w_type, o: Options, activation, norm_before_gate):
    """rms_norm_gated of the reference, with the roundings of llama mode to x's dtype."""
    plain = replace(o, casting_mode="torch")
    if o.casting_mode == "torch":
        return rms_norm_gated(*leaves, plain, activation, norm_before_gate)
    through = lambda t, dtype: t + (t.to(dtype).double() - t).detach()  # noqa: E731
    x, z, w, b = leaves
    act = z.sigmoid() if activation == "sigmoid" else z * z.sigmoid()
    rows = x if norm_before_gate else x * act
    k = next(k for k in range(1, x.shape[-1] + 1) if o.p is None or k / x.shape[-1] >= o.p)
    k = x.shape[-1] if o.p is None else k
    h = through(rows / (rows[..., :k].square().mean(-1, keepdim=True) + o.eps).sqrt(), x_type)
    y = h * (o.weight_offset + w)
    y = y if b is None else y + b
    return through(y, torch.promote_types(x_type, w_type)) * act if norm_before_gate else y


@pytest.mark.parametrize("norm_before_gate", ORDERS)
@pytest.mark.parametrize("o", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 40, 129, 1000])
def test_row_alone_is_row_in_batch(device, dtype, n, o, norm_before_gate):
    """y, dx and dz, in any layout, at any alignment, whatever other rows there are."""
    x, z, w, b, dy = inputs((30, n), dtype, w_type=torch.float32, device=device)
    args = (o, norm_before_gate)
    expected = everything(x, z, w, b, dy, *args)[:3]
    for i in (0, 17, 29):
        alone = everything(x[i].clone(), z[i].clone(), w, b, dy[i].clone(), *args)
        for a, e in zip(alone[:3], expected, strict=True):
            assert same_bits(a, e[i])
    for layout in ("slice of wider rows", "one of three packed", "misaligned"):
        x2, z2, dy2 = (lay_out(t, layout) for t in (x, z, dy))
        for a, e in zip(everything(x2, z2, w, b, dy2, *args)[:3], expected, strict=True):
            assert same_bits(a, e)


@pytest.mark.parametrize("norm_before_gate", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "weight"),
    [((3000, 33), 33), ((40, 4100), 4100), ((300, 8, 64), (8, 64)), ((9, 300, 65), (9, 1, 65))],
    ids=str,
)  # fmt: skip
def test_threads_and_repetition(device, shape, weight, dtype, norm_before_gate):
    """Every result has the same bits with 1, 2 and 3 threads, each time."""
    args = (*inputs(shape, dtype, weight, device=device), Options(1e-5), norm_before_gate)
    torch.set_num_threads(1)
    expected = everything(*args)
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        for a, e in zip(everything(*args), expected, strict=True):
            assert same_bits(a, e)


@pytest.mark.parametrize("norm_before_gate", ORDERS)
def test_large_outputs(norm_before_gate):
    """Written past the caches or not, as it is timed: the same bits."""
    rows, n = 2500, 1000
    x, z, w, b, dy = inputs((rows, n), torch.float32)
    torch.set_num_threads(1)
    large = everything(x, z, w, b, dy, Options(1e-5), norm_before_gate)
    for i in range(0, rows, 250):
        s = slice(i, i + 100)
        part = everything(x[s], z[s], w, b, dy[s], Options(1e-5), norm_before_gate)
        for a, e in zip(part[:3], large[:3], strict=True):
            assert same_bits(a, e[s])


@pytest.mark.parametrize("norm_before_gate", ORDERS)
def test_inputs_are_never_written(norm_before_gate):
    args = inputs((7, 40), torch.bfloat16)
    before = [t.clone() for t in args]
    everything(*args, Options(1e-5), norm_before_gate)
    for t, e in zip(args, before, strict=True):
        assert same_bits(t, e)
        assert t._version == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_size_is_a_norm_of_each_group(dtype):
    """By bits: each group of a row is a row by itself under its part of the weight."""
    x, z, w, b, dy = inputs((6, 96), dtype)
    whole = everything(x, z, w, b, dy, Options(1e-5), group=32)
    for g in range(3):
        s = (Ellipsis, slice(32 * g, 32 * g + 32))
        part = everything(*(t[s].contiguous() for t in (x, z, w, b, dy)), Options(1e-5))
        for a, e in zip(part, whole, strict=True):
            assert same_bits(a, e[s])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_as_in_transformers(family, dtype):
    """Of input, gate and weight, those that each family's module gives, to its last roundings."""
    theirs = FAMILIES[family]().to(dtype)
    torch.nn.init.normal_(theirs.weight)
    ours = fused_twin(theirs, family).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    x, z, dy = (numbers((4, 33, 64), dtype, "cpu", seed) for seed in (0, 1, 2))
    found = []
    for module in (ours, theirs):
        leaves = [t.clone().requires_grad_() for t in (x, z)]
        y = module(*leaves)
        found.append(torch.autograd.grad(y, (*leaves, module.weight), dy.to(y.dtype)))
    for a, e in zip(*found, strict=True):
        assert a.dtype == e.dtype
        error = (a.double() - e.double()).square().mean().sqrt() / e.double().square().mean().sqrt()
        # The composed operations round each intermediate gradient to the half type.
        assert error <= (2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps), error
