"""Memory of the norms: what each keeps for the backward, and on a GPU the peak of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..harness.memory import peak_bytes, saved_bytes
from .cases import Kind
from .speed import Inputs, add_norms, norms

__all__ = ["MEMORY_SHAPES", "memory_case", "memory_key"]

MEMORY_SHAPES = ((4096, 1024),)


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
            peak[name] = peak_bytes(step)
    return {
        "kind": kind,
        "rows": rows,
        "n": n,
        "dtype": str(dtype).removeprefix("torch."),
        "input_bytes": data.args[0].nbytes,
        "saved": saved,
        "peak": peak,
    }
