"""Memory: what a norm keeps between forward and backward, and on a GPU the peak of a step.

Counted is every storage that autograd saves for the backward, by torch's saved-tensor hooks: once
however many views of it are saved, in full however small the view. Not counted are the storages of
the inputs and the parameters, which live anyway. An output counts if it is saved: the sum of a
residual add is, in every variant, and as the next residual it would live anyway, too. What the
allocator rounds up to and what a kernel needs while it runs is only in the peak, which a GPU has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .norms_cases import Kind
from .norms_speed import Inputs, add_norms, norms

__all__ = ["MEMORY_SHAPES", "memory_case", "memory_key", "saved_bytes"]

MEMORY_SHAPES = ((4096, 1024),)


def saved_bytes(call: Callable[[], object], alive: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps when ``call`` returns, without the storages of ``alive``.

    ``call`` returns its outputs, which are held until the end, so that nothing saved is freed and
    its address given to something else.
    """
    known = {t.untyped_storage().data_ptr() for t in alive}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        held = call()
    kept = sum(bytes_ for address, bytes_ in saved.items() if address not in known)
    del held
    return kept


def _peak_bytes(call: Callable[[], object]) -> int:
    """Of a GPU: most bytes allocated at once during ``call``, beyond those before it."""
    call()  # what is allocated once, for good
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def memory_key(kind: Kind, rows: int, n: int, dtype: torch.dtype) -> str:
    """Key of the entry in the results."""
    return f"memory/{str(dtype).removeprefix('torch.')}/{rows}x{n}/{kind}"


def memory_case(
    kind: Kind, rows: int, n: int, dtype: torch.dtype, device: torch.device, compiled: bool
) -> dict[str, Any]:
    """One entry of the results: bytes saved per contender and, on a GPU, the peak of a step."""
    each = 2 if kind == "add" else 1

    def tensors(requires_grad: bool) -> tuple[Tensor, ...]:
        made = (torch.randn(rows, n, device=device).to(dtype) for _ in range(each))
        return tuple(t.requires_grad_(requires_grad) for t in made)

    affine = (f(n, device=device, dtype=dtype) for f in (torch.ones, torch.zeros))
    data = Inputs((*tensors(True), *(t.requires_grad_() for t in affine)), tensors(False))
    saved, peak = {}, {}
    for name, norm in (add_norms if kind == "add" else norms)(n, compiled).items():
        leaves = data.args if name == "torch_layer_norm" else data.args[:-1]

        def step(norm: Any = norm, leaves: tuple[Tensor, ...] = leaves) -> object:
            return torch.autograd.grad(norm(*data.args), leaves, data.grads)

        norm(*data.args)  # compiles
        saved[name] = saved_bytes(lambda: norm(*data.args), data.args)  # noqa: B023
        if device.type == "cuda":
            peak[name] = _peak_bytes(step)
    return {
        "kind": kind,
        "rows": rows,
        "n": n,
        "dtype": str(dtype).removeprefix("torch."),
        "input_bytes": data.args[0].nbytes,
        "saved": saved,
        "peak": peak,
    }
