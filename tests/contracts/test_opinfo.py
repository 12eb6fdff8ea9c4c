"""What PyTorch's own tests give to F.rms_norm and torch.nn.RMSNorm: taken, refused, alike."""

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_rmsnorm import RMSNorm
from fused_rmsnorm import functional as F

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]


@functools.cache
def op_info() -> Any:
    """PyTorch's description of F.rms_norm. Not imported with this file: it takes seconds."""
    reason = "this build of torch has no torch.testing._internal"
    invocations = pytest.importorskip(
        "torch.testing._internal.common_methods_invocations", reason=reason, exc_type=ImportError
    )
    found = [op for op in invocations.op_db if op.name == "nn.functional.rms_norm"]
    assert found, "op_db has no nn.functional.rms_norm any more"
    return found[0]


@functools.cache
def module_info() -> Any:
    reason = "this build of torch has no torch.testing._internal"
    modules = pytest.importorskip(
        "torch.testing._internal.common_modules", reason=reason, exc_type=ImportError
    )
    found = [info for info in modules.module_db if info.module_cls is torch.nn.RMSNorm]
    assert found, "module_db has no torch.nn.RMSNorm any more"
    return found[0]


def alike(got: Tensor, want: Tensor) -> None:
    """To the rounding of the dtype; NaN where it is NaN."""
    assert got.dtype == want.dtype
    step = torch.finfo(want.dtype).eps
    torch.testing.assert_close(got, want, rtol=4 * step, atol=16 * step, equal_nan=True)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples(dtype: torch.dtype, requires_grad: bool) -> None:
    op = op_info()
    samples = list(op.sample_inputs("cpu", dtype, requires_grad=requires_grad))
    samples += list(op.reference_inputs("cpu", dtype, requires_grad=requires_grad))
    assert any(s.kwargs.get("eps") == -0.5 for s in samples)
    for sample in samples:
        for one in (sample, sample.noncontiguous()):
            want = op(one.input, *one.args, **one.kwargs)
            got = F.rms_norm(one.input, *one.args, **one.kwargs)
            alike(got, want)
            alike(F.composite_rms_norm(one.input, *one.args, **one.kwargs), want)
            if requires_grad:
                inputs = [t for t in (one.input, *one.args) if isinstance(t, Tensor)]
                dy = torch.ones_like(want)
                ours = torch.autograd.grad(got, inputs, dy)
                for a, b in zip(ours, torch.autograd.grad(want, inputs, dy), strict=True):
                    assert torch.equal(a.isnan(), b.isnan())
                    # Sums of terms that cancel: judged by the largest.
                    scale = b.nan_to_num().abs().max().item() if b.numel() else 0
                    step = torch.finfo(dtype).eps
                    torch.testing.assert_close(
                        a, b, rtol=8 * step, atol=16 * step * max(scale, 1), equal_nan=True
                    )


def test_gradcheck_of_samples() -> None:
    for sample in op_info().sample_inputs("cpu", torch.float64, requires_grad=True):
        inputs = [t for t in (sample.input, *sample.args) if isinstance(t, Tensor)]
        rest = [t for t in sample.args if not isinstance(t, Tensor)]

        def call(x, *weight, rest=rest, kwargs=sample.kwargs):
            # As small as it takes to see eps.
            return F.rms_norm(x * 1e-2, *rest, *weight, **{**kwargs, "eps": 0.5})

        assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(call, inputs)


def test_error_inputs() -> None:
    seen = 0
    for error in op_info().error_inputs("cpu"):
        sample, seen = error.sample_input, seen + 1
        for norm in (op_info(), F.rms_norm, F.composite_rms_norm):
            with pytest.raises(error.error_type):
                norm(sample.input, *sample.args, **sample.kwargs)
    assert seen >= 3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_module_inputs(dtype: torch.dtype, training: bool) -> None:
    info = module_info()
    inputs = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=True, training=training
    )
    assert len(inputs) >= 6
    for one in inputs:
        made, given = one.constructor_input, one.forward_input
        theirs = torch.nn.RMSNorm(*made.args, **made.kwargs, dtype=dtype).train(training)
        ours = RMSNorm(*made.args, **made.kwargs, dtype=dtype).train(training)
        if theirs.weight is not None:
            torch.nn.init.uniform_(theirs.weight)
        ours.load_state_dict(theirs.state_dict())
        assert repr(ours) == repr(theirs)
        got, want = ours(*given.args, **given.kwargs), theirs(*given.args, **given.kwargs)
        alike(got, want)
        a = torch.autograd.grad(got, [*given.args, *ours.parameters()], torch.ones_like(got))
        b = torch.autograd.grad(want, [*given.args, *theirs.parameters()], torch.ones_like(want))
        for x, y in zip(a, b, strict=True):
            atol = 64 * torch.finfo(dtype).eps
            torch.testing.assert_close(x, y, rtol=8 * torch.finfo(dtype).eps, atol=atol)


EPS = [-0.5, -0.0, 0.0, -1e-6, math.nan, math.inf, -math.inf, None]


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
def test_eps_of_every_kind(dtype: torch.dtype, eps: float | None) -> None:
    """Rows whose mean square is above, at and below -eps; NaN and infinite where torch's are."""
    x = torch.tensor([[0.0] * 40, [0.5] * 40, [1.0] * 40, [3.0, -1.0] * 20], dtype=dtype)
    w = torch.linspace(0.5, 1.5, 40, dtype=dtype)
    want = torch.nn.functional.rms_norm(x, (40,), w, eps)
    for got in (
        F.rms_norm(x, 40, w, eps),
        F.composite_rms_norm(x, 40, w, eps),
        torch.ops.fused_rmsnorm.rms_norm(x, w, None, eps),
        torch.compile(F.rms_norm, backend="aot_eager")(x, 40, w, eps),
        F.add_rms_norm(x, torch.zeros_like(x), 40, w, eps)[0],
    ):
        alike(got, want)
    ours, theirs = (kind(40, eps=eps, dtype=dtype) for kind in (RMSNorm, torch.nn.RMSNorm))
    alike(ours(x), theirs(x))
    torch.nn.init.ones_(ours.weight)
    gradients = []
    for norm in (ours, theirs):
        input = x.clone().requires_grad_()
        gradients += [torch.autograd.grad(norm(input), [input, norm.weight], torch.ones_like(x))]
    for a, b in zip(*gradients, strict=True):
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(a, b, rtol=16 * step, atol=64 * step, equal_nan=True)
