"""Rows of up to 2^31 elements and sums over many rows: errors against fp64 do not grow with them.

The kernels of each instruction set are driven from C++ (cpu/long_rows.cpp), by rows
that repeat themselves in memory; here the operators see whole tensors. ``large`` marks what needs
many gigabytes: it runs where they are free."""

from pathlib import Path

import pytest
import torch
from kernel_builds import build, run
from torch import Tensor

from fused_rmsnorm.functional import rms_norm

FEW = 12 * 2.0**-24  # roundings of fp32
CHUNK = 1 << 20


def available_gb() -> float:
    """Of memory that is free or can be made free; 0 where nobody says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(s.split()[1]) / 2**20 for s in lines if s.startswith("MemAvailable:"))


def need(gigabytes: float) -> None:
    if available_gb() < 1.5 * gigabytes:
        pytest.skip(f"needs {gigabytes} GB of free memory, and half as much again to spare")


def dot64(*factors: Tensor) -> float:
    """The sum over all elements of the product, in fp64 and without copies of that size."""
    total = 0.0
    for parts in zip(*(f.reshape(-1).split(CHUNK) for f in factors), strict=True):
        product = parts[0].double()
        for part in parts[1:]:
            product = product * part.double()
        total += product.sum().item()
    return total


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want) / want.abs().max()).abs().max().item()


def test_kernels_of_every_instruction_set() -> None:
    folder = build("plain", "-DSANITIZE=", target="long_rows")
    assert run(folder / "long_rows") == "failures: 0\n"


@pytest.mark.parametrize("log2", [24, 26])
@pytest.mark.parametrize("numbers", ["normal", "one number"])
def test_forward(log2: int, numbers: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2**log2) if numbers == "normal" else torch.full((1, 2**log2), 0.7)
    y, rstd = torch.ops.fused_rmsnorm.rms_norm_fwd(x, eps=0.0)
    r = (dot64(x, x) / x.numel()) ** -0.5
    # Of one number over and over, the roundings inside a block of 4096 may all go the same way.
    bound = FEW if numbers == "normal" else 128 * 2.0**-24
    assert abs(rstd.item() / r - 1) < bound
    head = slice(0, CHUNK)
    assert relative(y[0, head], x[0, head].double() * r) < bound


@pytest.mark.parametrize("p", [None, 0.75])
def test_backward(p: float | None) -> None:
    torch.manual_seed(0)
    n = 2**24
    x = torch.randn(1, n)
    weight = (torch.rand(n) + 0.5).requires_grad_()
    dy = x + torch.randn(1, n)  # so that the dot product is large
    x.requires_grad_()
    rms_norm(x, (n,), weight, 0.0, p=p).backward(dy)
    assert x.grad is not None
    assert weight.grad is not None
    k = n if p is None else int(n * p)
    detached = x.detach()[0]
    r = (dot64(detached[:k], detached[:k]) / k) ** -0.5
    c = dot64(detached, dy[0], weight.detach()) * r * r / k
    for begin in (0, n // 2, n - CHUNK):
        part = slice(begin, begin + CHUNK)
        pull = detached[part].double() * (c if begin < k else 0)
        want = r * (dy[0, part].double() * weight.detach()[part].double() - pull)
        assert relative(x.grad[0, part], want) < FEW
        assert relative(weight.grad[part], dy[0, part].double() * detached[part].double() * r) < FEW


def test_gradients_of_many_rows() -> None:
    torch.manual_seed(0)
    rows, n = 2**22, 4
    x, dy = torch.rand(rows, n) + 0.5, torch.rand(rows, n) + 0.5  # nothing cancels
    weight, bias = torch.ones(n, requires_grad=True), torch.zeros(n, requires_grad=True)
    rms_norm(x, (n,), weight, 0.0, bias=bias).backward(dy)
    assert weight.grad is not None
    assert bias.grad is not None
    x64 = x.double()
    r = (x64 * x64).mean(-1, keepdim=True).rsqrt()
    assert relative(weight.grad, (dy.double() * x64 * r).sum(0)) < 2 * FEW
    assert relative(bias.grad, dy.double().sum(0)) < 2 * FEW


@pytest.mark.large
@pytest.mark.parametrize("log2", [30, 31])
def test_ones_of_bfloat16(log2: int) -> None:
    need(2 * 2.0 * 2 ** (log2 - 30))
    y = rms_norm(torch.ones(1, 2**log2, dtype=torch.bfloat16), (2**log2,))
    assert y.min().item() == y.max().item() == 1.0


@pytest.mark.large
def test_forward_and_backward_in_full() -> None:
    need(2 * 2.0 * 4)
    n = 2**31
    x = torch.ones(1, n, dtype=torch.bfloat16)
    for begin in range(0, n, 2**26):  # numbers that bf16 holds, in place
        x[0, begin : begin + 2**26].normal_()
    y, rstd = torch.ops.fused_rmsnorm.rms_norm_fwd(x, eps=0.0)
    assert abs(rstd.item() * (dot64(x, x) / n) ** 0.5 - 1) < FEW
    dx = torch.ops.fused_rmsnorm.rms_norm_bwd(y, x, None, rstd, output_mask=[True, False, False])[0]
    # dy = x * r: dx is zero but for roundings, of bf16 in dy.
    assert dx.abs().max().item() < 2**-7
