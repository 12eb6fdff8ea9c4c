"""Batch-invariant rows, deterministic gradients, and inputs that are never written: all by bits."""

import functools
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import LAYOUTS, OPTIONS, SEEDS, lay_out, numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import FLOATS, Options, same_bits

from fused_rmsnorm import functional as F

SUPPORT = Path(__file__).parents[1] / "support"

# Longer than a block of rows, and rows enough that every thread gets some (32768 elements each).
SIZES = [(3000, 33), (600, 256), (100, 1000), (40, 4100), (3, 70000)]
OPTION_SETS = [
    Options(),
    Options(p=0.3),
    Options(weight_offset=1.0, casting_mode="llama"),
]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def norm(x, w, b, o: Options):
    return F.rms_norm(x, x.shape[-1], w, o.eps, bias=b, **o.keywords())


def everything(x, w, b, dy, o: Options):
    """y, dx, dw and db."""
    leaves = [t.detach().requires_grad_() for t in (x, w, b)]
    y = norm(*leaves, o)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def inputs(rows, n, dtype, device, seed=0):
    sizes = ((rows, n), n, n, (rows, n))
    return [numbers(size, dtype, device, seed + i) for i, size in enumerate(sizes)]


@settings(max_examples=40)
@given(
    n=st.one_of(st.integers(1, 300), st.sampled_from([512, 1024, 4096, 5000])),
    rows=st.integers(1, 40),
    dtype=st.sampled_from(FLOATS),
    layout=st.sampled_from(LAYOUTS[:5] + LAYOUTS[-1:]),
    o=OPTIONS.filter(lambda o: o.eps != 0),
    data=st.data(),
    seed=SEEDS,
)
def test_row_alone_is_row_in_batch(device, n, rows, dtype, layout, o, data, seed):
    """Whatever the number of rows, the position, the strides and the grad mode: y and dx."""
    x, w, b, dy = inputs(rows, n, dtype, device, seed)
    i = data.draw(st.integers(0, rows - 1), "row")
    y, dx, _, _ = everything(x, w, b, dy, o)
    alone = everything(x[i].clone(), w, b, dy[i].clone(), o)
    assert same_bits(alone[0], y[i])
    assert same_bits(alone[1], dx[i])
    other, other_dy = (lay_out(t, layout) for t in (x, dy))
    again = everything(other, w, b, other_dy, o)
    assert same_bits(again[0], y)
    assert same_bits(again[1], dx)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    shuffled = everything(x[order], w, b, dy[order], o)
    assert same_bits(shuffled[0], y[order])
    assert same_bits(shuffled[1], dx[order])
    with torch.no_grad():
        assert same_bits(norm(x, w, b, o), y)
    with torch.inference_mode():
        assert torch.equal(norm(x, w, b, o), y)
    s = F.add_rms_norm(x, torch.zeros_like(x), n, w, o.eps, bias=b, **o.keywords())
    assert same_bits(s[0] + 0, y + 0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [1, 3, 17, 64, 100, 1000])
