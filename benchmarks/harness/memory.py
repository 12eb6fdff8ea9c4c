"""Bytes that autograd keeps between forward and backward, and on a GPU the peak of a call.

Every storage that autograd saves for the backward is counted, by torch's saved-tensor hooks: once
however many views of it are saved, and in full however small the view. The storages of inputs and
parameters are not counted, since they live anyway. An output counts if it is saved: the sum of a
residual add is, in every variant, although it would live as the next residual anyway. What the
allocator rounds up to, and what a kernel needs while it runs, is in the peak only, which a GPU has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

__all__ = ["peak_bytes", "saved_bytes"]


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


def peak_bytes(call: Callable[[], object]) -> int:
    """Of a GPU: most bytes allocated at once during ``call``, beyond those before it."""
    call()  # what is allocated once, for good
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
