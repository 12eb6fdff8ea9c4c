"""eps, p and weight_offset where Python is traced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["traced_numbers"]


def traced_numbers(eps: Any, p: Any, weight_offset: Any) -> tuple[Any, Any, Any]:
    """As floats, for operators that are called through torch.ops.

    These take no tensor and no numpy scalar (in Dynamo a tensor, too) for a number, which
    ``_eager.number`` does. A tensor whose value is not known while tracing ends the graph there, as
    it does in F.rms_norm.
    """
    return _traced(eps, "eps"), _traced(p, "p"), _traced(weight_offset, "weight_offset")


def _traced(value: Any, name: str) -> Any:
    if value is None or isinstance(value, float):
        return value
    if isinstance(value, bool):
        raise TypeError(f"{name} must be a number, but got bool")
    if isinstance(value, (int, str, bytes, torch.SymInt, torch.SymFloat)):
        return value  # numbers of the operators, and what they refuse
    if isinstance(value, Tensor) and (value.dim() or value.requires_grad):
        why = "has dimensions" if value.dim() else "requires grad: it would get none"
        raise TypeError(f"{name} must be a number, but got a Tensor that {why}")
    return float(value)