def test_any_alignment(device, dtype, n):
    """Every offset of an element within a line of 64 bytes, for x, weight, bias and grad_output."""
    x, w, b, dy = inputs(5, n, dtype, device)
    expected = everything(x, w, b, dy, Options())
    for offset in range(64 // x.element_size()):
        shifted = []
        for k, t in enumerate((x, w, b, dy)):
            buffer = t.new_full((t.numel() + 128,), float("nan"))
            at = (offset * (1, 3, 5, 7)[k]) % 64
            shifted.append(buffer[at : at + t.numel()].view(t.shape).copy_(t))
        for a, e in zip(everything(*shifted, Options()), expected, strict=True):
            assert same_bits(a, e)


@pytest.mark.parametrize(
    ("rows", "n", "dtype"),
    [(2500, 1000, torch.float32), (700, 4099, torch.float32), (5000, 1000, torch.bfloat16)],
    ids=str,
)
def test_large_outputs(device, rows, n, dtype):
    """From 8 MiB a thread on, the CPU kernels write parts of one result past the caches and parts
    with ordinary stores, as they are timed: no bit may depend on which part is which."""
    args = inputs(rows, n, dtype, device)
    x, w, b, dy = args
    torch.set_num_threads(1)
    large = everything(*args, Options())
    sums = F.add_rms_norm(x, dy, n, w)
    for i in range(0, rows, 100):
        part = everything(x[i : i + 100], w, b, dy[i : i + 100], Options())
        assert same_bits(large[0][i : i + 100], part[0])
        assert same_bits(large[1][i : i + 100], part[1])
        added = F.add_rms_norm(x[i : i + 100], dy[i : i + 100], n, w)
        for whole, piece in zip(sums, added, strict=True):
            assert same_bits(whole[i : i + 100], piece)
    torch.set_num_threads(3)  # too little for each to be written past the caches
    for a, e in zip(everything(*args, Options()), large, strict=True):
        assert same_bits(a, e)


@pytest.mark.parametrize("o", OPTION_SETS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("rows", "n"), SIZES)
def test_threads_and_repetition(device, rows, n, dtype, o):
    """y, dx, dw and db have the same bits with 1, 2 and 3 threads, each time."""
    args = inputs(rows, n, dtype, device)
    torch.set_num_threads(1)
    expected = everything(*args, o)
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        for name, a, e in zip(("y", "dx", "dw", "db"), everything(*args, o), expected, strict=True):
            assert same_bits(a, e), f"{name} differs with {threads} threads"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_larger_than_the_caches(device, dtype):
    """The CPU kernels then write past the caches, in lines that rows and threads share: the same
    bits as the rows by themselves, also where the result takes its input's place. (40 MiB: more
    than most caches; tests/kernels/cpu asks for that path by name on every machine.)"""
    rows, n = (40 << 20) // (4099 * dtype.itemsize), 4099
    x, w, b, dy = inputs(rows, n, dtype, device)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        y, dx, _, _ = everything(x, w, b, dy, Options())
        added, s = F.add_rms_norm(x, dy, n, w)
        for i in range(0, rows, rows // 29):
            part = slice(i, i + 3)
            few = everything(x[part], w, b, dy[part], Options())
            assert same_bits(few[0], y[part])
            assert same_bits(few[1], dx[part])
            assert same_bits(F.rms_norm(s[part], n, w), added[part])
        assert same_bits(s, x + dy)
        in_place = x.clone(), dy.clone()
        F.add_rms_norm_(*in_place, n, w)
        assert same_bits(in_place[0], added)
        assert same_bits(in_place[1], s)


@pytest.mark.parametrize("asked", [(True, False), (False, True), (True, True)])
def test_gradients_do_not_depend_on_which_are_asked_for(device, asked):
    x, w, b, dy = inputs(700, 200, torch.bfloat16, device)
    whole = everything(x, w, b, dy, Options())
    leaves = [t.clone().requires_grad_(a) for t, a in zip((w, b), asked, strict=True)]
    norm(x, *leaves, Options()).backward(dy)
    for t, expected in zip(leaves, whole[2:], strict=True):
        assert t.grad is None or same_bits(t.grad, expected)


def bytes_of(t):
    """All of the memory that t is a view of."""
    storage = t.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(storage).clone()


@settings(max_examples=40)
@given(
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    n=st.sampled_from([1, 7, 64, 130]),
    dtype=st.sampled_from(FLOATS),
    weight_type=st.sampled_from(FLOATS),
    o=OPTIONS,
    seed=SEEDS,
)
def test_inputs_are_never_written(device, layouts, n, dtype, weight_type, o, seed):
    """Nor is what lies between their elements; grad_output included."""
    x, residual, dy = (
        lay_out(numbers((3, 4, n), dtype, device, seed + i), layout)
        for i, layout in enumerate(layouts)
    )
    w, b = (numbers(n, weight_type, device, seed + i) for i in (3, 4))
    watched = (x, residual, dy, w, b)
    before = [bytes_of(t) for t in watched]
    versions = [t._version for t in watched]
    everything(x, w, b, dy.to(o.output_type(dtype, weight_type)), o)
    leaves = [t.detach().requires_grad_() for t in (x, residual, w, b)]
    y, s = F.add_rms_norm(*leaves[:2], n, leaves[2], o.eps, bias=leaves[3], **o.keywords())
    grads = torch.autograd.grad((y, s), leaves, (dy.to(y.dtype), dy), create_graph=True)
    torch.autograd.grad(grads[0].sum(), leaves[0])
    F.composite_rms_norm(x, n, w, bias=b)
    for t, bytes_before, version in zip(watched, before, versions, strict=True):
        assert torch.equal(bytes_of(t), bytes_before)
        assert t._version == version


def test_in_place_writes_only_what_it_names(device):
    """A slice of a packed tensor: its neighbours keep their bits."""
    packed = numbers((5, 3, 16), torch.float32, device, 0)
    before = packed.clone()
    x, residual = packed[:, 0], packed[:, 1]
    y, s = F.add_rms_norm(x, residual, 16)
    versions = packed._version
    F.add_rms_norm_(x, residual, 16)
    assert packed._version > versions  # what autograd saved of it is known to be stale
    assert same_bits(packed[:, 0], y)
    assert same_bits(packed[:, 1], s)
    assert same_bits(packed[:, 2], before[:, 2])


CAPABILITY = """
import sys, torch, fused_rmsnorm
sys.path.insert(0, sys.argv[1])
from cases import numbers
from reference import FLOATS, Options, assert_backward, assert_forward
print(fused_rmsnorm.build_info()["cpu_capability"])
for dtype in FLOATS:
    for n in (1, 2, 7, 16, 33, 64, 100, 129, 1000):
        for o in (Options(), Options(p=0.3, weight_offset=1.0), Options(casting_mode="llama")):
            for w_type in {dtype, torch.promote_types(dtype, torch.float32)}:
                x, dy = (numbers((37, n), dtype, "cpu", i).requires_grad_() for i in (0, 1))
                w, b = (numbers(n, w_type, "cpu", i).requires_grad_() for i in (2, 3))
                dy = dy.detach().to(o.output_type(dtype, w_type))
                y = torch.ops.fused_rmsnorm.rms_norm(x, w, b, **o.kwargs())
                assert_forward(y, x, w, b, o)
                assert_backward(torch.autograd.grad(y, (x, w, b), dy), x, w, b, dy, o)
"""


# The values of ATEN_CPU_CAPABILITY, weakest first: what torch calls it, and what we do.
INSTRUCTION_SETS = {
    "default": ("DEFAULT", "baseline"),
    "avx2": ("AVX2", "AVX2"),
    "avx512": ("AVX512", "AVX512"),
}


def unasked() -> dict[str, str]:
    """The environment without a word about the processor: for torch, or for numpy's OpenBLAS."""
    told = ("ATEN_CPU_CAPABILITY", "OPENBLAS_CORETYPE")
    return {k: v for k, v in os.environ.items() if k not in told}


@functools.cache
def capability_of_this_machine() -> str:
    """What torch chooses by itself, whatever this run of the tests has been told."""
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=unasked(), check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.mark.parametrize("capability", INSTRUCTION_SETS)
def test_every_instruction_set(capability):
    """Each set of kernels that this machine can run, chosen as ATen's own are, is right.

    Never more than it has: torch takes ATEN_CPU_CAPABILITY at its word, and dies of SIGILL.
    """
    here = capability_of_this_machine()
    order = [torchs for torchs, _ in INSTRUCTION_SETS.values()]
    torchs, expected = INSTRUCTION_SETS[capability]
    if torchs != "DEFAULT" and (here not in order or order.index(here) < order.index(torchs)):
        pytest.skip(f"this processor has no {torchs}: torch's best here is {here}")
    done = subprocess.run(
        [sys.executable, "-c", CAPABILITY, str(SUPPORT)],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected


PROCESSORS = {"EPYC-Rome": "AVX2", "Nehalem": "baseline"}  # of the emulator: the best kernels there


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these processors are x86-64")
@pytest.mark.skipif(not shutil.which("qemu-x86_64"), reason="qemu-x86_64 (qemu-user) is missing")
@pytest.mark.parametrize("processor", PROCESSORS)
def test_every_processor(processor):
    """On one that has no AVX-512, or no AVX: an instruction that it lacks would end the process."""
    python = os.path.realpath(sys.executable)  # not a link into a virtual environment
    done = subprocess.run(
        ["qemu-x86_64", "-cpu", processor, python, "-c", CAPABILITY, str(SUPPORT)],
        env={**unasked(), "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == PROCESSORS[processor]
