"""What autograd keeps of a norm, what checkpointing and offloading make of it, and that nothing
leaks."""

import ctypes
import gc
import weakref

import pytest
import torch
from cases import numbers
from fused_calls import Calls
from reference import same_bits
from torch import nn
from torch.autograd import graph
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fused_rmsnorm import AddRMSNorm, PRMSNorm, RMSNorm
from fused_rmsnorm import functional as F

ops = torch.ops.fused_rmsnorm
ROWS, N = 6, 32


def leaf(size, device="cpu", seed=0, dtype=torch.float32):
    return numbers(size, dtype, device, seed).requires_grad_()


def saved_by(function):
    """The tensors that autograd saves while ``function`` runs."""
    saved = []
    with graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        result = function()
    return saved, result


SAVING = {
    "rms_norm": lambda x, r, w, b: F.rms_norm(x, N, w, bias=b),
    "operator": lambda x, r, w, b: ops.rms_norm(x, w, b),
    "operator _fwd": lambda x, r, w, b: ops.rms_norm_fwd(x, w, b)[0],
    "p": lambda x, r, w, b: F.rms_norm(x, N, w, p=0.5),
    "llama": lambda x, r, w, b: F.rms_norm(x, N, w, casting_mode="llama", weight_offset=1.0),
    "add": lambda x, r, w, b: F.add_rms_norm(x, r, N, w, bias=b),
    "add operator": lambda x, r, w, b: ops.add_rms_norm(x, r, w, b),
    "add operator _fwd": lambda x, r, w, b: ops.add_rms_norm_fwd(x, r, w, b)[:2],
}


@pytest.mark.parametrize(
    ("dtype", "weight_type"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64,) * 2],
    ids=str,
)
@pytest.mark.parametrize("name", SAVING)
def test_bytes_saved(device, name, dtype, weight_type):
    """What was normalised (of a fused add the sum, not its parts), the weight, and one number a
    row: the very memory, no copy in another dtype, and nothing of y or the bias."""
    x, r = leaf((ROWS, N), device, 0, dtype), leaf((ROWS, N), device, 1, dtype)
    w, b = leaf(N, device, 2, weight_type), leaf(N, device, 3, weight_type)
    saved, result = saved_by(lambda: SAVING[name](x, r, w, b))
    normalised = result[1] if name.startswith("add") else x
    assert {t.data_ptr() for t in saved} >= {normalised.data_ptr(), w.data_ptr()}
    rstd_bytes = ROWS * torch.promote_types(dtype, torch.float32).itemsize
    expected = [normalised.nbytes, w.nbytes, rstd_bytes]
    assert sorted(t.untyped_storage().nbytes() for t in saved) == sorted(expected)


@pytest.mark.parametrize("layout", ["slice", "transposed", "every second element"])
def test_strided_input_is_saved_without_a_copy(device, layout):
    """Also where the kernel needs one: the copy goes when the call ends."""
    x = {
        "slice": leaf((ROWS, 3 * N), device)[:, N : 2 * N],
        "transposed": leaf((N, ROWS), device).t(),
        "every second element": leaf((ROWS, 2 * N), device)[:, ::2],
    }[layout]
    w = leaf(N, device, 1)
    saved, _ = saved_by(lambda: F.rms_norm(x, N, w))
    assert x.data_ptr() in {t.data_ptr() for t in saved}
    assert sorted(t.numel() for t in saved) == [ROWS, N, ROWS * N]


def test_saved_by_modules(device):
    x, shape = leaf((ROWS, 4, N), device), (4, N)
    for module in (RMSNorm(shape), RMSNorm(shape, bias=True), PRMSNorm(shape)):
        saved, _ = saved_by(lambda module=module: module.to(device)(x))
        assert sorted(t.numel() for t in saved) == [ROWS, 4 * N, ROWS * 4 * N]
    saved, (_, s) = saved_by(lambda: AddRMSNorm(shape, device=device)(x, x))
    assert sorted(t.numel() for t in saved) == [ROWS, 4 * N, ROWS * 4 * N]
    assert s.data_ptr() in {t.data_ptr() for t in saved}


