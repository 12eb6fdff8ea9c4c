"""What only a GPU shows: long rows (on the CPU, too), streams, graphs, several devices, and sizes
past 32 bits. simt looks at the kernels themselves, without one."""

import pytest
import torch
from cases import lay_out, numbers
from conftest import DEVICES
from reference import FLOATS, Options, assert_backward, assert_forward, same_bits

from fused_rmsnorm import RMSNorm, launch_plan
from fused_rmsnorm import functional as F

needs_gpu = pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU and the CUDA half")

# Rows over a block, over clusters of two, four and eight, and read twice; even, odd, in no pattern.
LONG = (5001, 9001, 16389, 40007, 70001, 140000, 270001)


def test_long_covers_every_family():
    """Of the launch plan on sm_80 and sm_90, whatever the dtype."""
    for dtype in ("float32", "bfloat16"):
        for arch in (80, 90):
            plans = [launch_plan(n, dtype, arch, b) for n in LONG for b in (False, True)]
            clusters = {"cluster"} if arch == 90 else set()
            assert {p["family"] for p in plans} == {"registers", "two_pass"} | clusters
            assert {p["cluster"] for p in plans} == ({1, 2, 4, 8} if clusters else {1})


@pytest.mark.parametrize(
    ("n", "dtype"),
    [(n, t) for n in LONG for t in FLOATS if n < 50000 or t in (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_long_rows(device, n, dtype):
    """Values, and the bits of a row alone; a residual, pRMSNorm, an fp32 weight, odd alignment."""
    o = Options(eps=1e-6, p=0.3)
    affine = torch.promote_types(dtype, torch.float32)
    x, residual, dy = (numbers((3, n), dtype, device, i) for i in range(3))
    w, b = (numbers(n, affine, device, i) for i in (3, 4))
    leaves = [t.requires_grad_() for t in (lay_out(x, "misaligned"), residual, w, b)]
    y, s = F.add_rms_norm(*leaves[:2], n, leaves[2], o.eps, bias=leaves[3], p=o.p)
    assert same_bits(s, x + residual)
    assert_forward(y, s.detach(), w, b, o)
    dx, _, dw, db = torch.autograd.grad(y, leaves, dy)
    assert_backward((dx, dw, db), s.detach(), w, b, dy, o)
    row = s.detach()[1].clone().requires_grad_()
    alone = F.rms_norm(row, n, w, o.eps, bias=b, p=o.p)
    assert same_bits(alone, y[1])
    assert same_bits(torch.autograd.grad(alone, row, dy[1])[0], dx[1])


def run(module, x, dy):
    y = module(x)
    return y.detach(), *torch.autograd.grad(y, (x, module.weight), dy)


@needs_gpu
def test_on_the_current_stream():
    """Behind what is queued there: on any other stream the kernels would read NaN."""
    module = RMSNorm(4096, device="cuda", dtype=torch.bfloat16)
    x, dy = (numbers((512, 4096), torch.bfloat16, "cuda", i) for i in (0, 1))
    expected = run(module, x.clone().requires_grad_(), dy)
    late = torch.full_like(x, float("nan")).requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            late.copy_(x)
        found = run(module, late, dy)
    stream.synchronize()
    assert all(same_bits(a, e) for a, e in zip(found, expected, strict=True))


@needs_gpu
@pytest.mark.parametrize("n", [64, 4096, 40000, 300000])
def test_in_a_cuda_graph(n):
    """Captured without a warm-up of these kernels' shape, replayed on other numbers."""
    module = RMSNorm(n, device="cuda", dtype=torch.bfloat16)
    x, dy, other = (numbers((33, n), torch.bfloat16, "cuda", i) for i in range(3))
    x.requires_grad_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(module, x, dy)
    with torch.no_grad():
        x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    expected = run(module, other.clone().requires_grad_(), dy)
    assert all(same_bits(a, e) for a, e in zip(captured, expected, strict=True))


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("n", [64, 16384])
def test_on_a_device_that_is_not_the_current_one(n):
    found = {}
    for device in ("cuda:0", "cuda:1"):
        x = numbers((9, n), torch.float32, device, 0).requires_grad_()
        found[device] = run(RMSNorm(n, device=device), x, torch.ones_like(x))
        assert all(str(t.device) == device for t in found[device])
    assert torch.cuda.current_device() == 0
    assert all(same_bits(a.cpu(), b.cpu()) for a, b in zip(*found.values(), strict=True))


@needs_gpu
@pytest.mark.parametrize("n", [100, 4099])
def test_more_than_2_31_elements(n):
    """The last rows of a batch past 32 bits have the bits of those rows alone."""
    rows = (1 << 31) // n + 1000
    if torch.cuda.mem_get_info()[0] < 9 * 2 * rows * n:
        pytest.skip("needs some 40 GB of free GPU memory")
    x = torch.randn(rows, n, device="cuda", dtype=torch.bfloat16).requires_grad_()
    module = RMSNorm(n, device="cuda", dtype=torch.bfloat16)
    y, dx, _ = run(module, x, x.detach())
    few = x.detach()[-900:].clone().requires_grad_()
    y_few, dx_few, _ = run(module, few, few.detach())
    assert same_bits(y[-900:], y_few)
    assert same_bits(dx[-900:], dx_few)
