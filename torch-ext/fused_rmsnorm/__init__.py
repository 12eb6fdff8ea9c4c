"""Fused RMSNorm and pRMSNorm, forward and backward, on CPU and CUDA: the operators and hub layers.

The package ``fused-rmsnorm`` has modules, functions and docs; this is what a Hub kernel may hold.
"""

from __future__ import annotations

import torch

from . import layers
from ._ops import ops

__all__ = ["add_rms_norm", "layers", "rms_norm"]


def rms_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float | None = None,
    p: float | None = None,
    weight_offset: float = 0.0,
    casting_mode: str = "torch",
) -> torch.Tensor:
    """RMSNorm over the last dimension; with ``p`` in (0, 1] pRMSNorm.

    ``weight`` and ``bias`` have the shape of the last dimension. ``casting_mode="llama"`` rounds
    to the input's dtype before the weight is multiplied; ``weight_offset`` is 1 in Gemma.
    """
    return ops.rms_norm(input, weight, bias, eps, p, weight_offset, casting_mode)


def add_rms_norm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float | None = None,
    p: float | None = None,
    weight_offset: float = 0.0,
    casting_mode: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(rms_norm(input + residual), input + residual)``."""
    return ops.add_rms_norm(input, residual, weight, bias, eps, p, weight_offset, casting_mode)