def test_saved_for_the_second_derivative(device):
    """The backward keeps grad_output, x and the weight if it is to be differentiated, else none."""
    x, w = leaf((ROWS, N), device), leaf(N, device, 1)
    y = F.rms_norm(x, N, w)
    dy = leaf((ROWS, N), device, 2)
    saved, _ = saved_by(lambda: torch.autograd.grad(y, (x, w), dy, retain_graph=True))
    assert saved == []
    saved, _ = saved_by(lambda: torch.autograd.grad(y, (x, w), dy, create_graph=True))
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (dy, x, w)}


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "nothing requires grad"])
def test_nothing_is_saved_without_need(device, mode, add):
    x, r, w, b = (leaf(s, device, i) for i, s in enumerate([(ROWS, N), (ROWS, N), N, N]))
    if mode == "nothing requires grad":
        x, r, w, b = (t.detach() for t in (x, r, w, b))

    def call():
        if add:
            return F.add_rms_norm(x, r, N, w, bias=b)
        return (F.rms_norm(x, N, w, bias=b),)

    guard = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with guard.get(mode, torch.enable_grad)():
        saved, results = saved_by(call)
    assert saved == []
    assert all(t.grad_fn is None and not t.requires_grad for t in results)
    # The memory of what was normalised goes with the last tensor that the caller holds.
    memory = StorageWeakRef(results[-1].untyped_storage())
    del results
    assert memory.expired()


@pytest.mark.parametrize("retain", [False, True])
def test_backward_frees_what_was_saved(device, retain):
    x, w = leaf((ROWS, N), device), leaf(N, device, 1)
    hidden = x * 2
    memory = StorageWeakRef(hidden.untyped_storage())
    y = F.rms_norm(hidden, N, w)
    del hidden
    assert not memory.expired()
    y.sum().backward(retain_graph=retain)
    assert memory.expired() != retain


class Block(nn.Module):
    def __init__(self, device) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(N, N, device=device), nn.Linear(N, N, device=device)
        self.norm = RMSNorm(N, device=device, bias=True)
        self.add_norm = AddRMSNorm(N, device=device)

    def forward(self, x):
        y, s = self.add_norm(self.first(self.norm(x)), x)
        return self.second(y) + s


def gradients(block, x, run):
    """Gradients of x and of the parameters, and how often each fused operator ran for them."""
    with Calls() as calls:
        loss = run(block, x).square().sum()
        grads = torch.autograd.grad(loss, (x, *block.parameters()))
    return grads, calls.fused()


def selective(policy):
    def contexts():
        return create_selective_checkpoint_contexts(policy)

    return lambda block, x: checkpoint(block, x, use_reentrant=False, context_fn=contexts)


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant", "selective", "selective, none"])
def test_checkpointing(device, kind):
    """The same bits; the forward runs again for the backward, or not where a policy says so."""
    seen = set()

    def policy(ctx, op, *args, **kwargs):
        seen.add(op)
        norms = (ops.rms_norm_fwd.default, ops.add_rms_norm_fwd.default)
        if op in norms and kind == "selective":
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    run = {
        "reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),
        "not reentrant": lambda block, x: checkpoint(block, x, use_reentrant=False),
        "selective": selective(policy),
        "selective, none": selective(policy),
    }[kind]
    torch.manual_seed(0)
    block, x = Block(device), leaf((ROWS, N), device)
    expected, plain = gradients(block, x, lambda block, x: block(x))
    assert plain == {"rms_norm_fwd": 1, "add_rms_norm_fwd": 1, "rms_norm_bwd": 2}
    if kind == "reentrant":  # it calls torch.autograd.backward, which torch.autograd.grad forbids
        with Calls() as calls:
            run(block, x).square().sum().backward()
        grads, counted = [t.grad for t in (x, *block.parameters())], calls.fused()
    else:
        grads, counted = gradients(block, x, run)
    assert all(same_bits(a, e) for a, e in zip(grads, expected, strict=True))
    forwards = 1 if kind == "selective" else 2
    assert counted == {"rms_norm_fwd": forwards, "add_rms_norm_fwd": forwards, "rms_norm_bwd": 2}
    if kind.startswith("selective"):
        assert {ops.rms_norm_fwd.default, ops.add_rms_norm_fwd.default} <= seen


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_saves_the_input_alone(device, use_reentrant):
    norm, x = RMSNorm(N, device=device), leaf((ROWS, N), device)
    hidden = x * 2
    saved, _ = saved_by(lambda: checkpoint(norm, hidden, use_reentrant=use_reentrant))
    # Beside it torch 2.11 saves an empty tensor of its own, without memory.
    held = [t for t in saved if t.untyped_storage().nbytes() > 0]
    assert {t.data_ptr() for t in held} <= {hidden.data_ptr()}


