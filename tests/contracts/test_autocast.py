"""Autocast: fp32 inside, x's dtype out, and not one cast or copy more than without it."""

import pytest
import torch
from cases import numbers
from fused_calls import profiled
from reference import Options, assert_backward, assert_forward, same_bits
from torch import nn

from fused_rmsnorm import AddRMSNorm, RMSNorm
from fused_rmsnorm import functional as F

N = 40
ALL = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TO = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("to", TO, ids=str)
@pytest.mark.parametrize("weight_type", ALL, ids=str)
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_output_and_gradients(device, dtype, weight_type, to):
    """The numbers, dtypes and bits of the same call without autocast."""
    x, dy = (numbers((5, N), dtype, device, i) for i in (0, 1))
    w, b = (numbers(N, weight_type, device, i) for i in (2, 3))
    results = []
    for enabled in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        with torch.autocast(device, to, enabled=enabled):
            y = F.rms_norm(leaves[0], N, leaves[1], bias=leaves[2])
        results.append((y, *torch.autograd.grad(y, leaves, dy)))
    assert all(same_bits(a, e) for a, e in zip(*results, strict=True))
    assert results[0][0].dtype == dtype
    assert_forward(results[0][0], x, w, b, Options())
    assert_backward(results[0][1:], x, w, b, dy, Options())


@pytest.mark.parametrize("kind", [RMSNorm, AddRMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_type", ["same", torch.float32], ids=str)
def test_no_cast_and_no_copy(device, kind, dtype, weight_type):
    """One operator forward, one backward, and inside of them nothing but memory for the results."""
    weight_type = dtype if weight_type == "same" else weight_type
    norm = kind(N, device=device, dtype=weight_type, bias=True)
    inputs = 1 + (kind is AddRMSNorm)
    args = [numbers((5, N), dtype, device, i).requires_grad_() for i in range(inputs)]
    dy = numbers((5, N), dtype, device, 9)

    def step():
        with torch.autocast(device, torch.bfloat16):
            y = norm(*args)
        y = y[0] if isinstance(y, tuple) else y
        torch.autograd.grad(y, [*args, *norm.parameters()], dy)

    step()
    calls = profiled(step)
    forward = "add_rms_norm" if kind is AddRMSNorm else "rms_norm"
    own = {k: n for k, n in calls.items() if k.startswith("fused_rmsnorm::")}
    assert own == {f"fused_rmsnorm::{forward}_fwd": 1, "fused_rmsnorm::rms_norm_bwd": 1}
    others = {k for k in calls if k.startswith("aten::")}
    # aten::to that returns what it was given; a cast would show as _to_copy or copy_.
    assert others <= {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::to"}


def test_difference_from_torch(device):
    """torch.nn.RMSNorm returns fp32 for bf16 input on CUDA (from 2.12 on); this one bf16."""
    x = numbers((5, N), torch.bfloat16, device, 0)
    ours, native = RMSNorm(N, device=device), nn.RMSNorm(N, device=device)
    with torch.autocast(device, torch.bfloat16):
        y, expected = ours(x), native(x)
    assert y.dtype == torch.bfloat16
    if device == "cuda" and tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 12):
        assert expected.dtype == torch.float32
    exact = nn.functional.rms_norm(x.double(), [N], eps=torch.finfo(torch.float32).eps)
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(y.dtype).eps / 2 * 1.001, atol=0)


def test_a_block(device):
    """Between linear layers with fp32 parameters: what flows on is bf16, gradients fp32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, N), RMSNorm(N), nn.Linear(N, 8)).to(device)
    dtypes = []
    model[1].register_forward_hook(lambda m, args, y: dtypes.append((args[0].dtype, y.dtype)))
    x = numbers((3, 8), torch.float32, device, 0)
    with torch.autocast(device, torch.bfloat16):
        model(x).float().square().sum().backward()
    assert dtypes == [(torch.bfloat16, torch.bfloat16)]
    h = model[0].weight.bfloat16(), model[0].bias.bfloat16()
    h = nn.functional.linear(x.bfloat16(), *h)
    y = nn.functional.rms_norm(h.float(), [N], model[1].weight).bfloat16()
    with torch.autocast(device, torch.bfloat16):
        out = model[2](y)
        again = model[2](model[1](h))
    assert same_bits(out, again)
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in model.parameters())


def test_llama_mode_promotes_as_ever(device):
    x = numbers((5, N), torch.bfloat16, device, 0)
    w = numbers(N, torch.float32, device, 1)
    with torch.autocast(device, torch.bfloat16):
        y = F.rms_norm(x, N, w, casting_mode="llama")
    assert same_bits(y, F.rms_norm(x, N, w, casting_mode="llama"))
    assert y.dtype == torch.float32


def test_derivatives_taken_inside(device):
    """Double backward and torch.func with autocast on: fp32 arithmetic, not the half type's."""
    x, w = (numbers(s, torch.float32, device, i) for i, s in enumerate([(4, N), N]))

    def second(x):
        g = torch.func.grad(lambda x: F.rms_norm(x, N, w).pow(3).sum())(x)
        return (g * g.detach().cos()).sum()

    expected = torch.func.grad(second)(x)
    per_sample = torch.func.vmap(torch.func.grad(lambda w, x: F.rms_norm(x, N, w).sum()), (None, 0))
    with torch.autocast(device, torch.bfloat16):
        assert same_bits(torch.func.grad(second)(x), expected)
        assert same_bits(per_sample(w, x), F.rms_norm(x, N))


def test_add_of_different_dtypes(device):
    """Autocast may hand on a bf16 branch and an fp32 residual: the stream stays fp32. A residual
    that is narrower than the branch is an error, not a silent cast."""
    x = numbers((5, N), torch.bfloat16, device, 0)
    with torch.autocast(device, torch.bfloat16):
        y, s = F.add_rms_norm(x, x.float(), N)
        with pytest.raises(TypeError, match="residual must have input's dtype Float or a wider"):
            F.add_rms_norm(x.float(), x, N)
    assert same_bits(s, x.float() * 2)
    assert same_bits(y, F.rms_norm(s, N).bfloat16())
