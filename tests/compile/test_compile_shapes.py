"""torch.compile and fake tensors where sizes are not numbers: at most one recompilation over a
range of batch sizes, a hidden size that varies, and sizes that depend on data."""

import pytest
import torch
from cases import numbers
from compiling import assert_same_results, bits_of, leaf
from reference import same_bits
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fused_rmsnorm import AddRMSNorm, RMSNorm
from fused_rmsnorm import functional as F

N = 40


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def counted(function, backend="aot_eager", **kwargs):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter, **kwargs), counter


class NoRecompilation:
    """From the second call on. With dynamic=True torch compiles the first one twice wherever a
    float is passed (nn.LayerNorm's eps, too): it is a symbol at first."""

    def __init__(self, counter):
        self.counter, self.first = counter, None

    def after_call(self):
        self.first = self.first or self.counter.frame_count
        assert self.counter.frame_count == self.first <= 2


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("kind", [RMSNorm, AddRMSNorm])
def test_batch_sizes(kind, marked):
    """One recompilation over many batch sizes, none where the dimension was marked."""
    norm = kind(N, p=0.3, bias=True)
    compiled, counter = counted(norm)
    for rows in (3, 5, 8, 13, 64):
        args = [leaf((rows, 2, N), i) for i in range(1 + (kind is AddRMSNorm))]
        for t in args if marked else ():
            torch._dynamo.mark_dynamic(t, 0)
        assert_same_results(compiled, norm, *args)
    assert counter.frame_count == (1 if marked else 2)


def test_batch_sizes_in_fuse_mode():
    norm, eager = RMSNorm(N, compile_mode="fuse"), RMSNorm(N)
    compiled, counter = counted(norm)
    for rows in (3, 5, 8, 13, 64):
        x = leaf((rows, 2, N))
        torch.testing.assert_close(bits_of(compiled, (x,)), bits_of(eager, (x,)))
    assert counter.frame_count == 2


def test_batch_sizes_with_inductor():
    """One dynamic kernel for all, under no_grad."""
    norm = AddRMSNorm(N)
    compiled, counter = counted(norm, "inductor", dynamic=True)
    check = NoRecompilation(counter)
    with torch.no_grad():
        for rows in (3, 5, 8, 13):
            x, residual = (numbers((rows, N), torch.float32, "cpu", i) for i in range(2))
            for actual, expected in zip(compiled(x, residual), norm(x, residual), strict=True):
                assert same_bits(actual, expected)
            check.after_call()


def test_several_sizes_at_once():
    """Batch, sequence and, over several dimensions, what is normalised."""

    def norm(x, w):
        return F.rms_norm(x, x.shape[-2:], w)

    compiled, counter = counted(norm, dynamic=True)
    check = NoRecompilation(counter)
    for a, b, c, d in ((2, 3, 4, 5), (3, 2, 6, 7), (4, 5, 8, 9)):
        assert_same_results(compiled, norm, leaf((a, b, c, d)), leaf((c, d), 1))
        check.after_call()


@pytest.mark.parametrize("p", [None, 0.07, 0.5])
def test_hidden_size_that_varies(p):
    """ceil(p * N) is taken of the size that there is, not of the first one seen."""

    def norm(x, residual, w):
        n = x.shape[-1]
        return (F.rms_norm(x, n, w, p=p), *F.add_rms_norm(x, residual, n, w, p=p))

    compiled, counter = counted(norm, dynamic=True)
    check = NoRecompilation(counter)
    for n in (40, 100, 101, 7):
        assert_same_results(compiled, norm, leaf((3, n)), leaf((3, n), 1), leaf(n, 2))
        check.after_call()


def test_hidden_size_in_fuse_mode():
    """With p the graph works out the number of columns: one graph, right for each size."""
    compiled, counter = counted(
        lambda x, w: F.composite_rms_norm(x, x.shape[-1], w, p=0.07), dynamic=True
    )
    check = NoRecompilation(counter)
    for n in (40, 100, 101):
        x, w = leaf((3, n)), leaf(n, 1)
        expected = bits_of(lambda x, w: F.rms_norm(x, x.shape[-1], w, p=0.07), (x, w))
        torch.testing.assert_close(bits_of(compiled, (x, w)), expected)
        check.after_call()