def test_offloading_a_block(device):
    """save_on_cpu and hooks that hand out other tensors, through first and second derivatives."""
    torch.manual_seed(0)
    block, x = Block(device), leaf((ROWS, N), device)

    def second_derivative():
        y = block(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, *block.parameters()), allow_unused=True)

    expected = second_derivative()
    pin = torch.device(device).type == "cuda"
    hooks = [
        graph.save_on_cpu(pin_memory=pin),
        graph.saved_tensors_hooks(lambda t: t.detach().cpu().numpy(), lambda a: from_numpy(a, x)),
    ]
    for hook in hooks:
        with hook:
            grads = second_derivative()
        for a, e in zip(grads, expected, strict=True):
            assert (a is None) == (e is None)
            assert a is None or same_bits(a, e)


def from_numpy(array, like):
    return torch.from_numpy(array).to(like.device)


def test_an_error_in_a_hook_is_the_callers(device):
    x = leaf((ROWS, N), device)

    def fail(_):
        raise OSError("no space left")

    with (
        graph.saved_tensors_hooks(fail, lambda t: t),
        pytest.raises(OSError, match="no space left"),
    ):
        F.rms_norm(x, N)
    with graph.saved_tensors_hooks(lambda t: t, fail):
        y, s = F.add_rms_norm(x, x, N)
    with pytest.raises(OSError, match="no space left"):
        (y + s).sum().backward()


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
                 "fordblks", "keepcost")]  # fmt: skip


def bytes_allocated() -> int:
    """What malloc has handed out and not got back; unlike RSS it does not depend on the pages that
    an allocator keeps."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2  # glibc >= 2.33
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def in_one_step(what, x, r, w, b):
    """One step of training or inference, whose results are dropped."""
    if what == "training":
        torch.autograd.grad(F.rms_norm(x, N, w, bias=b), (x, w, b), x)
    elif what == "training, add":
        y, s = F.add_rms_norm(x, r, N, w, p=0.5)
        torch.autograd.grad((y, s), (x, r, w), (x, r))
    elif what == "graphs that are dropped":
        F.rms_norm(x, N, w)
        F.add_rms_norm(x, r, N, w)
    elif what == "inference":
        with torch.no_grad():
            F.rms_norm(x, N, w, bias=b)
            F.add_rms_norm_(x.detach().clone(), r.detach().clone(), N, w)
    elif what == "errors":
        for bad in ({"weight": w[1:]}, {"weight": w, "p": 2.0}, {"weight": w, "eps": "1"}):
            with pytest.raises((RuntimeError, ValueError, TypeError)):
                F.rms_norm(x, N, **bad)
    elif what == "double backward":
        y = F.rms_norm(x, N, w)
        grads = torch.autograd.grad(y, (x, w), x, create_graph=True)
        torch.autograd.grad([g.sum() for g in grads], (x, w))
    elif what == "a cycle through .grad":
        F.rms_norm(x, N, w).sum().backward(create_graph=True)
        x.grad = w.grad = None
    else:
        raise ValueError(what)


# Steps. A leak of one small object in every step (a Node, a tensor's header, a Python frame) is
# above the 64 bytes a step that the test allows for what allocators and caches do.
LEAKS = {
    "training": 10_000,
    "training, add": 10_000,
    "graphs that are dropped": 10_000,
    "inference": 10_000,
    "errors": 2_000,
    "double backward": 2_000,
    "a cycle through .grad": 2_000,
}


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="counts bytes by glibc's mallinfo2"
)
@pytest.mark.parametrize("what", LEAKS)
def test_no_leak(what):
    steps = LEAKS[what]
    args = leaf((2, N)), leaf((2, N), seed=1), leaf(N, seed=2), leaf(N, seed=3)
    for _ in range(steps // 10):  # fills caches of torch, Python and malloc
        in_one_step(what, *args)
    gc.collect()
    gc.disable()  # what needs the collector is a leak, too
    try:
        before = bytes_allocated()
        for _ in range(steps):
            in_one_step(what, *args)
        grown = bytes_allocated() - before
    finally:
        gc.enable()
    assert grown < 64 * steps, f"{grown} bytes in {steps} steps"


def test_graph_of_a_double_backward_goes(device):
    """Dropped without the collector's help, whichever of its ends goes last."""

    class Hook:
        def __call__(self, grads, outputs):
            return None

    gc.disable()
    try:
        for last in ("y", "dx"):
            x, w = leaf((ROWS, N), device), leaf(N, device, 1)
            held = {"y": F.rms_norm(x, N, w)}
            (held["dx"],) = torch.autograd.grad(held["y"].sum(), x, create_graph=True)
            hook = Hook()
            held[last].grad_fn.register_hook(hook)
            alive = weakref.ref(hook)
            del hook
            held = {last: held[last]}
            assert alive() is not None
            held.clear()
            assert alive() is None
    finally:
        gc.enable()
