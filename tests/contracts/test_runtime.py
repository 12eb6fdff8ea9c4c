"""Threads, processes, torch's global modes, devices without kernels, CUDA streams and graphs."""

import os
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from cases import numbers
from conftest import DEVICES
from processes import completed
from reference import Options, assert_backward, assert_forward, same_bits
from torch import nn

from fused_rmsnorm import AddRMSNorm, RMSNorm
from fused_rmsnorm import functional as F

HERE = Path(__file__).parent
needs_gpu = pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU and the CUDA half")


def training_step(x, w, b, dy, retain_graph=False):
    """y, dx, dw, db, and the same of a fused add."""
    y = F.rms_norm(x, x.shape[-1], w, bias=b)
    grads = torch.autograd.grad(y, (x, w, b), dy)
    z, s = F.add_rms_norm(x, dy, x.shape[-1], w, bias=b)
    more = torch.autograd.grad((z, s), (x, w, b), (dy, dy))
    return [y.detach(), *grads, z.detach(), s.detach(), *more]


def operands(rows, n, device, seed=0, dtype=torch.float32):
    x, w, b = (numbers(s, dtype, device, seed + i) for i, s in enumerate([(rows, n), n, n]))
    leaves = [t.requires_grad_() for t in (x, w, b)]
    return *leaves, numbers((rows, n), dtype, device, seed + 3)