@pytest.mark.parametrize("p", [None, 0.3])
def test_rows_chosen_by_data(p):
    """As many rows as a mask selects: an unbacked size, forward and backward, no rows at all."""

    def norm(x, w):
        rows = x[x[:, 0] > 0]
        return (F.rms_norm(rows, N, w, p=p), *F.add_rms_norm(rows, rows * 2, N, w, p=p))

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled, counter = counted(norm)
        for shift in (0.0, 0.5, -100.0):
            x = (numbers((9, N), torch.float32, "cpu", 0) + shift).requires_grad_()
            assert_same_results(compiled, norm, x, leaf(N, 1))
    assert counter.frame_count == 1


def test_rows_chosen_twice():
    """Two unbacked sizes are compared when they are known: by the compiled graph."""

    def norm(x, residual, keep):
        return F.add_rms_norm(x[keep[0]], residual[keep[1]], N)

    x, residual = (numbers((6, N), torch.float32, "cpu", i) for i in range(2))
    mask = torch.tensor([[True, False, True, True, False, False]] * 2)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled, _ = counted(norm)
        for actual, expected in zip(
            compiled(x, residual, mask), norm(x, residual, mask), strict=True
        ):
            assert same_bits(actual, expected)
        mask[1, 1] = True
        with pytest.raises(RuntimeError, match="Runtime assertion failed"):
            compiled(x, residual, mask)


@pytest.mark.parametrize("p", [None, 0.3])
def test_columns_chosen_by_data(p):
    """A number read from a tensor: of both the input and the weight, as much as it says."""

    def norm(x, w, n):
        n = n.item()
        torch._check(n >= 2)
        torch._check(n <= N)
        return torch.ops.fused_rmsnorm.rms_norm(x[:, :n], w[:n], p=p)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled, counter = counted(norm)
        for n in (2, 17, N):
            args = leaf((3, N)), leaf(N, 1), torch.tensor(n)
            torch._dynamo.mark_dynamic(args[1], 0)  # the slice may then be shorter than n
            assert_same_results(compiled, norm, *args)
    assert counter.frame_count == 1


def symbolic(mode, sizes, dtype):
    """A fake tensor whose sizes are symbols, unless they are 1."""
    dynamic = [torch.fx.experimental.symbolic_shapes.DimDynamic.DYNAMIC] * len(sizes)
    context = torch.fx.experimental.symbolic_shapes.StatelessSymbolicContext(dynamic)
    return mode.from_tensor(torch.empty(sizes, dtype=dtype), symbolic_context=context)


@pytest.mark.parametrize("weight_type", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["torch", "llama"])
def test_fake_tensors(mode, weight_type):
    """Dtypes and strides as the kernels give them, symbols as they came, and no guard on any."""
    env = ShapeEnv()
    with FakeTensorMode(shape_env=env) as fake:
        x = symbolic(fake, (6, 5, N), torch.bfloat16).transpose(0, 1).requires_grad_()
        w = symbolic(fake, (N,), weight_type).requires_grad_()
        before = len(env.guards)
        y, s = F.add_rms_norm(x, x, x.shape[-1], w, p=0.3, casting_mode=mode)
        dx, dw = torch.autograd.grad((y, s), (x, w), (y, s))
    assert y.dtype == torch.promote_types(x.dtype, weight_type if mode == "llama" else x.dtype)
    assert (s.dtype, dx.dtype, dw.dtype) == (x.dtype, x.dtype, weight_type)
    assert y.is_contiguous()
    assert s.is_contiguous()
    assert [str(n) for n in y.shape] == [str(n) for n in x.shape]
    assert [str(n) for n in dw.shape] == [str(n) for n in w.shape]
    # The length of the weight is that of a row: the one thing that has to hold.
    assert len(env.guards) - before <= 1
