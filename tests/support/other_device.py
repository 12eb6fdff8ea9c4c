"""Run by test_runtime.py, in a process of its own: the operators on a device that they have no
kernels for. PyTorch lets Python be the backend of PrivateUse1; this one keeps its numbers in CPU
tensors."""

import pytest
import torch
import torch.utils._pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from fused_rmsnorm import AddRMSNorm, RMSNorm
from fused_rmsnorm import functional as F

ran: list[str] = []


class OnDevice(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl
    raw: torch.Tensor


def to_device(t):
    if not isinstance(t, torch.Tensor):
        return t
    wrapper = torch._C._acc.create_empty_tensor(tuple(t.shape), t.dtype)
    wrapper.__class__ = OnDevice
    wrapper.raw = t
    return wrapper


def from_device(value):
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.raw if isinstance(value, OnDevice) else value


def run_on_the_cpu(op, *args, **kwargs):
    """Every operator of the device: on the tensors inside; what an operator returns of its
    arguments is returned as the argument."""
    ran.append(op.name())
    if op.name() == "aten::_copy_from":  # what copy_ asks of a device
        source, target = (from_device(t) for t in args[:2])
        target.copy_(source)
        return args[1]
    result = op(*pytree.tree_map(from_device, args), **pytree.tree_map(from_device, kwargs))
    given = {id(a.raw): a for a in (*args, *kwargs.values()) if isinstance(a, OnDevice)}
    return pytree.tree_map(lambda t: given[id(t)] if id(t) in given else to_device(t), result)


def equal(ours, expected) -> bool:
    return ours.device.type == "other" and torch.equal(from_device(ours), expected)


def main() -> None:
    _setup_privateuseone_for_python_backend("other")
    library = torch.library.Library("_", "IMPL")
    library.fallback(run_on_the_cpu, "PrivateUse1")
    torch.manual_seed(0)
    x, r, w, b, dy = (torch.randn(s) for s in [(4, 8), (4, 8), 8, 8, (4, 8)])
    here = [t.clone().requires_grad_() for t in (x, r, w, b)]
    there = [to_device(t.clone()).requires_grad_() for t in (x, r, w, b)]
    for options in ({}, {"p": 0.5, "weight_offset": 1.0}, {"casting_mode": "llama"}):
        expected = F.composite_rms_norm(here[0], 8, here[2], bias=here[3], **options)
        ours = F.rms_norm(there[0], 8, there[2], bias=there[3], **options)
        assert equal(ours, expected)
        assert ours.grad_fn.name() == "RmsNormBackward"
        which = (0, 2, 3)
        grads = torch.autograd.grad(ours, [there[i] for i in which], to_device(dy))
        wanted = torch.autograd.grad(expected, [here[i] for i in which], dy)
        for a, e in zip(grads, wanted, strict=True):
            assert a.device.type == "other"
            torch.testing.assert_close(from_device(a), e)
        y, s = F.add_rms_norm(there[0], there[1], 8, there[2], bias=there[3], **options)
        assert equal(s, x + r)
        assert equal(y, F.composite_rms_norm(x + r, 8, w, bias=b, **options))
        with torch.no_grad():
            into = to_device(x.clone()), to_device(r.clone())
            F.add_rms_norm_(*into, 8, there[2], bias=there[3], **options)
            assert equal(into[0], from_device(y))
            assert equal(into[1], x + r)
    assert ran
    assert not [name for name in ran if not name.startswith("aten::")]
    with pytest.raises(RuntimeError, match=r"^weight must be on input's device other:0, but is on"):
        F.rms_norm(there[0], 8, w)
    parameters = {"weight": to_device(w), "bias": to_device(b)}
    y = torch.func.functional_call(RMSNorm(8, bias=True), parameters, (to_device(x),))
    assert equal(y, F.composite_rms_norm(x, 8, w, bias=b))
    both = to_device(x), to_device(r)
    y, _ = torch.func.functional_call(AddRMSNorm(8, bias=True), parameters, both)
    assert equal(y, F.composite_rms_norm(x + r, 8, w, bias=b))


if __name__ == "__main__":
    main()
    print("right")