def in_threads(count, function):
    """function(i) in each of ``count`` threads, started together; their results."""
    results, errors = [None] * count, []
    barrier = threading.Barrier(count)

    def run(i):
        try:
            barrier.wait()
            results[i] = function(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return results


def all_same(a, b):
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_with_graphs_of_their_own(device, dtype):
    """Four threads at once, each with its own shapes: the bits that each has alone."""
    sizes = [(3, 17), (200, 256), (700, 300), (64, 1000)]
    args = [operands(*size, device, i, dtype) for i, size in enumerate(sizes)]
    expected = [training_step(*a) for a in args]
    results = in_threads(4, lambda i: [training_step(*args[i]) for _ in range(10)])
    for of_thread, wanted in zip(results, expected, strict=True):
        assert all(all_same(result, wanted) for result in of_thread)


@pytest.mark.parametrize("engine_threads", [True, False])
def test_one_graph_from_many_threads(device, engine_threads):
    """Backward through the very same nodes at once, first and second order."""
    x, w, b, dy = operands(300, 257, device)
    y = F.rms_norm(x, 257, w, bias=b)
    z, s = F.add_rms_norm(x, y, 257, w)
    with torch.autograd.set_multithreading_enabled(engine_threads):

        def backward(_):
            grads = torch.autograd.grad((z, s), (x, w, b), (dy, dy), create_graph=True)
            return [*grads, torch.autograd.grad(grads[0].square().sum(), x, retain_graph=True)[0]]

        expected = backward(0)
        for result in in_threads(4, lambda i: [backward(i) for _ in range(3)][-1]):
            assert all_same(result, expected)


def test_one_module_in_many_threads(device):
    """Gradients of all threads add up in the parameters; small integers add exactly."""
    module = RMSNorm(16, eps=0.0, device=device)
    x = torch.ones(8, 16, device=device)  # normalised: ones
    in_threads(4, lambda i: [module(x).sum().backward() for _ in range(25)])
    assert same_bits(module.weight.grad, torch.full((16,), 8.0 * 4 * 25, device=device))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms(device, deterministic):
    """Nothing is refused, and nothing is left of the NaN with which torch then fills new memory:
    every element of a result, of rstd and of the workspaces is written before it is read."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    for rows, n in ((1, 1), (3, 17), (300, 100), (40, 4100), (0, 8)):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x, w, b, dy = operands(rows, n, device, dtype=dtype)
            result = training_step(x, w, b, dy)
            assert_forward(result[0], x, w, b, Options())
            assert_backward(result[1:4], x, w, b, dy, Options())
            torch.use_deterministic_algorithms(False)
            assert all_same(training_step(x, w, b, dy), result)
            torch.use_deterministic_algorithms(True)
    x, w, b, dy = operands(5, 33, device)
    (dx,) = torch.autograd.grad(F.rms_norm(x, 33, w, bias=b), x, dy, create_graph=True)
    assert torch.isfinite(torch.autograd.grad(dx.sum(), x)[0]).all()


@pytest.mark.parametrize("which", ["RmsNorm", "AddRmsNorm", "RmsNormBackward"])
def test_anomaly_mode_shows_the_forward_call(device, which):
    """The node that made a NaN, and the line of the call that recorded it."""
    x, w, _, _ = operands(3, 8, device)

    def the_forward_call_at_fault():
        if which == "AddRmsNorm":
            return F.add_rms_norm(x, x, 8, w)[0]
        y = F.rms_norm(x, 8, w)
        if which == "RmsNorm":
            return y
        return torch.autograd.grad(y.sum(), x, create_graph=True)[0]

    with (
        warnings.catch_warnings(record=True) as caught,
        torch.autograd.detect_anomaly(check_nan=True),
    ):
        warnings.simplefilter("always")
        y = the_forward_call_at_fault()
        nan = torch.full_like(y, float("nan"))
        with pytest.raises(RuntimeError, match=f"'{which}Backward' returned nan"):
            y.backward(nan)
    told = [str(w.message) for w in caught if "Error detected" in str(w.message)]
    assert len(told) == 1
    assert f"Error detected in {which}Backward" in told[0]
    assert "the_forward_call_at_fault" in told[0]


def run_python(*arguments):
    done = completed(
        [sys.executable, *arguments],
        timeout=900,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_device_without_kernels():
    """The composite serves it: forward, backward, both kinds of fused add, modules."""
    backends = pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(backends, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot make a device of Python")
    assert run_python(str(HERE.parent / "support" / "other_device.py")) == "right"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_meta_tensors(dtype):
    """Shapes, strides and dtypes of forward and backward without data, as they are with it."""

    def shapes(device):
        kinds = [(2, 3, 8), (2, 3, 8), (8,), (8,)]
        x, r, w, b = (torch.ones(s, dtype=dtype, device=device, requires_grad=True) for s in kinds)
        y = F.rms_norm(x.transpose(0, 1), 8, w, p=0.5)
        z, s = F.add_rms_norm(x, r, (3, 8), w.expand(3, 8), bias=b.expand(3, 8))
        loss = sum(t.abs().sum() for t in (y, z, s))
        grads = torch.autograd.grad(loss, (x, r, w, b))
        return [(t.shape, t.stride(), t.dtype) for t in (y, z, s, *grads)]

    assert shapes("meta") == shapes("cpu")


FORK = """
import torch
from torch.utils.data import DataLoader, Dataset
from test_runtime import operands, training_step

class Steps(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        result = training_step(*args)
        return [t.detach().numpy() for t in result], torch.get_num_threads()

if __name__ == "__main__":
    torch.set_num_threads(2)
    args = operands(600, 300, "cpu")
    expected = training_step(*args)  # on two threads
    loader = DataLoader(Steps(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    for result, threads in loader:
        assert threads == 1
        for a, e in zip(result, expected, strict=True):
            assert torch.equal(torch.as_tensor(a), e)
    again = training_step(*args)
    assert all(torch.equal(a, e) for a, e in zip(again, expected, strict=True))
    print("right")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_fork_after_use(tmp_path):
    """Workers of a DataLoader, forked after threads have run here: forward and backward. (Each
    sets torch to one thread. A forked process that does not hangs in its first parallel loop, here
    as in F.layer_norm: libgomp's threads do not survive a fork.)"""
    script = tmp_path / "fork_after_use.py"
    script.write_text(FORK)
    assert run_python(str(script)) == "right"


def step_in_a_process(module, x, queue):
    """One step of SGD on shared weights; hands back the output and the gradient."""
    y = module(x)
    y.sum().backward()
    with torch.no_grad():
        module.weight -= module.weight.grad
    queue.put((y.detach().numpy(), module.weight.grad.numpy()))


def test_spawn_with_shared_weights():
    """A module in shared memory, pickled into another process: what it writes is seen here."""
    module, x = RMSNorm(64, bias=True), numbers((10, 64), torch.float32, "cpu", 1)
    with torch.no_grad():
        module.weight.copy_(numbers(64, torch.float32, "cpu", 2))
    module.share_memory()
    assert module.weight.is_shared()
    assert module.bias.is_shared()
    before, y = module.weight.detach().clone(), module(x)
    (dw,) = torch.autograd.grad(y.sum(), module.weight)
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=step_in_a_process, args=(module, x, queue))
    process.start()
    their_y, their_dw = queue.get()
    process.join()
    assert process.exitcode == 0
    assert same_bits(torch.from_numpy(their_y), y.detach())
    assert same_bits(torch.from_numpy(their_dw), dw)
    assert same_bits(module.weight.detach(), before - dw)


@needs_gpu
@pytest.mark.parametrize("size", [(64, 100), (300, 4096)], ids=str)
def test_streams(size):
    """Kernels go to the current stream: behind what was put there, and nowhere else."""
    x, w, b, dy = operands(*size, "cuda")
    expected = training_step(x, w, b, dy)
    torch.cuda.synchronize()
    late = torch.full_like(x, float("nan")).requires_grad_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            late.copy_(x)
        result = training_step(late, w, b, dy)
    torch.cuda.current_stream().wait_stream(stream)
    assert all_same(result, expected)


@needs_gpu
def test_backward_runs_on_the_stream_of_its_forward():
    x, w, b, dy = operands(64, 100, "cuda")
    expected = training_step(x, w, b, dy)[1:4]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        y = F.rms_norm(x, 100, w, bias=b)
    grads = torch.autograd.grad(y, (x, w, b), dy)  # from another stream: autograd synchronises
    assert all_same(grads, expected)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(1, 128), (300, 100), (64, 8192)], ids=str)
def test_cuda_graph(size, dtype):
    """Captured once, replayed on other numbers: the bits of eager mode; in place, too."""
    x, w, b, dy = operands(*size, "cuda", dtype=dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            training_step(x, w, b, dy)
    torch.cuda.current_stream().wait_stream(stream)
    into = x.detach().clone(), dy.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = training_step(x, w, b, dy)
        with torch.no_grad():
            F.add_rms_norm_(*into, size[1], w)
    for seed in (10, 20):
        other = operands(*size, "cuda", seed, dtype)
        with torch.no_grad():
            for captured, new in zip((x, w, b, dy), other, strict=True):
                captured.copy_(new)
            into[0].copy_(other[0])
            into[1].copy_(other[3])
        graph.replay()
        assert all_same(result, training_step(*other))
        assert all_same(into, F.add_rms_norm(other[0], other[3], size[1], other[1]))


@needs_gpu
def test_make_graphed_callables():
    x, _, _, dy = operands(32, 64, "cuda")
    plain = nn.Sequential(nn.Linear(64, 64), RMSNorm(64)).cuda()
    expected = torch.autograd.grad(plain(x), (x, *plain.parameters()), dy)
    graphed = torch.cuda.make_graphed_callables(plain, (x,))
    grads = torch.autograd.grad(graphed(x), (x, *plain.parameters()), dy)
    for a, e in zip(grads, expected, strict=True):  # a captured matmul may be another one
        torch.testing.assert_close(a, e)


@needs_gpu
def test_data_parallel_on_gpus():
    """Replicas on every device that there is; with one, the scatter and gather around it."""
    module = AddRMSNorm(64, device="cuda")
    devices = list(range(torch.cuda.device_count()))
    x, _, _, dy = operands(32, 64, "cuda")
    y, s = nn.DataParallel(module, device_ids=devices)(x, dy)
    expected = module(x, dy)
    assert all_same((y, s), expected)
    grads = torch.autograd.grad(y, (x, module.weight), dy)
    wanted = torch.autograd.grad(expected[0], (x, module.weight), dy)
    assert same_bits(grads[0], wanted[0])
    torch.testing.assert_close(grads[1], wanted[1])
